"""Write RUN_DIR/report.json, report.md (with figures/) and one self-contained report.html from result files.

    python -m scripts.reporting.report results/tiny

Reads what training, scripts/eval.sh and scripts/probe.sh left in RUN_DIR/seed*/, and RUN_DIR/manifest-*.json, and says
what is not there. A backbone's experiments are compared with its baseline, the config whose name theirs extend; what
paper.toml names, with the paper too. TASK_blind is TASK with a blank image. Figures and sentences are all computed;
a file that is odd is refused with one line that says what to do.
"""

import base64
import datetime
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from zipfile import BadZipFile

import jinja2
import numpy as np
import tomllib
from markdown import markdown
from scipy import stats

from scripts import config
from scripts.evaluation.results import ResultError, load_columns, read
from scripts.reporting import figures

PAPER = tomllib.loads((Path(__file__).parent / "paper.toml").read_text())
RESAMPLES = 10_000
SEES, DIFFERS = 0.01, 0.05  # p below which the baseline is said to see, and two variants to differ
STAGES = {"stage 1": "-pretrain", "stage 2": "-finetune"}
TERMS = ("ce", "ce_swapped", "vista_mean", "vista_sum", "vista_cosine")


def refuse(path, problem, remedy):
    raise ResultError(path, problem, remedy)


# Statistics


def delta(scores, baseline):
    """The paper's delta: mean over the tasks of the relative gain, in %. NaN where a baseline score is 0."""
    return float(np.mean([100 * (s / b - 1) if b else np.nan for s, b in zip(scores, baseline, strict=True)]))


def resample(a_n, b_n, resamples=RESAMPLES, seed=0):
    """Means of a and of b, [2, resamples], over the same n samples drawn with replacement."""
    pairs, count = np.unique(np.stack([a_n, b_n]), axis=1, return_counts=True)  # few differ: 214,354 rows in a second
    rng, chunk = np.random.default_rng(seed), max(1, 10**7 // len(count))  # bounds the memory
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    draws = [rng.multinomial(count.sum(), count / count.sum(), size) @ pairs.T for size in sizes]
    return np.concatenate(draws).T / count.sum()


def interval(value, draws):
    """A statistic with its 95% percentile interval and the two-sided bootstrap p of "it is 0"; without draws, alone."""
    if draws is None and np.isfinite(value):
        return {"value": float(value), "ci95": None, "p": None}
    if draws is None or not np.isfinite([value, *draws]).all():  # a relative gain over 0
        return {"value": None, "ci95": None, "p": None}
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1, 2 * (tail + 1) / (len(draws) + 1))
    return {"value": float(value), "ci95": np.percentile(draws, [2.5, 97.5]).tolist(), "p": float(p)}


def mcnemar(a_n, b_n):
    """One-sided exact McNemar p of "a is right more often than b" for paired 0/1 answers."""
    better, worse = int((a_n > b_n).sum()), int((a_n < b_n).sum())
    if not better + worse:
        return 1.0
    return float(stats.binomtest(better, better + worse, alternative="greater").pvalue)


# The paper


def paper_deltas():
    """Each printed delta beside the one that its printed scores give, and whether rounding can explain the rest."""
    rows = []
    for name, tables in PAPER.items():
        for table, printed in tables.items():
            if "delta" not in printed:
                continue
            scores, base = printed["scores"], PAPER[baseline_of(name, PAPER)][table]["scores"]
            computed = delta(scores, base)
            rounding = 0.005 + np.mean([100 * 0.005 / b * (1 + s / b) for s, b in zip(scores, base, strict=True)])
            row = {"name": name, "table": int(table), "printed": printed["delta"], "computed": computed}
            rows.append(row | {"follows": bool(abs(computed - printed["delta"]) <= rounding)})
    return rows


def level(cell):
    """Whether a score is the paper's. The paper's has a sampling error too, at most as large as ours if independent."""
    if not cell["whole"]:
        return "cannot tell: not the whole split"
    if cell["stderr"] is None:
        return "cannot tell: no standard error"
    near = abs(cell["score"] - cell["paper"]) <= 1.96 * 2**0.5 * cell["stderr"]
    return "within noise" if near else "differs"


def claim(pair, whole):
    """Whether an experiment's difference to its baseline is the paper's, as far as its 95% interval can say."""
    if not whole:
        return "cannot tell: not the whole split"
    if pair["ci95"] is None:
        return "cannot tell: no interval"
    (low, high), paper = pair["ci95"], pair["paper"]
    if low <= 0 <= high:
        if paper == 0:
            return "reproduced: no difference"
        return "cannot tell: 0 and the paper's fit both" if low <= paper <= high else "not reproduced: too small"
    if pair["value"] * paper <= 0:
        return "not reproduced: the opposite" if paper else "not reproduced: a difference"
    if low <= paper <= high:
        return "reproduced"
    return f"reproduced, but {'larger' if abs(pair['value']) > abs(paper) else 'smaller'}"


# Reading


def load_log(folder):
    """{"ce" | "vista": [[step, value], ...]} of a training run; stock's own `loss` is the baseline's ce."""
    path, again = folder / "trainer_state.json", "Train this experiment again."
    try:
        rows = [row for row in json.loads(path.read_text())["log_history"] if "loss" in row]
        ce = [[row["step"], float(row.get("loss_ce", row["loss"]))] for row in rows]
        vista = [[row["step"], float(row["loss_vista"])] for row in rows if row.get("vista_share")]  # not text alone
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(path, f"not a trainer state ({type(error).__name__}: {error})", again)
    if not rows or not np.isfinite(ce + vista).all():
        refuse(path, "no logged loss, or one that is not finite", again)
    return {"ce": ce, "vista": vista}


def load_usual_answers(path):
    """{question: its most frequent answer} in the training conversations: what is known without the image."""
    try:
        rows = json.loads(path.read_text())
        answers = defaultdict(Counter)
        for row in rows:
            values = [turn["value"].replace("<image>", "").strip() for turn in row["conversations"]]
            for question, answer in zip(values[::2], values[1::2], strict=True):
                answers[question.partition("\n")[0]][answer] += 1  # behind it stands how to answer
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(path, f"not LLaVA's conversations ({type(error).__name__}: {error})", "Run scripts/data.sh again.")
    return {question: counts.most_common(1)[0][0] for question, counts in answers.items()}


def baseline_of(name, names):
    """The shortest of names that this one extends, or itself."""
    return next((b for b in sorted(names, key=len) if name == b or name.startswith(f"{b}-")), name)


def load_runs(run):
    """{baseline: load_run of it and of the experiments that extend its name}, and which of the paper's baselines have
    no experiment evaluated, although another has."""
    evaluated = {p.name for p in run.glob("seed*/eval/[!.]*")}
    if not evaluated:
        refuse(run, "has no seed*/eval folder", "Run scripts/eval.sh first.")
    known = evaluated | {path.stem for path in config.CONFIGS.glob("*.toml")}
    groups = defaultdict(set)
    for name in evaluated | (PAPER.keys() if evaluated & PAPER.keys() else set()):
        groups[baseline_of(name, known)] |= {name, baseline_of(name, known)}

    def order(name):  # as in the paper, then ablations
        return list(PAPER).index(name) if name in PAPER else len(PAPER), len(name), name

    absent = [baseline for baseline in sorted(groups) if not groups[baseline] & evaluated]
    there = sorted(groups.keys() - set(absent), key=order)
    return {baseline: load_run(run, sorted(groups[baseline], key=order)) for baseline in there}, absent


def load_run(run, variants):
    """seeds, variants (baseline first), columns, blind (tasks that have one); results[name, column][seed],
    logs[seed, name, stage], probes[seed, name], usual_answers[question]; missing, a sentence each."""
    r = SimpleNamespace(variants=variants, results=defaultdict(dict), logs={}, probes={}, missing=[], usual_answers={})
    r.evaluations = {}
    r.seeds = sorted(
        {p.parts[-3] for name in variants for p in run.glob(f"seed*/eval/{name}")}, key=lambda s: int(s[4:])
    )
    found = {(s, name): sorted((run / s / "eval" / name).glob("[!.]*")) for s in r.seeds for name in variants}
    planned = {name: planned_tasks(name) for name in variants}
    tasks = {task for some in planned.values() for task in some} | {p.name for some in found.values() for p in some}
    r.columns = load_columns({task for task in tasks if not task.endswith("_blind")})
    r.blind = sorted(task.removesuffix("_blind") for task in tasks if task.endswith("_blind"))
    units = {}
    for (seed, name), folders in found.items():
        for folder in folders:
            evaluation = read(folder, folder.name)
            r.evaluations[seed, name, folder.name] = evaluation
            for column, result in evaluation.results.items():
                r.results[name, column][seed] = result
                if result.units and result.units != units.setdefault(column.removesuffix("_blind"), result.units):
                    refuse(folder, "answers other questions than the others", "Run scripts/eval.sh again.")
        if len({e.checkpoint for (s, n, _), e in r.evaluations.items() if (s, n) == (seed, name)} - {None}) > 1:
            folder = run / seed / "eval" / name
            refuse(folder, "its tasks are of different checkpoints", "Run scripts/eval.sh again.")
        if not folders:
            r.missing.append(f"{name}, {seed}: not evaluated")
            continue
        if lacks := [task for task in planned[name] if task not in {p.name for p in folders}]:
            r.missing.append(f"{name}, {seed}: not evaluated on {', '.join(lacks)}")
        stages = {stage: run / seed / f"{name}{suffix}" for stage, suffix in STAGES.items()}
        r.logs |= {(seed, name, s): load_log(p) for s, p in stages.items() if (p / "trainer_state.json").exists()}
        if lacks := [stage for stage in stages if (seed, name, stage) not in r.logs]:
            r.missing.append(f"{name}, {seed}: no trainer_state.json of {' and '.join(lacks)}")
        path = run / seed / "probe" / f"{name}.npz"
        if path.exists():
            try:
                r.probes[seed, name] = dict(np.load(path))
            except (OSError, EOFError, ValueError, BadZipFile) as error:
                refuse(path, f"is broken ({error})", f"Remove it and run scripts/probe.sh {name} {seed[4:]}.")
        elif (run / "data").is_dir():  # the miniature's, whose held-out images are what is probed
            r.missing.append(f"{name}, {seed}: not probed (scripts/probe.sh {name} {seed[4:]})")
    if any(f"{task}_blind" in {p.name for p in folders} for task in r.blind for folders in found.values()):
        r.usual_answers = load_usual_answers(run / "data" / "finetune.json")
    return r


def planned_tasks(name):
    try:
        return config.load(name)["tasks"]
    except config.ConfigError:  # an experiment of another checkout: what is there counts
        return []


# What the report says


def sd(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 and np.isfinite(values).all() else None


def per_unit(run, name, column, seeds):
    """{stratum: [n]} of one experiment and column, seeds averaged: questions are what is sampled. None: unknown."""
    results = [run.results[name, column][seed] for seed in seeds]
    if not all(result.units for result in results):
        return None
    return {stratum: np.mean([r.value[stratum] for r in results], axis=0) for stratum in results[0].units}


def cell(run, name, column):
    """One experiment's score in one column, or None where there is none."""
    results = run.results[name, column.name]
    if not results:
        return None
    one, per_seed, stderr = next(iter(results.values())), [result.score for result in results.values()], None
    if value := per_unit(run, name, column.name, results):
        stderr = float(np.linalg.norm([stats.sem(stratum) for stratum in value.values()]))
    out = {
        "n": sum(map(len, one.units.values())) if one.units else one.rows,
        "whole": column.n in (None, one.rows),  # the split
        "score": float(np.mean(per_seed)),
        "stderr": stderr if stderr is None or np.isfinite(stderr) else None,
        "per_seed": per_seed,
        "seed_sd": sd(per_seed),
        "version": next(e.version for (_, n, t), e in run.evaluations.items() if (n, t) == (name, column.task)),
    }
    if name in PAPER and column.table:
        order = [c.name for c in load_columns() if c.table == column.table]
        out["paper"] = PAPER[name][str(column.table)]["scores"][order.index(column.name)]
        out["verdict"] = level(out)
    return out


def scores(run):
    """table[variant][column] (None: missing), paired[variant][column] (in the column's units) and
    delta[variant][table] (%), as in the paper's tables."""
    baseline, *others = run.variants
    table = {name: {c.name: cell(run, name, c) for c in run.columns} for name in run.variants}
    paired, gains = {name: {} for name in others}, {name: {} for name in others}
    for name in others:
        both = {}  # column: its scores and bootstrap draws, [ours, baseline] each, and the seeds
        for k, column in enumerate(run.columns):
            results = [run.results[n, column.name] for n in (name, baseline)]
            seeds = [seed for seed in run.seeds if all(seed in result for result in results)]
            if not seeds:
                continue
            a, b = (per_unit(run, n, column.name, seeds) for n in (name, baseline))
            # A seed each: the delta's columns are drawn independently.
            draws = a and b and sum(resample(a[s], b[s], seed=[k, i]) for i, s in enumerate(a))
            score = [np.mean([result[seed].score for seed in seeds]) for result in results]
            both[column.name] = score, draws, seeds
            pair = interval(score[0] - score[1], None if draws is None else draws[0] - draws[1])
            ours, base = table[name][column.name], table[baseline][column.name]
            if "paper" in ours and "paper" in base:
                pair["paper"] = ours["paper"] - base["paper"]
                pair["verdict"] = claim(pair, ours["whole"] and base["whole"])
            paired[name][column.name] = pair
        for number in sorted({c.table for c in run.columns}):
            columns = [c.name for c in run.columns if c.table == number]
            there = [column for column in columns if column in both]
            if there:
                gains[name][number] = gain(run, name, there, [both[column] for column in there]) | {"of": len(columns)}
                if all("paper" in table[name][column] for column in there):
                    gains[name][number]["paper"] = delta(
                        *([table[n][column]["paper"] for column in there] for n in (name, baseline))
                    )
    return {"table": table, "paired": paired, "delta": gains}


def gain(run, name, columns, both):
    """A table's delta over the columns that are there, with its bootstrap and its spread over the seeds."""
    score, draws, seeds = zip(*both, strict=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        known = all(draw is not None for draw in draws)
        draws = np.mean([100 * (a / b - 1) for a, b in draws], axis=0) if known else None
    per_seed = [
        delta(*([run.results[n, column][seed].score for column in columns] for n in (name, run.variants[0])))
        for seed in seeds[0]
        if all(seed in some for some in seeds)
    ]
    return interval(delta(*zip(*score, strict=True)), draws) | {"seed_sd": sd(per_seed), "over": len(columns)}


def sight(run):
    """Per task and seed: the baseline against the better of two image-blind answers to the same questions."""
    out = []
    for task, seed in ((task, seed) for task in run.blind for seed in run.seeds):
        results = [run.results[run.variants[0], name].get(seed) for name in (task, f"{task}_blind")]
        if None in results:
            continue
        (true,), (blank,) = (result.value.values() for result in results)
        questions = run.evaluations[seed, run.variants[0], task].asked
        asked = [questions[unit] for unit in results[0].units[""]]
        frequent = np.array([100.0 * (run.usual_answers.get(question) == answer) for question, answer in asked])
        row = {"task": task, "seed": seed, "n": len(true), "baseline": float(true.mean())}
        row |= {"blank_image": float(blank.mean()), "most_frequent": float(frequent.mean())}
        out.append(row | {"p": mcnemar(true, max(blank, frequent, key=np.mean))})
    return out


def probed(run, name):
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
    }


def verdicts(r):
    """The sentences at the report's top; those in capitals are warnings."""
    out = []
    for task in r["blind_tasks"]:
        rows = [row for row in r["blind"] if row["task"] == task]
        if not rows:
            out.append(
                f"NOT KNOWN whether {r['baseline']} sees ({task}): its answers or the blank image's are missing."
            )
            continue
        row = max(rows, key=lambda row: row["p"])
        seed = f"{row['seed']}, the least sure of {len(rows)}" if len(rows) > 1 else row["seed"]
        best = max(row["blank_image"], row["most_frequent"])
        source = "a blank image" if best == row["blank_image"] else "the question's most frequent answer in training"
        said = f"{r['baseline']} sees" if row["p"] < SEES else f"NO SIGHT in {r['baseline']}"
        out.append(
            f"{said} ({task}, {seed}): {row['baseline']:.1f}% right against {best:.1f}% for the best image-"
            f"blind answer ({source}), exact McNemar p = {row['p']:.2g}, n = {row['n']}."
        )
    if any(row["p"] >= SEES for row in r["blind"]):
        out.insert(0, f"NO COMPARISON WITH {r['baseline']} MEANS ANYTHING: a task shows no sight in it.")
    for name, cells in r["table"].items():
        levels = Counter(cell["verdict"].partition(":")[0] for cell in cells.values() if cell and "verdict" in cell)
        if levels:
            out.append(f"{name}: of {len(cells)} columns, against the paper's scores: {counts(levels)}.")
    for name, gains in r["delta"].items():
        claims = Counter(re.split("[:,]", p["verdict"])[0] for p in r["paired"][name].values() if "verdict" in p)
        if claims:
            out.append(f"{name}: the paper's differences to {r['baseline']}, column by column: {counts(claims)}.")
        for table, gain in gains.items():
            if gain["value"] is None:
                said = "is undefined, as a baseline score can be 0"
            elif gain["p"] is None:
                said = f"is {gain['value']:+.2f}%; no interval, as a column logs no per-sample scores"
            else:
                word = "better" if gain["value"] > 0 else "worse"
                word = word if gain["p"] < DIFFERS else "no measurable difference"
                if gain["p"] < DIFFERS and len(r["seeds"]) == 1:
                    word += " in this one run each; how much another seed changes, the interval does not know"
                said = f"is {gain['value']:+.2f}% (95% CI {ci(gain['ci95'])}, p = {gain['p']:.2g}): {word}"
            where = f"{name}, Table {table}" if table else name
            if gain["over"] < gain["of"]:
                where += f" ({gain['over']} of {gain['of']} columns)"
            out.append(f"{where}: the mean relative gain over {r['baseline']} {said}.")
        moved = [
            f"{column} {pair['value']:+.1f} (p = {pair['p']:.2g})"
            for column, pair in r["paired"][name].items()
            if pair["p"] is not None and pair["p"] < DIFFERS
        ]
        if gains:
            out.append(f"{name}: columns that differ at p < {DIFFERS}, uncorrected: {', '.join(moved) or 'none'}.")
    for name, probe in r["probes"].items():
        t = probe["theorem"]
        word = "shows no trend" if t["slope_p"] >= DIFFERS else "falls" if t["slope"] < 0 else "rises"
        out.append(
            f"{name}: the image's influence on the next token (mean KL {t['mean']:.3g} nats) {word} with the "
            f"token's position: {t['slope']:+.2g} nats per token, 95% CI {ci(t['slope_ci95'], '+.2g')}, "
            f"n = {t['n']} answers."
        )
    return out


def counts(counter):
    return ", ".join(f"{n} {word}" for word, n in sorted(counter.items()))


def ci(pair, spec="+.2f"):
    return f"[{pair[0]:{spec}}, {pair[1]:{spec}}]"


# Documents


def main(folder):
    try:
        write(folder)
    except ResultError as error:
        sys.exit(f"report.py: {error}")


def write(folder):
    if not folder.is_dir():
        refuse(folder, "is not a folder", "Give the run's folder, such as results/tiny.")
    (runs, absent), groups = load_runs(folder), {}
    manifests = {}
    for path in sorted(folder.glob("manifest-*.json")):
        try:
            manifests[path.stem.removeprefix("manifest-")] = json.loads(path.read_text())
        except ValueError as error:
            refuse(path, f"not a manifest ({error})", "Run python -m scripts.reporting.manifest again.")
    missing = [f"{baseline} and its variants: not evaluated" for baseline in absent]
    for baseline, run in runs.items():
        group = {"seeds": run.seeds, "baseline": baseline} | scores(run)
        group |= {"blind_tasks": run.blind, "blind": sight(run)}
        group["probes"] = {name: probed(run, name) for name in run.variants if name in {n for _, n in run.probes}}
        groups[baseline] = group | {"verdicts": verdicts(group)}
        missing += run.missing
        groups[baseline]["figures"] = figures.draw(run, group, folder / "figures" / baseline)
    columns = {c.name: dict(vars(c)) for run in runs.values() for c in run.columns}
    for name, column in columns.items():
        cells = [cell for group in groups.values() for cells in group["table"].values() if (cell := cells.get(name))]
        column |= {"ns": sorted({cell["n"] for cell in cells}), "version": cells[0]["version"] if cells else None}
    r = {"resamples": RESAMPLES, "columns": columns, "groups": groups, "missing": missing}
    r["paper_deltas"] = paper_deltas() if groups.keys() & PAPER.keys() else []
    r["maps"] = sorted(path.relative_to(folder).as_posix() for path in folder.glob("maps/*.png"))
    packages = ("lmms-eval", "torch", "transformers", "deepspeed", "numpy", "scipy", "matplotlib")
    r["versions"] = {name: importlib.metadata.version(name) for name in packages}
    r["versions"]["python"] = platform.python_version()
    r["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    r["manifests"] = manifests

    here = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=here, trim_blocks=True, undefined=jinja2.StrictUndefined)
    text = templates.get_template("report.md.j2").render(r, run=folder.as_posix(), ci=ci, paper=PAPER)
    body = markdown(text, extensions=["tables", "fenced_code", "sane_lists"])
    body = re.sub(r"<table>.*?</table>", r'<div class="scroll">\g<0></div>', body, flags=re.DOTALL)
    body = re.sub(r'src="((?:figures|maps)/.+?)"', lambda m: f'src="{data_uri(folder / m[1])}"', body)
    page = templates.get_template("report.html.j2").render(body=body, run=folder.as_posix())
    numbers = json.dumps(r, indent=1, allow_nan=False)
    for name, content in {"report.json": numbers, "report.md": text, "report.html": page}.items():
        (folder / f"{name}.partial").write_text(content)
        os.replace(folder / f"{name}.partial", folder / name)
    said = [line for group in groups.values() for line in group["verdicts"]]
    print(*said, *(f"missing: {line}" for line in missing), folder / "report.html", sep="\n")


def data_uri(png):
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
