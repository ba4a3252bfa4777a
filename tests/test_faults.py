"""The miniature's whole run, cut to minutes, under faults: SIGKILL, a full disk, broken files, a second run.

Each test lets scripts/reproduce.sh or one of its steps fail, mends the cause, gives the same command again, and finds
the losses, answers and weights of a run that nothing disturbed, bit by bit.
"""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import psutil
import pytest
import torch

from tests.helpers import small_kit

EXPERIMENTS = ("llava-tiny", "llava-tiny-vista", "llava-tiny-vista-cosine")
SIZES = {
    "TINY_DATA": "--scenes 100 --easyvqa 4 --digits 4 --probe 4",
    "TINY_MODELS": "--vision-steps 20 --language-steps 20",
}
KILLS = [  # (the step, at least and at most so many seconds after it begins, or after a checkpoint is begun)
    ("scripts/setup/upstream.sh", 0, 2), ("scripts/setup/upstream.sh", 0, 4), ("scripts/setup/patch.sh", 0, 0.3),
    ("scripts/data.sh", 0, 4), ("scripts/data.sh", 4, 12), ("scripts/data.sh", 8, 16),
    ("scripts/train.sh llava-tiny pretrain", 0, 8), ("scripts/train.sh llava-tiny pretrain", 8, 16),
    ("scripts/train.sh llava-tiny finetune", 4, 12), ("checkpoint of llava-tiny", 0, 0.3),
    ("scripts/train.sh llava-tiny finetune", 8, 16), ("scripts/eval.sh llava-tiny 0", 0, 8),
    ("scripts/eval.sh llava-tiny 0", 6, 14), ("scripts/probe.sh llava-tiny 0", 0, 5),
    ("scripts/train.sh llava-tiny-vista pretrain", 4, 14), ("checkpoint of llava-tiny-vista", 0, 0.5),
    ("scripts/eval.sh llava-tiny-vista 0", 2, 12), ("checkpoint of llava-tiny-vista-cosine", 0, 0.5),
    ("scripts/probe.sh llava-tiny-vista-cosine", 0, 5), ("python3 -m scripts.reporting.report", 0, 2),
]  # fmt: skip


def start(folder, log, command="scripts/reproduce.sh"):
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | SIZES, stdout=log.open("w"), stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def run(folder, *command):
    done = subprocess.run(command, cwd=folder, env=os.environ | SIZES, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


def left(folder):
    """Processes at work in this folder."""
    found = []
    for process in psutil.process_iter(["cwd", "status"]):
        cwd = process.info["cwd"]
        if cwd and cwd.startswith(str(folder)) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def outcome(folder, experiment, seed="results/tiny/seed0"):
    """All that a run leaves of an experiment: losses, answers, what the probe measured, weights."""
    seed = folder / seed
    losses, weights = {}, {}
    for stage, name in (("pretrain", "mm_projector.bin"), ("finetune", "pytorch_model.bin")):
        out = seed / f"{experiment}-{stage}"
        rows = json.loads((out / "trainer_state.json").read_text())["log_history"]
        losses[stage] = [{k: v for k, v in row.items() if "loss" in k and "train" not in k} for row in rows]
        loaded = torch.load(out / name, map_location="cpu", weights_only=True)
        weights[stage] = {key: tensor.view(torch.int16).numpy().tobytes() for key, tensor in loaded.items()}
    answers = {}
    for path in (seed / "eval" / experiment).glob("*/*/*_samples_*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        answers[path.parts[-3]] = sorted((row["doc_id"], row["target"], str(row["filtered_resps"])) for row in rows)
    probe = dict(np.load(seed / "probe" / f"{experiment}.npz"))
    return losses, answers, {key: value.tobytes() for key, value in probe.items()}, weights


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that is at work while the test that asks for it disturbs another: folder, process."""
    folder = small_kit(tmp_path_factory.mktemp("undisturbed") / "kit")
    process = start(folder, folder / "log")
    yield folder, process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def finished(undisturbed):
    folder, process = undisturbed
    assert process.wait(1800) == 0, (folder / "log").read_text()[-3000:]
    return folder


def checkpoints(folder, step):
    return {*(folder / "results/tiny/seed0").glob(f"{step.removeprefix('checkpoint of ')}-finetune/*checkpoint-*")}


@pytest.mark.faults
def test_killed_at_twenty_moments_it_ends_as_if_it_had_not_been(undisturbed, tmp_path):
    folder, log, moments, killed = small_kit(tmp_path / "kit"), tmp_path / "log", random.Random(0), []
    for step, least, most in KILLS:
        before, process = checkpoints(folder, step), start(folder, log)
        while not (f"] {step}" in log.read_text() or checkpoints(folder, step) - before) and process.poll() is None:
            time.sleep(0.05)
        time.sleep(moments.uniform(least, most))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed.append(step)
        assert process.wait() in (-signal.SIGKILL, 0), log.read_text()[-3000:]
        psutil.wait_procs(left(folder), timeout=5)  # on a busy machine a killed process takes its time to go
        assert not left(folder), "the whole process group was killed"
        print(f"{time.strftime('%X')} {'killed in' if process.returncode else 'too late for'} {step}", flush=True)
        if not process.returncode:  # a fast machine: all is done, and the moments to come, the cosine's, need work
            shutil.rmtree(folder / "results/tiny/seed0/llava-tiny-vista-cosine-finetune")
    assert len(killed) >= len(KILLS) - 2, killed
    code, output = run(folder, "scripts/reproduce.sh")
    assert code == 0, output[-3000:]
    expected = finished(undisturbed)
    for experiment in EXPERIMENTS:
        for ours, theirs in zip(outcome(folder, experiment), outcome(expected, experiment), strict=True):
            assert ours and ours == theirs
    assert (folder / "results/tiny/report.html").exists()
    assert not [*folder.rglob("*.partial"), *(folder / "upstream").rglob(".vista_patch-*")]


@pytest.fixture
def copy(undisturbed, tmp_path):
    """A finished run, to damage."""
    return shutil.copytree(finished(undisturbed), tmp_path / "kit", symlinks=True)


@pytest.mark.faults
def test_a_full_disk(copy, undisturbed):
    """Stage 2 on a disk that its first checkpoint fills; with more room the same command ends with the same bits."""
    out, finetune = copy / "results/tiny/seed0", ("scripts/train.sh", "llava-tiny", "finetune")
    kept = copy / "kept"
    out.rename(kept)
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", out], capture_output=True).returncode:
        pytest.skip("may not mount a file system here (root may)")
    try:
        shutil.copytree(kept / "llava-tiny-pretrain", out / "llava-tiny-pretrain")
        code, output = run(copy, *finetune)
        assert code == 1 and "make room" in output and "run the same command again" in output
        assert not (out / "llava-tiny-finetune/done").exists()
        subprocess.run(["mount", "-o", "remount,size=400m", out], check=True)
        assert run(copy, *finetune)[0] == 0
        shutil.copytree(kept / "eval", out / "eval")
        shutil.copytree(kept / "probe", out / "probe")
        assert outcome(copy, "llava-tiny") == outcome(undisturbed[0], "llava-tiny")
    finally:
        subprocess.run(["umount", out], check=True)


@pytest.mark.faults
@pytest.mark.parametrize("name", ("pytorch_model.bin", "config.json", "tokenizer.model"))
def test_half_a_checkpoint_is_not_evaluated(copy, name):
    seed = copy / "results/tiny/seed0"
    path = seed / "llava-tiny-finetune" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shutil.rmtree(seed / "eval/llava-tiny/digits")
    code, output = run(copy, "scripts/eval.sh", "llava-tiny")
    assert code == 1 and "left no whole results file" in output and not (seed / "eval/llava-tiny/digits").exists()


@pytest.mark.faults
def test_a_broken_checkpoint_is_named_and_what_follows_its_removal_is_the_same(copy, undisturbed):
    out, finetune = copy / "results/tiny/seed0/llava-tiny-finetune", ("scripts/train.sh", "llava-tiny", "finetune")
    (checkpoint,) = out.glob("checkpoint-*")
    (out / "done").unlink()
    for path in checkpoint.rglob("*optim_states.pt"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, output = run(copy, *finetune)
    assert code == 1 and f"{checkpoint.name}" in output, output
    assert not (out / "done").exists()
    shutil.rmtree(checkpoint)
    assert run(copy, *finetune)[0] == 0
    assert outcome(copy, "llava-tiny") == outcome(undisturbed[0], "llava-tiny")


@pytest.mark.faults
def test_a_removed_image_is_found_before_training(copy):
    next((copy / "results/tiny/data/images/digits").iterdir()).unlink()
    code, output = run(copy, "scripts/reproduce.sh")
    assert code == 1 and "results/tiny/data is not what" in output and "delete that folder" in output


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    folder = small_kit(tmp_path / "kit")
    (folder / "results").mkdir()
    with (folder / "results/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, output = run(folder, "scripts/reproduce.sh")
    assert code == 2 and "another run is at work in results/" in output and len(output.splitlines()) == 1
