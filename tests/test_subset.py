"""The parts of the training lists (scripts/data/subset.py): drawn by their rule, and no other list is taken."""

import hashlib
import json
import re

import pytest

from scripts import config
from scripts.data import download, subset
from scripts.training import cost
from tests.helpers import ROOT, row, serving
from tests.test_download import World

RULES = config.tomllib.loads((ROOT / "scripts/data/sources.toml").read_text())
PARTS = {name: table for name, table in RULES.items() if "of" in table}
LISTS = {
    "pretrain": "data/small/blip_laion_cc_sbu_558k.json",
    "finetune": "data/small/llava_v1_5_mix665k.json",
}
CONFIG = f"""
base = "llava-v1.5-7b"
[pretrain]
data_path = "{LISTS["pretrain"]}"
[finetune]
data_path = "{LISTS["finetune"]}"
image_folder = "data/images/coco/train2017"
"""


@pytest.fixture
def world(tmp_path):
    """test_download's, with the parts of its two lists: every second caption, and every second row of COCO."""
    with serving() as server:
        made = World(tmp_path, server)
        rows = [row(f"coco/train2017/{i}.jpg", f"What is number {i}?") for i in range(3)]
        rows[1:1] = [row("ocr_vqa/images/1.jpg"), row(id=1)]
        server.hub["datasets/liuhaotian/LLaVA-Instruct-150K"]["llava_v1_5_mix665k.json"] = json.dumps(rows).encode()
        made.catalog |= {name: table | {"every": 2} for name, table in PARTS.items()}
        made.write_catalog()
        (tmp_path / "scripts/configs/llava-v1.5-7b.toml").rename(tmp_path / "scripts/configs/whole.toml")
        text = CONFIG.replace('"llava-v1.5-7b"', '"whole"')
        (tmp_path / "scripts/configs/llava-v1.5-7b.toml").write_text(text)
        yield made


def read(world, stage):
    return json.loads((world.folder / LISTS[stage]).read_text())


def test_the_rules_draw_as_many_rows_as_the_cost_model_counts():
    """And the whole lists' counts: 558,128 rows, and 364,100 of COCO (LLaVA issue 657)."""
    for table in PARTS.values():
        whole = {"data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": 558_128}.get(table["of"], 364_100)
        assert cost.DATA[table["to"]].rows == len(range(0, whole, table["every"]))
        assert cost.DATA[table["to"]].with_image == 1


# GB. Archives: facts of their hosts, as sources.toml has them; the weights and the evaluation's sets: at most.
ARCHIVES = {"llava-pretrain-images": 27.36, "coco": 19.34}
LISTED = {"llava-pretrain-json": 0.19, "mix665k-json": 1.03, "qwen2-0.5b": 1.0, "siglip-so400m-patch14-384": 3.6}
SETS = ("eval-MMStar", "eval-RealWorldQA", "eval-OCRBench", "eval-ai2d", "eval-MME", "eval-MMMU")


def test_the_small_profile_needs_two_archives_and_under_120_gb():
    """While it unpacks, and when its nine runs are there: each set of the evaluation with its conversion."""
    needed = [source.name for source in download.needed(config.load("tinyllava-0.5b"))[0]]
    assert sorted(needed) == sorted([*ARCHIVES, *LISTED, *SETS, *PARTS])
    assert RULES["coco"]["bytes"] == pytest.approx(ARCHIVES["coco"] * 1e9, rel=1e-3)
    rest = sum(LISTED.values()) + 1.0 * len(SETS)
    assert 2 * sum(ARCHIVES.values()) + rest < 120
    runs = cost.Experiment("tinyllava-0.5b").disk(9)
    assert sum(ARCHIVES.values()) + rest + 1.0 * len(SETS) + runs < 120


def test_a_part_is_every_nth_row_below_a_folder_named_from_there(tmp_path):
    whole = tmp_path / "whole.json"
    rows = [row(f"coco/train2017/{i}.jpg") if i % 3 else row(f"gqa/{i}.jpg") for i in range(30)] + [row(id=1)]
    whole.write_text(json.dumps(rows))
    drawn = json.loads(subset.part(whole, "coco/train2017/", 4))
    assert [r["image"] for r in drawn] == ["1.jpg", "7.jpg", "13.jpg", "19.jpg", "25.jpg"]
    assert json.loads(subset.part(whole, "", 10)) == [rows[i] for i in (0, 10, 20, 30)]
    assert subset.part(whole, "", 10) == subset.part(whole, "", 10)


@pytest.fixture
def mix(tmp_path, monkeypatch):
    """The part of the second list as a source, in a folder of its own that has the whole list."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    rows = [row(f"coco/train2017/{i}.jpg", f"What is number {i}?") for i in range(5)] + [row("gqa/1.jpg"), row(id=1)]
    (tmp_path / "data/llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    return download.Source("small-mix-json", **PARTS["small-mix-json"] | {"every": 2})


def test_a_list_is_drawn_once_and_its_hash_kept(mix):
    download.check_part(mix)
    drawn = mix.to.read_bytes()
    digest = hashlib.sha256(drawn).hexdigest()
    assert [r["image"] for r in json.loads(drawn)] == ["0.jpg", "2.jpg", "4.jpg"]
    assert download.read_locks()["small-mix-json"] == {"sha256": {"llava_v1_5_mix665k.json": digest}}
    download.Path("data/llava_v1_5_mix665k.json").unlink()  # is not asked for again
    download.check_part(mix)
    assert mix.to.read_bytes() == drawn and download.lacking(mix, verify=True) == ""


@pytest.mark.parametrize("first", (True, False), ids=("from the start", "later"))
def test_a_foreign_list_is_refused_in_one_line(mix, first):
    if not first:
        download.check_part(mix)
    mix.to.parent.mkdir(exist_ok=True)
    mix.to.write_text(json.dumps([row("1.jpg")]))
    said = (
        f"{LISTS['finetune']} is not one in 2 of the rows of data/llava_v1_5_mix665k.json with a picture below coco/t"
    )
    with pytest.raises(download.DataError, match=re.escape(said)) as refused:
        download.check_part(mix)
    assert str(refused.value).endswith("move it away and run again") and "\n" not in str(refused.value)
    assert json.loads(mix.to.read_text()) == [row("1.jpg")]  # nothing of the user's is changed
    mix.to.unlink()
    download.check_part(mix)


def test_another_list_than_at_first_use_is_refused_and_so_is_one_with_another_hash_than_the_catalogs(mix):
    download.check_part(mix)
    mix.to.unlink()
    mix.every = 1
    with pytest.raises(download.DataError, match=r"small-mix-json: one in 1 of .* data/sources.lock.json says"):
        download.check_part(mix)
    mix.every, mix.sha256 = 2, "0" * 64
    with pytest.raises(download.DataError, match=rf"sources.toml says {'0' * 64}"):
        download.check_part(mix)
    assert not mix.to.exists()
    mix.sha256 = download.read_locks()["small-mix-json"]["sha256"]["llava_v1_5_mix665k.json"]
    download.check_part(mix)
    assert mix.to.exists()


def test_a_list_without_such_rows_is_refused(mix):
    download.Path("data/llava_v1_5_mix665k.json").write_text(json.dumps([row("gqa/1.jpg")]))
    with pytest.raises(download.DataError, match="has no row with a picture below coco/train2017/"):
        download.check_part(mix)


def test_data_sh_draws_the_lists_from_what_only_their_archives_hold_after_a_download_that_broke_off(world):
    def run(*options):
        done = world.start(*options)
        return "".join(done.communicate(timeout=300)), done.returncode

    said, code = run("--offline")
    assert code == 2
    for name, path in (
        ("coco", "data/images/coco/train2017"), ("llava-pretrain-images", "data/LLaVA-Pretrain/images"),
        ("mix665k-json", "data/llava_v1_5_mix665k.json"),
    ):  # fmt: skip
        assert sum(f"{name} is missing: {path}, from" in line for line in said.splitlines()) == 1, said
    world.server.fault = lambda handler, path: path.endswith("train2017.zip") and handler.refuse(404)
    said, code = run()
    assert code == 2 and not (world.folder / "data/small").exists() and "404" in said, said
    world.server.fault = None
    said, code = run()
    assert code == 0, said
    assert [r["image"] for r in read(world, "finetune")] == ["0.jpg", "2.jpg"]
    assert [r["image"] for r in read(world, "pretrain")] == ["0/a.jpg"]
    assert not world.sent("ocr_vqa_images_llava_v15.zip") and "data/images/coco/train2017, where all are" in said
    before = len(world.server.log)
    said, code = run("--offline", "--verify")
    assert code == 0 and len(world.server.log) == before, said
