"""scripts/reporting/report.py: statistics against slow references and the paper, refusals, the page in a browser."""

import base64
import html
import http.server
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from scripts import config
from scripts.data import catalog
from scripts.evaluation import results
from scripts.evaluation.results import ResultError, can_cider, identity, load_columns, read, record
from scripts.reporting import calibration, markup, paper, report, runs, statistics, verdicts
from tests.helpers import ROOT, VARIANTS, N, make_run, write_task
from vista_patch.config import VistaConfig


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


# -- statistics


def test_bootstrap_against_a_slow_reference():
    rng = np.random.default_rng(1)
    a, b = (rng.random(150) < 0.75).astype(float), (rng.random(150) < 0.65).astype(float)
    fast = statistics.interval((a - b).mean(), np.subtract(*statistics.resample(a, b)))
    slow_random, draws = random.Random(2), []
    for _ in range(10_000):
        picked = [slow_random.randrange(150) for _ in range(150)]
        draws.append(sum(a[i] - b[i] for i in picked) / 150)
    draws.sort()
    # Both are Monte Carlo: with 10,000 draws of sd 0.055 the 2.5% quantile has a standard error of 0.0015.
    assert fast["ci95"] == pytest.approx([draws[250], draws[9750]], abs=0.008)
    assert fast["p"] == pytest.approx(2 * sum(d <= 0 for d in draws) / 10_000, abs=0.02)


def test_bootstrap_over_seeds_and_questions_against_a_slow_reference():
    """Three seeds, of which one is far from the others, and both experiments drawn alike."""
    rng = np.random.default_rng(1)
    a, b = (rng.random((3, 100)) < [[0.8], [0.7], [0.5]]).astype(float), (rng.random((3, 100)) < 0.6).astype(float)
    fast = statistics.interval((a - b).mean(), np.subtract(*statistics.resample(a, b)))
    slow_random, draws = random.Random(2), []
    for _ in range(10_000):
        seeds, picked = slow_random.choices(range(3), k=3), slow_random.choices(range(100), k=100)
        draws.append(sum(a[s, i] - b[s, i] for s in seeds for i in picked) / 300)
    draws.sort()
    # Monte Carlo, with draws of sd 0.1.
    assert fast["ci95"] == pytest.approx([draws[250], draws[9750]], abs=0.015)
    alone = statistics.interval(0, np.subtract(*statistics.resample(a.mean(0), b.mean(0))))
    assert np.ptp(fast["ci95"]) > 1.3 * np.ptp(alone["ci95"])  # it knows how far the seeds are apart
    assert (statistics.resample(a[:1], b[:1]) == statistics.resample(a[0], b[0])).all()


def test_the_smallest_effect_is_seen_four_times_in_five():
    rng, seeds = np.random.default_rng(0), 4
    seen = stats.ttest_1samp(rng.normal(statistics.detectable(seeds), 1, (20_000, seeds)), 0, axis=1).pvalue < 0.05
    assert seen.mean() == pytest.approx(0.8, abs=0.01)
    assert statistics.smallest([1.0, 2.0]) is None  # two seeds tell no spread
    assert statistics.smallest([1.0, 3.0, 5.0, 7.0]) == pytest.approx(statistics.detectable(4) * (20 / 3) ** 0.5)


def test_with_three_seeds_the_report_says_the_smallest_effect_that_could_have_been_seen(tmp_path):
    report.main([str(make_run(tmp_path, seeds=3))])
    group = json.loads((tmp_path / "report.json").read_text())["groups"]["llava-tiny"]
    text = (tmp_path / "report.md").read_text()
    pair = group["paired"]["llava-tiny-vista"]["digits"]
    scores = [group["table"][name]["digits"]["per_seed"] for name in ("llava-tiny-vista", "llava-tiny")]
    spread = np.std(np.subtract(*scores), ddof=1)
    assert pair["smallest"] == pytest.approx(statistics.detectable(3) * spread)
    assert "| Smallest seen |" in text and f"| {pair['smallest']:.2f} |" in text
    assert "Bootstrap over the seeds and, in each, over the questions" in text


def test_bootstrap_is_seeded_and_paired():
    a = np.arange(50) % 2.0
    assert (statistics.resample(a, a)[0] == statistics.resample(a, a)[1]).all()
    assert (statistics.resample(a, 1 - a, 100) == statistics.resample(a, 1 - a, 100)).all()
    assert statistics.interval(0, np.zeros(10_000))["p"] == 1


def test_mcnemar_is_the_binomial_tail():
    a, b = np.array([1] * 14 + [0] * 4 + [1] * 30), np.array([0] * 14 + [1] * 4 + [1] * 30)
    assert statistics.mcnemar(a, b) == pytest.approx(sum(math.comb(18, k) for k in range(14, 19)) / 2**18)
    assert statistics.mcnemar(b, b) == 1


def test_bootstrap_of_strata_is_stratified():
    a, b = np.repeat([0.0, 1.0], [10, 30]), np.repeat([1.0, 0.0], [20, 20])
    draws = statistics.resample(a, b, 20_000)
    assert draws.mean(1) == pytest.approx([0.75, 0.5], abs=0.005)
    assert draws.std(1) == pytest.approx([(0.75 * 0.25 / 40) ** 0.5, (0.25 / 40) ** 0.5], rel=0.05)


# -- the paper


def test_the_papers_tables_are_whole():
    sizes = {table: sum(c.table == table for c in load_columns()) for table in (1, 2, 3)}
    assert sizes == {1: 6, 2: 8, 3: 5} and len(paper.ROWS) == 6
    for name, row in paper.ROWS.items():
        assert {t: len(printed.scores) for t, printed in row.tables.items()} == sizes
        assert list(row.scores) == [column.name for column in load_columns()]
        assert all((printed.delta is not None) == ("vista" in name) for printed in row.tables.values())


def test_three_of_the_papers_twelve_deltas_follow_from_its_scores():
    """Recorded, so that nobody looks for the error here."""
    rows = {(row.name, row.table): row for row in paper.deltas()}
    follows = {key for key, row in rows.items() if row.follows}
    llava = {("llava-v1.5-7b-vista-cosine", 1), ("llava-v1.5-7b-vista", 1)}
    assert len(rows) == 12 and follows == llava | {("tinyllava-3b-vista", 2)}
    # By hand: 0.71, 5.26, 0.89, 1.22, 2.81 and 5.44 %.
    assert rows["llava-v1.5-7b-vista", 1].computed == pytest.approx(2.72, abs=0.005)


@pytest.mark.parametrize(
    "ci95, value, paper, whole, verdict",
    [
        ([0.5, 1.5], 1.0, 1.2, True, "reproduced"),
        ([0.5, 1.5], 1.0, 2.0, True, "reproduced, but smaller"),
        ([-1.5, -0.5], -1.0, -0.2, True, "reproduced, but larger"),
        ([-0.5, 1.5], 0.5, 1.2, True, "cannot tell: 0 and the paper's fit both"),
        ([-0.5, 1.5], 0.5, 2.0, True, "not reproduced: too small"),
        ([-0.5, 1.5], 0.5, 0.0, True, "reproduced: no difference"),
        ([0.5, 1.5], 1.0, -1.0, True, "not reproduced: the opposite"),
        ([0.5, 1.5], 1.0, 0.0, True, "not reproduced: a difference"),
        ([0.5, 1.5], 1.0, 1.2, False, "cannot tell: not the whole split"),
        (None, 1.0, 1.2, True, "cannot tell: no interval"),
    ],
)
def test_a_verdict_respects_the_interval(ci95, value, paper, whole, verdict):
    assert verdicts.claim({"ci95": ci95, "value": value, "paper": paper}, whole) == verdict


def test_a_score_is_the_papers_within_two_standard_errors():
    cell = {"score": 50.0, "stderr": 1.0, "paper": 52.7, "whole": True}
    assert verdicts.level(cell) == "within noise" and verdicts.level(cell | {"paper": 52.8}) == "differs"
    assert verdicts.level(cell | {"stderr": None}).startswith("cannot tell")
    assert verdicts.level(cell | {"whole": False}).startswith("cannot tell")


# -- reading and refusing


def test_scores_and_verdicts(run):
    report.main([str(run)])
    whole = json.loads((run / "report.json").read_text())
    r = whole["groups"]["llava-tiny"]
    assert r["table"]["llava-tiny"]["digits"]["n"] == N and whole["manifests"]["llava"]["kit"]
    means = {name: [r["table"][name][t]["score"] for t in ("digits", "easyvqa")] for name in VARIANTS}
    for name, d in r["delta"].items():
        assert d["0"]["value"] == pytest.approx(paper.delta(means[name], means[VARIANTS[0]]))
    log = runs.load_log(run / "seed0/llava-tiny-vista-finetune")
    assert len(log["ce"]) == 40 and len(log["vista"]) == 36  # a step of text alone has no term
    text = (run / "report.md").read_text()
    first = [text.index(f"](figures/llava-tiny/{name}.png)") for name in ("scores", "differences")]
    assert sorted([*first, text.index("\n|"), text.index("\n- ")]) == [*first, text.index("\n|"), text.index("\n- ")]
    assert "NO COMPARISON" not in text and text.count("llava-tiny sees") == 2
    assert re.search(
        r"llava-tiny-vista: the mean relative gain over llava-tiny is \+.*better in this one run each", text
    )
    assert re.search(r"llava-tiny-vista-cosine: the mean relative gain over .*no measurable difference", text)
    assert text.count("falls with the token's position") == 3
    assert r["blind"][0]["most_frequent"] == 100 * 3 / 8  # half of the yes and no, a quarter of the digits


def test_a_blind_baseline_is_said_at_the_top(tmp_path):
    report.main([str(make_run(tmp_path, blind_accuracy=0.7))])
    first = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("-"))
    assert first.startswith("- **NO COMPARISON WITH llava-tiny MEANS ANYTHING")


def test_a_row_shows_what_it_was_trained_with(tmp_path):
    """As its checkpoints say, which its config need not say any more; a stage each, where they differ."""
    make_run(tmp_path, seeds=2)
    half = {"vista": VistaConfig(metric="l2", weight=0.5).to_dict()}
    for seed in (0, 1):
        (tmp_path / f"seed{seed}/llava-tiny-vista-finetune/config.json").write_text(json.dumps(half))
        for stage, settings in {"pretrain": {}, "finetune": {"vista": {"metric": "cosine"}}}.items():
            path = tmp_path / f"seed{seed}/llava-tiny-vista-cosine-{stage}/config.json"
            path.write_text(json.dumps(settings))
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "| Method | vista | vista_reduction | vista_ramp | vista_weight | vista_detach_text |" in text
    assert "| llava-tiny-vista | l2 | mean | t/m | 0.5 | false |" in text
    assert "| llava-tiny-vista-cosine, stage 1 | off |" in text and "-cosine, stage 2 | cosine | mean |" in text
    settings = json.loads((tmp_path / "report.json").read_text())["groups"]["llava-tiny"]["settings"]
    assert settings["llava-tiny-vista"]["stage 2"]["vista_weight"] == 0.5
    (tmp_path / "seed1/llava-tiny-vista-finetune/config.json").write_text(json.dumps({"vista": {"metric": "l2"}}))
    with pytest.raises(SystemExit, match=r"seed1/llava-tiny-vista-finetune/config.json: .* another seed has"):
        report.main([str(tmp_path)])
    (tmp_path / "seed1/llava-tiny-vista-finetune/config.json").write_text('{"vista": {"wieght": 1}}')
    with pytest.raises(SystemExit, match=r"config.json: not a checkpoint's config .*wieght"):
        report.main([str(tmp_path)])


def test_seeds_give_mean_and_standard_deviation(tmp_path):
    report.main([str(make_run(tmp_path, seeds=3))])
    r = json.loads((tmp_path / "report.json").read_text())
    cell = r["groups"]["llava-tiny"]["table"]["llava-tiny-vista"]["digits"]
    assert cell["score"] == pytest.approx(np.mean(cell["per_seed"]))
    assert cell["seed_sd"] == pytest.approx(np.std(cell["per_seed"], ddof=1)) and len(cell["per_seed"]) == 3
    assert "3 seeds" in (tmp_path / "report.md").read_text()


def test_two_backbones_in_one_report(run):
    make_run(run, variants=[f"tiny{name}" for name in VARIANTS])
    report.main([str(run)])
    groups = json.loads((run / "report.json").read_text())["groups"]
    assert list(groups) == ["llava-tiny", "tinyllava-tiny"]
    assert list(groups["tinyllava-tiny"]["delta"]) == ["tinyllava-tiny-vista", "tinyllava-tiny-vista-cosine"]
    table = (run / "report.md").read_text().split("## Scores")[1].split("###")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    both = [name for group in groups.values() for name in [*group["table"], f"*{group['baseline']}, blank image*"]]
    assert rows == ["Method", *both, "*the question's most frequent answer in training*"]


def test_what_is_missing_is_said_and_not_compared(run):
    make_run(run, variants=[f"tiny{name}" for name in VARIANTS])
    shutil.rmtree(run / "seed0/eval/tinyllava-tiny/digits_blind")
    shutil.rmtree(run / "seed0/eval/tinyllava-tiny-vista/digits")
    shutil.rmtree(run / "seed0/eval/tinyllava-tiny-vista-cosine")
    shutil.rmtree(run / "seed0/llava-tiny-finetune")
    (run / "seed0/probe/llava-tiny-vista.npz").unlink()
    report.main([str(run)])
    whole = json.loads((run / "report.json").read_text())
    assert whole["missing"] == [
        "llava-tiny, seed0: no trainer_state.json of stage 2",
        "llava-tiny-vista, seed0: not probed (scripts/probe.sh llava-tiny-vista 0)",
        "tinyllava-tiny, seed0: not evaluated on digits_blind",
        "tinyllava-tiny-vista, seed0: not evaluated on digits",
    ]
    r = whole["groups"]["tinyllava-tiny"]
    assert "NOT KNOWN whether tinyllava-tiny sees (digits)" in r["verdicts"][0]
    assert r["delta"]["tinyllava-tiny-vista"]["0"] | {"over": 1, "of": 2} == r["delta"]["tinyllava-tiny-vista"]["0"]
    assert list(r["paired"]["tinyllava-tiny-vista"]) == ["easyvqa"]
    row = next(x for x in (run / "report.md").read_text().splitlines() if x.startswith("| tinyllava-tiny-vista |"))
    assert row.split(" | ")[1] == "missing" and row.endswith("(1 of 2) |")


@pytest.mark.parametrize("there", (VARIANTS[:1], VARIANTS[1:2]))
def test_a_single_experiment_is_reported_without_comparison(tmp_path, there):
    report.main([str(make_run(tmp_path, variants=there))])
    r = json.loads((tmp_path / "report.json").read_text())
    group = r["groups"]["llava-tiny"]
    assert group["baseline"] == "llava-tiny" and not any(group["paired"].values())
    assert [name for name, cells in group["table"].items() if any(cells.values())] == there
    assert ("llava-tiny, seed0: not evaluated" in r["missing"]) == (there != VARIANTS[:1])


def edit(pattern, change):
    def apply(run):
        (path,) = run.glob(f"seed0/{pattern}")
        if change is None:
            path.unlink()
        else:
            path.write_text(change(path.read_text()))

    return apply


RESULTS = "eval/llava-tiny-vista/digits/*/*_results.json"
SAMPLES = "eval/llava-tiny-vista/digits/*/*_samples_digits.jsonl"


@pytest.mark.parametrize(
    "damage, message",
    [
        (edit(RESULTS, None), "0 results files"),
        (edit(RESULTS, lambda t: t[:40]), "not a whole lmms-eval result"),
        (edit(RESULTS, lambda t: t.replace("exact_match,none", "acc,none")), "exact_match,none"),
        (
            edit(RESULTS, lambda t: t.replace('"exact_match,none": 0', '"exact_match,none": 1')),
            "not the mean",
        ),
        (edit(SAMPLES, None), "samples_digits.jsonl"),
        (edit(SAMPLES, lambda t: t[t.index("\n") + 1 :]), "119 rows"),
        (edit(SAMPLES, lambda t: t.replace('"doc_id": 8,', '"doc_id": 0,')), "119 questions"),
        (edit(SAMPLES, lambda t: t.replace('"doc_id": 7,', '"doc_id": 999,')), "other questions"),
        (edit("llava-tiny-finetune/trainer_state.json", lambda t: t[:40]), "not a trainer state"),
        (edit("llava-tiny-finetune/trainer_state.json", lambda t: t.replace("3.0", "NaN")), "not finite"),
        (lambda run: shutil.rmtree(run / "seed0"), "Run scripts/eval.sh first"),
    ],
)
def test_refuses_what_is_missing_or_odd(run, damage, message):
    damage(run)
    with pytest.raises(SystemExit, match=f"(?s)^report.py: .*{re.escape(message)}"):
        report.main([str(run)])
    assert not list(run.glob("report*"))


NOT_WHOLE = {
    "no results": (lambda path: path.unlink(), RESULTS, "0 results files instead of one"),
    "two results": (lambda path: shutil.copy(path, path.with_name("2_results.json")), RESULTS, "2 results files"),
    "an empty file": (lambda path: path.write_text(""), RESULTS, "not a whole lmms-eval result"),
    "no JSON object": (lambda path: path.write_text("7"), RESULTS, "not a whole lmms-eval result"),
    "brackets without end": (lambda path: path.write_text("[" * 10**6), RESULTS, "RecursionError"),
    "no UTF-8": (lambda path: path.write_bytes(b'{"results": "\xff"}'), RESULTS, "UnicodeDecodeError"),
    "a NaN score": (lambda path: path.write_text(re.sub(r"(none\": )[01]\.\d+", r"\1NaN", path.read_text(), count=1)),
                    RESULTS, "exact_match,none is nan"),
    "a NaN sample": (lambda path: path.write_text(path.read_text().replace("1.0}", "NaN}", 1)),
                     SAMPLES, "not the mean"),
    "no samples": (lambda path: path.unlink(), SAMPLES, "FileNotFoundError"),
    "half of the samples": (lambda path: path.write_text(path.read_text()[:999]), SAMPLES, "JSONDecodeError"),
    "samples that are no rows": (lambda path: path.write_text("[]\n" * N), SAMPLES, "TypeError"),
}  # fmt: skip


@pytest.mark.parametrize("damage, pattern, message", NOT_WHOLE.values(), ids=NOT_WHOLE)
def test_a_result_that_is_not_whole_is_one_clear_answer(tmp_path, damage, pattern, message):
    folder = tmp_path / "seed0/eval/llava-tiny-vista/digits"
    write_task(folder, np.arange(N) % 2 == 0)
    assert read(folder, "digits").results["digits"].score == 50
    (path,) = tmp_path.glob(f"seed0/{pattern}")
    damage(path)
    with pytest.raises(ResultError, match=f"(?s)^{re.escape(str(folder))}.*{re.escape(message)}.*Run scripts/eval.sh"):
        read(folder, "digits")


def other_metric(folder, **scores):
    """Gives a task's results these metrics in the place of exact_match."""
    for path in folder.glob("*/*"):
        path.write_text(path.read_text().replace('"exact_match"', '"anls"'))
    (path,) = folder.glob("*/*_results.json")
    whole = json.loads(path.read_text())
    whole["results"][folder.name] = {"alias": folder.name} | {f"{key},none": value for key, value in scores.items()}
    path.write_text(json.dumps(whole))


def test_a_users_own_task_may_have_other_metrics(run):
    """It is whole, and the report says that it does not show it. The miniature's tasks must have exact_match."""
    folder = run / "seed0/eval/llava-tiny-vista/my_task"
    write_task(folder, np.arange(N) % 2 == 0)
    assert read(folder, "my_task").results["my_task"].score == 50
    other_metric(folder, anls=0.5, anls_stderr="N/A", f1=12, submission=None)
    assert read(folder, "my_task").results == {}
    report.main([str(run)])
    missing = json.loads((run / "report.json").read_text())["missing"]
    assert "llava-tiny-vista, seed0: my_task lacks exact_match, all that is shown of a task" in missing
    assert "my_task lacks exact_match" in (run / "report.md").read_text()


@pytest.mark.parametrize(
    "scores, message",
    [
        ({"anls": 0.5, "f1": math.nan}, "f1,none is nan"),
        ({"anls": math.inf}, "anls,none is inf"),
        ({"submission": None, "anls_stderr": 0.1}, "no metric is a number"),
        ({}, "no metric is a number"),
    ],
)
def test_a_users_own_task_without_a_finite_metric_is_not_whole(tmp_path, scores, message):
    write_task(tmp_path / "my_task", np.arange(N) % 2 == 0)
    other_metric(tmp_path / "my_task", **scores)
    with pytest.raises(ResultError, match=message):
        read(tmp_path / "my_task", "my_task")


def make_checkpoint(folder, weights=b"weights"):
    (folder / "checkpoint-50").mkdir(parents=True)
    for name, content in {"model.safetensors": weights, "config.json": b"{}", "tokenizer.model": b"words"}.items():
        (folder / name).write_bytes(content)
    for name in ("trainer_state.json", "training_args.bin", "train.log", "done", "checkpoint-50/model.safetensors"):
        (folder / name).write_bytes(os.urandom(8))
    return folder


def test_a_result_is_whole_by_its_checkpoints_contents_and_not_by_clocks(tmp_path):
    """A copy of a finished run has other times and the same contents."""
    one, copy, other = (make_checkpoint(tmp_path / name) for name in ("one", "copy", "other"))
    (other / "config.json").write_text("{ }")
    assert identity(one) == identity(copy) != identity(other)
    folder = tmp_path / "digits"
    write_task(folder, np.arange(N) % 2 == 0)
    with pytest.raises(ResultError, match="does not say which checkpoint it is of"):
        read(folder, "digits", identity(one))
    record(folder, identity(one))
    os.utime(one / "done")
    assert read(folder, "digits", identity(copy)).checkpoint == identity(one)
    with pytest.raises(ResultError, match="is of another checkpoint"):
        read(folder, "digits", identity(other))
    (folder / "checkpoint.json").write_text('{"sha')
    with pytest.raises(ResultError, match="does not name a checkpoint"):
        read(folder, "digits")


@pytest.mark.parametrize("change", (lambda c: (c / "model.safetensors").rename(c / "model-1.safetensors"),
                                    lambda c: (c / "model.safetensors").write_bytes(b"weight"),
                                    lambda c: (c / "tokenizer.model").unlink()))  # fmt: skip
def test_a_checkpoints_identity_is_all_that_its_model_is_loaded_from(tmp_path, change):
    checkpoint = make_checkpoint(tmp_path / "one")
    before = identity(checkpoint)
    change(checkpoint)
    assert identity(checkpoint) != before


def test_a_checkpoint_without_weights_has_no_identity(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(ResultError, match="holds no weights"):
        identity(tmp_path)


def test_tasks_of_different_checkpoints_are_not_one_experiments(run):
    for task, checkpoint in {"digits": "1" * 64, "easyvqa": "2" * 64}.items():
        record(run / "seed0/eval/llava-tiny" / task, checkpoint)
    with pytest.raises(SystemExit, match="eval/llava-tiny: its tasks are of different checkpoints"):
        report.main([str(run)])


# -- the paper's suite: stand-in answers, logged and scored by lmms-eval's own task code

CHOICE = {"A": "cat", "B": "dog", "C": "car", "D": "sun"}


def suite_task(task, rng, accuracy, n):
    """Rows as lmms-eval logs them (its own process_results) and {key: score} (its own aggregation)."""
    from lmms_eval.api.metrics import anls
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator, mmbench_process_results
    from lmms_eval.tasks.mme import utils as mme
    from lmms_eval.tasks.mmmu import utils as mmmu
    from lmms_eval.tasks.mmstar import utils as mmstar
    from lmms_eval.tasks.mmt import utils as mmt
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results
    from lmms_eval.tasks.ok_vqa.utils import ok_vqa_process_results
    from lmms_eval.tasks.seedbench import utils as seed
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val

    answers = ["cat"] * 4 + ["dog"] * 6
    rows = []
    for i in range(n):
        ok = rng.random() < accuracy
        letter, word = ("A", "dog") if ok else ("B", "sun" if i % 2 else "cat")
        if task == "vqav2_val":
            doc = {"question_id": i, "answers": [{"answer": a, "answer_id": k} for k, a in enumerate(answers)]}
            row = vqav2_process_results_val(doc, [word])
        elif task in ("ok_vqa_val2014", "textvqa_val"):
            scored = ok_vqa_process_results if task.startswith("ok") else textvqa_process_results
            row = scored({"question_id": i, "answers": list(answers)}, [word])
        elif task in ("gqa", "realworldqa", "ai2d"):
            row = {"exact_match": float(ok)}
        elif task == "docvqa_val":
            row = anls(["invoice 17", "17"], ["invoice 18" if ok else "total"])
        elif task == "seedbench":
            doc = {"answer": "A", "data_type": "video" if i % 5 == 0 else "image", "question_id": i}
            row = seed.seed_process_result(doc, [letter.lower()])
        elif task == "mmmu_val":
            doc = {"id": f"validation_{['Art', 'Math'][i % 2]}_{i}", "question_type": "multiple-choice"}
            doc |= {"answer": "A", "options": str(list(CHOICE.values()))}
            if i % 7 == 0:
                doc |= {"question_type": "open", "answer": "12"}
            row = mmmu.mmmu_process_results(doc, ["12" if ok and i % 7 == 0 else letter])
        elif task == "mmstar":
            doc = {
                "index": i,
                "answer": "A",
                "category": "math",
                "l2_category": ["geometry", "recognition"][i % 3 == 0],
            }
            row = mmstar.mmstar_process_results(doc, [letter])
        elif task == "mmt_val":
            row = mmt.mmt_process_results(CHOICE | {"answer": "A", "l2-category": "ocr"}, [letter])
        elif task == "ocrbench":
            kind = "Regular Text Recognition"
            row = ocrbench_process_results({"answer": ["dog"], "dataset": "IIIT5K", "question_type": kind}, [word])
        elif task.startswith("mmbench"):  # three rotations of each question
            doc = dict.fromkeys(("question", "hint", "source", "split", "category", "L2-category"), "nan") | CHOICE
            doc |= {"index": i // 3 + i % 3 * 10**6, "answer": "A"}
            row = mmbench_process_results(doc, [letter])
        elif task == "mme":  # two questions a picture
            doc = {"question_id": f"{i // 2}.png", "category": ["existence", "count", "code_reasoning"][i // 2 % 3]}
            row = mme.mme_process_results(doc | {"answer": "Yes"}, ["Yes" if ok else "No"])
        else:
            caption = {
                "answer": [f"the dog number {i}", "a dog"],
                "pred": f"dog {i}" if ok else "a red car",
                "ann_id": i,
            }
            row = {"refcoco_CIDEr": caption}
        rows.append({"doc_id": i, "target": "dog", "doc": {"id": i}} | row)

    def all_of(metric):
        return [row[metric] for row in rows if metric in row]

    match task:
        case "docvqa_val":
            return rows, {"anls,none": np.mean(all_of("anls"))}
        case "realworldqa" | "ai2d":
            return rows, {"exact_match,flexible-extract": np.mean(all_of("exact_match"))}
        case "seedbench":
            return rows, {"seed_image,none": seed.seed_aggregation_result(all_of("seed_image"))}
        case "mmmu_val":
            return rows, {"mmmu_acc,none": mmmu.mmmu_aggregate_results(all_of("mmmu_acc"))}
        case "mmstar":
            return rows, {"average,none": mmstar.mmstar_aggregate_results(all_of("average"))}
        case "mmt_val":
            return rows, {"accuracy,none": mmt.mmt_aggregate_results(all_of("accuracy"))}
        case "ocrbench":  # its aggregation adds to a global: one call a process
            return rows, {"ocrbench_accuracy,none": sum(r["score"] for r in all_of("ocrbench_accuracy")) / 1000}
        case "mmbench_en_dev" | "mmbench_cn_dev":
            return rows, {
                "gpt_eval_score,none": 100 * mmbench_evaluator.eval_result(all_of("gpt_eval_score"), "openai")[0]
            }
        case "mme":
            keys = ("mme_perception_score", "mme_cognition_score")
            return rows, {f"{key},none": mme.mme_aggregate_results(all_of(key)) for key in keys}
        case "refcoco_bbox_val" | "refcoco+_bbox_val" | "refcocog_bbox_val":
            if not can_cider():  # without Java nobody has the score either
                return rows, {"refcoco_CIDEr,none": accuracy}
            from lmms_eval.tasks.refcoco.utils import refcoco_cider

            return rows, {"refcoco_CIDEr,none": refcoco_cider(all_of("refcoco_CIDEr"))}
    return rows, {"exact_match,none": np.mean(all_of("exact_match"))}


def write_suite_task(root, name, task, accuracy, n=60):
    folder = root / "seed0/eval" / name / task / "seed0__llava"
    folder.mkdir(parents=True)
    rows, scores = suite_task(task, np.random.default_rng([len(task), len(name)]), accuracy, n)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"20260101_000000_samples_{task}.jsonl").write_text(lines)
    count = {"original": n, "effective": n}
    results = {"results": {task: scores}, "versions": {task: 0.0}, "n-samples": {task: count}}
    (folder / "20260101_000000_results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def suite_run(tmp_path_factory):
    """All 18 tasks of LLaVA's three experiments, two of TinyLLaVA's baseline."""
    root = tmp_path_factory.mktemp("full")
    tasks = {c.task: None for c in load_columns()}
    for name, accuracy in (("", 0.5), ("-vista", 0.65), ("-vista-cosine", 0.5)):
        for task in tasks:
            write_suite_task(root, f"llava-v1.5-7b{name}", task, accuracy)
    for task in ("gqa", "mme"):
        write_suite_task(root, "tinyllava-3b", task, 0.5)
    (root / "maps").mkdir()
    Image.new("RGB", (64, 32), "navy").save(root / "maps/cube.png")
    report.main([str(root)])
    return root


def test_every_column_of_the_paper_is_read(suite_run):
    whole = json.loads((suite_run / "report.json").read_text())
    table = whole["groups"]["llava-v1.5-7b"]["table"]
    columns = [c.name for c in load_columns()]
    for cells in table.values():
        assert list(cells) == columns and all(cells.values())
        for column, cell in cells.items():
            assert (cell["stderr"] or 0) > 0 or (column.startswith("RefCOCO") and not can_cider())
            assert cell["paper"] and cell["verdict"] == "cannot tell: not the whole split"
    n = {column: table["llava-v1.5-7b"][column]["n"] for column in columns}
    units = {"SEED-Bench (image)": 48, "MMBench EN": 20, "MMBench CN": 20, "MME perception": 20, "MME cognition": 10}
    assert n == dict.fromkeys(columns, 60) | units
    text = (suite_run / "report.md").read_text()
    assert text.count("### Table ") == 3 and "3 of 12 follow" in text and "maps/cube.png" in text
    assert "- tinyllava-3b-vista, seed0: not evaluated" in text
    row = next(row for row in text.splitlines() if row.startswith("| tinyllava-3b |"))
    assert [bool(re.match(r"\d+\.\d\d ± \d", cell)) for cell in row.split(" | ")[1:7]] == [False, False, True] + 3 * [
        False
    ]
    assert row.count("missing") == 5


def test_a_stratified_score_has_its_own_standard_error(suite_run):
    """MMStar: the mean of its categories' means, here 20 and 40 questions of equal weight."""
    folder = suite_run / "seed0/eval/llava-v1.5-7b/mmstar"
    (samples,) = folder.glob("*/*.jsonl")
    score = {}
    for line in samples.read_text().splitlines():
        row = json.loads(line)["average"]
        score.setdefault(row["l2_category"], []).append(100 * row["score"])
    errors = [np.std(s, ddof=1) / len(s) ** 0.5 / len(score) for s in score.values()]
    cell = json.loads((suite_run / "report.json").read_text())["groups"]["llava-v1.5-7b"]["table"]["llava-v1.5-7b"]
    assert cell["MMStar"]["stderr"] == pytest.approx(math.hypot(*errors))
    assert cell["MMStar"]["score"] == pytest.approx(np.mean([np.mean(s) for s in score.values()]))


def test_a_whole_split_gets_a_verdict(suite_run, monkeypatch):
    """The same results, of which the suite is said to have no more."""
    whole = {"SEED-Bench (image)": 48, "MME perception": 40, "MME cognition": 20}
    sized = [replace(column, n=whole.get(column.name, 60)) for column in load_columns()]
    monkeypatch.setattr(results, "load_columns", lambda tasks=None: [c for c in sized if not tasks or c.task in tasks])
    report.main([str(suite_run)])
    group = json.loads((suite_run / "report.json").read_text())["groups"]["llava-v1.5-7b"]
    paired = group["paired"]["llava-v1.5-7b-vista"]
    assert paired["GQA"]["paper"] == pytest.approx(0.55) and paired["GQA"]["ci95"][0] < paired["GQA"]["value"]
    said = {pair["verdict"].partition(":")[0].partition(",")[0] for pair in paired.values()}
    assert said <= {"reproduced", "not reproduced", "cannot tell"} and len(said) > 1
    assert group["delta"]["llava-v1.5-7b-vista"]["1"]["paper"] == pytest.approx(2.72, abs=0.01)
    table = group["table"]["llava-v1.5-7b"]
    known = {cell["verdict"] for column, cell in table.items() if can_cider() or not column.startswith("RefCOCO")}
    assert known == {"within noise", "differs"}


def test_a_judged_mmbench_has_a_score_alone(tmp_path):
    """lmms-eval does not log what the judge said: the rules alone give another score, and no standard error."""
    for name in ("llava-v1.5-7b", "llava-v1.5-7b-vista"):
        write_suite_task(tmp_path, name, "mmbench_en_dev", 0.5)
        (path,) = tmp_path.glob(f"seed0/eval/{name}/*/*/*_results.json")
        results = json.loads(path.read_text())
        results["results"]["mmbench_en_dev"]["gpt_eval_score,none"] += 5
        path.write_text(json.dumps(results))
    report.main([str(tmp_path)])
    group = json.loads((tmp_path / "report.json").read_text())["groups"]["llava-v1.5-7b"]
    assert group["table"]["llava-v1.5-7b"]["MMBench EN"]["stderr"] is None
    pair = group["paired"]["llava-v1.5-7b-vista"]["MMBench EN"]
    assert pair["value"] is not None and pair["ci95"] is None
    assert "no interval, as a column logs no per-sample scores" in (tmp_path / "report.md").read_text()


# -- calibration by a public checkpoint


@pytest.fixture
def public(tmp_path, monkeypatch):
    """public(shift): the sentence and the report's state of a public checkpoint, evaluated on all of three stand-in
    splits, of which its authors publish what it scores here, GQA's shifted."""
    sizes = {"MME perception": 40, "MME cognition": 20}
    columns = [replace(column, n=sizes.get(column.name, 60)) for column in load_columns()]
    monkeypatch.setattr(
        results, "load_columns", lambda tasks=None: [c for c in columns if not tasks or c.task in tasks]
    )
    name = "llava-v1.5-7b-public"
    for task in ("vqav2_val", "gqa", "mme"):
        write_suite_task(tmp_path, name, task, 0.5)
    folder = tmp_path / "seed0/eval" / name
    here = {"GQA": results.read(folder / "gqa", "gqa").results["GQA"].score, "VQAv2": 99.0}
    here["MME perception"] = results.read(folder / "mme", "mme").results["MME perception"].score

    def check(shift):
        published = replace(paper.PAPER.published[name], scores=here | {"GQA": here["GQA"] + shift})
        monkeypatch.setattr(calibration, "PAPER", replace(paper.PAPER, published={name: published}))
        report.main([str(tmp_path)])
        return json.loads((tmp_path / "report.json").read_text())["calibration"][name]

    check.folder = folder
    return check


def test_a_harness_is_calibrated_or_not_or_cannot_tell(public, tmp_path, capsys):
    """The standard error of GQA's 60 questions is 6.5: 2% of answers drawn anew explain 0.39 of it, that is 2.5."""
    found = public(2.0)
    assert found["state"] == "calibrated" and "this harness is calibrated. All 2 columns" in capsys.readouterr().out
    verdicts = {check["column"]: check["verdict"] for check in found["checks"]}
    assert verdicts == {"VQAv2": "cannot tell: another split", "GQA": "within noise", "MME perception": "within noise"}
    assert public(3.0)["state"] == "not calibrated"
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"(?m)^- \*\*NOT CALIBRATED: llava-v1.5-7b-public .* 1 of the 2 .*: GQA by -3.00", text)
    assert "## Scores" not in text and "### What cannot be compared, and why" in text
    assert text.startswith("# Calibration: ") and re.search(r"Task versions: gqa \S+, mme \S+, vqav2_val \S", text)
    shutil.rmtree(public.folder / "gqa")
    assert public(3.0)["state"] == "calibrated" and "Not evaluated: GQA." in capsys.readouterr().out
    shutil.rmtree(public.folder / "mme")
    assert public(3.0)["state"] == "cannot tell"


def test_trained_rows_are_read_against_the_calibration(public, tmp_path):
    write_suite_task(tmp_path, "llava-v1.5-7b", "gqa", 0.5)
    public(3.0)
    rows = [
        line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| llava-v1.5-7b | GQA |")
    ]
    assert len(rows) == 1 and rows[0].endswith("| differs |")
    shutil.rmtree(public.folder)
    assert public(0.0)["state"] == "missing"
    text = (tmp_path / "report.md").read_text()
    assert "llava-v1.5-7b-public is not evaluated" in text and "NOT CALIBRATED" not in text and "## Missing" in text


def test_each_public_checkpoint_is_an_experiment_that_downloads_it():
    for name, published in paper.PAPER.published.items():
        if published.public:
            loaded = config.load(name)
            sources, own = catalog.needed(loaded)
            assert not own and [s.repo for s in sources if str(s.to) == loaded["checkpoint"]] == [published.public]
            assert set(loaded["tasks"]) == {column.task for column in load_columns()}


def test_what_a_public_checkpoint_was_trained_on_is_said(tmp_path):
    for name in ("tinyllava-3b-public", "tinyllava-3b"):
        write_suite_task(tmp_path, name, "gqa", 0.5)
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "### tinyllava-3b-public" in text and "It was trained on ShareGPT4V's data" in text


# -- a file for a challenge's server


@pytest.fixture
def sent(tmp_path):
    """A whole vqav2_test of the public checkpoint, as lmms-eval 0.3.0 leaves it."""
    folder = tmp_path / "seed0/eval/llava-v1.5-7b-public/vqav2_test"
    write_submission(folder, range(60))
    return folder


def write_submission(folder, numbers):
    (folder / "models__llava-v1.5-7b").mkdir(parents=True)
    (folder / "submissions").mkdir()
    answers = [{"question_id": number, "answer": "yes"} for number in numbers]
    rows = [
        {"doc_id": i, "target": "answer", "doc": {"question_id": answer["question_id"]}, "submission": answer}
        for i, answer in enumerate(answers)
    ]
    stamp = folder / "models__llava-v1.5-7b/20260101_000000"
    Path(f"{stamp}_samples_vqav2_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {"results": {"vqav2_test": {"alias": "vqav2_test", "submission,none": None}}}
    found |= {"versions": {"vqav2_test": "Yaml"}, "n-samples": {"vqav2_test": {"effective": len(rows)}}}
    Path(f"{stamp}_results.json").write_text(json.dumps(found))
    (folder / "submissions/vqav2-test-submission-2026-01-01-00-00-00.json").write_text(json.dumps(answers))


def resend(change):
    def write(folder):
        (path,) = folder.glob("submissions/*.json")
        answers = json.loads(path.read_text())
        path.write_text(json.dumps(change(answers)))

    return write


@pytest.mark.parametrize(
    "damage,message",
    [
        (resend(lambda answers: answers[:-2]), "refuse it: questions without an answer: 2. Run scripts/eval.sh"),
        (resend(lambda answers: [*answers, answers[0]]), "answers to a question that has one already: 1"),
        (
            resend(lambda answers: [*answers[:-1], answers[-1] | {"question_id": 99}]),
            "questions without an answer: 1, answers to questions that were not asked: 1",
        ),
        (resend(lambda answers: [answers[0] | {"answer": 3}, *answers[1:]]), "answers that are no text: 1"),
        (resend(lambda answers: answers[0]), "not a whole lmms-eval result of vqav2_test"),
        (lambda folder: shutil.rmtree(folder / "submissions"), "has 0 files for the challenge's server"),
        (lambda folder: (folder / "score.txt").write_text("78,5"), "score.txt: holds no score in %. Write what"),
        (lambda folder: (folder / "score.txt").write_text("785"), "score.txt: holds no score in %"),
    ],
)
def test_a_file_that_the_server_would_refuse_is_refused_here(sent, damage, message):
    assert read(sent, "vqav2_test").submission.questions == 60
    damage(sent)
    with pytest.raises(ResultError, match=re.escape(message)):
        read(sent, "vqav2_test")


def test_the_file_lies_beside_the_report_and_the_servers_score_calibrates(sent, tmp_path, monkeypatch):
    report.main([str(tmp_path)])
    name = "llava-v1.5-7b-public"
    beside = tmp_path / f"submissions/{name}-seed0-vqav2_test.json"
    (file,) = sent.glob("submissions/*.json")
    assert beside.read_bytes() == file.read_bytes()
    text = (tmp_path / "report.md").read_text()
    row = f"| {name} | seed0 | VQAv2 | submissions/{beside.name} | 60 of 447,793: refused | \u2013 | 78.50 | \u2013 |"
    assert row in text and "lacks exact_match" not in text

    def of_vqav2(score):
        (sent / "score.txt").write_text(score)
        report.main([str(tmp_path)])
        (check,) = json.loads((tmp_path / "report.json").read_text())["calibration"][name]["checks"][:1]
        return check["column"], check["verdict"]

    assert of_vqav2("78.54\n") == ("VQAv2", "cannot tell: not the whole split")
    whole = {task: replace(challenge, n=60) for task, challenge in results.load_challenges().items()}
    monkeypatch.setattr(results, "load_challenges", lambda: whole)
    # 107,394 answers: a standard error of at most 0.125. 2% of them drawn anew explain 0.05, rounding 0.05.
    assert of_vqav2("78.59") == ("VQAv2", "within noise") and of_vqav2("78.61") == ("VQAv2", "differs")
    assert "| 60 of 60 | 78.61 ± 0.13 | 78.50 | +0.11 |" in (tmp_path / "report.md").read_text()


def test_the_papers_llava_row_is_the_public_checkpoints(capsys):
    """And TinyLLaVA's is not."""
    equal = {name: (len(row.equal()), len(row.scores)) for name, row in paper.PAPER.published.items()}
    assert equal == {"llava-v1.5-7b-public": (5, 5), "llava-v1.5-7b-lora": (0, 5), "tinyllava-3b-public": (0, 4)}
    command = [sys.executable, "-m", "scripts.reporting.paper"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "3 of the paper's 12 printed deltas follow" in said and "row is the public checkpoint's: 5 of the 5" in said


def test_there_is_one_list_of_what_cannot_be_compared():
    """The docs' is paper.toml's."""
    words = " ".join((ROOT / "docs/reproduce.md").read_text().split()).replace("`", "")
    listed = [f"- **{entry.numbers}:** {entry.why}" for entry in paper.PAPER.incomparable]
    assert len(listed) > 9 and " ".join(listed) in words


# -- the maps of any image


@pytest.fixture
def checkpoint(workshop, make_model, tmp_path):
    """save(name, seed): a random LLaVA in a folder of any name, with the workshop's tokenizer."""
    import torch
    from transformers import AutoTokenizer

    def save(name, seed):
        model = make_model(image_aspect_ratio="pad")
        model.resize_token_embeddings(512)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(workshop / "llama", use_fast=False).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def draw_maps(tmp_path, *checkpoints):
    image = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype="uint8")).save(image)
    command = [ROOT / "scripts/probe.sh", "--image", image, "--prompt", "red circle?", "--out", tmp_path / "maps.png"]
    return subprocess.run([*command, *checkpoints], capture_output=True, text=True)


def test_maps_of_any_image_and_checkpoints(checkpoint, tmp_path):
    folders = checkpoint("one", 0), checkpoint("other", 1)
    done = draw_maps(tmp_path, *folders)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "maps.png") as picture:
        assert min(picture.size) > 200
    assert not list(tmp_path.glob("*.partial"))

    import torch

    from scripts.reporting import probe

    probe.one(folders[0], tmp_path / "wide.png", "red circle?", tmp_path / "one.npz")
    arrays = np.load(tmp_path / "one.npz")
    model = probe.load(folders[0])
    with torch.inference_mode():  # the definition, token by token
        ids = model.tokenizer("red circle?", add_special_tokens=False).input_ids
        text = torch.stack([model.model.get_input_embeddings().weight[i] for i in ids]).mean(0)
        pixels = model.pixels(Image.open(tmp_path / "wide.png").convert("RGB"))
        tokens = model.model.get_model().mm_projector(model.model.get_vision_tower()(pixels))[0]
        expected = [float(text @ token / text.norm() / token.norm()) for token in tokens]
    assert arrays["map"].shape == (1, 2, 2) and arrays["map"].ravel() == pytest.approx(expected, abs=1e-5)
    assert arrays["image"].shape == (1, 8, 8, 3)  # padded to a square, as the tower gets it


@pytest.mark.parametrize("missing, message", [("image", "no such image"), ("checkpoint", "holds no config.json")])
def test_maps_without_their_input_are_one_error(tmp_path, missing, message):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "here.png")
    image = tmp_path / ("gone.png" if missing == "image" else "here.png")
    command = [ROOT / "scripts/probe.sh", "--image", image, "--prompt", "what?", "--out", tmp_path / "maps.png"]
    done = subprocess.run([*command, tmp_path / "one"], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "maps.png").exists()


# -- hostile input

SCRIPT = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
LINKS = "[click](javascript:alert(1)) [click][ref] ![x](http://127.0.0.1:{port}/a) <img src=http://127.0.0.1:{port}/b>"
OUTSIDE = '<img src="figures/../../secret.png"> ![x](figures/../../secret.png) ![x](maps/../../secret.png)'
BLOCKS = "a | b | c\n\n# head\n\n```\n\n[ref]: javascript:alert(1)\n\n    code *b* _c_ `d` \x1b[31m"
SECRETS = "https://user:pass-word@judge.example/v1?key=query-key hf_abcdefghijkl sk-abcdefghijklmnopqrst"
FOLDERS = ("<img src=x onerror=document.title='owned'>", "[x](javascript:alert(1))", "a|b*c*_d_`e`\n# f", "$x_{$", "\\")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")


def dump_dom(page, tmp_path):
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command = [CHROMIUM, *options, "--virtual-time-budget=10000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def listener():
    """.port of a server of this machine, .asked: the paths that it was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.port = [], server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def copy_as(seed, name):
    """A variant of any name: a copy of llava-tiny-vista's evaluation and probe."""
    shutil.copytree(seed / "eval/llava-tiny-vista", seed / "eval" / name)
    shutil.copy(seed / "probe/llava-tiny-vista.npz", seed / "probe" / f"{name}.npz")


@pytest.fixture
def hostile(tmp_path, listener):
    """A run in which whatever a stranger could write says something hostile, beside a secret picture."""
    Image.effect_noise((8, 8), 9).save(tmp_path / "secret.png")
    root = make_run(tmp_path / "run <b> & $1$", variants=["llava-tiny", "llava-tiny-vista"])
    for name in FOLDERS:
        copy_as(root / "seed0", f"llava-tiny-{name}")
    said = " ".join([SCRIPT, LINKS.format(port=listener.port), OUTSIDE, BLOCKS, SECRETS, "\ud800"])
    for path in root.glob("seed0/eval/llava-tiny*/*/*/*_results.json"):
        results = json.loads(path.read_text())
        results["versions"] = dict.fromkeys(results["versions"], said)
        path.write_text(json.dumps(results))
    manifest = json.dumps({said: [said, {"```\n": said}], "judge": SECRETS})
    for name in ("llava", "<script>document.title = 1", "[x](javascript:1)"):
        (root / f"manifest-{name}.json").write_text(manifest)
    (root / "maps").mkdir()
    for name in FOLDERS:
        shutil.copy(tmp_path / "secret.png", root / f"maps/{name}.png")
    shutil.copytree(root / "seed0/eval/llava-tiny/digits", root / "seed0/eval/llava-tiny/<i>task\n")
    (old,) = root.glob("seed0/eval/llava-tiny/<i>*/*/*_samples_digits.jsonl")
    old.rename(old.with_name(old.name.replace("digits", "<i>task\n")))
    (path,) = root.glob("seed0/eval/llava-tiny/<i>*/*/*_results.json")
    path.write_text(path.read_text().replace('"digits":', '"<i>task\\n":'))
    for path in root.glob("seed0/probe/*.npz"):
        arrays = dict(np.load(path))
        np.savez(path, **(arrays | {"question": np.array([said[:40], "$\\frac{"])}))
    return root


@browser
def test_nothing_that_a_file_says_is_markup(hostile, listener, tmp_path, capsys):
    secret = base64.b64encode((tmp_path / "secret.png").read_bytes()).decode()
    for path in hostile.glob("maps/*.png"):
        Image.new("RGB", (8, 8), "navy").save(path)
    report.main([str(hostile)])
    page = (hostile / "report.html").read_text()
    body = page.partition("</style>")[2]
    tags = "h1 h2 h3 p ul li strong em img pre code div table thead tbody tr th td"
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(body)
    assert {tag for tag, _ in found} <= set(tags.split()) and secret not in page
    assert {name for _, attributes in found for name in attributes} <= {"alt", "src", "class"}
    sources = [attributes["src"] for tag, attributes in found if tag == "img"]
    assert len(sources) == 11 and all(source.startswith("data:image/png;base64,i") for source in sources)
    dom = dump_dom(hostile / "report.html", tmp_path)
    assert "<title>VISTA against its baseline: " in dom and "owned'</title>" not in dom and not listener.asked
    assert dom.count("<table>") == 7 and dom.count("<h1>") == 1  # no row and no heading of a stranger's
    assert "<code" in dom and dom.count("<pre>") == 3
    written = "".join((hostile / f"report.{kind}").read_text() for kind in ("html", "md", "json"))
    for secret in ("pass-word", "query-key", "hf_abcdefghijkl", "sk-abcdef", "\x1b"):
        assert secret not in written + capsys.readouterr().out


@browser
@pytest.mark.parametrize("policy", (True, False))
def test_the_policy_stops_what_escaping_would_let_through(tmp_path, listener, policy):
    """Without it, the same page runs the script and asks for the picture."""
    raw = f"<script>document.title = 'owned'</script>\n\n<object data=http://127.0.0.1:{listener.port}/b></object>"
    raw += f"<style>p {{ background: url(http://127.0.0.1:{listener.port}/c) }}</style><p>x</p>"
    raw += f"<iframe src=http://127.0.0.1:{listener.port}/d></iframe>"
    page = markup.page(raw, "title", {})
    if not policy:
        page = re.sub(r"<meta http-equiv.*\n", "", page)
    (tmp_path / "page.html").write_text(page)
    dom = dump_dom(tmp_path / "page.html", tmp_path)
    assert ("<title>owned</title>" in dom, bool(listener.asked)) == (not policy, not policy)


def test_only_pictures_of_the_runs_own_folder_are_embedded(run, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    Image.new("RGB", (8, 8)).save(outside)
    (run / "maps").mkdir()
    (run / "maps/a.png").symlink_to(outside)
    with pytest.raises(SystemExit, match=r"maps/a.png: leads out of .*remove the link"):
        report.main([str(run)])
    (run / "maps/a.png").unlink()
    (run / "maps/a.png").write_bytes(b"BM no PNG")
    with pytest.raises(SystemExit, match=r"maps/a.png: is not a PNG"):
        report.main([str(run)])
    (run / "maps/a.png").unlink()
    (run / "figures").symlink_to(outside.parent)
    with pytest.raises(SystemExit, match=r"leads out of"):
        report.main([str(run)])
    assert [path.name for path in outside.parent.iterdir()] == ["secret.png"] and not list(run.glob("report.*"))


def test_a_locale_without_unicode_is_no_traceback(run):
    """The names that a system cannot write are shown as what they are; the files are UTF-8."""
    for name in ("llava-tiny-\u00fc\u4e2d", os.fsdecode(b"llava-tiny-vista-\xff")):
        copy_as(run / "seed0", name)
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "scripts.reporting.report", run]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | ascii_only, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"llava-tiny-\\xfc\\u4e2d: columns that differ" in done.stdout and b"llava-tiny-vista-\\xff:" in done.stdout
    for kind in ("md", "html"):
        text = (run / f"report.{kind}").read_bytes().decode()
        assert "llava-tiny-\u00fc\u4e2d" in text and "\u00b1" in text and "\u0394" in text
    assert "llava-tiny-vista-\\xff" in json.loads((run / "report.json").read_text())["groups"]["llava-tiny"]["table"]


@pytest.mark.parametrize("arguments, code, said", [(["--help"], 0, "RUN_DIR/report.json"), ([], 2, "usage: report.py")])
def test_what_it_does_can_be_asked(arguments, code, said):
    command = [sys.executable, "-m", "scripts.reporting.report", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and said in done.stdout + done.stderr and "Traceback" not in done.stderr


# -- the page

# An iframe gives the page any width (headless windows have a minimum), and its parent may look into a srcdoc.
FRAME = """<!doctype html><iframe width="{width}" height="900" style="border: 0" srcdoc="{page}"></iframe>
<script>onload = () => {{
  const page = document.querySelector("iframe").contentDocument, images = [...page.images];
  document.body.dataset.found = JSON.stringify({{
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    tables: page.querySelectorAll("table").length,
    images: images.length,
    loaded: images.filter(i => i.complete && i.naturalWidth && i.src.startsWith("data:")).length,
  }});
}}</script>"""


@browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which, tables, images", [("run", 7, 6), ("suite_run", 9, 4)])
def test_page_in_a_browser(request, tmp_path, which, tables, images, width):
    folder = request.getfixturevalue(which)
    if which == "run":
        report.main([str(folder)])
        shutil.rmtree(folder / "figures")  # self-contained: nothing may be read from beside it
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape((folder / "report.html").read_text())))
    dom = dump_dom(frame, tmp_path)
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))
    assert found == {"overflow": 0, "tables": tables, "images": images, "loaded": images}
