"""The study's runs: every experiment of PLAN for its seeds, each one's results as a small file to commit.

    python -m scripts.miniature.study [--lanes N]        N runs abreast, default: one for each core
    python -m scripts.miniature.study --pilot            PILOT's runs instead, which tell how many seeds it takes

docs/study/results/seedN/EXPERIMENT.json holds what the analysis needs of one run: which questions it answered rightly,
what scripts/probe.sh measured, the kit's commit, the instrument (a hash) and the kind of CPU. Or it says in which stage
the loss was not finite. A pilot's lies in docs/study/pilot/seedN/. A run that has this file is skipped, and one that
was cut off continues, so the command may be stopped and given again at any time. The data are make reproduce's; the
trained models lie in results/study/seedN. The primary runs come first, a seed at a time. All runs of a seed come from
one kind of CPU, and all runs from one instrument: what was begun with another is refused.
"""

import argparse
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cpuinfo
import numpy as np

from scripts import config
from scripts.common import ROOT, Busy, Job, lock, run_abreast, sha256, signals_raise, start, write_whole
from scripts.evaluation import results
from scripts.evaluation.results import ResultError
from scripts.reporting.comparison import usual_right
from scripts.reporting.instrument import fact_kl, measured
from scripts.reporting.runs import load_probe, load_usual_answers
from vista_patch.config import FLAGS

OUT = Path("docs/study")
RUN = Path("results/study")
# The probe's arrays that a result keeps whole, for a bootstrap over rows; probe.py says what they are.
ROWS = (
    "fact_token",
    "fact_right",
    "fact_kl",
    "auroc",
    "hit",
    "hit_chance",
    "map_type",
    "stage_1_ce",
    "stage_1_ce_swapped",
)
PRIMARY = ("llava-tiny", "llava-tiny-vista", "llava-tiny-vista-cosine")
ABLATIONS = tuple(f"llava-tiny-vista-{name}" for name in ("stage-1", "stage-2", "tenth", "third", "sum", "flat"))
TINYLLAVA = ("tinyllava-tiny", "tinyllava-tiny-vista", "tinyllava-tiny-vista-cosine")
# Seeds 0 to 99 are for pilots and for `make reproduce`: no finding rests on a seed that a setting was chosen on.
PLAN = [(name, seed) for seed in range(100, 110) for name in PRIMARY]
PLAN += [(name, seed) for seed in range(100, 105) for name in (*ABLATIONS, *TINYLLAVA)]
PILOT = [(name, seed) for seed in range(5) for name in PRIMARY[:2]]
# Beside the data, the models and the flags: the code that trains, evaluates and probes. What vista_patch computes is
# held by its own tests; a result names its commit.
CODE = ("patches/**/*", "scripts/training/stock.py", "scripts/evaluation/stock.py", "scripts/reporting/probe.py")


@functools.cache
def cpu() -> str:
    """The kind of CPU, on which a run's last bits depend."""
    known = cpuinfo.get_cpu_info()
    flags = sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & set(known.get("flags", ())))
    name, family, model, step = (known.get(key, "?") for key in ("brand_raw", "family", "model", "stepping"))
    return f"{name}, family {family}, model {model}, stepping {step}, {' '.join(flags)}"


@functools.cache
def instrument(backbone: str) -> str:
    """A sha256 over what decides the numbers of a baseline's runs beside the seed and the kind of CPU: data, start
    models, flags and code. A variant's runs differ from them by VISTA's flags alone. A few seconds."""
    loaded, total = config.load(backbone), hashlib.sha256()
    for stage in config.STAGES:
        flags = {key: value for key, value in config.settings(loaded, stage).items() if key not in FLAGS}
        total.update(json.dumps([loaded["train_module"], flags], sort_keys=True).encode())
    for key in ("model_name_or_path", "vision_tower"):
        total.update(results.identity(Path(loaded["train"][key])).encode())
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern) if path.is_file()):
        total.update(f"{path.relative_to(ROOT)} {sha256(path)}\n".encode())
    manifest = Path(loaded["finetune"]["data_path"]).with_name("manifest.json")
    total.update(json.dumps(json.loads(manifest.read_text())["files"], sort_keys=True).encode())
    return total.hexdigest()[:16]


def baseline(name: str) -> str:
    return TINYLLAVA[0] if name in TINYLLAVA else PRIMARY[0]


def result_file(name: str, seed: int) -> Path:
    return OUT / ("pilot" if seed < 100 else "results") / f"seed{seed}" / f"{name}.json"


def steps(name: str, seed: int) -> list[list[str]]:
    train = [["scripts/train.sh", name, stage, str(seed)] for stage in config.STAGES]
    return [*train, ["scripts/eval.sh", name, str(seed)], ["scripts/probe.sh", name, str(seed)]]


def stage_of(command: list[str]) -> str | None:
    return command[2] if command[0] == "scripts/train.sh" else None


def who(name: str, seed: int) -> dict[str, Any]:
    """What a result says of its run."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    return {"experiment": name, "seed": seed, "cpu": cpu(), "commit": commit, "instrument": instrument(baseline(name))}


def collect(name: str, seed: int) -> dict[str, Any]:
    """A run's results as its file holds them. Raises ResultError where they are missing or odd."""
    folder, right = RUN / f"seed{seed}", {}
    evaluated = {task: folder / "eval" / name / task for task in config.load(name)["tasks"]}
    usual = load_usual_answers(RUN / "data" / "finetune.json") if name == baseline(name) else None
    for task, path in evaluated.items():
        evaluation = results.read(path, task)
        result = evaluation.results[task]
        if result.value is None or result.units is None:
            raise ResultError(path, "has no per-question answers")
        right[task] = bits(result.value[""])  # in the order of the questions
        if usual is not None and not task.endswith("_blind"):
            right[f"{task}_usual"] = bits(usual_right(evaluation, result.units[""], usual))
    arrays = load_probe(folder / "probe" / f"{name}.npz", f"scripts/probe.sh {name} {seed}")
    arrays["fact_kl"] = fact_kl(arrays)
    rows = {key: plain(arrays[key]) for key in ROWS}
    return who(name, seed) | {"right": right, "probe": measured([arrays]), "rows": rows}


def bits(value_n: np.ndarray) -> str:
    return "".join("1" if value else "0" for value in value_n)


def plain(array: np.ndarray) -> Any:
    """Nested lists for JSON: four decimals, None for NaN."""
    if array.ndim > 1:
        return [plain(row) for row in array]
    return [
        None if value != value else round(value, 4) if isinstance(value, float) else value for value in array.tolist()
    ]


def jobs(name: str, seed: int, failed: list[str]) -> list[Job]:
    """One run's steps, of which the last one writes its result file. failed: gets a run that breaks off."""
    log = RUN / f"seed{seed}" / f"{name}.study.log"
    commands, begun = steps(name, seed), time.monotonic()

    def begin(command: list[str]) -> "subprocess.Popen[bytes]":
        nonlocal begun
        begun = time.monotonic() if command == commands[0] else begun
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            given = os.environ | {"RUN_FOLDER": str(RUN)}
            return start(command, env=given, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def end(command: list[str], code: int) -> bool:
        broken = [
            stage for stage in config.STAGES if (RUN / f"seed{seed}" / f"{name}-{stage}" / "nonfinite.json").exists()
        ]
        if not code and command != commands[-1]:
            return True
        try:
            if code and stage_of(command) not in broken:
                raise ResultError(log, f"{' '.join(command)} ended with {code}", "Read there why.")
            found = who(name, seed) | {"nonfinite": stage_of(command)} if code else collect(name, seed)
        except (ResultError, OSError, ValueError, KeyError) as error:
            failed.append(name)
            print(f"study: {name}, seed {seed}: {error}", file=sys.stderr, flush=True)
            return False
        path = result_file(name, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        found["seconds"] = round(time.monotonic() - begun)  # of a run that was cut off, since it continued
        write_whole(path, json.dumps(found, allow_nan=False) + "\n")
        print(f"study: {path} is written: commit it", flush=True)
        return not code

    return [Job(functools.partial(begin, command), functools.partial(end, command)) for command in commands]


def todo(plan: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """What is still to run. Exits where it was begun on another kind of CPU or instrument, or a result file is odd."""
    here = cpu()
    missing = [(name, seed) for name, seed in plan if not result_file(name, seed).exists()]
    for name, seed in plan:
        path = result_file(name, seed)
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_text())
            said, by, commit = (found["experiment"], found["seed"], found["cpu"]), found["instrument"], found["commit"]
        except (ValueError, KeyError, TypeError) as error:
            sys.exit(f"study: {path} is not a whole result ({type(error).__name__}: {error}): restore or remove it")
        if said[:2] != (name, seed):
            sys.exit(f"study: {path} is the result of {said[0]}, seed {said[1]}: restore or remove it")
        if said[2] != here and any(s == seed for _, s in missing):
            sys.exit(
                f"study: seed {seed} was begun on {said[2]}; this is {here}. A seed's runs must come from one kind of "
                f"CPU: finish it there, or remove {path.parent} to begin it anew here"
            )
        if any(baseline(n) == baseline(name) for n, _ in missing) and by != instrument(baseline(name)):
            sys.exit(
                f"study: {path} was made by another instrument (commit {commit}): other data, models, flags or code. "
                f"Go on at that commit, or remove what was made with it to begin anew"
            )
    return missing


def main(at_once: int, pilot: bool = False) -> int:
    RUN.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(RUN / ".lock", lambda problem: print(f"study: {problem}", file=sys.stderr))
    except Busy:
        sys.exit(f"study: another one is at work in {RUN}: wait for it, or stop it")
    try:
        return run(PILOT if pilot else PLAN, at_once)
    finally:
        os.close(held)


def run(plan: list[tuple[str, int]], at_once: int) -> int:
    data = RUN / "data"
    if not data.is_symlink():
        data.symlink_to("../tiny/data")
    missing, failed = todo(plan), list[str]()
    print(f"study: {len(plan) - len(missing)} of {len(plan)} runs are there", flush=True)
    try:
        with signals_raise():
            run_abreast([jobs(*one, failed) for one in missing], at_once, go_on=True)
    except SystemExit as stopped:
        print("study: stopped; the same command continues", file=sys.stderr)
        return int(stopped.code or 0)
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--lanes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--pilot", action="store_true")
    given = parser.parse_args()
    sys.exit(main(given.lanes, given.pilot))
