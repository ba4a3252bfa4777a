"""The study's answers from its committed results: the part of docs/study.md below its line, and its figures, anew.

    python -m scripts.reporting.study

Reads docs/study/results/ and docs/study/pilot/, whose files scripts/miniature/study.py writes, and answers the
questions of docs/study.md as it says. The same files give the same bytes. What is missing is named, and an answer
without all its seeds says so. A damaged or foreign file, or one of another instrument, is one error: then nothing is
written.
"""

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from scripts import config
from scripts.common import ROOT, write_whole
from scripts.evaluation.results import ODD, ResultError
from scripts.miniature.study import ABLATIONS, PILOT, PLAN, PRIMARY, ROWS, TINYLLAVA, baseline
from scripts.reporting import figures, statistics
from scripts.reporting.figures import COLORS, Point
from scripts.reporting.instrument import PARTS, SIZE_STATES, slopes
from scripts.reporting.markup import table
from scripts.reporting.statistics import Array, Interval
from scripts.reporting.tables import NONE
from scripts.reporting.verdicts import DIFFERS, SEES, ci

PAGE, FOLDER = Path("docs/study.md"), Path("docs/study")
MARK = "<!-- python -m scripts.reporting.study makes everything below this line -->\n"
TASKS = ("easyvqa", "digits")
BASE, L2, COSINE = PRIMARY
FAMILY = [(name, tasks) for name in (L2, COSINE) for tasks in (("easyvqa",), ("digits",), TASKS)]
BONFERRONI = DIFFERS / len(FAMILY)  # Holm's hardest case
KEYS = {"experiment", "seed", "cpu", "commit", "instrument", "seconds"}
UNITS = {"right_slope": "points a token", "kl_slope": "nats a token", "thirds": "points", "auroc": "", "hit": ""}
WEIGHTS = {f"{L2}-tenth": 0.1, f"{L2}-third": 0.3, L2: 1.0}
WIDTH = 128.0  # d of the miniature's language models
MEANS = {
    "stage-1": "l2 in stage 1 alone",
    "stage-2": "l2 in stage 2 alone",
    "tenth": "l2 with weight 0.1",
    "third": "l2 with weight 0.3",
    "sum": "l2 summed over d (Eq. 10 to the letter)",
    "flat": "l2 with f(t) = 1",
}
ALTS = {
    "effects": "each variant's difference to the baseline, with its interval",
    "position": "the image's share by position",
    "weight": "accuracy by the term's weight",
}
SEEN = ("Of", "In", "Answer", "Difference [95% interval]", "Could have seen", "Seeds")
EXPLAINED = (
    "Where no difference was seen, **could have seen** is the smallest true one that a paired t-test shows four times "
    "in five. It is of so many seeds, spread as these, at p < 0.05. In question 1 it is at p < 0.05 / 6, Holm's "
    "hardest case. The interval knows the spread of the questions too: a larger difference may be within it.\n\n"
    "Question 1 alone is corrected for the number of its comparisons. Of twenty others, one may differ by chance."
)
SIZES = (
    "The weighted term divided by the cross-entropy: the value, then the norms of the gradients with regard to "
    f"{', '.join(PARTS)}."
)
SAID = {
    "thirds": "accuracy, last third - first third",
    "right_slope": "slope of the accuracy",
    "kl_slope": "slope of the KL divergence",
    "auroc": "AUROC",
    "hit": "pointing game, hits minus chance",
}


@dataclass(frozen=True)
class Result:
    """One run. values: {measure: [n]}, a task's questions in % right, or held-out rows; empty: a loss not finite."""

    path: Path
    said: dict[str, Any]
    values: dict[str, Array]


Results = dict[tuple[str, int], Result]


def load(plan: Sequence[tuple[str, int]], folder: Path) -> Results:
    """What is there of a plan. Raises ResultError for a file that is odd or of another study."""
    paths = {folder / f"seed{seed}" / f"{name}.json": (name, seed) for name, seed in plan}
    found: Results = {}
    for path in sorted(path for path in folder.glob("**/*") if path.is_file() and path.suffix != ".partial"):
        if path not in paths:
            raise ResultError(path, "is no run of the plan", "Remove it; scripts/miniature/study.py holds the plan.")
        found[paths[path]] = read(path, *paths[path])
    for run, result in found.items():
        first = {
            "cpu": next(other for (_, seed), other in found.items() if seed == run[1]),
            "instrument": next(other for (name, _), other in found.items() if baseline(name) == baseline(run[0])),
        }
        for key, other in first.items():
            if result.said[key] != other.said[key]:
                problem = f"its {key} is {result.said[key]}, and that of {other.path} is {other.said[key]}"
                raise ResultError(result.path, problem, "Restore the right file, or run one of the two again.")
        check_rows(result, [other for (name, _), other in found.items() if baseline(name) == baseline(run[0])])
    return found


def check_rows(result: Result, others: Sequence[Result]) -> None:
    """Whether a run was asked what the others of its backbone were asked."""
    whole = next((other for other in others if other.values), result)
    for key, value in result.values.items():
        other = whole.values.get(key, value)
        same = key not in ("fact_token", "hit_chance") or np.array_equal(value, other, equal_nan=True)
        if value.shape != other.shape or not same:
            problem = f"its {key} is of other questions than that of {whole.path}"
            raise ResultError(result.path, problem, "Restore the right file, or run one of the two again.")


def read(path: Path, name: str, seed: int) -> Result:
    again = "Restore it, or remove it and run make study again."
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if lacks := KEYS - said.keys():
            raise ResultError(path, f"lacks {', '.join(sorted(lacks))}", again)
        if (said["experiment"], said["seed"]) != (name, seed):
            raise ResultError(path, f"is the result of {said['experiment']}, seed {said['seed']}", again)
        if "nonfinite" in said:
            return Result(path, said, {})
        tasks = set(config.load(name)["tasks"])
        if name == baseline(name):
            tasks |= {f"{task}_usual" for task in TASKS}
        if said["right"].keys() != tasks or not all(said["right"].values()):
            raise ResultError(path, f"has answers to {', '.join(sorted(said['right']))}", again)
        values = {task: np.array([{"0": 0.0, "1": 100.0}[bit] for bit in said["right"][task]]) for task in tasks}
        rows = {key: np.array(said["rows"][key], dtype="float64") for key in ROWS if key != "map_type"}
        if any(rows[key].shape != rows["fact_token"].shape for key in ("fact_right", "fact_kl")) or any(
            rows[key].shape != rows["auroc"].shape for key in ("hit", "hit_chance")
        ):
            raise ResultError(path, "has rows of different lengths", again)
        values |= rows | measures(rows)
        sizes = said["probe"]["sizes"]
        numbers = [sizes[s][t][k] for s in SIZE_STATES for t in ("ce", "l2", "cosine") for k in ("value", *PARTS)]
        if not np.isfinite([*numbers, said["seconds"]]).all():
            raise ResultError(path, "has a number that is not finite", again)
    except ODD as error:
        raise ResultError(path, f"is not a whole result ({type(error).__name__}: {error})", again) from None
    return Result(path, said, values)


def measures(rows: Mapping[str, Array]) -> dict[str, Array]:
    """What is compared of a run's held-out rows: a number for each answer, and for each map that says something."""
    token_nF = rows["fact_token"]
    known_nF = token_nF >= 0
    right_nF = np.where(known_nF, 100 * rows["fact_right"], np.nan)
    early, late = np.quantile(token_nF[known_nF], [1 / 3, 2 / 3])
    with np.errstate(invalid="ignore"):
        thirds = [
            np.where(some, right_nF, 0).sum(1) / some.sum(1)
            for some in (known_nF & (token_nF <= early), known_nF & (token_nF > late))
        ]
    maps = np.isfinite(rows["auroc"])
    out = {"right_slope": slopes(token_nF, right_nF), "kl_slope": slopes(token_nF, rows["fact_kl"])}
    out |= {"thirds": thirds[1] - thirds[0], "auroc": rows["auroc"][maps]}
    out["hit"] = (rows["hit"] - rows["hit_chance"])[maps]
    if not np.isfinite([*out["right_slope"], *out["kl_slope"], *out["auroc"], *out["hit"]]).all():
        raise ValueError("an answer's words or a map have no number")
    return {key: value[np.isfinite(value)] for key, value in out.items()}


@dataclass(frozen=True)
class Effect:
    """One experiment minus another, over the seeds that both have."""

    interval: Interval
    seeds: list[int]
    planned: int
    by_seed: list[float]

    def smallest(self, alpha: float = DIFFERS) -> float | None:
        return statistics.smallest(self.by_seed, alpha)

    @property
    def differs(self) -> bool:
        return bool(self.interval["ci95"] and (self.interval["ci95"][0] > 0 or self.interval["ci95"][1] < 0))


class Study:
    """The results, and what is computed of them."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.sight = {
            (name, task): {
                seed: seen(result, task) for (n, seed), result in results.items() if n == name and result.values
            }
            for name in (BASE, TINYLLAVA[0])
            for task in TASKS
        }

    def seeds(self, *names: str) -> list[int]:
        """Those in which all these experiments, and their baseline, have finite results."""
        names = (*names, baseline(names[0]))
        return [
            seed
            for seed in sorted({seed for _, seed in PLAN})
            if all((name, seed) in self.results and self.results[name, seed].values for name in names)
        ]

    def whole(self, name: str) -> bool:
        """Whether all its planned runs are there, and a seed of them has finite results."""
        return all(run in self.results for run in PLAN if run[0] == name) and bool(self.seeds(name))

    def blind(self, name: str, measures: Sequence[str]) -> list[int]:
        """The seeds whose baseline does not see on one of these tasks."""
        sights = [self.sight.get((baseline(name), task), {}) for task in measures]
        return sorted({seed for by_seed in sights for seed, row in by_seed.items() if row["p"] >= SEES})

    def effect(self, name: str, base: str, measures: Sequence[str], all_seeds: bool = False) -> Effect | None:
        """The difference in the mean of these measures; without the seeds whose baseline is blind, or with them."""
        planned = [s for s in sorted({s for _, s in PLAN}) if (name, s) in PLAN and (base, s) in PLAN]
        without = [] if all_seeds else self.blind(name, measures)
        planned = [seed for seed in planned if seed not in without]
        seeds = [seed for seed in self.seeds(name, base) if seed in planned]
        if not seeds:
            return None
        draws, by_seed = [], []
        for k, measure in enumerate(measures):
            ours, theirs = (np.stack([self.results[n, s].values[measure] for s in seeds]) for n in (name, base))
            drawn = statistics.resample(ours, theirs, seed=[k])
            draws.append(drawn[0] - drawn[1])
            by_seed.append(ours.mean(1) - theirs.mean(1))
        differences = np.mean(by_seed, axis=0)
        found = statistics.interval(float(differences.mean()), np.mean(draws, axis=0))
        return Effect(found, seeds, len(planned), differences.tolist())

    def level(self, name: str, measure: str) -> Interval | None:
        seeds = self.seeds(name)
        if not seeds:
            return None
        values = np.stack([self.results[name, s].values[measure] for s in seeds])
        return statistics.interval(float(values.mean()), statistics.resample(values, values, seed=[0])[0])

    def scores(self, name: str, task: str) -> dict[int, float]:
        runs = {s: r for (n, s), r in sorted(self.results.items()) if n == name and r.values}
        return {seed: float(result.values[task].mean()) for seed, result in runs.items()}

    def ratios(self, name: str, state: str, weight: float) -> dict[str, float]:
        """The term's size over the cross-entropy's, in value and gradient norm, at that weight; seeds averaged."""
        sizes = [r.said["probe"]["sizes"][state] for (n, _), r in self.results.items() if n == name and r.values]
        shares = {key: [size["l2"][key] / size["ce"][key] for size in sizes] for key in ("value", *PARTS)}
        return {key: weight * float(np.mean(share)) for key, share in shares.items()}


def seen(result: Result, task: str) -> dict[str, float]:
    """Whether a baseline is better than the better of two image-blind answers."""
    blind = {key: result.values[f"{task}_{key}"] for key in ("blind", "usual")}
    best = max(blind.values(), key=lambda value: float(value.mean()))
    found = {key: float(value.mean()) for key, value in {"baseline": result.values[task], **blind}.items()}
    return found | {"p": statistics.mcnemar(result.values[task], best)}


def number(value: float) -> str:
    value = round(value, 9) + 0.0  # the last bits of a sum are no effect, and -0.0 is 0
    return f"{value:+.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:+.2g}"


def told(effect: Effect | None, unit: str, alpha: float = DIFFERS, differs: bool | None = None) -> list[str]:
    """The last cells of SEEN: an effect, the smallest that could have been seen where none was, and the seeds."""
    if effect is None:
        return ["no seed has both runs", NONE, "0"]
    found, seeds = effect.interval, f"{len(effect.seeds)} of {effect.planned}"
    if found["value"] is None or found["ci95"] is None or found["p"] is None:
        return ["it cannot be computed", NONE, seeds]
    text = f"{number(found['value'])} {ci(found['ci95'], '+.3g')} {unit}".strip()
    if effect.differs if differs is None else differs:
        return [text, NONE, seeds]
    smallest = effect.smallest(alpha)
    return [text, "needs three seeds" if smallest is None else f"{smallest:.2g}", seeds]


def short(name: str) -> str:
    plain = {BASE: "baseline", L2: "l2", COSINE: "cosine"}
    plain |= dict(zip(TINYLLAVA, ("its baseline", "TinyLLaVA's l2", "TinyLLaVA's cosine"), strict=True))
    return plain.get(name, name.removeprefix(f"{L2}-"))


def primary(study: Study) -> list[tuple[str, Sequence[str], Effect | None, float]]:
    """Question 1: the six comparisons, with Holm's p; one that cannot be made counts as p = 1."""
    effects = [study.effect(name, BASE, tasks) for name, tasks in FAMILY]
    ps = [1.0 if e is None or e.interval["p"] is None else e.interval["p"] for e in effects]
    return [(*of, e, p) for of, e, p in zip(FAMILY, effects, statistics.holm(ps), strict=True)]


def answers(study: Study) -> list[str]:
    """The page's sections, one for each question."""
    out = ["### 1. Does VISTA change accuracy?"]
    rows = []
    for name, tasks, effect, p in primary(study):
        shown = told(effect, "points", BONFERRONI, p < DIFFERS)
        if blind := study.blind(name, tasks):
            without = f"without seeds {', '.join(map(str, blind))}, whose baseline does not see"
            with_them = told(study.effect(name, BASE, tasks, all_seeds=True), "points")[0]
            shown[0] += f" {without}; with them {with_them}"
        rows.append([*what(name, BASE, tasks), answer(effect, "yes" if p < DIFFERS else "no"), *shown, f"{p:.2g}"])
    out.append(table([*SEEN, "p, Holm over the six"], rows))

    out.append("### 2. Does the image's share fall with position, and does VISTA slow the fall?")
    rows = []
    for measure in ("kl_slope", "right_slope"):
        base = study.level(BASE, measure)
        falls = bool(base and base["ci95"] and base["ci95"][1] < 0)
        rows.append(level_row(study, measure, base, "it falls" if falls else "no fall seen"))
        for name in (L2, COSINE):
            effect, own = study.effect(name, BASE, (measure,)), study.level(name, measure)
            slower = bool(effect and effect.differs and np.mean(effect.by_seed) > 0)
            nearer = bool(own and base and abs(own["value"] or 0) < abs(base["value"] or 0))
            word = "yes" if falls and slower and nearer else "no"
            rows.append([*what(name, BASE, (measure,)), answer(effect, word), *told(effect, UNITS[measure])])
    out.append(table(SEEN, rows))

    out.append("### 3. Does VISTA change more where texts are longer?")
    out.append("Words in the last third of the positions against those in the first, in the same answers.")
    out.append(table(SEEN, [row(study, name, BASE, ("thirds",)) for name in (L2, COSINE)]))

    out.append("### 4. Do similarity maps localise better?")
    rows = []
    for measure in ("auroc", "hit"):
        rows.append(level_row(study, measure, study.level(BASE, measure)))
        rows += [row(study, name, BASE, (measure,)) for name in (L2, COSINE)]
    out.append(table(SEEN, rows))

    out.append("### 5. Is l2 better than cosine, t/m than a flat ramp, the mean over d than Eq. 10's sum?")
    out.append(table(SEEN, [row(study, L2, other, TASKS) for other in (COSINE, f"{L2}-flat", f"{L2}-sum")]))

    out.append("### 6. In which stage does the term act?")
    rows = [
        row(study, f"{L2}-{stage}", BASE, measures)
        for stage in ("stage-1", "stage-2")
        for measures in (TASKS, ("kl_slope",), ("right_slope",))
    ]
    out.append(table(SEEN, rows))
    return out


def what(name: str, base: str, measures: Sequence[str]) -> list[str]:
    """What is compared, and in what: the first cells of a row."""
    return [f"{short(name)} - {short(base)}", "both tasks" if measures == TASKS else SAID.get(*measures, *measures)]


def answer(effect: Effect | None, word: str) -> str:
    if effect is None:
        return "not known"
    return word if len(effect.seeds) == effect.planned else f"{word} (not complete)"


def row(study: Study, name: str, base: str, measures: Sequence[str]) -> list[str]:
    """One comparison, which its interval decides."""
    effect, word = study.effect(name, base, measures), "no difference seen"
    if effect is not None and effect.differs:
        word = "higher" if np.mean(effect.by_seed) > 0 else "lower"
    return [*what(name, base, measures), answer(effect, word), *told(effect, UNITS.get(measures[0], "points"))]


def level_row(study: Study, measure: str, base: Interval | None, word: str = NONE) -> list[str]:
    """The baseline's own value."""
    if base is None or base["value"] is None or base["ci95"] is None:
        return [short(BASE), SAID[measure], "not known", "no run", NONE, "0"]
    shown = f"{base['value']:.3g} {ci(base['ci95'], '.3g')} {UNITS[measure]}".strip()
    return [short(BASE), SAID[measure], word, shown, NONE, f"{len(study.seeds(BASE))}"]


def sweep(study: Study) -> str:
    """The term's weight, what it changes, and how large it is beside the cross-entropy."""
    rows = []
    for name, weight in {**WEIGHTS, f"{L2}-sum": WIDTH}.items():  # the sum over d is d times the mean
        if not study.scores(name, TASKS[0]):
            continue
        effect = study.effect(name, BASE, TASKS)
        shown = told(effect, "points")
        for state in SIZE_STATES[1:]:
            ratios = study.ratios(name, state, weight)
            shown.append(", ".join(f"{float(f'{ratios[key]:.2g}'):g}" for key in ("value", *PARTS)))
        rows.append([f"{weight:g}{' (sum over d)' if weight == WIDTH else ''}", *shown])
    return table(["Weight of l2", *SEEN[3:], *SIZE_STATES[1:]], rows)


def scores(study: Study) -> str:
    rows = []
    for name in dict.fromkeys(name for name, _ in PLAN):
        by_task = [study.scores(name, task) for task in TASKS]
        if by_task[0]:
            cells = []
            for by_seed in by_task:
                spread = statistics.sd(list(by_seed.values()))
                cells.append(f"{np.mean(list(by_seed.values())):.2f}" + ("" if spread is None else f" ({spread:.2f})"))
            each = " · ".join(f"{s}: {by_task[0][s]:.1f}, {by_task[1][s]:.1f}" for s in by_task[0])
            rows.append([name, str(len(by_task[0])), *cells, each])
    return table(
        ["Experiment", "Seeds", *(f"{task}, % (SD)" for task in TASKS), f"Each seed: {', '.join(TASKS)}"], rows
    )


def sights(study: Study) -> str:
    rows = [
        [
            name, str(seed), task, f"{row['baseline']:.1f}", f"{row['blind']:.1f}", f"{row['usual']:.1f}",
            f"{row['p']:.2g}", "yes" if row["p"] < SEES else "no",
        ]
        for (name, task), by_seed in study.sight.items()
        for seed, row in sorted(by_seed.items())
    ]  # fmt: skip
    return table(["Baseline", "Seed", "Task", "Right, %", "Blank image", "Usual answer", "p", "Sees"], rows)


def power(pilot: Results) -> list[str]:
    """The smallest true difference that so many seeds show four times in five, as the pilots' differences spread."""
    seeds = [s for s in range(5) if all((n, s) in pilot and pilot[n, s].values for n in PRIMARY[:2])]
    if len(seeds) < 3:
        return [f"{len(seeds)} pairs of pilots are there: too few to tell how differences spread."]
    out, spreads = [], {}
    for task in TASKS:
        found = [pilot[L2, s].values[task].mean() - pilot[BASE, s].values[task].mean() for s in seeds]
        spreads[task] = statistics.sd(found) or 0.0
        out.append(f"- l2 minus baseline on {task}, seeds {', '.join(map(str, seeds))}: {np.mean(found):+.2f} points, "
                   f"SD {spreads[task]:.2f}.")  # fmt: skip
    rows = [
        [
            str(n),
            *(f"{statistics.detectable(n, a) * spreads[task]:.2f}" for task in TASKS for a in (DIFFERS, BONFERRONI)),
        ]
        for n in range(5, 21)
    ]
    head = [f"{task}, p = {p}" for task in TASKS for p in ("0.05", "0.05 / 6")]
    said = "The smallest true difference, in points, that a paired t-test over so many seeds shows four times in five:"
    return ["\n".join(out), said, table(["Seeds", *head], rows)]


def holes(results: Results) -> list[str]:
    """What is missing, and what broke off."""
    lacks: dict[str, list[int]] = {}
    for name, seed in PLAN:
        if (name, seed) not in results:
            lacks.setdefault(name, []).append(seed)
    out = [f"- missing: {name}, seeds {', '.join(map(str, seeds))}" for name, seeds in lacks.items()]
    broken = [(run, r.said["nonfinite"]) for run, r in sorted(results.items()) if not r.values]
    return out + [f"- the loss of {name}, seed {seed}, was not finite in {stage}" for (name, seed), stage in broken]


def curves(study: Study) -> bytes:
    """Accuracy and KL of the words that only the image tells, by token position."""
    figure, axes = plt.subplots(2, 1, figsize=(4.8, 4.8), sharex=True)
    for name, color in zip(PRIMARY, COLORS, strict=False):
        runs = [study.results[name, seed].values for seed in study.seeds(name)]
        if not runs:
            continue
        token_nF = runs[0]["fact_token"]
        known_nF = token_nF >= 0
        edges = np.quantile(token_nF[known_nF], np.linspace(0, 1, 9))
        bins_nF = np.digitize(token_nF, edges[1:-1])
        for axis, key, scale in ((axes[0], "fact_kl", 1), (axes[1], "fact_right", 100)):
            value_nF = scale * np.mean([run[key] for run in runs], axis=0)
            chosen = [known_nF & (bins_nF == k) for k in range(8)]
            points = [(token_nF[some].mean(), value_nF[some].mean()) for some in chosen if some.any()]
            axis.plot(*zip(*points, strict=True), "o-", color=color, ms=3, label=short(name))
    axes[0].set_ylabel("KL(true || swapped image), nats")
    axes[1].set(ylabel="right, %", xlabel="position of the word's first token")
    axes[0].legend()
    return svg(figure)


def effects(study: Study) -> bytes:
    """The difference to the baseline of each variant whose runs are all there, by task and in their mean."""
    names = [name for name in (L2, COSINE, *ABLATIONS) if study.whole(name)]
    color = {short(name): COLORS[1 + k] for k, name in enumerate(names)}
    rows = {
        said: {short(n): point(e) for n in names if (e := study.effect(n, BASE, tasks))}
        for said, tasks in (("both", TASKS), *((task, (task,)) for task in TASKS))
    }
    figure, axis = figures.forest(rows, color, "Difference to the baseline (points, 95% interval)")
    axis.axvline(0, color="black", lw=0.8)
    said = {name: f"{name}: {MEANS[name]}" if name in MEANS else name for name in color}
    figures.legend(figure, {said[name]: figures.dot(shade) for name, shade in color.items()})
    return svg(figure)


def point(effect: Effect) -> Point:
    found = effect.interval
    low, high = found["ci95"] or (None, None)
    return found["value"] or 0.0, low, high


def weights(study: Study) -> bytes:
    """Accuracy by the term's weight; 0 is the baseline."""
    figure, axis = plt.subplots(figsize=(4.8, 3.2))
    for task, color in zip(TASKS, COLORS[1:], strict=False):
        known = {w: study.scores(n, task) for n, w in {BASE: 0.0, **WEIGHTS}.items() if study.whole(n)}
        shared = set.intersection(*(set(by_seed) for by_seed in known.values()))
        means = {w: np.mean([by_seed[s] for s in shared]) for w, by_seed in known.items() if shared}
        axis.plot(list(means), list(means.values()), "o-", color=color, label=f"{task}, {len(shared)} seeds")
    axis.set(xlabel="weight of l2", ylabel="right, %")
    axis.legend()
    return svg(figure)


def svg(figure: Figure) -> bytes:
    """The same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()


def beside(group: Mapping[str, Any], results: Results) -> list[str]:
    """A report's differences beside those of the study's seeds; nothing where the study has no such runs."""
    study, out = Study(results), []
    for name, pairs in group["paired"].items():
        for task in TASKS:
            ours, base = study.scores(name, task), study.scores(group["baseline"], task)
            found = [ours[seed] - base[seed] for seed in ours.keys() & base.keys()]
            if task in pairs and (spread := statistics.sd(found)) is not None:
                out.append(
                    f"{name}: your run's difference on {task} is {pairs[task]['value']:+.1f}; over {len(found)} seeds "
                    f"of the study it was {np.mean(found):+.1f} ± {spread:.1f} (standard deviation over the seeds)."
                )
    return out


def compose(results: Results, pilot: Results) -> tuple[str, dict[str, bytes]]:
    """The generated part of the page, and its figures."""
    study, pictures = Study(results), dict[str, bytes]()
    parts = ["## Answers"]
    if not results:
        parts.append("**No results exist.** `make study` makes them.")
    else:
        if lacks := holes(results):
            parts += ["**Not complete.** Every answer is of the runs that are there, and says of how many seeds:"]
            parts.append("\n".join(lacks))
        if study.whole(BASE) and study.whole(L2):
            pictures = {"effects": effects(study), "position": curves(study), "weight": weights(study)}
            parts += [f"![{alt}](study/{name}.svg)" for name, alt in ALTS.items()]
        parts.append(EXPLAINED)
        parts += answers(study)
        parts += ["### Does the term's size explain it?", SIZES, sweep(study)]
        parts += ["### The other backbone"]
        compared = [(name, tasks) for name in TINYLLAVA[1:] for tasks in (("easyvqa",), ("digits",), TASKS)]
        parts.append(table(SEEN, [row(study, name, TINYLLAVA[0], tasks) for name, tasks in compared]))
        parts += ["## Every run", scores(study), "## Whether the baselines see", sights(study)]
    parts += ["## Pilots", *power(pilot)]
    if results:
        cpus = sorted({result.said["cpu"] for result in results.values()})
        made = sorted({f"{r.said['instrument']} ({r.said['commit'][:7]})" for r in results.values()})
        hours = sum(result.said["seconds"] for result in results.values()) / 3600
        parts += [
            "## How it was made",
            "`make study` makes the runs and this page; `python -m scripts.reporting.study` makes the page alone. "
            "Remove a run's file, and `make study` makes it again. On the same kind of CPU all of it is the same, but "
            "for the commit and the seconds.",
            f"{len(results)} of {len(PLAN)} runs took {hours:.1f} hours of lanes. Those that were cut off count since "
            f"they continued. CPUs: {'; '.join(cpus)}. Instruments (commits): {', '.join(made)}.",
        ]
    return "\n\n".join(parts) + "\n", pictures


def write(page: Path = PAGE, folder: Path = FOLDER) -> list[str]:
    """The page's generated part and its figures anew. Returns what to tell. Raises ResultError, and writes nothing."""
    results, pilot = load(PLAN, folder / "results"), load(PILOT, folder / "pilot")
    asked, mark, _ = page.read_text(encoding="utf-8").partition(MARK)
    if not mark:
        raise ResultError(page, f"lacks the line {MARK.strip()}", "Restore it.")
    text, pictures = compose(results, pilot)
    for name, picture in pictures.items():
        write_whole(folder / f"{name}.svg", picture)
    for name in ALTS.keys() - pictures.keys():
        (folder / f"{name}.svg").unlink(missing_ok=True)
    write_whole(page, f"{asked}{MARK}\n{text}")
    return [*power(pilot)[:1], *holes(results), f"{len(results)} of {len(PLAN)} runs: {page}"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="study.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    try:
        said = write(ROOT / PAGE, ROOT / FOLDER)
    except (ResultError, OSError) as error:
        sys.exit(f"study.py: {error}")
    print("\n".join(said))


if __name__ == "__main__":
    main()
