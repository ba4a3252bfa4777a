"""Write RUN_DIR/report.json, report.md (with figures/) and one self-contained report.html from result files.

    python scripts/report.py results/tiny

Reads what training, scripts/eval.sh and scripts/probe.sh left in RUN_DIR/seed*/, and RUN_DIR/manifest-*.json.
A baseline is an experiment whose name others extend: one per backbone. TASK_blind is TASK with a blank image. Figures
and sentences are all computed; what is missing or odd is refused with one line that says what to do.
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
import report_figures
from markdown import markdown
from scipy import stats

METRIC = "exact_match"
RESAMPLES = 10_000
SEES, DIFFERS = 0.01, 0.05  # p below which the baseline is said to see, and two variants to differ
STAGES = {"stage 1": "-pretrain", "stage 2": "-finetune"}
TERMS = ("ce", "ce_swapped", "vista_mean", "vista_sum", "vista_cosine")


def refuse(path, problem, remedy):
    sys.exit(f"report.py: {path}: {problem}. {remedy}")


# Statistics


def delta(scores, baseline):
    """The paper's delta: mean over the tasks of the relative gain, in %. NaN where a baseline score is 0."""
    return float(np.mean([100 * (s / b - 1) if b else np.nan for s, b in zip(scores, baseline, strict=True)]))


def resample(a_n, b_n, resamples=RESAMPLES, seed=0):
    """Means of a and of b, [2, resamples], over the same n samples drawn with replacement."""
    rng, n, pairs = np.random.default_rng(seed), len(a_n), np.stack([a_n, b_n])
    chunk = max(1, 10**7 // n)  # bounds the memory
    sizes = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    return np.concatenate([pairs[:, rng.integers(n, size=(size, n))].mean(2) for size in sizes], axis=1)


def interval(value, draws):
    """A statistic with its 95% percentile interval and the two-sided bootstrap p of "it is 0"."""
    if not np.isfinite([value, *draws]).all():  # a relative gain over 0
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


# Reading


def load_task(folder):
    """lmms-eval's output of one task: its version and {question_id: (right 0/1, question, answer)}."""
    task, again = folder.name, "Run scripts/eval.sh for it again."
    files = sorted(folder.glob("*/[0-9]*_results.json"))
    if len(files) != 1:
        refuse(folder, f"has {len(files)} results files instead of one", again)
    try:
        results = json.loads(files[0].read_text())
        score, n = results["results"][task][f"{METRIC},none"], results["n-samples"][task]["effective"]
        samples = files[0].with_name(files[0].name.replace("_results.json", f"_samples_{task}.jsonl"))
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        docs = [row["doc"] for row in rows]
        answered = {
            doc["question_id"]: (float(row[METRIC]), doc["question"], doc["answer"])
            for doc, row in zip(docs, rows, strict=True)
        }
        version = results["versions"][task]
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(files[0], f"not a whole lmms-eval result of {task} ({type(error).__name__}: {error})", again)
    if not n or not len(answered) == len(rows) == n:
        refuse(files[0], f"says n = {n}, its samples: {len(rows)} rows, {len(answered)} question ids", again)
    right = [right for right, *_ in answered.values()]
    if not set(right) <= {0, 1} or abs(np.mean(right) - score) > 1e-6:
        refuse(files[0], f"its {METRIC} {score} is not the mean of its 0/1 samples", again)
    return SimpleNamespace(version=version, answered=answered)


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


def load_runs(run):
    """{baseline: load_run of it and the variants whose names extend it}, one for each backbone."""
    names = sorted({p.name for p in run.glob("seed*/eval/*")}, key=lambda name: (len(name), name))
    if not names:
        refuse(run, "has no seed*/eval folder", "Run scripts/eval.sh first.")
    groups = {}
    for name in names:
        groups.setdefault(next((b for b in groups if name.startswith(f"{b}-")), name), []).append(name)
    for baseline, variants in groups.items():
        if len(variants) < 2:
            refuse(run, f"{baseline} is evaluated alone", "A baseline and its -variants are needed.")
    runs = {baseline: load_run(run, variants) for baseline, variants in groups.items()}
    if len({(*r.seeds, *r.tasks) for r in runs.values()}) > 1:
        refuse(run, f"{' and '.join(runs)} have other tasks or seeds", "Run scripts/eval.sh for what is missing.")
    return runs


def load_run(run, variants):
    """seeds, variants (baseline first), tasks; evals[seed, variant, task], logs[seed, variant, stage],
    probes[seed, variant]; usual_answers[question]."""
    baseline = variants[0]
    seeds = sorted({p.parts[-3] for p in run.glob(f"seed*/eval/{baseline}")}, key=lambda name: int(name[4:]))
    tasks = sorted(p.name for p in run.glob(f"{seeds[0]}/eval/{baseline}/[!.]*") if not p.match("*_blind"))
    evals, logs, probes = {}, {}, {}
    for seed in seeds:
        for name in variants:
            for task in tasks + [f"{task}_blind" for task in tasks if name == baseline]:
                folder = run / seed / "eval" / name / task
                evals[seed, name, task] = load_task(folder)
                asked = evals[seeds[0], baseline, task.removesuffix("_blind")].answered.keys()
                if evals[seed, name, task].answered.keys() != asked:
                    refuse(folder, "answers other questions than the baseline", "Run scripts/eval.sh again.")
            for stage, suffix in STAGES.items():
                logs[seed, name, stage] = load_log(run / seed / f"{name}{suffix}")
            path = run / seed / "probe" / f"{name}.npz"
            try:
                probes[seed, name] = dict(np.load(path))
            except (OSError, EOFError, ValueError, BadZipFile) as error:
                refuse(path, f"is missing or broken ({error})", f"Remove it, run scripts/probe.sh {name} {seed[4:]}.")
    usual = load_usual_answers(run / "data" / "finetune.json")
    return SimpleNamespace(
        seeds=seeds, variants=variants, tasks=tasks, evals=evals, logs=logs, probes=probes, usual_answers=usual
    )


def right(run, name, task):
    """[seeds, n] 0/1, questions in the baseline's order."""
    order = run.evals[run.seeds[0], run.variants[0], task.removesuffix("_blind")].answered
    return np.array([[run.evals[seed, name, task].answered[i][0] for i in order] for seed in run.seeds])


# What the report says


def sd(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 and np.isfinite(values).all() else None


def scores(run):
    """table[variant][task], paired[variant][task] (points) and delta[variant] (%), as the paper's Table 1."""
    baseline, *others = run.variants
    table, paired, gains = {}, {}, {}
    for name in run.variants:
        table[name] = {}
        for task in run.tasks:
            right_sn = right(run, name, task)
            per_question = right_sn.mean(0)  # questions are what is sampled: average the seeds first
            table[name][task] = {
                "n": len(per_question),
                "score": float(right_sn.mean()),
                "stderr": float(stats.sem(per_question)),
                "per_seed": right_sn.mean(1).tolist(),
                "seed_sd": sd(right_sn.mean(1)),
                "version": run.evals[run.seeds[0], name, task].version,
            }
    base = table[baseline]
    for name in others:
        pairs = {
            task: resample(right(run, name, task).mean(0), right(run, baseline, task).mean(0), seed=k)
            for k, task in enumerate(run.tasks)  # a seed each: the delta's tasks are drawn independently
        }
        paired[name] = {
            task: interval(100 * (table[name][task]["score"] - base[task]["score"]), 100 * (a - b))
            for task, (a, b) in pairs.items()
        }
        with np.errstate(divide="ignore", invalid="ignore"):
            draws = np.mean([100 * (a / b - 1) for a, b in pairs.values()], axis=0)
        value = delta(*([cells[t]["score"] for t in run.tasks] for cells in (table[name], base)))
        per_seed = [
            delta(*([cells[t]["per_seed"][k] for t in run.tasks] for cells in (table[name], base)))
            for k in range(len(run.seeds))
        ]
        gains[name] = interval(value, draws) | {"seed_sd": sd(per_seed)}
    return {"table": table, "paired": paired, "delta": gains}


def sight(run):
    """Per task and seed: the baseline against the better of two image-blind answers to the same questions."""
    out = []
    for task in run.tasks:
        answered = run.evals[run.seeds[0], run.variants[0], task].answered.values()
        frequent = np.array([float(run.usual_answers.get(q) == a) for _, q, a in answered])
        images = right(run, run.variants[0], task), right(run, run.variants[0], f"{task}_blind")
        for seed, true, blank in zip(run.seeds, *images, strict=True):
            row = {"task": task, "seed": seed, "n": len(true), "baseline": float(true.mean())}
            row |= {"blank_image": float(blank.mean()), "most_frequent": float(frequent.mean())}
            row["p"] = mcnemar(true, max(blank, frequent, key=np.mean))
            out.append(row)
    return out


def probed(run, name):
    """Theorem 3.3's curve, the loss terms' sizes and the maps' averages of one variant, seeds averaged."""
    probes = [run.probes[seed, name] for seed in run.seeds]
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
    for task in r["table"][r["baseline"]]:
        row = max((row for row in r["blind"] if row["task"] == task), key=lambda row: row["p"])
        seed = f"{row['seed']}, the least sure of {len(r['seeds'])}" if len(r["seeds"]) > 1 else row["seed"]
        best = max(row["blank_image"], row["most_frequent"])
        source = "a blank image" if best == row["blank_image"] else "the question's most frequent answer in training"
        said = f"{r['baseline']} sees" if row["p"] < SEES else f"NO SIGHT in {r['baseline']}"
        out.append(
            f"{said} ({task}, {seed}): {row['baseline']:.1%} right against {best:.1%} for the best image-"
            f"blind answer ({source}), exact McNemar p = {row['p']:.2g}, n = {row['n']}."
        )
    if any(row["p"] >= SEES for row in r["blind"]):
        out.insert(0, f"NO COMPARISON WITH {r['baseline']} MEANS ANYTHING: a task shows no sight in it.")
    for name, gain in r["delta"].items():
        moved = [
            f"{task} {pair['value']:+.1f} points (p = {pair['p']:.2g})"
            for task, pair in r["paired"][name].items()
            if pair["p"] < DIFFERS
        ]
        if gain["value"] is None:
            said = "is undefined, as a baseline score can be 0"
        else:
            word = "better" if gain["value"] > 0 else "worse"
            word = word if gain["p"] < DIFFERS else "no measurable difference"
            said = f"is {gain['value']:+.2f}% (95% CI {ci(gain['ci95'])}, p = {gain['p']:.2g}): {word}"
        out.append(
            f"{name}: the mean relative gain over {r['baseline']} {said}. "
            f"Tasks that differ at p < {DIFFERS}, uncorrected: {', '.join(moved) or 'none'}."
        )
    for name, probe in r["probes"].items():
        t = probe["theorem"]
        word = "shows no trend" if t["slope_p"] >= DIFFERS else "falls" if t["slope"] < 0 else "rises"
        out.append(
            f"{name}: the image's influence on the next token (mean KL {t['mean']:.3g} nats) {word} with the "
            f"token's position: {t['slope']:+.2g} nats per token, 95% CI {ci(t['slope_ci95'], '+.2g')}, "
            f"n = {t['n']} answers."
        )
    return out


def ci(pair, spec="+.2f"):
    return f"[{pair[0]:{spec}}, {pair[1]:{spec}}]"


# Documents


def main(folder):
    if not folder.is_dir():
        refuse(folder, "is not a folder", "Give the run's folder, such as results/tiny.")
    runs, groups = load_runs(folder), {}
    for baseline, run in runs.items():
        group = {"seeds": run.seeds, "baseline": baseline} | scores(run) | {"blind": sight(run)}
        group["probes"] = {name: probed(run, name) for name in run.variants}
        groups[baseline] = group | {"verdicts": verdicts(group)}
    r = {"metric": METRIC, "resamples": RESAMPLES, "groups": groups}
    packages = ("lmms-eval", "torch", "transformers", "deepspeed", "numpy", "scipy", "matplotlib")
    r["versions"] = {name: importlib.metadata.version(name) for name in packages}
    r["versions"]["python"] = platform.python_version()
    r["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    manifests = sorted(folder.glob("manifest-*.json"))
    r["manifests"] = {}
    for path in manifests:
        try:
            r["manifests"][path.stem.removeprefix("manifest-")] = json.loads(path.read_text())
        except ValueError as error:
            refuse(path, f"not a manifest ({error})", "Run scripts/manifest.py again.")

    for baseline, run in runs.items():
        report_figures.draw(run, groups[baseline], folder / "figures" / baseline)
    here = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=here, trim_blocks=True, undefined=jinja2.StrictUndefined)
    text = templates.get_template("report.md.j2").render(r, run=folder.as_posix(), ci=ci)
    body = markdown(text, extensions=["tables", "fenced_code", "sane_lists"])
    body = re.sub(r"<table>.*?</table>", r'<div class="scroll">\g<0></div>', body, flags=re.DOTALL)
    body = re.sub(r'src="(figures/.+?)"', lambda m: f'src="{data_uri(folder / m[1])}"', body)
    page = templates.get_template("report.html.j2").render(body=body, run=folder.as_posix())
    numbers = json.dumps(r, indent=1, allow_nan=False)
    for name, content in {"report.json": numbers, "report.md": text, "report.html": page}.items():
        (folder / f"{name}.partial").write_text(content)
        os.replace(folder / f"{name}.partial", folder / name)
    print(*(line for group in groups.values() for line in group["verdicts"]), folder / "report.html", sep="\n")


def data_uri(png):
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
