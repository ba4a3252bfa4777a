"""Reads what training, evaluation and the probe left in a run's folder. What is missing is said; what is odd raises."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from scripts import config
from scripts.evaluation import results
from scripts.evaluation.results import ODD, Column, Evaluation, Result, ResultError
from scripts.reporting.instrument import NEEDED
from scripts.reporting.paper import PAPER
from vista_patch.config import VistaConfig

STAGES = {"stage 1": "-pretrain", "stage 2": "-finetune"}
PAIRS = list[list[float]]  # [[step, value], ...]


@dataclass
class Run:
    """A baseline and the experiments that extend its name, as far as they are there."""

    variants: list[str]  # the baseline first
    seeds: list[str]  # "seed0", ...
    columns: list[Column]
    blind: list[str]  # tasks that are asked with a blank image too, as TASK_blind
    evaluations: dict[tuple[str, str, str], Evaluation] = field(default_factory=dict)  # by seed, variant, task
    results: dict[tuple[str, str], dict[str, Result]] = field(default_factory=lambda: defaultdict(dict))
    """[variant, column][seed]"""
    logs: dict[tuple[str, str, str], dict[str, PAIRS]] = field(default_factory=dict)  # by seed, variant, stage
    probes: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)  # by seed, variant: probe.py's arrays
    settings: dict[str, dict[str, VistaConfig]] = field(default_factory=dict)  # by variant, stage
    usual_answers: dict[str, str] = field(default_factory=dict)  # {question: the most frequent answer in training}
    missing: list[str] = field(default_factory=list)  # a sentence each


def seeds_of(run: Path) -> list[str]:
    return sorted((p.name for p in run.iterdir() if re.fullmatch("seed[0-9]+", p.name)), key=lambda s: (len(s), s))


def there(folder: Path) -> list[str]:
    """What lies in a folder, without hidden names; nothing where there is none."""
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def load_log(folder: Path) -> dict[str, PAIRS]:
    """{"ce" | "vista": [[step, value], ...]} of a training run; stock's own `loss` is the baseline's ce."""
    path, again = folder / "trainer_state.json", "Train this experiment again."
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        rows = [row for row in history if "loss" in row]
        ce = [[row["step"], float(row.get("loss_ce", row["loss"]))] for row in rows]
        vista = [[row["step"], float(row["loss_vista"])] for row in rows if row.get("vista_share")]  # not text alone
        finite = all(math.isfinite(number) for pair in ce + vista for number in pair)
    except ODD as error:
        raise ResultError(path, f"not a trainer state ({type(error).__name__}: {error})", again) from None
    if not rows or not finite:
        raise ResultError(path, "no logged loss, or one that is not finite", again)
    return {"ce": ce, "vista": vista}


def load_usual_answers(path: Path) -> dict[str, str]:
    """{question: its most frequent answer} in the training conversations: what is known without the image."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    try:
        for row in json.loads(path.read_text(encoding="utf-8")):
            values = [turn["value"].replace("<image>", "").strip() for turn in row["conversations"]]
            for question, answer in zip(values[::2], values[1::2], strict=True):
                answers[question.partition("\n")[0]][answer] += 1  # behind it stands how to answer
    except ODD as error:
        problem = f"not LLaVA's conversations ({type(error).__name__}: {error})"
        raise ResultError(path, problem, "Run scripts/data.sh again.") from None
    return {question: counts.most_common(1)[0][0] for question, counts in answers.items()}


def load_probe(path: Path, again: str) -> dict[str, Any]:
    try:
        arrays = dict(np.load(path, allow_pickle=False))
    except (*ODD, EOFError, BadZipFile) as error:
        raise ResultError(path, f"is broken ({error})", f"Remove it and run {again}.") from None
    if lacks := NEEDED - arrays.keys():
        problem = f"was measured by another version of the kit, without {', '.join(sorted(lacks))}"
        raise ResultError(path, problem, f"Remove it and run {again}.")
    return arrays


def load_settings(run: Path, seeds: Collection[str], name: str) -> dict[str, VistaConfig]:
    """{stage: what an experiment was trained with}, as its checkpoints say; where none is there, as its config says."""
    found: dict[str, VistaConfig] = {}
    for path, stage in ((run / s / f"{name}{suffix}/config.json", st) for s in seeds for st, suffix in STAGES.items()):
        try:
            trained = VistaConfig.from_dict(json.loads(path.read_text(encoding="utf-8")).get("vista", {}), "vista")
        except FileNotFoundError:
            continue
        except ODD as error:
            problem = f"not a checkpoint's config ({type(error).__name__}: {error})"
            raise ResultError(path, problem, "Train this experiment again.") from None
        if found.setdefault(stage, trained) != trained:
            raise ResultError(
                path, f"{trained} is not what another seed has: {found[stage]}", "Train one of them again."
            )
    if found:
        return found
    try:
        planned = config.load(name)
        return {
            stage: VistaConfig.from_arguments(config.vista(planned, suffix.removeprefix("-")))
            for stage, suffix in STAGES.items()
        }
    except (config.ConfigError, KeyError, ValueError):  # an experiment of another checkout
        return {}


def planned_tasks(name: str) -> list[str]:
    try:
        return list(config.load(name)["tasks"])
    except config.ConfigError:  # an experiment of another checkout: what is there counts
        return []


def baseline_of(name: str, names: Collection[str]) -> str:
    """The shortest of names that this one extends, or itself."""
    return next((b for b in sorted(names, key=len) if name == b or name.startswith(f"{b}-")), name)


def load_runs(run: Path) -> tuple[dict[str, Run], list[str]]:
    """{baseline: its Run}, and which of the paper's baselines have no experiment evaluated, although another has."""
    evaluated = {name for seed in seeds_of(run) for name in there(run / seed / "eval")}
    if not evaluated:
        raise ResultError(run, "has no seed*/eval folder", "Run scripts/eval.sh first.")
    paper, public = PAPER.rows, {name for name, published in PAPER.published.items() if published.public}
    known = evaluated | {path.stem for path in config.CONFIGS.glob("*.toml")}
    groups: dict[str, set[str]] = defaultdict(set)
    for name in evaluated - public | (paper.keys() if evaluated & paper.keys() else set()):
        groups[baseline_of(name, known)] |= {name, baseline_of(name, known)}

    def order(name: str) -> tuple[int, int, str]:  # as in the paper, then ablations
        return list(paper).index(name) if name in paper else len(paper), len(name), name

    absent = [baseline for baseline in sorted(groups) if not groups[baseline] & evaluated]
    baselines = sorted(groups.keys() - set(absent), key=order)
    return {baseline: load_run(run, sorted(groups[baseline], key=order)) for baseline in baselines}, absent


def load_run(run: Path, variants: list[str]) -> Run:
    """What is there of these experiments, whose first one is the baseline. Raises ResultError."""
    seeds = [seed for seed in seeds_of(run) if any((run / seed / "eval" / name).exists() for name in variants)]
    folders = {(seed, name): run / seed / "eval" / name for seed in seeds for name in variants}
    found = {key: [folder / task for task in there(folder)] for key, folder in folders.items()}
    planned = {name: planned_tasks(name) for name in variants}
    tasks = {task for some in planned.values() for task in some} | {p.name for some in found.values() for p in some}
    blind = sorted(task.removesuffix("_blind") for task in tasks if task.endswith("_blind"))
    columns = results.load_columns({task for task in tasks if not task.endswith("_blind")})
    loaded = Run(variants, seeds, columns, blind)
    units: dict[str, Any] = {}
    for (seed, name), evaluated in found.items():
        load_evaluations(loaded, seed, name, evaluated, units)
        if not evaluated:
            loaded.missing.append(f"{name}, {seed}: not evaluated")
            continue
        if lacks := [task for task in planned[name] if task not in {path.name for path in evaluated}]:
            loaded.missing.append(f"{name}, {seed}: not evaluated on {', '.join(lacks)}")
        load_training(loaded, run, seed, name)
    loaded.settings = {name: load_settings(run, seeds, name) for name in variants}
    if any(path.name.endswith("_blind") for some in found.values() for path in some):
        loaded.usual_answers = load_usual_answers(run / "data" / "finetune.json")
    return loaded


def load_evaluations(loaded: Run, seed: str, name: str, folders: list[Path], units: dict[str, Any]) -> None:
    """units: {column: the questions that are asked in it}, which is filled and must be the same in every experiment."""
    for folder in folders:
        evaluation = loaded.evaluations[seed, name, folder.name] = results.read(folder, folder.name)
        if not evaluation.results and not evaluation.submission:
            loaded.missing.append(f"{name}, {seed}: {folder.name} lacks exact_match, all that is shown of a task")
        for column, result in evaluation.results.items():
            loaded.results[name, column][seed] = result
            if result.units and result.units != units.setdefault(column.removesuffix("_blind"), result.units):
                raise ResultError(folder, "answers other questions than the others", "Run scripts/eval.sh again.")
    checkpoints = {loaded.evaluations[seed, name, folder.name].checkpoint for folder in folders}
    if len(checkpoints - {None}) > 1:
        problem = "its tasks are of different checkpoints"
        raise ResultError(folders[0].parent, problem, "Run scripts/eval.sh again.")


def load_training(loaded: Run, run: Path, seed: str, name: str) -> None:
    stages = {stage: run / seed / f"{name}{suffix}" for stage, suffix in STAGES.items()}
    for stage, folder in stages.items():
        if (folder / "trainer_state.json").exists():
            loaded.logs[seed, name, stage] = load_log(folder)
    if lacks := [stage for stage in stages if (seed, name, stage) not in loaded.logs]:
        loaded.missing.append(f"{name}, {seed}: no trainer_state.json of {' and '.join(lacks)}")
    path, again = run / seed / "probe" / f"{name}.npz", f"scripts/probe.sh {name} {seed[4:]}"
    if path.exists():
        loaded.probes[seed, name] = load_probe(path, again)
    elif (run / "data").is_dir():  # the miniature's, whose held-out images are what is probed
        loaded.missing.append(f"{name}, {seed}: not probed ({again})")
