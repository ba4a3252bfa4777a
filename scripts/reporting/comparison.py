"""The numbers of a report: scores, differences to the baseline, what the baseline sees, what the probe measured."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
from scipy import stats

from scripts.evaluation.results import Column, Evaluation
from scripts.reporting import instrument, statistics, verdicts
from scripts.reporting.paper import ROWS, delta
from scripts.reporting.runs import Run
from scripts.reporting.statistics import Array, Interval

TERMS = ("ce", "ce_swapped", "vista_mean", "vista_sum", "vista_cosine")


class Cell(TypedDict):
    """One experiment's score in one column, seeds averaged."""

    n: int  # questions, or what else is a unit
    whole: bool  # all of the split
    score: float
    stderr: float | None
    per_seed: list[float]
    seed_sd: float | None
    version: str | float
    paper: NotRequired[float]
    verdict: NotRequired[str]


class Gain(Interval):
    """A table's delta, in %."""

    seed_sd: float | None
    over: int  # columns
    of: int


class Sight(TypedDict):
    """The baseline against two image-blind answers to the same questions, in %."""

    task: str
    seed: str
    n: int
    baseline: float
    blank_image: float
    most_frequent: float
    p: float


def per_seed(run: Run, name: str, column: str, seeds: list[str]) -> dict[str, Array] | None:
    """{stratum: [seeds, n]} of one experiment and column. None: not known of a seed."""
    values = [run.results[name, column][seed].value for seed in seeds]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return {stratum: np.stack([value[stratum] for value in known]) for stratum in known[0]}


def cell(run: Run, name: str, column: Column) -> Cell | None:
    """One experiment's score in one column, or None where there is none."""
    results = run.results[name, column.name]
    if not results:
        return None
    seed, one = next(iter(results.items()))
    scores = [result.score for result in results.values()]
    value = per_seed(run, name, column.name, list(results))
    out: Cell = {
        "n": sum(map(len, one.units.values())) if one.units else one.rows,
        "whole": column.n in (None, one.rows),
        "score": float(np.mean(scores)),
        "stderr": statistics.stderr([units_Sn.mean(0) for units_Sn in value.values()]) if value else None,
        "per_seed": scores,
        "seed_sd": statistics.sd(scores),
        "version": run.evaluations[seed, name, column.task].version,
    }
    if name in ROWS and column.table:
        out["paper"] = ROWS[name].scores[column.name]
        out["verdict"] = verdicts.level(out)
    return out


def scores(run: Run) -> dict[str, Any]:
    """table[variant][column] (None: missing), paired[variant][column] (in the column's units) and
    delta[variant][table] (%), as in the paper's tables."""
    baseline, *others = run.variants
    table = {name: {c.name: cell(run, name, c) for c in run.columns} for name in run.variants}
    paired: dict[str, dict[str, Interval]] = {name: {} for name in others}
    gains: dict[str, dict[int, Gain]] = {name: {} for name in others}
    for name in others:
        both = {}
        for k, column in enumerate(run.columns):
            if compared := compare(run, name, column.name, k):
                both[column.name] = compared
                paired[name][column.name] = difference(compared, table[name][column.name], table[baseline][column.name])
        for number in sorted({c.table for c in run.columns}):
            columns = [c.name for c in run.columns if c.table == number]
            if there := [column for column in columns if column in both]:
                gains[name][number] = gain(run, name, {column: both[column] for column in there}, len(columns))
                papers = [(ours["paper"], base["paper"]) for c in there if (ours := table[name][c]) and
                          (base := table[baseline][c]) and "paper" in ours and "paper" in base]  # fmt: skip
                if len(papers) == len(there):
                    gains[name][number]["paper"] = delta(*zip(*papers, strict=True))
    return {"table": table, "paired": paired, "delta": gains}


# Scores [2, seeds] and bootstrap draws [2, resamples], ours and the baseline's; the seeds.
Compared = tuple[Array, Array | None, list[str]]


def compare(run: Run, name: str, column: str, k: int) -> Compared | None:
    """An experiment and its baseline in the k-th column, over the seeds that both have; None where there is none."""
    results = [run.results[n, column] for n in (name, run.variants[0])]
    seeds = [seed for seed in run.seeds if all(seed in result for result in results)]
    if not seeds:
        return None
    a, b = (per_seed(run, n, column, seeds) for n in (name, run.variants[0]))
    # A seed each: the questions of the delta's columns are drawn independently.
    draws = sum(statistics.resample(a[s], b[s], seed=[k, i]) for i, s in enumerate(a)) if a and b else None
    scores_2S = np.array([[result[seed].score for seed in seeds] for result in results])
    return scores_2S, None if draws is None else np.asarray(draws), seeds


def difference(compared: Compared, ours: Cell | None, base: Cell | None) -> Interval:
    scores_2S, draws, _ = compared
    score = scores_2S.mean(1)
    pair = statistics.interval(score[0] - score[1], None if draws is None else draws[0] - draws[1])
    if (smallest := statistics.smallest(list(scores_2S[0] - scores_2S[1]))) is not None:
        pair["smallest"] = smallest
    if ours and base and "paper" in ours and "paper" in base:
        pair["paper"] = ours["paper"] - base["paper"]
        pair["verdict"] = verdicts.claim(pair, ours["whole"] and base["whole"])
    return pair


def gain(run: Run, name: str, both: dict[str, Compared], of: int) -> Gain:
    """A table's delta over the columns that are there, with its bootstrap and its spread over the seeds."""
    scores_2S, draws, seeds = zip(*both.values(), strict=True)
    known = [draw for draw in draws if draw is not None]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.mean([100 * (a / b - 1) for a, b in known], axis=0) if len(known) == len(draws) else None
    gains = [
        delta(*([run.results[n, column][seed].score for column in both] for n in (name, run.variants[0])))
        for seed in seeds[0]
        if all(seed in some for some in seeds)
    ]
    found = statistics.interval(delta(*zip(*(score.mean(1) for score in scores_2S), strict=True)), mean)
    if (smallest := statistics.smallest(gains)) is not None:
        found["smallest"] = smallest
    return {**found, "seed_sd": statistics.sd(gains), "over": len(both), "of": of}


def usual_right(evaluation: Evaluation, units: Sequence[Hashable], usual: Mapping[str, str]) -> Array:
    """[n], 1 where the question's usual answer in training is right, else 0."""
    asked = [evaluation.asked.get(unit) for unit in units]
    return np.array([float(bool(known and usual.get(known[0]) == known[1])) for known in asked])


def sight(run: Run) -> list[Sight]:
    """Per task and seed: the baseline against the better of two image-blind answers to the same questions."""
    out: list[Sight] = []
    for task, seed in ((task, seed) for task in run.blind for seed in run.seeds):
        results = [run.results[run.variants[0], name].get(seed) for name in (task, f"{task}_blind")]
        values = [result.value for result in results if result and result.value]
        if len(values) < 2 or results[0] is None or not results[0].units:
            continue
        true, blank = (value[""] for value in values)
        evaluation = run.evaluations[seed, run.variants[0], task]
        frequent = 100 * usual_right(evaluation, results[0].units[""], run.usual_answers)
        out.append(
            {
                "task": task,
                "seed": seed,
                "n": len(true),
                "baseline": float(true.mean()),
                "blank_image": float(blank.mean()),
                "most_frequent": float(frequent.mean()),
                "p": statistics.mcnemar(true, max(blank, frequent, key=np.mean)),
            }
        )
    return out


def probed(run: Run, name: str) -> dict[str, Any]:
    """Theorem 3.3's curve, the loss terms' sizes and the maps' averages of one variant, seeds averaged."""
    probes = [run.probes[seed, name] for seed in run.seeds if (seed, name) in run.probes]
    kl_nT = np.mean([probe["kl"] for probe in probes], axis=0)
    known = np.isfinite(kl_nT)
    slopes = [np.polyfit(np.flatnonzero(ok), row[ok], 1)[0] for row, ok in zip(kl_nT, known, strict=True)]
    trend = stats.ttest_1samp(slopes, 0)
    kl_nT = kl_nT[:, known.sum(0) >= max(2, len(kl_nT) // 4)]  # few answers are longer: no mean worth drawing
    return {
        "theorem": {
            "n": len(kl_nT),
            "kl": np.nanmean(kl_nT, axis=0).tolist(),
            "stderr": stats.sem(kl_nT, axis=0, nan_policy="omit").tolist(),
            "mean": float(np.nanmean(kl_nT)),
            "slope": float(np.mean(slopes)),
            "slope_ci95": list(map(float, trend.confidence_interval())),
            "slope_p": float(trend.pvalue),
        },
        "terms": {key: float(np.mean([probe[key] for probe in probes])) for key in TERMS}
        | {"d": int(probes[0]["hidden_size"])},
        "maps": {
            "cosine": float(np.nanmean([probe["map"] for probe in probes])),
            "sd_within_image": float(np.mean([np.nanstd(probe["map"], (1, 2)) for probe in probes])),
        },
        "measured": instrument.measured(probes),
    }
