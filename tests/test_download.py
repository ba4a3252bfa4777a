"""scripts/data.sh against a local server that speaks as much of the hub's protocol as huggingface_hub asks for, and
plain HTTP: the real script, config, client and files, and every fault really met. The real catalog's addresses are not
reached here.

(olah, the one maintained hub server on the package index, needs a newer huggingface_hub than LLaVA's pins allow, and
cannot cut a connection or tell a lie.)
"""

import contextlib
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
import torch
from safetensors.torch import load_file, save

from scripts import config, outside
from scripts.data import catalog, download, weights
from tests.helpers import COMMIT, ROOT, packed, pickled, picture, row, serving, sha256, write_catalog

BIG = picture(after=24 << 20)  # more than twice what huggingface_hub writes at once
WEIGHTS = {"w": torch.arange(500.0)}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: unshare")
SCRIPTS = [f"data/{path.name}" for path in (ROOT / "scripts/data").glob("*.py")]


class World:
    """A folder with the real scripts and a small catalog, and the server that the catalog names."""

    experiment = "llava-v1.5-7b"

    def __init__(self, folder, server):
        self.folder, self.server = folder, server
        self.url = f"http://127.0.0.1:{server.server_port}"
        for name in ("data", "setup"):
            (folder / "scripts" / name).mkdir(parents=True)
        (folder / ".venv").symlink_to(ROOT / ".venv")
        shutil.copytree(ROOT / "scripts/configs", folder / "scripts/configs")
        for name in ("__init__.py", "common.py", "config.py", "outside.py", "data.sh", "setup/kit.sh", *SCRIPTS):
            shutil.copy(ROOT / "scripts" / name, folder / "scripts" / name)
        pretrain = {"0/a.jpg": BIG, "1/b.jpg": picture()}
        coco = {f"train2017/{i}.jpg": picture("JPEG", after=1 << 20) for i in range(3)}
        ocr = {"ocr_vqa/images/1.jpg": picture("JPEG"), "ocr_vqa/images/2.gif": picture("GIF")}
        names = ("coco/train2017/0.jpg", "ocr_vqa/images/1.jpg", "ocr_vqa/images/2.jpg")
        rows = [*map(row, names), row(id=1)]
        self.coco = packed(coco)
        server.plain = {"/train2017.zip": self.coco, "/mirror/train2017.zip": self.coco}
        server.hub = {
            "datasets/liuhaotian/LLaVA-Pretrain": {
                "blip_laion_cc_sbu_558k.json": json.dumps([row(name) for name in pretrain]).encode(),
                "images.zip": packed(pretrain),
            },
            "datasets/liuhaotian/LLaVA-Instruct-150K": {"llava_v1_5_mix665k.json": json.dumps(rows).encode()},
            "datasets/weizhiwang/llava_v15_instruction_images": {"ocr_vqa_images_llava_v15.zip": packed(ocr)},
            "lmsys/vicuna-7b-v1.5": {
                "generation_config.json": b'{"temperature": 0.9}',
                "tokenizer.model": b"t",
                "model.safetensors": save(WEIGHTS),
                "tf_model.h5": b"not asked for",
            },
            "openai/clip-vit-large-patch14-336": {
                "config.json": b"{}",
                "merges.txt": b"",
                "model.safetensors": save({"c": torch.ones(2)}),
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
            if (source.get("repo", "?") in " ".join(server.hub) or name == "coco")
            and source.get("tasks") != ["vqav2_test"]  # a part of the evaluation only where it is asked for
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

    def pickle(self, repo="lmsys/vicuna-7b-v1.5", data=None):
        """Gives a model its weights as a pickle alone, as the real ones are."""
        del self.server.hub[repo]["model.safetensors"]
        self.server.hub[repo]["pytorch_model.bin"] = data or pickled(WEIGHTS)

    def start(self, *options, before=(), **variables):
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.folder / "home"), "no_proxy": "127.0.0.1"}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | hub | variables
        command = [*before, "scripts/data.sh", self.experiment, *options]
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
    world.pickle()
    code, said = world.run()
    assert code == 0, said
    data = world.folder / "data"
    assert (data / "images/coco/train2017/2.jpg").stat().st_size > 1 << 20
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
    assert "4 rows, 3 with one of 3 images" in said and "2 others are there" in said
    locked = json.loads((data / "sources.lock.json").read_text())
    assert locked["ocr-vqa"]["revision"] == COMMIT and "trusted at first use" in said
    assert subprocess.run("sha256sum --quiet --check data/.sums/*", shell=True, cwd=world.folder).returncode == 0

    world.server.log.clear()
    code, said = world.run()
    assert code == 0 and not world.server.log and "now" not in said
    code, said = world.run("--verify")
    assert code == 0 and not world.server.log and "every file as it was" in said

    assert torch.equal(load_file(vicuna / "model.safetensors")["w"], WEIGHTS["w"])
    (vicuna / "model.safetensors").write_bytes(b"v" * 2000)
    code, said = world.run("--verify")
    assert code == 2 and "1 of 3 files changed or missing, first data/models/vicuna-7b-v1.5/model.safetensors" in said
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
    assert "in data/sources.lock.json since its first use: if this one is right, remove ocr-vqa there" in said


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
    world.pickle()
    weights = f"/lmsys/vicuna-7b-v1.5/resolve/{world.catalog['vicuna-7b-v1.5']['revision']}/pytorch_model.bin"
    world.server.altered = {"/train2017.zip": world.coco[:-1] + b"?", weights: pickled({"w": -WEIGHTS["w"]})}
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
    "megabytes,message", ((14, "make room, or link"), (100, "No space left on device: mend that and run again"))
)
def test_a_full_disk_is_said_before_or_when_it_is(world, megabytes, message):
    """A disk that is too small, and one that others fill in the middle of the large file."""
    (world.folder / "data").mkdir()
    small = f'mount -t tmpfs -o size={megabytes}m none data && exec "$@"'
    before = ["unshare", "--mount", "sh", "-c", small, "sh"]
    if subprocess.run([*before, "true"], cwd=world.folder, capture_output=True).returncode:
        pytest.skip("no mount namespace can be had here")

    def fill(handler, path):
        there = ["nsenter", f"--target={process.pid}", "--mount", "sh", "-c", 'head -c 1G /dev/zero >"$0"; true']
        subprocess.run([*there, world.folder / "data/full"], stderr=subprocess.DEVNULL, check=True)

    world.server.fault = once(("/images.zip", fill)) if megabytes == 100 else None
    process = world.start(before=before)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and message in said and "Traceback" not in said, said
    assert megabytes == 100 or not [path for method, path, _, _ in world.server.log if "api" not in path]


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
    rows = [row(f"coco/train2017/{i}.jpg") for i in range(8)]
    world.server.hub["datasets/liuhaotian/LLaVA-Instruct-150K"]["llava_v1_5_mix665k.json"] = json.dumps(rows).encode()
    code, said = world.run()
    assert code == 2 and "5 of 8 images are not in data/images: coco/train2017/3.jpg, " in said
    listed = (world.folder / "data/llava_v1_5_mix665k.missing.txt").read_text().split()
    assert listed == [f"coco/train2017/{i}.jpg" for i in range(3, 8)]


def test_what_a_user_already_has_is_taken_if_it_is_whole(world):
    own = world.folder / "own"
    own.mkdir()
    for i in range(2):
        (own / f"{i}.jpg").write_bytes(picture("JPEG"))
    (world.folder / "data/images/coco").mkdir(parents=True)
    (world.folder / "data/images/coco/train2017").symlink_to(own)
    code, said = world.run()
    assert code == 2 and "holds 2 files, not 3" in said and not world.server.log
    (own / "2.jpg").write_bytes(picture("JPEG"))
    code, said = world.run()
    assert code == 0 and "is there already" in said and not world.sent("train2017.zip"), said


HOSTILE = [
    "data/validation-x/../../../../../../../scripts/eval.sh", "data/validation-/../../x", "./data/validation-1",
    "data//validation-1", "/etc/passwd", "data/validation-a\\..\\b", "data/validation-\x1b[2Jall there",
    "data/validation-a\nb", "data/validation-a\u2028b", "data/validation-\x85", "data/validation-\ud800", "..", "",
    "data/validation-" + "a" * 300,
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_name_that_no_file_has(name):
    with pytest.raises(ValueError, match="leads out of its folder") as raised:
        outside.checked_name(name)
    assert raised.value.args[0].isascii() and raised.value.args[0].isprintable()


@pytest.mark.parametrize("name", [HOSTILE[0], HOSTILE[1], HOSTILE[6], HOSTILE[9]], ids=ascii)
def test_a_hub_that_names_what_no_file_is_called_is_refused_before_a_byte(world, name):
    (world.folder / "scripts/eval.sh").write_text("mine")
    world.server.hub["datasets/lmms-lab/VQAv2"][name] = b"theirs"
    code, said = world.run()
    assert code == 2 and "eval-VQAv2: " in said and "leads out of its folder" in said, said
    assert not {"\x1b", "\u2028", "\x85"} & set(said)
    assert not [path for _, path, _, _ in world.server.log if "/api/" not in path]
    assert (world.folder / "scripts/eval.sh").read_text() == "mine" and not list((world.folder / "data").rglob("*.jpg"))


def test_a_star_stays_within_a_folder_and_a_name_is_no_pattern(world):
    repo = world.server.hub["datasets/lmms-lab/VQAv2"]
    repo |= {"data/validation-1/deep.parquet": b"", "data/validation-*": b"star", "data/train-0.parquet": b""}
    code, said = world.run()
    there = world.folder / "data/eval/lmms-lab/VQAv2/data"
    assert code == 0 and sorted(os.listdir(there)) == ["validation-*", "validation-0.parquet"], said


def test_what_a_user_links_is_never_changed(world):
    """Renaming, editing and converting happen in the kit's own downloads alone; each refusal says what to do."""
    own = world.folder / "own"
    (own / "pictures").mkdir(parents=True)
    (own / "pictures/1.gif").write_bytes(picture("GIF"))
    (own / "vicuna").mkdir()
    for name, data in {
        "generation_config.json": b"{}",
        "tokenizer.model": b"t",
        "pytorch_model.bin": pickled(WEIGHTS),
    }.items():
        (own / "vicuna" / name).write_bytes(data)
    for place, folder in (("images/ocr_vqa/images", "pictures"), ("models/vicuna-7b-v1.5", "vicuna")):
        (world.folder / "data" / place).parent.mkdir(parents=True)
        (world.folder / "data" / place).symlink_to(own / folder)
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}

    def refused(*messages):
        code, said = world.run()
        assert code == 2 and all(message in said for message in messages) and not world.server.log, said
        assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before

    refused(
        "1 files end in .gif, first data/images/ocr_vqa/images/1.gif", "generation_config.json lacks", "rename them"
    )
    for path, new in ((own / "pictures/1.gif", "1.jpg"), (own / "pictures/1.jpg", "2.jpg")):
        before[path.with_name(new)] = before[path]
        path.with_name(new).write_bytes(before[path])
    before[own / "vicuna/generation_config.json"] = b'{"do_sample": true}'
    (own / "vicuna/generation_config.json").write_bytes(b'{"do_sample": true}')
    refused("pytorch_model.bin is a pickle", "scripts.data.weights data/models/vicuna-7b-v1.5 makes safetensors")
    command = [ROOT / ".venv/bin/python", "-m", "scripts.data.weights", "data/models/vicuna-7b-v1.5"]
    subprocess.run(command, cwd=world.folder, check=True, capture_output=True)
    assert (own / "vicuna/pytorch_model.bin").read_bytes() == before[own / "vicuna/pytorch_model.bin"]
    assert "pickle" not in world.run()[1]


def test_locks_and_lists_change_nothing_that_a_link_of_their_name_leads_to(world):
    (world.folder / "data").mkdir()
    mine = world.folder / "mine"
    mine.write_text("mine")
    (world.folder / "data/.lock").symlink_to(mine)
    (world.folder / "data/sources.lock.json.partial").symlink_to(mine)
    code, said = world.run()
    assert code == 2 and "data/.lock is a link, which no lock is: remove it" in said
    (world.folder / "data/.lock").unlink()
    (world.folder / "data/images/coco/train2017.partial").mkdir(parents=True)
    (world.folder / "data/images/coco/train2017.partial/photo.jpg").write_text("mine")
    code, said = world.run()
    assert code == 2 and "train2017.partial is where this works, and holds what others put there" in said
    assert (world.folder / "data/images/coco/train2017.partial/photo.jpg").exists() and mine.read_text() == "mine"
    shutil.rmtree(world.folder / "data/images/coco/train2017.partial")
    (world.folder / "data/images/coco/train2017.partial").symlink_to(world.folder)
    code, said = world.run()
    assert code == 2 and "holds what others put there" in said and not (world.folder / "download").exists()


def test_on_a_file_system_without_locks_the_second_download_still_waits(world, tmp_path):
    """As on Lustre without its option flock, and some CIFS: what is not kept apart, other machines, is named."""
    shim = tmp_path / "no_locks.c"
    shim.write_text("#include <errno.h>\nint flock(int file, int how) { errno = ENOSYS; return -1; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "no_locks.so", shim], check=True)
    hold = threading.Event()
    world.server.fault = once(
        ("/train2017.zip", lambda handler, path: handler.answer(path, world.coco, stop=2 << 20, hold=hold))
    )
    first = world.start(LD_PRELOAD=str(tmp_path / "no_locks.so"))
    warning = first.stderr.readline()
    assert "the file system of data has no locks (Function not implemented)" in warning
    assert "start no other on another machine" in warning and "have data on a file system with locks" in warning
    second = world.start(LD_PRELOAD=str(tmp_path / "no_locks.so"))
    assert "another process is at work in data/: waiting for it" in second.stderr.readline()
    hold.set()
    (_, first_said), (_, second_said) = first.communicate(timeout=60), second.communicate(timeout=60)
    assert first.returncode == 0, first_said
    assert second.returncode == 0 and "data: 0 to download" in second_said, second_said
    assert world.run("--verify")[0] == 0


def test_a_broken_first_archive_is_not_what_later_ones_must_equal(world):
    repo = world.server.hub["datasets/weizhiwang/llava_v15_instruction_images"]
    good = repo["ocr_vqa_images_llava_v15.zip"]
    repo["ocr_vqa_images_llava_v15.zip"] = good[: len(good) // 2]
    code, said = world.run()
    assert code == 2 and "is refused: File is not a zip file: deleted; run again" in said
    assert "ocr-vqa" not in json.loads((world.folder / "data/sources.lock.json").read_text())
    repo["ocr_vqa_images_llava_v15.zip"] = good
    code, said = world.run()
    assert code == 0, said


@pytest.mark.parametrize("hub", [False, True])
def test_a_download_stops_at_the_size_that_was_announced(world, hub):
    sent = []

    def flood(handler):
        handler.send_response(200)
        if not hub:
            handler.send_header("Content-Range", f"bytes 0-1/{len(world.coco)}")
        handler.send_header("Connection", "close")
        handler.end_headers()
        with contextlib.suppress(ConnectionError):
            for _ in range(300):
                sent.append(handler.wfile.write(bytes(1 << 20)))
        handler.close_connection = True
        return True

    def fault(handler, path):
        right = path.endswith("/images.zip") if hub else path == "/train2017.zip"
        return right and handler.command == "GET" and flood(handler)

    world.server.fault = fault
    code, said = world.run()
    assert code == (2 if hub else 0) and "goes on after the" in said and "bytes announced: deleted" in said, said
    assert len(sent) < 100 and not [p for p in (world.folder / "data").rglob("*") if p.stat().st_size > 30 << 20]


def test_weights_that_no_one_vouches_for_are_announced_and_then_held_to(world):
    """The hub's own hash fits whatever a mirror serves, so it does not count as known."""
    code, said = world.run()
    digest = sha256(save(WEIGHTS))
    assert code == 0 and f"vicuna-7b-v1.5: trusted at first use: model.safetensors has sha256 {digest}" in said, said
    assert "clip-vit-large-patch14-336: trusted at first use: model.safetensors" in said
    shutil.rmtree(world.folder / "data/models/vicuna-7b-v1.5")
    world.server.hub["lmsys/vicuna-7b-v1.5"]["model.safetensors"] = save({"w": -WEIGHTS["w"]})
    code, said = world.run()
    assert code == 2 and f"not {digest}: deleted; the other is in data/sources.lock.json" in said


def test_safetensors_are_taken_where_they_are(world):
    world.server.hub["lmsys/vicuna-7b-v1.5"]["pytorch_model.bin"] = b"not asked for"
    code, said = world.run()
    assert code == 0 and not world.sent("pytorch_model.bin"), said
    assert not list(world.folder.rglob("data/models/**/*.bin"))


@pytest.mark.parametrize("listing", [{"siblings": None}, {"siblings": [{"rfilename": "a.json"}]}, b"<html>"], ids=str)
def test_a_hub_that_lists_nothing_or_no_listing_is_one_error(world, listing):
    def fault(handler, path):
        if "/api/models/lmsys" in path:
            about = {"id": "x", "sha": world.catalog["vicuna-7b-v1.5"]["revision"]}
            html = isinstance(listing, bytes)
            return handler.refuse(404) if html else handler.answer(path, json.dumps(about | listing).encode())

    world.server.fault = fault
    code, said = world.run()
    assert code == 2 and "vicuna-7b-v1.5: " in said and not world.sent(".zip"), said


@pytest.mark.parametrize("text", ["[1]", '{"coco": 1}', "[" * 100_000, "\x00"])
def test_a_damaged_lock_is_one_error(world, text):
    (world.folder / "data").mkdir()
    (world.folder / "data/sources.lock.json").write_text(text)
    code, said = world.run()
    assert code == 2 and "data/sources.lock.json is damaged" in said and not world.server.log


class Harm:
    def __reduce__(self):
        return os.system, ("touch harm",)


@pytest.mark.parametrize("data", [pickled({"w": Harm()}), pickled([1]), pickled({"w": "text"}), b"no weights"])
def test_a_pickle_of_more_than_tensors_is_refused_and_runs_nothing(world, data):
    world.pickle(data=data)
    code, said = world.run()
    assert code == 2 and "pytorch_model.bin holds more than tensors" in said, said
    assert not list(world.folder.rglob("harm")) and not list(world.folder.rglob("data/models/vicuna*/*.json"))


def test_pickles_in_several_files_become_safetensors_with_an_index(tmp_path):
    tied = torch.ones(3, 2)
    parts = {"00001-of-00002": {"a": tied, "b": tied, "c": tied.T}, "00002-of-00002": {"d": WEIGHTS["w"].half()}}
    for part, tensors in parts.items():
        (tmp_path / f"pytorch_model-{part}.bin").write_bytes(pickled(tensors))
    assert len(weights.convert(tmp_path)) == 2 and weights.pickled(tmp_path) == []
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for part, tensors in parts.items():
        loaded = load_file(tmp_path / f"model-{part}.safetensors")
        assert all(
            torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
        )
        assert {index[name] for name in tensors} == {f"model-{part}.safetensors"}


@pytest.mark.parametrize("index", (b"{", b"[]", b'{"weight_map": {"w": "../w.bin"}}'))
def test_a_broken_index_of_pickles_is_refused(tmp_path, index):
    (tmp_path / weights.INDEX).write_bytes(index)
    with pytest.raises(weights.WeightsError, match=f"{weights.INDEX} is no index of weights"):
        weights.convert(tmp_path)


def test_a_public_checkpoint_comes_with_its_vision_tower_and_nothing_that_training_needs(world):
    """As LLaVA's: pickles in parts with their index, and mm_projector.bin, whose tensors they hold too."""
    name, repo = "llava-v1.5-7b", "liuhaotian/llava-v1.5-7b"
    parts = {f"pytorch_model-0000{i}-of-00002.bin": {f"w{i}": WEIGHTS["w"] + i} for i in (1, 2)}
    listed = {key: file for file, tensors in parts.items() for key in tensors}
    world.server.hub[repo] = {file: pickled(tensors) for file, tensors in parts.items()} | {
        "config.json": b'{"mm_vision_tower": "openai/clip-vit-large-patch14-336"}', "tokenizer.model": b"t",
        "pytorch_model.bin.index.json": json.dumps({"weight_map": listed}).encode(),
        "mm_projector.bin": pickled(parts["pytorch_model-00001-of-00002.bin"]),
    }  # fmt: skip
    world.catalog[name] = config.tomllib.loads((ROOT / "scripts/data/sources.toml").read_text())[name]
    world.write_catalog()
    world.experiment = "llava-v1.5-7b-public"
    code, said = world.run()
    assert code == 0 and "2 pickled weight files" in said and "3 to download" in said, said
    folder = world.folder / "data/models" / name
    assert sorted(os.listdir(folder)) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.model",
    ]  # fmt: skip
    assert torch.equal(load_file(folder / "model-00002-of-00002.safetensors")["w2"], WEIGHTS["w"] + 2)
    asked = {path for method, path, *_ in world.server.log if method == "GET"}
    assert not any(part in path for path in asked for part in ("mm_projector", "vicuna", "Pretrain", "train2017"))
    assert world.run("--offline", "--verify") == (0, f"data: {world.experiment}: all there, every file as it was\n")
    own = world.folder / "own"
    own.mkdir()
    for file, data in world.server.hub[repo].items():
        (own / file).write_bytes(data)
    assert [path.name for path in weights.convert(own)] == list(parts)  # a user's copy: mm_projector.bin stays as it is
    (folder / "model-00001-of-00002.safetensors").unlink()
    code, said = world.run("--offline")
    assert code == 2 and f"{name}: 1 of 5 files missing" in said and "run again" in said, said


def test_a_token_for_a_mirror_is_warned_of_and_no_secret_is_printed(world):
    assert "your Hugging Face token" not in world.run("--offline", HF_TOKEN="hf_secretsecret")[1]
    world.catalog["coco"]["url"] = [
        f"{world.url.replace('//', '//me:pass@wd@')}/none.zip?token=sigsecret",
        f"{world.url}/train2017.zip",
    ]
    world.write_catalog()
    code, said = world.run(HF_TOKEN="hf_secretsecret")
    assert code == 0 and f"your Hugging Face token goes to {world.url}, unencrypted" in said, said
    assert not any(secret in said for secret in ("secretsecret", "pass", "wd@", "sigsecret"))


def test_hf_transfer(world):
    many = {"w": torch.arange(18_000_000, dtype=torch.int32)}
    world.pickle("openai/clip-vit-large-patch14-336", pickled(many))  # it is used from 50 MB on
    code, said = world.run(HF_HUB_ENABLE_HF_TRANSFER="1")
    assert code == 0, said
    weights = "clip-vit-large-patch14-336/{}pytorch_model.bin"
    parts = world.sent(weights.format(f"resolve/{world.catalog['clip-vit-large-patch14-336']['revision']}/"))
    made = world.folder / "data/models/clip-vit-large-patch14-336/model.safetensors"
    assert len(parts) > 5 and torch.equal(load_file(made)["w"], many["w"])


def member(name, kind=stat.S_IFREG):
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "members,message",
    [
        ([("../a.jpg", b"")], "leads out"),
        ([("a/./b.jpg", b"")], "leads out"),
        ([("a//b.jpg", b"")], "leads out"),
        *(([(f"a{letter}b.jpg", b"")], "leads out") for letter in "\n\r\v\f\x1b\x1c\x7f\x85\u2028\u2029"),
        ([("/etc/a.jpg", b"")], "leads out"),
        ([("x\\..\\a.jpg", b"")], "leads out"),
        ([(member("a.jpg", stat.S_IFLNK), b"/etc/passwd")], "is a link or a device"),
        ([(member("a.jpg", stat.S_IFCHR), b"")], "is a link or a device"),
        ([("a.jpg", b""), ("b/../a.jpg", b"")], "leads out"),
        ([("a.jpg", b"1"), ("a.jpg", b"2")], "is there twice"),
        ([("a", b"1"), ("a/b.jpg", b"2")], "lies below a file"),
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
    sources, own = catalog.needed(loaded)
    assert not own and set(loaded["tasks"]) <= {task for source in sources for task in source.tasks}
    for source in sources:
        assert sum(map(bool, (source.url, source.repo, source.of))) == 1
        assert bool(source.url) == bool(source.bytes and source.sha256)
        assert re.fullmatch("([0-9a-f]{64})?", source.sha256) and re.fullmatch("([0-9a-f]{40})?", source.revision)


@pytest.mark.parametrize("text,message", (("[x", "sources.toml: "), ("[x]\nto = 'a'\nulr = []", "unexpected keyword")))
def test_a_wrong_catalog_is_one_error(world, text, message):
    Path(world.folder, "scripts/data/sources.toml").write_text(text)
    code, said = world.run()
    assert code == 2 and message in said and len(said.splitlines()) == 1


def test_where_nobody_reads_what_it_says_it_ends_and_continues_the_next_time(world):
    """A closed terminal: tqdm does not give its lock back, and the other threads would wait for it without end."""
    hold = threading.Event()
    world.server.fault = lambda handler, path: "/resolve/" in path and hold.wait(60) and False
    process = world.start()
    while "to download" not in process.stderr.readline():
        pass
    process.stderr.close()
    hold.set()
    assert process.wait(timeout=300) == 1
    world.server.fault = None
    process = world.start()
    said = "".join(process.communicate(timeout=300))
    assert process.returncode == 0, said
