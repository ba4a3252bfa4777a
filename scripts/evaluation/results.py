"""lmms-eval's results and samples of a task, as columns of the paper's tables (scripts/evaluation/suite.toml).

A column's score is the sum over its strata of the mean over the stratum's units. Most columns have one stratum, and a
row is a unit; MME adds its categories up (a unit is a picture's pair of questions), MMStar averages 18 of them.
"""

import importlib.util
import json
import math
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tomllib

ROUNDING = 6e-4  # in the paper's units: MMMU and MMT-Bench round to 5 digits


def refuse(path, problem, remedy):
    sys.exit(f"report.py: {path}: {problem}. {remedy}")


def load_columns(tasks=None):
    """The columns that these tasks (None: the paper's) have: suite.toml's in its order; a task that it lacks (the
    miniature's) is a column of its own: table 0, exact_match in %. table, name, task, key, field, scale, n as there."""
    suite = tomllib.loads((Path(__file__).parent / "suite.toml").read_text())["column"]
    paper = {column["task"] for column in suite}
    tasks = paper if tasks is None else tasks
    own = sorted(tasks - paper)
    rows = suite + [{"name": task, "task": task, "key": "exact_match,none", "scale": 100} for task in own]
    empty = {"table": 0, "field": None, "n": None}
    return [SimpleNamespace(**(empty | row)) for row in rows if row["task"] in tasks]


def load_task(folder, columns):
    """{column's name: its result} of one task. A result has the score in the paper's units, the number of rows that
    count, the task's version, and units and value {stratum: [n]}, both None where lmms-eval logs too little.
    Rows of the miniature's tasks keep question and answer: asked {unit: (question, answer)}."""
    task, again = folder.name, "Run scripts/eval.sh for it again."
    files = sorted(folder.glob("*/[0-9]*_results.json"))
    if len(files) != 1:
        refuse(folder, f"has {len(files)} results files instead of one", again)
    metrics = {column.name: column.key.partition(",")[0] for column in columns}
    logged, units, asked = {name: {} for name in metrics}, [], {}
    try:
        results = json.loads(files[0].read_text())
        samples = files[0].with_name(files[0].name.replace("_results.json", f"_samples_{task}.jsonl"))
        with samples.open() as lines:  # 600 MB for VQAv2: a line at a time
            for line in lines:
                row = json.loads(line)
                units.append(unit := (row["doc_id"], row["target"]))  # the same in every experiment
                for name, metric in metrics.items():
                    if metric in row:
                        logged[name][unit] = row[metric]
                if not columns[0].table:
                    asked[unit] = (row["doc"]["question"], row["doc"]["answer"])
        n, version = results["n-samples"][task]["effective"], results["versions"][task]
        values = {column.name: results["results"][task][column.key] for column in columns}
        score = {c.name: c.scale * float(values[c.name][c.field] if c.field else values[c.name]) for c in columns}
        if not n or not len(units) == len(set(units)) == n:
            refuse(files[0], f"says n = {n}, its samples: {len(units)} rows, {len(set(units))} questions", again)
        out = {}
        for column in columns:
            ids, value = per_sample(metrics[column.name], logged[column.name])
            out[column.name] = SimpleNamespace(
                score=score[column.name], rows=len(logged[column.name]), version=version, asked=asked,
                units=ids, value=value and {s: column.scale * np.array(v) for s, v in value.items()},
            )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse(files[0], f"not a whole lmms-eval result of {task} ({type(error).__name__}: {error})", again)
    for column in columns:
        result = out[column.name]
        if not math.isfinite(result.score) or not result.rows:
            refuse(files[0], f"{column.key} is {result.score} over {result.rows} samples", again)
        if result.value is None:
            continue
        if abs(sum(v.mean() for v in result.value.values()) - result.score) > ROUNDING:
            if metrics[column.name] == "gpt_eval_score":  # a judge was asked, and lmms-eval does not log what it said
                result.units = result.value = None
            else:
                refuse(files[0], f"its {column.key} {result.score} is not the mean of its samples", again)
    return out


def per_sample(metric, logged):
    """The rows of a column, logged {unit: what lmms-eval logs of the metric}, as (units, value): {stratum: [n]} both,
    such that the metric is the sum over the strata of the mean of value. (None, None) if that cannot be had."""
    strata = defaultdict(dict)
    match metric:
        case "seed_image":
            for unit, row in logged.items():
                strata[""][unit] = float(row["pred"].lower().strip() == row["answer"].lower().strip())
        case "mmmu_acc":
            from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

            for unit, row in logged.items():
                strata[""][unit] = float(evaluate_mmmu([row])[1]["acc"])
        case "average":  # MMStar
            categories = {row["l2_category"] for row in logged.values()}
            for unit, row in logged.items():
                strata[row["l2_category"]][unit] = row["score"] / len(categories)
        case "accuracy":  # MMT-Bench, in %
            strata[""] = {unit: 100 * row["overall"] for unit, row in logged.items()}
        case "ocrbench_accuracy":  # divided by 1,000 however many there are
            strata[""] = {unit: row["score"] * len(logged) / 1000 for unit, row in logged.items()}
        case "mme_perception_score" | "mme_cognition_score":  # accuracy in % over both questions, and over the pair
            pairs = defaultdict(list)
            for row in logged.values():
                pairs[row["category"], row["question_id"]].append(row["score"])
            for (category, picture), (one, other) in pairs.items():
                strata[category][picture] = 50 * (one + other) + 100 * (one + other == 2)
        case "gpt_eval_score":  # MMBench, in %: right if every rotation of the options is; here by its rules alone
            from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

            rules, hits = MMBench_Evaluator(), defaultdict(list)
            for row in logged.values():
                hits[int(row["index"]) % 10**6].append(rules.prefetch_answer(dict(row)) == row["answer"])
            strata[""] = {question: 100.0 * all(hit) for question, hit in hits.items()}
        case "refcoco_CIDEr":
            strata[""] = dict(zip(logged, cider(list(logged.values())), strict=True)) if can_cider() else None
        case _:
            strata[""] = {unit: float(value) for unit, value in logged.items()}
    if not all(strata.values()):
        return None, None
    ordered = {stratum: dict(sorted(values.items())) for stratum, values in sorted(strata.items())}
    return {s: list(v) for s, v in ordered.items()}, {s: list(v.values()) for s, v in ordered.items()}


def can_cider():
    return bool(importlib.util.find_spec("pycocoevalcap") and shutil.which("java"))  # its tokenizer is a Java program


def cider(rows):
    """CIDEr of each caption. Document frequencies are the references', so the same for every model."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenize = PTBTokenizer().tokenize
    references = tokenize({i: [{"caption": text} for text in row["answer"]] for i, row in enumerate(rows)})
    return Cider().compute_score(references, tokenize({i: [{"caption": r["pred"]}] for i, r in enumerate(rows)}))[1]
