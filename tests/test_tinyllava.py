"""Stock TinyLLaVA, unpatched and patched, really training in its own environment: 16 steps on small random models."""

import inspect
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

from tests.helpers import ROOT, patched_tinyllava, python_of, qwen2, reference, run_stock, small_experiment

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
    """The folder of test_training's data, with a random small Phi, Qwen2 and SigLIP."""
    import torch

    from scripts.miniature import tiny_models

    torch.manual_seed(0)
    for name, new in (("siglip", tiny_models.siglip), ("phi", tiny_models.phi), ("qwen2", qwen2)):
        (workshop / name).mkdir()
        lines = () if name == "siglip" else ((workshop / "text.txt").read_text().splitlines(), workshop / name)
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


# -- the small profile's language model


@pytest.fixture(scope="module")
def qwen2_trained(train, parts, tmp_path_factory):
    """qwen2_trained(name, **changes): both stages with the small Qwen2, in safetensors; their folders and logs."""
    folder, done = tmp_path_factory.mktemp("qwen2"), {}

    def run(name, **changes):
        if name not in done:
            own = {"model_name_or_path": parts / "qwen2", "save_safetensors": True} | changes
            outs = [folder / f"{name}-{stage}" for stage in STAGES]
            logs = [train(outs[0], "pretrain", **own)]
            again = {"conv_version": "qwen2_base", "pretrained_model_path": outs[0]}
            done[name] = outs, [*logs, train(outs[1], "finetune", **own, **again)]
        return done[name]

    return run


def test_qwen2_without_vista_is_bitwise_stock_in_both_stages(qwen2_trained, stock_tree):
    stock, plain = qwen2_trained("stock", tree=stock_tree), qwen2_trained("off", vista="off")
    assert stock[1] == plain[1] and [len(log) for log in plain[1]] == [STEPS] * 2
    assert len({row["loss"] for row in plain[1][1]}) > 1
    names = ("language_model/pytorch_model.bin", "connector/pytorch_model.bin"), ("model.safetensors",)
    for files, *outs in zip(names, stock[0], plain[0], strict=True):
        for file in files:
            one, two = ((out / file).read_bytes() for out in outs)
            assert one == two, file


@pytest.mark.parametrize("metric", ("l2", "cosine"))
def test_qwen2s_term_is_the_fp64_references(qwen2_trained, tree, metric):
    """Of the checkpoint that stage 2 left, which holds all that is loaded: an fp32 model against an fp64 term."""
    (_, out), logs = qwen2_trained("l2", vista="l2")
    for row in (row for log in logs for row in log):
        assert row["loss"] == pytest.approx(row["loss_ce"] + row["loss_vista"], abs=2e-4)  # loss: 4 digits
    code = f"""
import torch
{inspect.getsource(reference)}
from tinyllava.model import load_pretrained_model
model, *_ = load_pretrained_model({str(out)!r}, device_map="cpu")
assert type(model.language_model).__name__ == "Qwen2ForCausalLM"
model = model.float().train()
rows = [[5, -200, 6, 7, 8, 9], [-200, 10, 11, 12], [13, 14, 15, 16, 17, 18]]
width = max(map(len, rows))
ids = torch.tensor([row + [model.tokenizer.pad_token_id] * (width - len(row)) for row in rows])
mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
inputs = dict(input_ids=ids, attention_mask=mask, labels=torch.where(mask & (ids >= 0), ids, -100),
              images=torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
plain = type(model).forward.__wrapped__(model, **inputs, output_hidden_states=True)
x, h = plain.hidden_states[0], plain.hidden_states[-1]
patches = x.shape[1] - width + 1
text, image = torch.zeros(x.shape[:2]).bool(), torch.zeros(x.shape[:2]).bool()
for b, row in enumerate(rows):
    kinds = [kind for token in row for kind in (["image"] * patches if token == -200 else ["text"])]
    for i, kind in enumerate(kinds):
        (text if kind == "text" else image)[b, i] = True
model.config.vista = dict(metric={metric!r}, reduction="mean", ramp="t/m", weight=1.0, detach_text=False)
ours = (model(**inputs).loss - plain.loss).double()
theirs = reference(x, h, text, image, {metric!r}, "mean", "t/m")
print(patches, float(ours), float(theirs))
torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
"""
    command = [python_of("cpu-tinyllava"), "-c", code]
    variables = os.environ | {"PYTHONPATH": f"{tree}:{ROOT}"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    patches, ours, _ = done.stdout.split()[-3:]
    assert int(patches) == 15 and float(ours) != 0 and "newly initialized" not in done.stderr
