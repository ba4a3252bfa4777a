"""Checks what ci/smoke.sh's runs left, for each backbone, and writes the summary results/smoke.md.

The variable SMOKE names the baselines, with spaces between.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from scripts import config

ROOT = Path(__file__).parents[1]
BASELINES = os.environ["SMOKE"].split()
SUMMARY = ROOT / "results/smoke.md"


@pytest.fixture(scope="session", autouse=True)
def summary():
    """{baseline: {what was measured: its value}}, the table of the page."""
    table = {}
    yield table
    measured = list(dict.fromkeys(name for values in table.values() for name in values))
    lines = [f"# Smoke test: {platform.node()}, kit {os.environ.get('KIT_COMMIT', 'unknown')}", ""]
    lines += [f"| | {' | '.join(table)} |", "|---" * (len(table) + 1) + "|"]
    lines += [
        f"| {name} | {' | '.join(values.get(name, 'failed') for values in table.values())} |" for name in measured
    ]
    SUMMARY.write_text("\n".join([*lines, "", "Passed and failed: smoke.xml.", ""]))


@pytest.fixture(scope="module", params=BASELINES)
def smoke(request, summary):
    return Smoke(request.param, summary.setdefault(request.param, {}))


class Smoke:
    """A baseline, its VISTA variant (l2), and what their runs left."""

    def __init__(self, name, row):
        self.row, self.variants = row, (name, f"{name}-vista")
        self.config = config.load(name)
        self.folder = ROOT / self.config["run"] / "seed0"
        self.data = ROOT / "results/tiny/data/eval"
        self.upstream = ROOT / "upstream" / self.config["backbone"]

    def log(self, variant, stage):
        state = json.loads((self.folder / f"{variant}-{stage}/trainer_state.json").read_text())
        return [row for row in state["log_history"] if "loss" in row]

    def python(self, *command, upstream=None):
        """What a command prints in the experiment's environment."""
        variables = os.environ | {"PYTHONPATH": f"{ROOT}:{upstream or self.upstream}", "HF_HUB_OFFLINE": "1"}
        python = ROOT / self.config["environment"] / "bin/python"
        done = subprocess.run([python, *command], cwd=ROOT, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


@pytest.mark.parametrize("stage", ("pretrain", "finetune"))
def test_the_cross_entropy_falls(smoke, stage):
    """The last fifth of the steps is compared with the first, by rank. A single step's value depends on how many of its
    rows are text alone, so a bound on a few steps would not do."""
    for variant in smoke.variants:
        log = smoke.log(variant, stage)
        ce = [row.get("loss_ce", row["loss"]) for row in log]  # the baseline's loss is the cross-entropy
        first, last = ce[: len(ce) // 5], ce[-(len(ce) // 5) :]
        name = f"CE, {stage}, {'VISTA' if 'vista' in variant else 'baseline'}"
        smoke.row[name] = f"{np.mean(first):.3f} → {np.mean(last):.3f}"
        assert len(log) == smoke.config[stage]["max_steps"] and np.isfinite(ce).all()
        assert mannwhitneyu(last, first, alternative="less").pvalue < 0.01


def test_the_term_falls_against_the_baseline(smoke):
    """On held-out answers, forward only (scripts/reporting/probe.py)."""
    terms = [np.load(smoke.folder / f"probe/{variant}.npz")["vista_mean"].mean() for variant in smoke.variants]
    smoke.row["VISTA term on held-out answers"] = "baseline {:.3f}, VISTA {:.3f}".format(*terms)
    assert terms[1] < terms[0]


def test_unpatched_stock_loads_the_checkpoint(smoke, tmp_path):
    stock = tmp_path / "stock"
    shutil.copytree(smoke.upstream, stock, ignore=shutil.ignore_patterns(".git"))
    subprocess.run([sys.executable, "-m", "vista_patch", "revert", stock], check=True, cwd=ROOT)
    code = f"""
from scripts.reporting import probe
from pathlib import Path
import torch
loaded = probe.load(Path({str(smoke.folder / (smoke.variants[1] + "-finetune"))!r}))
row = probe.held_out(Path({str(smoke.data)!r}))[0][0]
with torch.inference_mode():
    logp = loaded.forward(row, row["image"])[0]
model = loaded.model
print(hasattr(type(model).forward, "adds_vista"), model.config.vista["metric"], logp.isfinite().all().item())
"""
    assert smoke.python("-c", code, upstream=stock).split()[-3:] == ["False", "l2", "True"]


def test_lmms_eval_gives_its_keys(smoke):
    for variant in smoke.variants:
        tasks = config.load(variant)["tasks"]
        found = {}
        for task in tasks:
            (path,) = (smoke.folder / "eval" / variant / task).glob("*/*_results.json")
            found[task] = json.loads(path.read_text())["results"][task]["exact_match,none"]
        assert np.isfinite(list(found.values())).all()
        name = "VISTA" if "vista" in variant else "baseline"
        smoke.row[f"Accuracy, {name}"] = ", ".join(f"{task} {value:.3f}" for task, value in found.items())


def test_what_the_term_costs(smoke):
    """Measured, not judged: the miniature's step is too short for the term's share of a real one."""
    checkpoint = smoke.folder / f"{smoke.variants[0]}-finetune"
    cost = json.loads(smoke.python("ci/step_cost.py", checkpoint, smoke.data).splitlines()[-1])
    (off, peak_off), (l2, peak_l2) = cost["off"], cost["l2"]
    smoke.row["Step, paired"] = f"off {off:.1f} ms, l2 {l2:.1f} ms, {cost['overhead']:+.1f}% ({cost['device']})"
    smoke.row["Peak memory"] = f"off {peak_off:.0f} MB, l2 {peak_l2:.0f} MB" if peak_off else "on a GPU only"
    assert l2 > 0 and off > 0
