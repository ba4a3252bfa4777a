"""Reads what lmms-eval left of a task: whether it is whole, and what is in it, in one reading.

A task's folder holds lmms-eval's own folder, with `*_results.json` and `*_samples_TASK.jsonl`, and checkpoint.json, the
identity of what was evaluated. `read` gives its columns of the paper's tables (suite.toml), or raises ResultError.

A column's score is the sum over its strata of the mean over the stratum's units. Most columns have one stratum, and a
row is a unit; MME adds its categories up (a unit is a picture's pair of questions), MMStar averages 18 of them.
"""

import hashlib
import importlib.util
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomllib
from numpy.typing import NDArray

from scripts.common import sha256

MINIATURE = Path(__file__).parents[1] / "miniature/tasks"
ROUNDING = 6e-4  # in the paper's units: MMMU and MMT-Bench round to 5 digits
ODD = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)  # of a broken file
# Of a checkpoint's folder: what its model is loaded from, and what training writes beside it.
LOADED = {".bin", ".json", ".model", ".safetensors", ".txt"}
WRITTEN = {"trainer_state.json", "training_args.bin", "nonfinite.json"}


class ResultError(Exception):
    """A result that is missing, not whole or not the right one. Says where, what is wrong and what to do."""

    def __init__(self, path: Path, problem: str, remedy: str = "Run scripts/eval.sh for it again."):
        super().__init__(f"{path}: {problem}. {remedy}")


@dataclass(frozen=True)
class Column:
    """A column of the paper's tables; suite.toml says what the fields mean. Table 0: a task that the paper lacks."""

    name: str
    task: str
    key: str
    scale: float
    table: int = 0
    field: str | None = None
    n: int | None = None
    data: str | None = None

    @property
    def metric(self) -> str:
        return self.key.partition(",")[0]


@dataclass(frozen=True)
class Challenge:
    """A task whose answers are not public; suite.toml says what the fields mean."""

    task: str
    column: str
    data: str
    n: int
    scored: int


@dataclass(frozen=True)
class Submission:
    """The file of one evaluation for a challenge's server, whole: each question once, no other."""

    challenge: Challenge
    path: Path
    questions: int
    score: float | None  # that the server gave it, in %

    @property
    def whole(self) -> bool:
        """All of the split: the server takes nothing else."""
        return self.questions == self.challenge.n

    @property
    def stderr(self) -> float | None:
        """The largest standard error that the score can have: that of answers which are right or wrong."""
        return None if self.score is None else (self.score * (100 - self.score) / self.challenge.scored) ** 0.5


@dataclass(frozen=True)
class Result:
    """One column of one evaluation. units, value: {stratum: [n]} both, None where lmms-eval logs too little."""

    score: float  # in the paper's units
    rows: int  # that count in this column
    units: dict[str, list[Hashable]] | None
    value: dict[str, NDArray[np.float64]] | None


@dataclass(frozen=True)
class Evaluation:
    """One task of one checkpoint, whole."""

    task: str
    version: str | float
    checkpoint: str | None  # its `identity`; None: nobody recorded it
    results: dict[str, Result]  # by the column's name; of a user's own task without exact_match: empty
    asked: dict[Hashable, tuple[str, str]]  # {unit: (question, answer)}, of tasks that the paper lacks
    submission: Submission | None = None


def load_columns(tasks: Collection[str] | None = None) -> list[Column]:
    """The columns that these tasks (None: the paper's) have: suite.toml's in its order. A task that it lacks (the
    miniature's) is a column of its own: exact_match in %."""
    paper = [Column(**row) for row in load_suite()["column"]]
    if tasks is None:
        return paper
    own = sorted(set(tasks) - {column.task for column in paper} - load_challenges().keys())
    paper += [Column(name=task, task=task, key="exact_match,none", scale=100) for task in own]
    return [column for column in paper if column.task in tasks]


def load_suite() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("suite.toml").read_text(encoding="utf-8"))


def load_challenges() -> dict[str, Challenge]:
    """By the task."""
    return {row["task"]: Challenge(**row) for row in load_suite()["submission"]}


def identity(checkpoint: Path) -> str:
    """A sha256 over what a model is loaded from: its weights, config and tokenizer, by name and content. A copy has the
    same one. Reads every byte: 14 GB take 10 to 30 s. Raises ResultError where there are no weights."""
    total, weights = hashlib.sha256(), False
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint)
        skipped = name.parts[0].startswith((".", "checkpoint-")) or name.parts[0] in ("replay", "runs")
        if skipped or path.suffix not in LOADED or path.name in WRITTEN or not path.is_file():
            continue
        weights = weights or path.suffix in (".bin", ".safetensors")
        total.update(f"{name.as_posix()!a} {sha256(path)}\n".encode())
    if not weights:
        raise ResultError(checkpoint, "holds no weights", "Train this experiment first.")
    return total.hexdigest()


def record(folder: Path, checkpoint: str) -> None:
    """Write beside a task's results which checkpoint, by its identity, they are of."""
    (folder / "checkpoint.json").write_text(json.dumps({"sha256": checkpoint}) + "\n", encoding="utf-8")


def read(folder: Path, task: str, checkpoint: str | None = None) -> Evaluation:
    """A task's whole evaluation. checkpoint: the identity that it must be of; None: of any.

    lmms-eval exits 0 even when a run fails, so its files decide. Raises ResultError where they are missing, cut off or
    of another checkpoint, where a column is no finite number, and where the score is not what the samples give.

    A user's own task may have other metrics than exact_match. Then these must be finite, and there is no column. Nor is
    there one of a challenge; there it raises too where the file for the server is not whole.
    """
    files = sorted(folder.glob("*/[0-9]*_results.json"))
    if len(files) != 1:
        raise ResultError(folder, f"has {len(files)} results files instead of one")
    recorded = read_record(folder / "checkpoint.json")
    if checkpoint is not None and recorded != checkpoint:
        said = "does not say which checkpoint it is of" if recorded is None else "is of another checkpoint"
        raise ResultError(folder, said)
    columns = load_columns({task})
    logged: dict[str, dict[Hashable, Any]] = {column.name: {} for column in columns}
    units: list[Hashable] = []
    asked: dict[Hashable, tuple[str, str]] = {}
    challenge = load_challenges().get(task)
    numbers: set[int] = set()
    try:
        stock = json.loads(files[0].read_text(encoding="utf-8"))
        samples = files[0].with_name(files[0].name.replace("_results.json", f"_samples_{task}.jsonl"))
        with samples.open(encoding="utf-8") as lines:  # 600 MB for VQAv2: a line at a time
            for line in lines:
                row = json.loads(line)
                units.append(unit := (row["doc_id"], row["target"]))  # the same in every experiment
                for column in columns:
                    if column.metric in row:
                        logged[column.name][unit] = row[column.metric]
                if challenge:
                    numbers.add(row["doc"]["question_id"])
                elif not columns[0].table and {"question", "answer"} <= row["doc"].keys():
                    asked[unit] = (str(row["doc"]["question"]), str(row["doc"]["answer"]))
        n, version = stock["n-samples"][task]["effective"], stock["versions"][task]
        if not n or not len(units) == len(set(units)) == n:
            raise ResultError(files[0], f"says n = {n}, its samples: {len(units)} rows, {len(set(units))} questions")
        values = stock["results"][task]
        if challenge:
            submission = submitted(folder, challenge, numbers)
            return Evaluation(task, told(version), recorded, {}, {}, submission)
        if is_users(task) and columns[0].key not in values:
            check_finite(values)
            columns = []
        results = {column.name: result(column, values[column.key], logged[column.name]) for column in columns}
    except UnreadableScore as error:
        raise ResultError(files[0], str(error)) from None
    except ODD as error:
        problem = f"not a whole lmms-eval result of {task} ({type(error).__name__}: {error})"
        raise ResultError(files[0], problem) from None
    return Evaluation(task, told(version), recorded, results, asked)


def told(version: Any) -> str | float:
    return version if isinstance(version, int | float) else str(version)


def submitted(folder: Path, challenge: Challenge, asked: set[int]) -> Submission:
    """What a task wrote for its challenge's server. asked: the numbers of the questions.

    score.txt, where the user put it, is the server's score. Raises ResultError unless each question has one answer, a
    text, and no other has, and for a score that is no percentage.
    """
    files = sorted(folder.glob("submissions/*.json"))
    if len(files) != 1:
        raise ResultError(folder, f"has {len(files)} files for the challenge's server instead of one")
    rows = json.loads(files[0].read_text(encoding="utf-8"))
    answers = {row["question_id"]: row["answer"] for row in rows}
    problems = [
        (len(rows) - len(answers), "answers to a question that has one already"),
        (len(asked - answers.keys()), "questions without an answer"),
        (len(answers.keys() - asked), "answers to questions that were not asked"),
        (sum(not isinstance(answer, str) for answer in answers.values()), "answers that are no text"),
    ]
    if wrong := [f"{what}: {count}" for count, what in problems if count]:
        raise ResultError(files[0], f"the challenge's server would refuse it: {', '.join(wrong)}")
    return Submission(challenge, files[0], len(answers), read_score(folder / "score.txt"))


def read_score(path: Path) -> float | None:
    if not path.exists():
        return None
    try:
        score = float(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        score = math.nan
    if not 0 <= score <= 100:
        raise ResultError(path, "holds no score in %", "Write what the challenge's server says there, such as 78.5.")
    return score


def is_users(task: str) -> bool:
    """Whether a task is neither one of the paper's nor the miniature's."""
    return not load_columns({task})[0].table and not (MINIATURE / f"{task}.yaml").exists()


def check_finite(values: Mapping[str, Any]) -> None:
    """values: what results[TASK] is, with keys "METRIC,FILTER" and "METRIC_stderr,FILTER".

    A metric may be something else than a number, such as null where a submission was written. Raises UnreadableScore
    where no metric is a number, and where one is not finite.
    """
    metrics = {key: value for key, value in values.items() if not key.partition(",")[0].endswith("_stderr")}
    scores = {key: value for key, value in metrics.items() if "," in key and isinstance(value, int | float)}
    if not scores:
        raise UnreadableScore("no metric is a number")
    for key, value in scores.items():
        if not math.isfinite(value):
            raise UnreadableScore(f"{key} is {value}")


def read_record(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["sha256"])
    except FileNotFoundError:
        return None
    except ODD as error:
        raise ResultError(path, f"does not name a checkpoint ({type(error).__name__}: {error})") from None


class UnreadableScore(Exception):
    pass


def result(column: Column, value: Any, logged: Mapping[Hashable, Any]) -> Result:
    """value: what results[TASK][column.key] is; logged: {unit: what lmms-eval logs of the metric}."""
    score = column.scale * float(value[column.field] if column.field else value)
    if not math.isfinite(score) or not logged:
        raise UnreadableScore(f"{column.key} is {score} over {len(logged)} samples")
    strata = per_sample(column.metric, logged)
    if not all(strata.values()):
        return Result(score, len(logged), None, None)
    ordered = {stratum: dict(sorted(rows.items())) for stratum, rows in sorted(strata.items())}
    scaled = {stratum: column.scale * np.array([*rows.values()], dtype=float) for stratum, rows in ordered.items()}
    if not abs(sum(v.mean() for v in scaled.values()) - score) <= ROUNDING:  # NaN is never within
        if column.metric != "gpt_eval_score":
            raise UnreadableScore(f"its {column.key} {score} is not the mean of its samples")
        return Result(score, len(logged), None, None)  # a judge was asked, and lmms-eval does not log what it said
    return Result(score, len(logged), {stratum: [*rows] for stratum, rows in ordered.items()}, scaled)


def per_sample(metric: str, logged: Mapping[Hashable, Any]) -> dict[str, dict[Any, float]]:
    """The rows of a column as {stratum: {unit: value}}, such that the metric is the sum over the strata of the mean of
    value. An empty stratum: that cannot be had."""
    strata: dict[str, dict[Any, float]] = defaultdict(dict)
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
            strata[""] = dict(zip(logged, cider(list(logged.values())), strict=True)) if can_cider() else {}
        case _:
            strata[""] = {unit: float(value) for unit, value in logged.items()}
    return dict(strata)


def can_cider() -> bool:
    return bool(importlib.util.find_spec("pycocoevalcap") and shutil.which("java"))  # its tokenizer is a Java program


def cider(rows: list[Any]) -> list[float]:
    """CIDEr of each caption. Document frequencies are the references', so the same for every model."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenize = PTBTokenizer().tokenize
    references = tokenize({i: [{"caption": text} for text in row["answer"]] for i, row in enumerate(rows)})
    scores = Cider().compute_score(references, tokenize({i: [{"caption": r["pred"]}] for i, r in enumerate(rows)}))[1]
    return [float(score) for score in scores]
