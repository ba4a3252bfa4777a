"""scripts/data.sh against a local server that speaks as much of the hub's protocol as huggingface_hub asks for, and
plain HTTP: the real script, config, client and files, and every fault really met. The real catalog's addresses are not
reached here.

(olah, the one maintained hub server on the package index, needs a newer huggingface_hub than LLaVA's pins allow, and
cannot cut a connection or tell a lie.)
"""

import json
import os
import re
import shutil
import stat
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest

from scripts import config
from scripts.data import download
from tests.helpers import COMMIT, ROOT, packed, serving, sha256, write_catalog

BIG = os.urandom(24 << 20)  # more than twice what huggingface_hub writes at once
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: unshare")


class World:
    """A folder with the real scripts and a small catalog, and the server that the catalog names."""

    def __init__(self, folder, server):
        self.folder, self.server = folder, server
        self.url = f"http://127.0.0.1:{server.server_port}"
        (folder / "scripts/data").mkdir(parents=True)
        (folder / ".venv").symlink_to(ROOT / ".venv")
        shutil.copytree(ROOT / "scripts/configs", folder / "scripts/configs")
        for name in ("__init__.py", "config.py", "data.sh", "data/__init__.py", "data/download.py"):
            shutil.copy(ROOT / "scripts" / name, folder / "scripts" / name)
        pretrain = {"0/a.jpg": BIG, "1/b.jpg": b"b"}
        coco = {f"train2017/{i}.jpg": os.urandom(1 << 20) for i in range(3)}
        ocr = {"ocr_vqa/images/1.jpg": b"1", "ocr_vqa/images/2.gif": b"2"}
        rows = [
            {"image": "coco/train2017/0.jpg"},
            {"image": ["ocr_vqa/images/1.jpg", "ocr_vqa/images/2.jpg"]},
            {"id": 1},
        ]
        self.coco = packed(coco)
        server.plain = {"/train2017.zip": self.coco, "/mirror/train2017.zip": self.coco}
        server.hub = {
            "datasets/liuhaotian/LLaVA-Pretrain": {
                "blip_laion_cc_sbu_558k.json": json.dumps([{"image": name} for name in pretrain]).encode(),
                "images.zip": packed(pretrain),
            },
            "datasets/liuhaotian/LLaVA-Instruct-150K": {"llava_v1_5_mix665k.json": json.dumps(rows).encode()},
            "datasets/weizhiwang/llava_v15_instruction_images": {"ocr_vqa_images_llava_v15.zip": packed(ocr)},
            "lmsys/vicuna-7b-v1.5": {
                "generation_config.json": b'{"temperature": 0.9}',
                "tokenizer.model": b"t",
                "pytorch_model.bin": b"w" * 2000,
                "tf_model.h5": b"not asked for",
            },
            "openai/clip-vit-large-patch14-336": {
                "config.json": b"{}",
                "merges.txt": b"",
                "pytorch_model.bin": b"w" * 200,
            },
            "datasets/lmms-lab/VQAv2": {
                "README.md": b"---\n---\n",
                "data/validation-0.parquet": b"p" * 200,
                "data/test-0.parquet": b"",
            },
        }
        self.catalog = {
            name: source
            for name, source in config.tomllib.loads((ROOT / "scripts/data/sources.toml").read_text()).items()
            if source.get("repo", "?") in " ".join(server.hub) or name == "coco"
        }
        for source in self.catalog.values():
            source.pop("sha256", 0), source.pop("files", 0)
        self.catalog["coco"] |= {
            "url": [f"{self.url}/train2017.zip", f"{self.url}/mirror/train2017.zip"],
            "bytes": len(self.coco),
            "sha256": sha256(self.coco),
            "files": 3,
        }
        self.write_catalog()

    def write_catalog(self):
        write_catalog(self.folder, self.catalog)

    def start(self, *options, before=(), **variables):
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.folder / "home"), "no_proxy": "127.0.0.1"}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | hub | variables
        command = [*before, "scripts/data.sh", "llava-v1.5-7b", *options]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stderr=pipe, stdout=pipe, text=True, start_new_session=True
        )

    def run(self, *options, **variables):
        process = self.start(*options, **variables)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err, err
        return process.returncode, out + err

    def sent(self, path):
        """(first byte, bytes) of each body sent for it"""
        return [
            (first, count) for method, name, first, count in self.server.log if name.endswith(path) and method == "GET"
        ]

    def there(self):
        return sorted(p.relative_to(self.folder / "data").as_posix() for p in (self.folder / "data").rglob("*"))


@pytest.fixture
def world(tmp_path):
    with serving() as server:
        yield World(tmp_path, server)


def once(*answers):
    """A fault that gives each answer, (suffix of the path, function of handler and path), one time."""
    left, guard = list(answers), threading.Lock()

    def fault(handler, path):
        with guard:
            found = next((a for a in left if path.endswith(a[0]) and handler.command == "GET"), None)
            if not found:
                return False
            left.remove(found)
        return found[1](handler, path)

    return fault


def test_all_is_downloaded_once_and_then_checked(world):
    code, said = world.run()
    assert code == 0, said
    data = world.folder / "data"
    assert (data / "images/coco/train2017/2.jpg").stat().st_size == 1 << 20
    assert (data / "LLaVA-Pretrain/images/0/a.jpg").read_bytes() == BIG
    assert (data / "eval/lmms-lab/VQAv2/data/validation-0.parquet").exists()
    assert sorted(os.listdir(data / "images/ocr_vqa/images")) == ["1.jpg", "2.jpg"] and "1 .gif files" in said
    vicuna = data / "models/vicuna-7b-v1.5"
    assert json.loads((vicuna / "generation_config.json").read_text()) == {"temperature": 0.9, "do_sample": True}
    assert (
        not (vicuna / "tf_model.h5").exists()
        and not list(data.rglob("test-0.parquet"))
        and not list(data.rglob("*.partial"))
        and not list(data.rglob("*.zip"))
    )
    assert "3 rows, 2 with one of 3 images" in said and "2 others are there" in said
    locked = json.loads((data / "sources.lock.json").read_text())
    assert locked["ocr-vqa"]["revision"] == COMMIT and "trusted at first use" in said
    assert subprocess.run("sha256sum --quiet --check data/.sums/*", shell=True, cwd=world.folder).returncode == 0

    world.server.log.clear()
    code, said = world.run()
    assert code == 0 and not world.server.log and "now" not in said
    code, said = world.run("--verify")
    assert code == 0 and not world.server.log and "every file as it was" in said

    (vicuna / "pytorch_model.bin").write_bytes(b"v" * 2000)
    code, said = world.run("--verify")
    assert code == 2 and "1 of 3 files changed or missing, first data/models/vicuna-7b-v1.5/pytorch_model.bin" in said
    (data / "images/coco/train2017/1.jpg").unlink()
    code, said = world.run()
    assert code == 2 and "1 of 3 files missing, first data/images/coco/train2017/1.jpg: rm -r" in said

    # Deleted, it comes again, and must be what was trusted the first time.
    shutil.rmtree(data / "images/ocr_vqa")
    shutil.rmtree(data / "images/coco")
    world.server.hub["datasets/weizhiwang/llava_v15_instruction_images"]["ocr_vqa_images_llava_v15.zip"] = packed(
        {"3.jpg": b""}
    )
    code, said = world.run()
    assert code == 2 and (data / "images/coco/train2017/1.jpg").exists()
    assert f"not {locked['ocr-vqa']['sha256']['ocr_vqa_images_llava_v15.zip']}: deleted" in said


def test_a_cut_connection_is_resumed_where_it_was_cut(world):
    images = world.server.hub["datasets/liuhaotian/LLaVA-Pretrain"]["images.zip"]
    tag = {"ETag": f'"{sha256(images)}"', "X-Repo-Commit": world.catalog["llava-pretrain-images"]["revision"]}
    world.server.fault = once(
        ("/train2017.zip", lambda handler, path: handler.answer(path, world.coco, stop=2 << 20)),
        ("/images.zip", lambda handler, path: handler.answer(path, images, tag, stop=21 << 20)),
    )
    code, said = world.run()
    assert code == 0 and said.count("goes on in 1 s") == 2, said
    (_, cut), (first, rest) = world.sent("/train2017.zip")
    assert cut == 2 << 20 and cut - (1 << 18) <= first <= cut and first + rest == len(world.coco)
    _, (first, rest) = world.sent("/images.zip")
    assert first == 20 << 20 and first + rest == len(images)  # it writes 10 MB at once


def test_killed_in_a_download_it_continues(world):
    hold = threading.Event()
    world.server.fault = once(
        ("/train2017.zip", lambda handler, path: handler.answer(path, world.coco, stop=2 << 20, hold=hold))
    )
    process = world.start()
    partial = world.folder / "data/images/coco/train2017.partial/download/train2017.zip"
    deadline = time.time() + 20
    while time.time() < deadline and not (partial.exists() and partial.stat().st_size >= 1 << 20):
        time.sleep(0.02)
    other = world.start()
    assert "another process is at work" in other.stderr.readline()
    os.killpg(process.pid, 9)
    process.communicate()
    hold.set()
    out, err = other.communicate(timeout=60)  # it waited, and now does what is left
    assert other.returncode == 0 and world.run("--verify")[0] == 0, out + err
    _, (first, rest) = world.sent("/train2017.zip")
    assert first >= 1 << 20 and first + rest == len(world.coco)


def test_a_wrong_hash_is_refused_and_the_mirror_tried(world):
    weights = f"/lmsys/vicuna-7b-v1.5/resolve/{world.catalog['vicuna-7b-v1.5']['revision']}/pytorch_model.bin"
    world.server.altered = {"/train2017.zip": world.coco[:-1] + b"?", weights: b"v" * 2000}
    code, said = world.run()
    assert code == 2 and "trying the mirror" in said and len(world.sent("/mirror/train2017.zip")) == 1
    assert "pytorch_model.bin has sha256" in said and "deleted" in said
    there = world.there()
    assert "images/coco/train2017/0.jpg" in there and "models/vicuna-7b-v1.5" not in there
    assert not [path for path in there if path.endswith("pytorch_model.bin") and "vicuna" in path]
    assert ".sums/vicuna-7b-v1.5" not in there
    world.server.altered = {}
    assert world.run()[0] == 0 and len(world.sent("/mirror/train2017.zip")) == 1


def test_too_many_requests_waits_as_long_as_it_is_told(world):
    world.server.fault = once(
        ("/train2017.zip", lambda handler, _: handler.refuse(429, Retry_After="2")),
        ("/images.zip", lambda handler, _: handler.refuse(429, Retry_After="2")),
        ("/revision/main", lambda handler, _: handler.refuse(429, Retry_After="2")),
        ("/tokenizer.model", lambda handler, _: handler.refuse(503)),
    )
    started = time.time()
    code, said = world.run()
    assert code == 0 and said.count("429") == 3 and said.count("goes on in 2 s") == 3, said
    assert time.time() - started > 4  # the list of files, then the files


def test_it_gives_up_where_nothing_comes(tmp_path, monkeypatch):
    waits, source = [], download.Source("x", tmp_path / "to")
    monkeypatch.setattr(time, "sleep", waits.append)

    def fail():
        if len(waits) == 3:  # a byte arrives: it starts to count again
            source.downloads.mkdir(parents=True)
            (source.downloads / "part").write_bytes(b"x" * 9)
        raise OSError("https://user:hf_secret@hub/file?signature=secret is cut")

    with pytest.raises(download.DataError, match=r"^https://hub/file is cut: given up after 6 tries") as raised:
        download.attempts(source, fail)
    assert waits == [1, 2, 4, 1, 2, 4, 8, 16] and "secret" not in str(raised.value)


def test_what_waiting_does_not_mend_ends_at_once(world):
    def fault(handler, path):
        if "vicuna" in path:
            return handler.headers["Authorization"] != "Bearer hf_secret" and handler.refuse(401)
        return path == "/train2017.zip" and handler.refuse(404)

    world.server.fault = fault
    code, said = world.run()
    assert code == 2 and "needs HF_TOKEN" in said and "goes on" not in said
    (world.folder / "token").write_text("hf_secret")
    code, said = world.run(HF_TOKEN_PATH=str(world.folder / "token"))
    assert code == 0 and "404" in said and "trying the mirror" in said and "hf_secret" not in said


@needs_root
@pytest.mark.parametrize(
    "claimed,message", ((None, "make room, or link"), (10, "No space left on device: mend that and run again"))
)
def test_a_full_disk_is_said_before_or_when_it_is(world, claimed, message):
    """8 MB of disk; with a hub that claims the large file to be small, it is full in the middle."""
    if claimed:
        world.server.claimed = {"images.zip": claimed}
    (world.folder / "data").mkdir()
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=14m none data && exec "$@"', "sh"]
    if subprocess.run([*small, "true"], cwd=world.folder, capture_output=True).returncode:
        pytest.skip("no mount namespace can be had here")
    code, said = world.run(before=small)
    assert code == 2 and message in said, said
    assert claimed or not [path for method, path, _, _ in world.server.log if "api" not in path]


def test_offline_asks_no_network(world):
    alone = ["unshare", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no network namespace can be had here")
    code, said = world.run("--offline", before=alone)
    assert code == 2 and "coco is missing: data/images/coco/train2017" in said
    assert said.count("is missing") == len(world.catalog)
    assert world.run()[0] == 0
    # A machine without a network: a copy of data/, and nothing else of this one.
    world.folder.joinpath("data").rename(world.folder / "there")
    subprocess.run("tar cf - -C there . | (mkdir data && tar xf - -C data)", shell=True, check=True, cwd=world.folder)
    code, said = world.run("--offline", "--verify", before=alone)
    assert code == 0 and "all there, every file as it was" in said


def test_images_that_rows_name_and_no_folder_holds_are_listed(world):
    rows = [{"image": f"coco/train2017/{i}.jpg"} for i in range(8)]
    world.server.hub["datasets/liuhaotian/LLaVA-Instruct-150K"]["llava_v1_5_mix665k.json"] = json.dumps(rows).encode()
    code, said = world.run()
    assert code == 2 and "5 of 8 images are not in data/images: coco/train2017/3.jpg, " in said
    listed = (world.folder / "data/llava_v1_5_mix665k.missing.txt").read_text().split()
    assert listed == [f"coco/train2017/{i}.jpg" for i in range(3, 8)]


def test_what_a_user_already_has_is_taken_if_it_is_whole(world):
    own = world.folder / "own"
    own.mkdir()
    for i in range(2):
        (own / f"{i}.jpg").touch()
    (world.folder / "data/images/coco").mkdir(parents=True)
    (world.folder / "data/images/coco/train2017").symlink_to(own)
    code, said = world.run()
    assert code == 2 and "holds 2 files, not 3" in said and not world.server.log
    (own / "2.jpg").touch()
    code, said = world.run()
    assert code == 0 and "is there already" in said and not world.sent("train2017.zip"), said


def test_hf_transfer(world):
    repo = world.server.hub["openai/clip-vit-large-patch14-336"]
    repo["pytorch_model.bin"] = BIG * 3  # it is used from 50 MB on
    code, said = world.run(HF_HUB_ENABLE_HF_TRANSFER="1")
    assert code == 0, said
    weights = "clip-vit-large-patch14-336/{}pytorch_model.bin"
    parts = world.sent(weights.format(f"resolve/{world.catalog['clip-vit-large-patch14-336']['revision']}/"))
    assert len(parts) > 5 and (world.folder / "data/models" / weights.format("")).stat().st_size == 3 * len(BIG)


def member(name, kind=stat.S_IFREG):
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "members,message",
    [
        ([("../a.jpg", b"")], "leads out"),
        ([("/etc/a.jpg", b"")], "leads out"),
        ([("x\\..\\a.jpg", b"")], "leads out"),
        ([(member("a.jpg", stat.S_IFLNK), b"/etc/passwd")], "is a link or a device"),
        ([(member("a.jpg", stat.S_IFCHR), b"")], "is a link or a device"),
        ([("a.jpg", b""), ("b/../a.jpg", b"")], "leads out"),
        ([("a.jpg", b"1"), ("a.jpg", b"2")], "is there twice"),
        ([("a.jpg", bytes(1 << 24))], "would become"),
        ([(f"{i}.jpg", b"") for i in range(99)], "holds 99 files, not 2"),
        ([], "holds 0 files"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_means_harm_leaves_nothing(tmp_path, members, message):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    before = sorted(tmp_path.rglob("*"))
    source = download.Source("bad", tmp_path / "to", files=2 if len(members) == 99 else 0, unpack=True)
    with pytest.raises(download.DataError, match=message):
        download.unpack(source, tmp_path / "bad.zip", tmp_path / "out" / "deep")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_archive_is_one_error(tmp_path):
    data = packed({"a/1.jpg": b"x" * 999, "b/1.jpg": b"y"})
    for name, bad in (("cut", data[:-40]), ("flipped", data.replace(b"x" * 9, b"x" * 8 + b"?", 1))):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(download.DataError, match=f"{name} is refused"):
            download.unpack(download.Source("bad", "to", unpack=True), tmp_path / name, tmp_path / "out")


def test_unpacking_goes_on_where_it_was_cut_off(tmp_path):
    (tmp_path / "whole.zip").write_bytes(packed({"top/a/1.jpg": b"1", "top/b/2.jpg": b"22", "top/b/3.jpg": b"33"}))
    (tmp_path / "out/b").mkdir(parents=True)
    (tmp_path / "out/b/2.jpg").write_bytes(b"22")
    (tmp_path / "out/b/3.jpg").write_bytes(b"3")
    before = (tmp_path / "out/b/2.jpg").stat().st_mtime_ns
    download.unpack(download.Source("good", "to", unpack=True), tmp_path / "whole.zip", tmp_path / "out")
    assert (tmp_path / "out/b/2.jpg").stat().st_mtime_ns == before
    assert (tmp_path / "out/a/1.jpg").read_bytes() == b"1" and (tmp_path / "out/b/3.jpg").read_bytes() == b"33"


@pytest.mark.parametrize("experiment", sorted(p.stem for p in config.CONFIGS.glob("*.toml") if "-tiny" not in p.stem))
def test_the_catalog_has_all_that_the_full_experiments_name(experiment):
    loaded = config.load(experiment)
    sources, own, _ = download.needed(loaded)
    assert not own and set(loaded["tasks"]) <= {task for source in sources for task in source.tasks}
    for source in sources:
        assert bool(source.url) != bool(source.repo) and bool(source.url) == bool(source.bytes and source.sha256)
        assert re.fullmatch("([0-9a-f]{64})?", source.sha256) and re.fullmatch("([0-9a-f]{40})?", source.revision)


@pytest.mark.parametrize("text,message", (("[x", "sources.toml: "), ("[x]\nto = 'a'\nulr = []", "unexpected keyword")))
def test_a_wrong_catalog_is_one_error(world, text, message):
    Path(world.folder, "scripts/data/sources.toml").write_text(text)
    code, said = world.run()
    assert code == 2 and message in said and len(said.splitlines()) == 1
