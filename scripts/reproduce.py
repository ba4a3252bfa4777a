"""The whole reproduction: a stock upstream, patched, trained in two stages as baseline, VISTA and VISTA (cosine),
evaluated and reported. An experiment that is a public checkpoint is evaluated and reported alone.

Every step is a script of its own, is skipped when its output is whole, and continues when it was cut off. --dry-run
prints the steps, what is downloaded and evaluated, and each training's resolved command, and needs no set-up.
"""

import os
import shlex
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts import common, config
from scripts.common import ROOT, Arguments, Busy, Job, fail, lock, run_abreast, signals_raise, start
from scripts.data import catalog
from scripts.training import launch

USAGE = (
    "scripts/reproduce.sh [--profile tiny|small|full] [--backbone llava|tinyllava|both] [--seeds N] [--dry-run]\n"
    "       scripts/reproduce.sh --experiment NAME [--seeds N] [--dry-run]       one of scripts/configs/ alone"
)
BASELINES = {
    "tiny": {"llava": "llava-tiny", "tinyllava": "tinyllava-tiny"},
    "small": {"tinyllava": "tinyllava-0.5b"},
    "full": {"llava": "llava-v1.5-7b", "tinyllava": "tinyllava-3b"},
}
SEEDS = {"small": "3"}  # where it is not 1
VARIANTS = ("", "-vista", "-vista-cosine")
BEGUN = time.monotonic()


@dataclass(frozen=True)
class Step:
    """A command, and the backbone that it is for."""

    words: tuple[str, ...]
    backbone: str

    @classmethod
    def of(cls, backbone: str, *words: object) -> "Step":
        return cls(tuple(map(str, words)), backbone)

    def show(self) -> None:
        seconds = int(time.monotonic() - BEGUN)
        print(f"\n[{seconds // 60}:{seconds % 60:02}] {shlex.join(self.words)}", flush=True)

    def begin(self) -> "subprocess.Popen[bytes]":
        self.show()
        return start(self.words, cwd=ROOT)

    def job(self) -> Job:
        return Job(self.begin)


@dataclass(frozen=True)
class Plan:
    """What a run does: one thing after another, then the lanes, of which some may run at once, then the report."""

    setup: list[Step]
    lanes: list[list[Step]]
    report: Step
    backbones: list[str]
    profile: str


def make_plan(names: Sequence[str], variants: Sequence[str], profile: str, seeds: int) -> Plan:
    """For each of these experiments and its variants. Raises ConfigError."""
    loaded = {name: config.load(name) for name in names}
    public = [name for name in names if loaded[name]["checkpoint"]]
    if public and seeds > 1:
        raise config.ConfigError(f"{public[0]} is a public checkpoint, which no seed changes: leave --seeds out")
    backbones = [loaded[name]["backbone"] for name in names]
    setup = [
        Step.of("", "scripts/setup/doctor.sh", profile, *backbones),
        Step.of("", "scripts/setup/env.sh", "cpu"),
    ]
    if profile != "tiny":  # a baseline's variants cost the same
        setup.append(Step.of("", "python3", "-m", "scripts.training.cost", *names, "--runs", len(variants) * seeds))
    lanes = []
    for name, experiment in loaded.items():
        backbone, experiments = experiment["backbone"], [f"{name}{variant}" for variant in variants]
        words: list[tuple[object, ...]] = [
            ("scripts/setup/upstream.sh", backbone),
            ("scripts/setup/patch.sh", backbone),
        ]
        if experiment["environment"] == ".venv-cpu-tinyllava":  # the full profile's own environments are the image's
            words.append(("scripts/setup/env.sh", "cpu-tinyllava"))
        words.append(("scripts/data.sh", name))
        words.append(("python3", "-m", "scripts.reporting.manifest", "--seeds", seeds, *experiments))
        setup += [Step.of(backbone, *command) for command in words]
        for seed in range(seeds):
            for one in experiments:
                stages = () if name in public else config.STAGES
                lane = [Step.of(backbone, "scripts/train.sh", one, stage, seed) for stage in stages]
                lane.append(Step.of(backbone, "scripts/eval.sh", one, seed))
                if profile == "tiny" and stages:
                    lane.append(Step.of(backbone, "scripts/probe.sh", one, seed))
                lanes.append(lane)
    run = loaded[names[0]]["run"]
    return Plan(setup, lanes, Step.of("", "python3", "-m", "scripts.reporting.report", run), backbones, profile)


def show(plan: Plan) -> None:
    """The dry run: what the steps are, and what those that change nothing say."""
    for step in [*plan.setup, *(step for lane in plan.lanes for step in lane), plan.report]:
        step.show()
        if step.words[0] == "scripts/train.sh":
            experiment, name, seed = step.words[1:]
            stage = launch.plan(experiment, name, seed)
            print(shlex.join([*stage.launcher(), *stage.program()]), flush=True)
        elif step.words[0] == "scripts/data.sh":
            for source in catalog.needed(config.load(step.words[1]))[0]:
                hub = f"{source.repo}@{source.revision[:7] or 'main'}" if source.repo else ""
                says = hub or source.of or source.url[0]
                print(f"  {source.to} {'is there' if source.to.exists() else f'from {says}'}", flush=True)
        elif step.words[0] == "scripts/eval.sh":
            print(" ", *config.load(step.words[1])["tasks"], flush=True)
        elif step.words[0] == "scripts/setup/doctor.sh":
            subprocess.run(step.words, cwd=ROOT)  # tells the disk; what it lacks does not stop a dry run
        elif "scripts.training.cost" in step.words:
            subprocess.run([sys.executable, *step.words[1:]], cwd=ROOT, check=True)


def run(plan: Plan) -> int:
    without: set[str] = set()
    for step in plan.setup:
        if step.backbone in without or run_abreast([[step.job()]], 1):
            continue
        # TinyLLaVA is on GitHub alone.
        if step.words != ("scripts/setup/upstream.sh", "tinyllava") or len(plan.backbones) == 1:
            return 1
        without.add(step.backbone)
        print(f"reproduce: going on without {step.backbone}", file=sys.stderr, flush=True)
    lanes = [[step.job() for step in lane] for lane in plan.lanes if lane[0].backbone not in without]
    # On a CPU a training takes one core, whatever their number, so that its bits do not depend on it.
    at_once = len(os.sched_getaffinity(0)) if plan.profile == "tiny" else 1
    if not run_abreast(lanes, at_once):
        fail("reproduce", "a step failed, see above; the same command continues", 1)
    return 0 if run_abreast([[plan.report.job()]], 1) else 1


def main(argv: list[str]) -> int:
    os.chdir(ROOT)
    parser = Arguments(prog="reproduce", usage=USAGE, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="tiny", nargs="?", const="")
    parser.add_argument("--backbone", nargs="?", const="")
    parser.add_argument("--experiment", nargs="?", const="")
    parser.add_argument("--seeds", nargs="?", const="")
    parser.add_argument("--dry-run", action="store_true")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unknown option {unknown[0]}")
    if args.profile not in BASELINES:
        parser.error(f"--profile {args.profile!r}: choose tiny, small or full")
    profile, baselines = args.profile, BASELINES[args.profile]
    backbone = next(iter(baselines)) if args.backbone is None else args.backbone
    if backbone not in ("llava", "tinyllava", "both"):
        parser.error(f"--backbone {backbone!r}: choose llava, tinyllava or both")
    if not (names := [baselines[key] for key in baselines if backbone in (key, "both")]):
        parser.error(f"--backbone {backbone}: profile {profile} has {' and '.join(baselines)} alone")
    seeds = args.seeds if args.seeds is not None else SEEDS.get(profile, "1") if args.experiment is None else "1"
    if not (seeds.isdecimal() and seeds.isascii() and 1 <= int(seeds) <= 10**6):
        parser.error(f"--seeds {seeds!r}: give a number from 1 on")
    variants: Sequence[str] = VARIANTS
    try:
        if args.experiment is not None:
            names, variants, profile = [args.experiment], [""], config.load(args.experiment)["profile"]
        plan = make_plan(names, variants, profile, int(seeds))
        if args.dry_run:
            show(plan)
            return 0
    except (config.ConfigError, catalog.DataError) as error:
        fail("reproduce", str(error))
    Path("results").mkdir(exist_ok=True)
    try:
        lock(Path("results/.lock"), lambda problem: print(f"reproduce: {problem}", file=sys.stderr))
    except Busy:
        fail("reproduce", "another run is at work in results/: wait for it, or stop it")
    except OSError as error:
        fail("reproduce", f"results/.lock cannot be opened: {error.strerror}. Remove it if it is a link")
    # On a bare clone this is the system's Python, and pyenv puts its own before all others.
    os.environ["PATH"] = f"{ROOT}/.venv/bin:{os.environ.get('PATH', os.defpath)}"
    with signals_raise():
        return run(plan)


if __name__ == "__main__":
    common.run("reproduce", main)
