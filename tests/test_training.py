"""Stock train.py, unpatched and patched, really training: 32 steps on small random models."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from tests.helpers import ROOT, UPSTREAM, python_of, run_stock

GOLDEN = Path(__file__).parent / "golden.json"
STEPS = 32
FLAGS = {
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False, "model_max_length": 96, "tf32": False, "max_steps": STEPS, "weight_decay": 0.0,
    "warmup_ratio": 0.03, "lr_scheduler_type": "cosine", "lazy_preprocess": True, "logging_steps": 1,
    "save_strategy": "no", "report_to": "none", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    "seed": 0, "bf16": False,
}  # fmt: skip
STAGES = {
    "pretrain": {"version": "plain", "tune_mm_mlp_adapter": True, "learning_rate": 1e-3},
    "finetune": {"version": "v1", "image_aspect_ratio": "pad", "group_by_modality_length": True, "learning_rate": 2e-4},
}


@pytest.fixture(scope="session")
def stock_tree(tmp_path_factory):
    tree = tmp_path_factory.mktemp("stock") / "LLaVA"
    shutil.copytree(UPSTREAM, tree, ignore=shutil.ignore_patterns(".git"))
    subprocess.run([sys.executable, "-m", "vista_patch", "revert", tree], check=True, cwd=ROOT)
    return tree


# Stock turns the vision tower to fp16 where bf16 is off; in fp32 the losses can be compared between machines.
DRIVER = """
import runpy
import deepspeed  # before llava, whose bare except hides what an import order breaks
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
CLIPVisionTower.to = lambda self, **_: self
runpy.run_path("scripts/training/stock.py", run_name="__main__")
"""


def train(workshop, out, stage, tree=UPSTREAM, launcher=(), python=sys.executable, **changes):
    """One stage of LLaVA."""
    flags = FLAGS | STAGES[stage] | {"output_dir": out, "data_path": workshop / f"{stage}.json"} | changes
    flags |= {
        "model_name_or_path": workshop / "llama",
        "vision_tower": workshop / "clip",
        "image_folder": workshop / "images",
    }
    driver = ["scripts/training/gloo.py"] if launcher else ["-c", DRIVER]
    return run_stock("llava.train.train", flags, tree, driver, launcher, python)


def weights(out):
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")} or (
        out / "mm_projector.bin"
    ).read_bytes()


@pytest.fixture(scope="session")
def runs(workshop, tmp_path_factory):
    """Both stages of a variant on the patched tree, once: {stage: log}, and where they are."""
    done = {}

    def run(variant):
        if variant not in done:
            folder = tmp_path_factory.mktemp(f"llava-{variant}")
            flags = {"vista": variant}
            logs = {"pretrain": train(workshop, folder / "pretrain", "pretrain", **flags)}
            projector = {"pretrain_mm_mlp_adapter": folder / "pretrain/mm_projector.bin"}
            logs["finetune"] = train(workshop, folder / "llava", "finetune", **flags, **projector)
            done[variant] = folder, logs
        return done[variant]

    return run


@pytest.mark.parametrize("vista", ({}, {"vista": "l2", "vista_weight": 0.0}), ids=("off", "weight_0"))
def test_without_vista_training_is_bitwise_stock(workshop, stock_tree, runs, tmp_path, vista):
    folder, _ = runs("off")
    projector = {"pretrain_mm_mlp_adapter": folder / "pretrain/mm_projector.bin"}
    logs = [
        train(workshop, tmp_path / "stock", "finetune", tree=stock_tree, **projector),
        train(workshop, tmp_path / "patched", "finetune", **projector, **vista),
    ]
    assert len(logs[0]) == STEPS and logs[0] == logs[1]
    assert weights(tmp_path / "stock") == weights(tmp_path / "patched")


@pytest.mark.parametrize("variant", ("off", "l2", "cosine"))
def test_golden_trajectory(runs, variant):
    """A change that moves these numbers changes the computation: if it is meant, regenerate with GOLDEN=write."""
    _, logs = runs(variant)
    keys = ("loss",) if variant == "off" else ("loss_ce", "loss_vista", "vista_cosine")
    ours = {stage: {key: [row[key] for row in log] for key in keys} for stage, log in logs.items()}
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("GOLDEN") == "write":
        rounded = {s: {k: [round(v, 5) for v in values] for k, values in part.items()} for s, part in ours.items()}
        GOLDEN.write_text(json.dumps(golden | {variant: rounded}, indent=0).replace(",\n", ", ") + "\n")
        pytest.skip("golden written")
    for stage, part in golden[variant].items():
        for key, values in part.items():
            # fp32 sums run in another order on another CPU: 1e-7 a step, grown by 32 steps of training.
            np.testing.assert_allclose(ours[stage][key], values, rtol=2e-3, atol=2e-4, err_msg=f"{stage} {key}")


@pytest.mark.parametrize("variant", ("l2", "cosine"))
def test_the_log_adds_up_and_the_checkpoint_says_how(runs, variant):
    folder, logs = runs(variant)
    baseline = runs("off")[1]
    for stage, log in logs.items():
        for row in log:
            assert row["loss"] == pytest.approx(row["loss_ce"] + row["loss_vista"], abs=2e-4)  # loss: 4 digits
        assert "loss_vista" not in baseline[stage][0]
    shares = [row["vista_share"] for row in logs["finetune"]]
    assert {row["vista_share"] for row in logs["pretrain"]} == {1.0} and {0.0, 1.0} <= set(
        shares
    )  # grouped by modality
    assert json.loads((folder / "llava/config.json").read_text())["vista"]["metric"] == variant


def test_unpatched_stock_loads_and_runs_the_checkpoint(runs, stock_tree):
    folder, _ = runs("l2")
    code = f"""
import sys, torch
from llava.model.builder import load_pretrained_model
tokenizer, model, _, _ = load_pretrained_model({str(folder / "llava")!r}, None, "llava", device="cpu", device_map="cpu")
out = model.float()(torch.tensor([[1, -200, 5]]), images=torch.zeros(1, 3, 8, 8), labels=torch.tensor([[1, -100, 5]]))
print("vista_patch" in sys.modules, model.config.vista["metric"], out.loss.item())
"""
    environment = os.environ | {"PYTHONPATH": str(stock_tree)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=folder)
    assert done.stdout.split()[-3:-1] == ["False", "l2"], done.stderr[-2000:]
    assert np.isfinite(float(done.stdout.split()[-1]))


@pytest.mark.parametrize("variant", ("l2", "cosine"))
def test_training_on_the_term_lowers_it(workshop, runs, tmp_path, variant):
    """Paired on the same batches against a weight that only makes the term be logged."""
    folder, logs = runs(variant)
    projector = {"pretrain_mm_mlp_adapter": folder / "pretrain/mm_projector.bin"}
    logged = train(workshop, tmp_path / "llava", "finetune", vista=variant, vista_weight=1e-9, **projector)
    pairs = [(a, b) for a, b in zip(logs["finetune"], logged, strict=True) if a["vista_share"]]  # not text alone
    difference = [a["loss_vista"] - b["loss_vista"] for a, b in pairs]
    assert difference[0] == 0 and max(difference[-8:]) < 0


def test_two_runs_are_equal(workshop, runs, tmp_path):
    folder, logs = runs("l2")
    again = train(workshop, tmp_path / "pretrain", "pretrain", vista="l2")
    assert again == logs["pretrain"] and weights(tmp_path / "pretrain") == weights(folder / "pretrain")


def test_stage_2_killed_and_continued_ends_as_if_it_had_not_been(workshop, runs, tmp_path):
    folder, logs = runs("l2")
    out = tmp_path / "llava"
    flags = {"vista": "l2", "pretrain_mm_mlp_adapter": folder / "pretrain/mm_projector.bin"}
    flags |= {"save_strategy": "steps", "save_steps": 12}
    with ThreadPoolExecutor() as pool:
        first = pool.submit(train, workshop, out, "finetune", **flags)
        while not (out / "checkpoint-12").exists() and not first.done():
            time.sleep(0.05)
        for process in psutil.process_iter(["cmdline"]):
            if str(out) in (process.info["cmdline"] or ()):
                process.kill()
        with pytest.raises(AssertionError):
            first.result()
    assert not (out / "config.json").exists()
    assert train(workshop, out, "finetune", **flags) == logs["finetune"]
    assert weights(out) == weights(folder / "llava")


def test_stage_1_stopped_by_sigterm_and_continued_ends_as_if_it_had_not_been(kit, tmp_path):
    running = kit("pretrain")
    assert running.wait() == 0, running.stdout.read()
    (tmp_path / "results/seed0").rename(tmp_path / "whole")
    whole, cut = tmp_path / "whole/small-pretrain", tmp_path / "results/seed0/small-pretrain"

    running = kit("pretrain")
    while not (cut / "train.log").exists():
        time.sleep(0.05)
    second = kit("pretrain")
    assert second.wait() == 2 and "another run is training" in second.stdout.read()
    running.terminate()
    output, _ = running.communicate()
    assert running.returncode == 143 and "the same command continues" in output
    assert [path.name for path in cut.glob("checkpoint-*")] == ["checkpoint-1"] and not (cut / "done").exists()
    shutil.copytree(cut / "checkpoint-1", cut / "checkpoint-2")
    state = next(cut.glob("checkpoint-2/global_step*/*optim_states.pt"))
    state.write_bytes(state.read_bytes()[:-100])

    assert kit("pretrain").wait() == 0
    log = (cut / "train.log").read_text()
    assert re.search("cannot continue from .*checkpoint-2: File is not a zip file", log)
    histories = [json.loads((out / "trainer_state.json").read_text())["log_history"][:6] for out in (whole, cut)]
    assert len(histories[0]) == 6 and histories[0] == histories[1]
    assert weights(whole) == weights(cut)
    assert "tokens_per_second" in log and "gpu_hours" in log


def test_without_a_whole_checkpoint_nothing_starts_over(workshop, tmp_path):
    (tmp_path / "out/checkpoint-1").mkdir(parents=True)
    with pytest.raises(AssertionError, match=r"no checkpoint in .*/out can be continued"):
        train(workshop, tmp_path / "out", "pretrain")


def test_two_ranks_under_deepspeed_log_the_mean_over_ranks(workshop, runs, tmp_path):
    """The trainer gathers `loss` over the ranks; the terms must be gathered alike to add up to it. Stage 1's two ranks
    are test_cluster's."""
    changes = {"gradient_accumulation_steps": 1, "max_steps": 8, "vista": "l2"}
    changes |= {"deepspeed": UPSTREAM / "scripts/zero3.json", "bf16": True}
    changes["pretrain_mm_mlp_adapter"] = runs("l2")[0] / "pretrain/mm_projector.bin"
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", "29533"]
    log = train(workshop, tmp_path / "llava", "finetune", launcher=launcher, **changes)
    assert len(log) == 8
    for row in log:
        assert row["loss"] == pytest.approx(row["loss_ce"] + row["loss_vista"], abs=2e-4)  # loss: 4 digits
    tower = load_file(workshop / "clip/model.safetensors")  # frozen: as on disk, or deepspeed's gathering spoilt it
    left = load_file(tmp_path / "llava/model.safetensors")
    for name, weight in tower.items():
        assert left[f"model.vision_tower.vision_tower.{name}"].equal(weight.bfloat16()), name


@pytest.mark.pins
def test_the_exact_upstream_pins_give_the_same_losses(workshop, runs, tmp_path):
    """torch 2.1.2 and deepspeed 0.12.6 as LLaVA pins them, against the CPU environment, both stages in fp32."""
    python = python_of("llava")
    ours = runs("l2")[1]
    logs = {"pretrain": train(workshop, tmp_path / "pretrain", "pretrain", python=python, vista="l2")}
    projector = {"pretrain_mm_mlp_adapter": tmp_path / "pretrain/mm_projector.bin"}
    logs["finetune"] = train(workshop, tmp_path / "llava", "finetune", python=python, vista="l2", **projector)
    for stage, log in logs.items():
        for key in ("loss_ce", "loss_vista", "vista_cosine"):
            values = [[row[key] for row in rows] for rows in (log, ours[stage])]
            # The two torches sum in other orders: 1e-7 a step, grown by 32 steps of training.
            np.testing.assert_allclose(*values, rtol=2e-3, atol=2e-4, err_msg=f"{stage} {key}")


def test_a_flag_that_is_no_choice_is_named(workshop, tmp_path):
    with pytest.raises(AssertionError, match="invalid choice: 'L2'"):
        train(workshop, tmp_path / "out", "pretrain", vista="L2")


def test_a_non_finite_loss_stops_the_run(workshop, tmp_path):
    with pytest.raises(AssertionError, match=r"VISTA: loss_ce and loss_vista not finite.*before step"):
        train(workshop, tmp_path / "out", "pretrain", vista="l2", learning_rate=1e25)
    assert not (tmp_path / "out/mm_projector.bin").exists()


def test_the_rows_of_a_non_finite_step_are_kept_and_replaying_them_reproduces_it(kit, workshop, tmp_path):
    """One row's text holds a character whose embedding is NaN."""
    import torch
    from transformers import LlamaForCausalLM, LlamaTokenizer

    rows = json.loads((workshop / "pretrain.json").read_text())
    rows[7]["conversations"][1]["value"] += " \u00e9"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    model = LlamaForCausalLM.from_pretrained(workshop / "llama")
    tokenizer = LlamaTokenizer.from_pretrained(workshop / "llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("\u00e9").input_ids[-1]] = torch.nan
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "llama")
    config = tmp_path / "scripts/configs/small.toml"
    text = config.read_text().replace(f"{workshop}/llama", f"{tmp_path}/llama")
    text = text.replace(f"{workshop}/pretrain.json", f"{tmp_path}/rows.json").replace(
        "save_steps = 4", "save_steps = 1"
    )
    config.write_text(text)

    out = tmp_path / "results/seed0/small-pretrain"
    for folder, arguments in ((out, ()), (out / "replay", ("0", "replay"))):
        running = kit("pretrain", *arguments)
        output, _ = running.communicate()
        assert running.returncode == 1 and "FloatingPointError: VISTA: loss_ce and loss_vista not finite" in output
        kept = json.loads((folder / "nonfinite.json").read_text())
        assert len(kept) == 8 and rows[7] in kept and f"ids: {kept[0]['id']}, {kept[1]['id']}" in output
    checkpoints = [path.name for path in out.glob("checkpoint-*")]
    assert len(checkpoints) == 1 and (out / "replay" / checkpoints[0]).is_symlink()


@pytest.fixture(scope="session")
def unlabelled(workshop):
    """Two-stage data in which stock drops all labels of row 5: "</s>" in an answer gives it a round too many."""
    rows = json.loads((workshop / "finetune.json").read_text())
    rows = [row | {"conversations": row["conversations"][:2]} for row in rows]  # some of two turns are mismatched too
    rows[5]["conversations"][1]["value"] = "red </s> blue"
    path = workshop / "unlabelled.json"
    path.write_text(json.dumps(rows))
    return {
        "data_path": path, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 8,
        "group_by_modality_length": False,
    }  # fmt: skip


def test_a_micro_batch_without_labels_stops_the_run_and_says_so(workshop, unlabelled, tmp_path):
    said = r"no token has a label: its loss is 0/0. Its ids: 5\. Stock drops .* set unlabelled = \"skip\""
    with pytest.raises(AssertionError, match=said):
        train(workshop, tmp_path / "llava", "finetune", **unlabelled, logging_nan_inf_filter=False)
    assert rows_without_labels(tmp_path / "llava") == ["5"]


def rows_without_labels(out):
    return [row["id"] for row in json.loads((out / "nonfinite.json").read_text()) if "</s>" in str(row)]


def test_a_micro_batch_without_labels_may_count_nothing_as_in_stock(workshop, stock_tree, unlabelled, tmp_path):
    """Stock goes on, since the gradient of 0/0 is 0: the weights are the same to the bit."""
    stock = train(workshop, tmp_path / "stock", "finetune", tree=stock_tree, **unlabelled)
    skipped = {"unlabelled": "skip", "logging_nan_inf_filter": False}
    ours = train(workshop, tmp_path / "llava", "finetune", **unlabelled, **skipped)
    assert len(ours) == 8 and all(np.isfinite(row["loss"]) for row in ours)
    assert weights(tmp_path / "stock") == weights(tmp_path / "llava")
    differ = [a["loss"] != b["loss"] for a, b in zip(stock, ours, strict=True)]
    assert sum(differ) <= 1  # stock's log shows another figure at that step


def test_another_nan_stops_it_all_the_same(workshop, unlabelled, tmp_path):
    with pytest.raises(AssertionError, match="FloatingPointError: loss is nan at step"):
        train(
            workshop, tmp_path / "llava", "finetune", **unlabelled, unlabelled="skip", logging_nan_inf_filter=False,
            learning_rate=1e25,
        )  # fmt: skip


def test_a_picture_that_breaks_in_mid_training_is_named(workshop, tmp_path):
    rows = json.loads((workshop / "pretrain.json").read_text())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows[7]["image"] = str(tmp_path / "broken.png")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    said = rf"row 7 of the data \(id {rows[7]['id']}, image {tmp_path}/broken.png\) cannot be used: Unidentified"
    with pytest.raises(AssertionError, match=said):
        train(workshop, tmp_path / "out", "pretrain", data_path=tmp_path / "rows.json")


def test_nothing_is_left_of_a_training_whose_script_was_killed_without_a_home(kit, tmp_path):
    def left():
        return [p for p in psutil.process_iter(["cmdline"]) if "small-pretrain" in " ".join(p.info["cmdline"] or ())]

    running = kit("pretrain", without=("HOME", "XDG_CACHE_HOME"))
    log = tmp_path / "results/seed0/small-pretrain/train.log"
    while running.poll() is None and not (log.exists() and "Setting CUDA_VISIBLE_DEVICES" in log.read_text()):
        time.sleep(0.05)
    assert running.poll() is None, running.stdout.read()
    before = left()
    running.kill()
    running.wait()
    psutil.wait_procs(before, timeout=40)
    assert before and not left()


def test_out_of_memory_in_mid_stage_a_smaller_micro_batch_goes_on(kit, tmp_path):
    """And another number of ranks does not: each has its part of the optimizer's state."""
    running = kit("pretrain")
    out = tmp_path / "results/seed0/small-pretrain"
    while running.poll() is None and not (out / "train.log").exists():
        time.sleep(0.05)
    running.terminate()
    assert running.wait() == 143, running.stdout.read()
    refused = kit("pretrain", RANKS="2")
    output, _ = refused.communicate()
    assert refused.returncode == 2 and "go on with RANKS=1: ranks (RANKS) was 1, is 2" in output
    smaller = kit("pretrain", PER_DEVICE="2")
    output, _ = smaller.communicate()
    assert smaller.returncode == 0 and "(PER_DEVICE) was 4, is 2" in output, output
    assert "was 4, is 2" in (out / "train.log").read_text()
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4, 5, 6]
