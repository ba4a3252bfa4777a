"""The study's runs: every experiment of PLAN for its seeds, each one's results as a small file to commit.

    python -m scripts.miniature.study [--lanes N]        N runs abreast, default: one for each core

docs/study/results/seedN/EXPERIMENT.json holds what the analysis needs of one run: which questions it answered rightly,
what scripts/probe.sh measured, the kit's commit and the kind of CPU. A run that has this file is skipped, and one that
was cut off continues, so the command may be stopped and given again at any time. The data are make reproduce's; the
trained models lie in results/study/seedN. The primary runs come first, a seed at a time. All runs of a seed come from
one kind of CPU: a seed that was begun on another is refused.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from scripts import config
from scripts.common import write_whole
from scripts.evaluation import results
from scripts.reporting.instrument import fact_kl, measured

OUT = Path("docs/study/results")
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


def cpu() -> str:
    """The kind of CPU, on which a run's last bits depend."""
    fields = dict(
        line.split(":", 1)
        for line in Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        if ":" in line
    )
    known = {key.strip(): value.strip() for key, value in fields.items()}
    flags = sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & set(known.get("flags", "").split()))
    names = [known.get(key, "?") for key in ("model name", "cpu family", "model", "stepping")]
    return f"{names[0]}, family {names[1]}, model {names[2]}, stepping {names[3]}, {' '.join(flags)}"


def result_file(name: str, seed: int) -> Path:
    return OUT / f"seed{seed}" / f"{name}.json"


def steps(name: str, seed: int) -> list[list[str]]:
    train = [["scripts/train.sh", name, stage, str(seed)] for stage in ("pretrain", "finetune")]
    return [*train, ["scripts/eval.sh", name, str(seed)], ["scripts/probe.sh", name, str(seed)]]


def collect(name: str, seed: int) -> dict[str, Any]:
    """A run's results as its file holds them."""
    folder = RUN / f"seed{seed}"
    right = {}
    for task in config.load(name)["tasks"]:
        result = results.read(folder / "eval" / name / task, task).results[task]
        if result.value is None:
            sys.exit(
                f"study: {folder}/eval/{name}/{task} has no per-question answers: run scripts/eval.sh for it again"
            )
        right[task] = "".join("1" if value else "0" for value in result.value[""])  # in the order of the questions
    with np.load(folder / "probe" / f"{name}.npz") as file:
        arrays = dict(file)
    arrays["fact_kl"] = fact_kl(arrays)
    rows = {key: plain(arrays[key]) for key in ROWS}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    said = {"experiment": name, "seed": seed, "cpu": cpu(), "commit": commit, "right": right}
    return said | {"probe": measured([arrays]), "rows": rows}


def plain(array: np.ndarray) -> Any:
    """Nested lists for JSON: four decimals, None for NaN."""
    if array.ndim > 1:
        return [plain(row) for row in array]
    return [
        None if value != value else round(value, 4) if isinstance(value, float) else value for value in array.tolist()
    ]


class Stopped(Exception):
    """SIGTERM or SIGINT came."""


class Lanes:
    """Runs steps as processes of their own, which a signal ends."""

    def __init__(self) -> None:
        self.lock, self.running, self.stopped = threading.Lock(), set[subprocess.Popen[bytes]](), False

    def stop(self, *_: object) -> None:
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()

    def run(self, name: str, seed: int) -> None:
        """One run to its result file. Raises CalledProcessError where a step fails, Stopped after a signal."""
        log = RUN / f"seed{seed}" / f"{name}.study.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        for command in steps(name, seed):
            with self.lock:
                if self.stopped:
                    raise Stopped
                with log.open("ab") as out:
                    process = subprocess.Popen(
                        command,
                        env=os.environ | {"RUN_FOLDER": str(RUN)},
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=out,
                    )
                self.running.add(process)
            code = process.wait()
            with self.lock:
                self.running.discard(process)
                if self.stopped:
                    raise Stopped
            if code:
                raise subprocess.CalledProcessError(code, f"{' '.join(command)} ({log} says why)")
        path = result_file(name, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(collect(name, seed), allow_nan=False) + "\n")
        print(f"study: {path} is written: commit it", flush=True)


def todo() -> list[tuple[str, int]]:
    """What PLAN still lacks. Exits where a seed was begun on another kind of CPU, or a result file is odd."""
    here = cpu()
    for name, seed in PLAN:
        path = result_file(name, seed)
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_text())
            said = found["experiment"], found["seed"], found["cpu"]
        except (ValueError, KeyError, TypeError) as error:
            sys.exit(f"study: {path} is not a whole result ({type(error).__name__}: {error}): restore or remove it")
        if said[:2] != (name, seed):
            sys.exit(f"study: {path} is the result of {said[0]}, seed {said[1]}: restore or remove it")
        lacks = any(n for n, s in PLAN if s == seed and not result_file(n, s).exists())
        if said[2] != here and lacks:
            sys.exit(
                f"study: seed {seed} was begun on {said[2]}; this is {here}. A seed's runs must come from one kind of "
                f"CPU: finish it there, or remove {path.parent} to begin it anew here"
            )
    return [(name, seed) for name, seed in PLAN if not result_file(name, seed).exists()]


def main(at_once: int) -> int:
    missing = todo()
    print(f"study: {len(PLAN) - len(missing)} of {len(PLAN)} runs are there", flush=True)
    data = RUN / "data"
    if not data.is_symlink():
        RUN.mkdir(parents=True, exist_ok=True)
        data.symlink_to("../tiny/data")
    lanes, failed = Lanes(), []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lanes.stop)
    with ThreadPoolExecutor(at_once) as pool:
        for (name, seed), lane in [(run, pool.submit(lanes.run, *run)) for run in missing]:
            error = lane.exception()
            if error and not isinstance(error, Stopped):
                failed.append(name)
                print(f"study: {name}, seed {seed}: {error}", file=sys.stderr, flush=True)
    if lanes.stopped:
        print("study: stopped; the same command continues", file=sys.stderr)
        return 143
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--lanes", type=int, default=os.cpu_count() or 1)
    sys.exit(main(parser.parse_args().lanes))
