"""Stock TinyLLaVA, unpatched and patched, really training in its own environment: 16 steps on small random models."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.helpers import ROOT, patched_tinyllava, python_of, run_stock, small_experiment

pytestmark = [pytest.mark.pins, pytest.mark.upstream]
STEPS = 16
FLAGS = {
    "connector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "attn_implementation": "eager",
    "training_recipe": "common", "tune_type_vision_tower": "frozen", "tune_type_connector": "full",
    "tokenizer_use_fast": False, "model_max_length": 160, "max_steps": STEPS, "weight_decay": 0.0,
    "warmup_ratio": 0.03, "lr_scheduler_type": "cosine", "lazy_preprocess": True, "logging_steps": 1,
    "save_strategy": "no", "report_to": "none", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    "seed": 0, "bf16": False, "use_cpu": True, "save_safetensors": False,
}  # fmt: skip
STAGES = {
    "pretrain": {"conv_version": "pretrain", "tune_type_llm": "frozen", "learning_rate": 1e-3},
    "finetune": {
        "conv_version": "phi", "tune_type_llm": "full", "group_by_modality_length": True, "learning_rate": 2e-4,
    },
}  # fmt: skip
# Its train.py needs a process group; on a CPU, a group of one.
RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541"}


def script(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tree():
    return patched_tinyllava()


@pytest.fixture(scope="module")
def stock_tree(tree, tmp_path_factory):
    stock = tmp_path_factory.mktemp("stock") / "tinyllava"
    shutil.copytree(tree, stock, ignore=shutil.ignore_patterns(".git"))
    subprocess.run([sys.executable, "-m", "vista_patch", "revert", stock], check=True, cwd=ROOT)
    return stock


@pytest.fixture(scope="module")
def parts(workshop):
    """The folder of test_training's data, with a random small Phi and SigLIP."""
    import torch

    from scripts.miniature import tiny_models

    torch.manual_seed(0)
    for name, new in (("siglip", tiny_models.siglip), ("phi", tiny_models.phi)):
        (workshop / name).mkdir()
        lines = ((workshop / "text.txt").read_text().splitlines(), workshop / name) if name == "phi" else ()
        for part in new(*lines):
            part.save_pretrained(workshop / name)
    return workshop


@pytest.fixture(scope="module")
def train(parts, tree):
    def run(out, stage, tree=tree, environment_name="cpu-tinyllava", **changes):
        flags = FLAGS | STAGES[stage] | {"output_dir": out, "data_path": parts / f"{stage}.json"}
        flags |= {"model_name_or_path": parts / "phi", "vision_tower": parts / "siglip"}
        flags |= {"image_folder": parts / "images"} | changes
        return run_stock("tinyllava.train.train", flags, tree, python=python_of(environment_name), **RANK)

    return run


@pytest.fixture(scope="module")
def pretrained(train, tmp_path_factory):
    """Stage 1 with the l2 term: where it is, and its log."""
    out = tmp_path_factory.mktemp("runs") / "tinyllava-pretrain"
    return out, train(out, "pretrain", vista="l2")


@pytest.fixture(scope="module")
def finetuned(train, pretrained, tmp_path_factory):
    """finetuned(metric): stage 2 on it, once for each metric."""
    done = {}

    def run(metric):
        if metric not in done:
            out = tmp_path_factory.mktemp("runs") / f"tinyllava-{metric}-finetune"
            done[metric] = out, train(out, "finetune", vista=metric, pretrained_model_path=pretrained[0])
        return done[metric]

    return run


@pytest.mark.parametrize("vista", ("off", "weight_0"))
def test_without_vista_training_is_bitwise_stock(train, stock_tree, pretrained, finetuned, tmp_path, vista):
    stock = tmp_path / "stock-finetune"
    logs = [train(stock, "finetune", tree=stock_tree, pretrained_model_path=pretrained[0])]
    if vista == "off":
        patched, log = finetuned("off")
    else:
        patched = tmp_path / "patched-finetune"
        log = train(patched, "finetune", vista="l2", vista_weight=0.0, pretrained_model_path=pretrained[0])
    assert len(log) == STEPS and logs[0] == log
    assert (stock / "pytorch_model.bin").read_bytes() == (patched / "pytorch_model.bin").read_bytes()


@pytest.mark.parametrize("metric", ("l2", "cosine"))
def test_the_log_adds_up_and_the_checkpoint_says_how(finetuned, pretrained, metric):
    out, log = finetuned(metric)
    for row in [*log, *pretrained[1]]:
        assert row["loss"] == pytest.approx(row["loss_ce"] + row["loss_vista"], abs=2e-4)  # loss: 4 digits
    assert {row["vista_share"] for row in pretrained[1]} == {1.0}
    assert {row["vista_share"] for row in log} == {0.5, 1.0}  # grouped by modality: one of two micro-batches is text
    assert json.loads((out / "config.json").read_text())["vista"]["metric"] == metric


def test_unpatched_stock_loads_and_runs_the_checkpoint(finetuned, stock_tree):
    out, _ = finetuned("l2")
    code = f"""
import sys, torch
from tinyllava.model import load_pretrained_model
model, *_ = load_pretrained_model({str(out)!r}, device_map="cpu")
ids = torch.tensor([[1, -200, 5]])
loss = model(ids, images=torch.zeros(1, 3, 64, 64), labels=torch.tensor([[1, -100, 5]])).loss
print("vista_patch" in sys.modules, model.config.vista["metric"], loss.item())
"""
    variables = os.environ | {"PYTHONPATH": str(stock_tree)}
    command = [python_of("cpu-tinyllava"), "-c", code]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=out)
    assert done.stdout.split()[-3:-1] == ["False", "l2"], done.stderr[-2000:]
    assert np.isfinite(float(done.stdout.split()[-1])) and "newly initialized" not in done.stderr


def test_the_maps_of_any_image_are_drawn(finetuned, tmp_path):
    out, _ = finetuned("l2")
    Image.new("RGB", (96, 48), "red").save(tmp_path / "red.png")
    command = ["--image", tmp_path / "red.png", "--prompt", "red circle?", "--out", tmp_path / "maps.png", out]
    done = script("scripts/probe.sh", *command)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "maps.png") as picture:
        assert min(picture.size) > 200


def test_the_exact_upstream_pins_give_the_same_losses(train, pretrained, finetuned, tmp_path):
    """torch 2.1.2 and TinyLLaVA's own versions, against the CPU environment, both stages in fp32."""
    stage_1, stage_2 = tmp_path / "tinyllava-pretrain", tmp_path / "tinyllava-finetune"
    logs = [train(stage_1, "pretrain", environment_name="tinyllava", vista="l2")]
    changes = {"vista": "l2", "pretrained_model_path": stage_1}
    logs.append(train(stage_2, "finetune", environment_name="tinyllava", **changes))
    for pinned, ours in zip(logs, (pretrained[1], finetuned("l2")[1]), strict=True):
        for key in ("loss_ce", "loss_vista", "vista_cosine"):
            values = [[row[key] for row in rows] for rows in (pinned, ours)]
            # The two torches sum in other orders: 1e-7 a step, grown by the steps of training.
            np.testing.assert_allclose(*values, rtol=2e-3, atol=2e-4, err_msg=key)


def test_both_stages_stopped_by_a_signal_and_continued_end_as_if_they_had_not_been(kit, parts, tree, tmp_path):
    """Under deepspeed, ZeRO-2 and ZeRO-3, by train.sh."""
    python_of("cpu-tinyllava")
    (tmp_path / ".venv-cpu-tinyllava").symlink_to(ROOT / ".venv-cpu-tinyllava")
    small_experiment(tmp_path, "tinyllava-tiny-vista", parts, ("phi", "siglip"), STAGES, {"model_max_length": 160})

    def finish(stage):
        running = kit(stage)
        output, _ = running.communicate()
        assert running.returncode == 0, output
        out = tmp_path / f"results/seed0/small-{stage}"
        log = json.loads((out / "trainer_state.json").read_text())["log_history"]
        saved = {path.relative_to(out): path.read_bytes() for path in out.glob("**/pytorch_model*.bin")}
        return log[:6], {path: data for path, data in saved.items() if "checkpoint" not in str(path)}

    whole = {stage: finish(stage) for stage in STAGES}
    shutil.rmtree(tmp_path / "results")
    for stage, (log, saved) in whole.items():
        running = kit(stage)
        out = tmp_path / f"results/seed0/small-{stage}"
        while running.poll() is None and not ((out / "train.log").exists() and (out / "train.log").stat().st_size):
            time.sleep(0.05)
        if stage == "pretrain":
            running.terminate()
        else:  # as Slurm does: to every process
            parent = psutil.Process(running.pid)
            for process in [parent, *parent.children(recursive=True)]:
                process.send_signal(signal.SIGUSR1)
        output, _ = running.communicate()
        assert running.returncode == 143, output
        assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"] and not (out / "done").exists()
        again = finish(stage)
        assert len(log) == 6 and again[0] == log and saved and again[1] == saved
