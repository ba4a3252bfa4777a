"""One training stage of a named experiment: the stock train.py of its upstream under the deepspeed launcher.

Stage 1 (pretrain) trains the projector, stage 2 (finetune) the projector and the language model; the vision tower
stays frozen. A stage that is done is skipped; one that was cut off continues from its newest whole checkpoint.
SIGTERM (or SIGUSR1, Slurm's early warning) stops it after a checkpoint, with exit code 143.
replay: the rows that a loss which was not finite left in nonfinite.json, as one step on the newest checkpoint.

Another number of GPUs, or less memory: RANKS=4 PER_DEVICE=8 (scripts/config.py). CUDA_VISIBLE_DEVICES says which GPUs.
Several machines with one folder:
  HOSTFILE=FILE                           deepspeed starts them over ssh (scripts/training/cluster/hostfile)
  NNODES=N NODE_RANK=R MASTER_ADDR=HOST   torchrun, this script on each of them (scripts/training/cluster/train.sbatch)
"""

import base64
import glob
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import ArgumentTypeError, RawDescriptionHelpFormatter
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from scripts import common, config
from scripts.common import (
    ROOT,
    Arguments,
    Busy,
    count_gpus,
    fail,
    lock,
    need_setup,
    remove_below,
    start,
    stop,
    write_whole,
)

USAGE = "scripts/train.sh EXPERIMENT pretrain|finetune [SEED [replay]]"
# What a machine may differ in. Each step trains on the same rows whatever they are.
SPREAD = {"ranks", "per_device_train_batch_size", "gradient_accumulation_steps"}
FREE = {"report_to", "unlabelled"}  # may change at any time: neither moves a step that went well
STALE = 300  # seconds, for a compiler on another machine, which cannot be asked: a minute on a CPU, two beside a GPU
SHARED = Path("/dev/shm")

Settings = dict[str, str]


@dataclass(frozen=True)
class Machines:
    """Where the ranks run."""

    nodes: int
    node: int  # this machine's number
    address: str
    port: int
    hostfile: str | None

    @classmethod
    def from_environment(cls, stage: str) -> "Machines":
        def number(name: str, default: str, least: int, most: int) -> int:
            text = os.environ.get(name) or default
            if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) or not least <= int(text) <= most:
                fail(stage, f"{name}={text!r}: give a whole number from {least} to {most}")
            return int(text)

        nodes = number("NNODES", "1", 1, 10**6)
        node = number("NODE_RANK", "0", 0, nodes - 1)
        port = number("MASTER_PORT", "29500", 1, 65535)
        address = os.environ.get("MASTER_ADDR", "")
        if nodes > 1 and not re.fullmatch(r"[\w.:%-]+", address, re.ASCII):
            fail(stage, f"MASTER_ADDR={address!r}: give the host of node 0")
        hostfile = os.environ.get("HOSTFILE") or None
        if hostfile and not Path(hostfile).is_file():  # deepspeed would train on this machine alone
            fail(stage, f"HOSTFILE={hostfile}: no such file")
        if hostfile and nodes > 1:
            fail(stage, "HOSTFILE and NNODES are two ways to several machines: set one of them")
        return cls(nodes, node, address, port, hostfile)

    def slots(self) -> int:
        """Of all hosts in the hostfile."""
        lines = Path(self.hostfile or os.devnull).read_text(encoding="utf-8").splitlines()
        return sum(int(found[1]) for line in lines if (found := re.match(r"[^#]*slots=([0-9]+)", line)))


@dataclass(frozen=True)
class Stage:
    """What is trained and where it goes; paths are relative to the repository."""

    experiment: str
    name: str  # pretrain or finetune
    seed: str
    settings: Settings  # stock's flags
    train_module: str
    backbone: str
    environment: Path
    ranks: int
    out: Path
    pretrained: Path
    machines: Machines
    replayed: Path | None = None  # the checkpoint that a replay starts from
    replay: bool = False

    def fail(self, message: str, code: int = 2) -> NoReturn:
        fail(self.name, message, code)

    @property
    def described(self) -> Settings:
        """All that decides what a stage computes."""
        given = {**self.settings, "output_dir": str(self.out), "seed": self.seed}
        return {"ranks": str(self.ranks), "train_module": self.train_module, **given}

    def program(self, driver: str = "stock.py") -> list[str]:
        words = [f"scripts/training/{driver}", "--train_module", self.train_module]
        for key, value in self.settings.items():
            words += [f"--{key}", value]
        return [*words, "--output_dir", str(self.out), "--seed", self.seed]

    def launcher(self) -> list[str]:
        """As a person would type it; `launched` is what runs."""
        at = self.machines
        if at.nodes > 1:
            words = ["torchrun", "--nnodes", str(at.nodes), "--node_rank", str(at.node)]
            words += ["--nproc_per_node", str(self.ranks // at.nodes), "--master_addr", at.address]
            return [*words, "--master_port", str(at.port)]
        if at.hostfile:
            return ["deepspeed", "--hostfile", at.hostfile, "--master_port", str(at.port)]
        return ["deepspeed", "--num_gpus", str(self.ranks)]

    def launched(self, gpus: int) -> list[str]:
        """On one machine this is what `deepspeed` itself starts. That one ends on SIGTERM without its child, and gives
        the ranks GPUs from 0 on whatever CUDA_VISIBLE_DEVICES says."""
        if self.machines.nodes > 1 or self.machines.hostfile:
            return self.launcher()
        with socket.create_server(("", 0)) as free:  # other trainings may run beside this one
            port = free.getsockname()[1]
        world = {"localhost": visible_devices(self.ranks, gpus)}
        encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
        words = ["python3", "-u", "-m", "deepspeed.launcher.launch", f"--world_info={encoded}"]
        return [*words, "--master_addr=127.0.0.1", f"--master_port={port}"]


def visible_devices(ranks: int, gpus: int) -> list[str] | list[int]:
    """The devices that the ranks are given, as CUDA_VISIBLE_DEVICES names them: numbers, UUIDs or MIG names."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not gpus:
        return ["-1"] * ranks if names is not None else list(range(ranks))  # one that is hidden stays so
    return [name.strip() for name in names.split(",")][:ranks] if names is not None else list(range(ranks))


def plan(experiment: str, stage: str, seed: str = "0", replay: bool = False) -> Stage:
    """Everything but this machine's GPUs. Ends the program where the call or the config is wrong."""
    machines = Machines.from_environment(stage)
    try:
        loaded = config.load(experiment, machines.slots() if machines.hostfile else None)
        settings = config.settings(loaded, stage)
    except config.ConfigError as error:
        fail("config", str(error))
    if loaded["checkpoint"]:
        there = f"{experiment} is a public checkpoint, {loaded['checkpoint']}"
        fail(stage, f"{there}: it is not trained. scripts/eval.sh {experiment} evaluates it")
    ranks, run = loaded["ranks"], Path(loaded["run"], f"seed{seed}")
    if ranks % machines.nodes:
        fail(stage, f"{ranks} ranks do not spread over {machines.nodes} nodes: set RANKS")
    # TinyLLaVA saves what its own loader can read only where "finetune" is in the name.
    out, pretrained = run / f"{experiment}-{stage}", run / f"{experiment}-pretrain"
    if stage == "finetune":
        first = {
            "llava": {"pretrain_mm_mlp_adapter": str(pretrained / "mm_projector.bin")},
            "tinyllava": {"pretrained_model_path": str(pretrained)},
        }
        settings |= first[loaded["backbone"]]
    checkpoint = None
    if replay:
        rows = out / "nonfinite.json"
        if not rows.is_file():
            fail(stage, f"there is no {rows} to replay. usage: {USAGE}")
        checkpoint = max(out.glob("checkpoint-*"), key=step_of, default=None)
        out = out / "replay"
        settings |= {"data_path": str(rows), "max_steps": str(step_of(checkpoint) + 1), "save_strategy": "no"}
    return Stage(
        experiment, stage, seed, settings, loaded["train_module"], loaded["backbone"], Path(loaded["environment"]),
        ranks, out, pretrained, machines, checkpoint, replay,
    )  # fmt: skip


def step_of(checkpoint: Path | None) -> int:
    found = re.fullmatch(r"checkpoint-([0-9]+)", checkpoint.name) if checkpoint else None
    return int(found[1]) if found else 0


def read_settings(path: Path) -> Settings:
    """What a stage was begun with: OUT/command. Raises ValueError where it does not say."""
    text = path.read_text(encoding="utf-8")
    if old := re.fullmatch(r"([0-9]+) ranks: \S+\s+--(.*)", text.strip(), re.DOTALL):  # before it was JSON
        pairs = [part.partition(" ") for part in old[2].split(" --")]
        return {"ranks": old[1], **{key: value for key, _, value in pairs}}
    settings = json.loads(text)
    if not isinstance(settings, dict):
        raise ValueError("is no JSON object")
    return {str(key): str(value) for key, value in settings.items()}


def check_settings(stage: Stage) -> str | None:
    """Refuses to continue what was begun with settings that compute something else. Says what it lets change."""
    path, now = stage.out / "command", stage.described
    if stage.replay or not path.exists() or not path.stat().st_size:
        return None
    other = f"{stage.out} was begun with other settings: remove it"
    try:
        before = read_settings(path)
    except ValueError as error:
        fail(stage.name, f"{other} ({path} does not say which: {error})")
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    bound = [key for key in changed if key not in SPREAD | FREE]

    def told(keys: list[str]) -> str:
        by_key = {key: variable for variable, key in config.VARIABLES.items()}
        named = (f"{key} ({by_key[key]})" if key in by_key else key for key in keys)
        return ", ".join(
            f"{name} was {before.get(key, 'not set')}, is {now.get(key, 'not set')}"
            for name, key in zip(named, keys, strict=True)
        )

    if bound:
        fail(stage.name, f"{other}, or undo the change: {told(bound)}")
    spread = [key for key in changed if key in SPREAD]
    # Once it is done, and before it has a checkpoint, it does not matter how the global batch is spread.
    if not spread or (stage.out / "done").exists() or not any(stage.out.glob("checkpoint-*")):
        return None
    if "ranks" in spread:
        fail(
            stage.name,
            f"{other} to start over, or go on with RANKS={before['ranks']}: {told(['ranks'])}, and each rank keeps its "
            "own part of the optimizer's state in the checkpoints",
        )
    return (
        f"{told(spread)}: goes on, with the same rows in each step. A step's loss is the mean over its micro-batches, "
        "so it is not the same to the last digit"
    )


def check_machine(stage: Stage) -> int:
    """The number of GPUs here; refuses what cannot work."""
    need_setup(stage.name)
    if stage.name == "finetune" and not (stage.pretrained / "done").exists():
        stage.fail(f"{stage.pretrained} is not done: run the pretrain stage first")
    if not Path("upstream", stage.backbone).is_dir():
        stage.fail(f"upstream/{stage.backbone} is missing: run scripts/setup/upstream.sh {stage.backbone}")
    if not (stage.environment / "bin/python3").exists():
        stage.fail(f"the environment {stage.environment} is missing: make it with scripts/setup/env.sh")
    at = stage.machines
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if at.hostfile and visible is not None:
        stage.fail(
            f"HOSTFILE and CUDA_VISIBLE_DEVICES={visible} cannot agree: deepspeed takes GPUs from 0 on, as many as the "
            "slots. Unset the variable, or use NNODES, under which each machine's holds"
        )
    gpus = count_gpus(stage.name, stage.environment)
    here = stage.ranks // at.nodes
    if gpus and not at.hostfile and here > gpus:
        hint = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
        stage.fail(f"{here} ranks on {gpus} GPUs{hint}: set RANKS={gpus * at.nodes}")
    return gpus


def variables(stage: Stage, gpus: int) -> dict[str, str]:
    """The ranks' environment."""
    given = dict(os.environ)
    # Not by a link: deepspeed's extensions are compiled anew where the environment's path has changed.
    given["PATH"] = f"{(ROOT / stage.environment).resolve()}/bin:{given.get('PATH', os.defpath)}"
    given["PYTHONPATH"] = f"upstream/{stage.backbone}:."
    given["HF_HUB_OFFLINE"] = "1"
    given["PYTHONUTF8"] = "1"
    given.setdefault("HOME", str(ROOT / stage.out))  # torch and deepspeed write below it, and fail without
    if not gpus:
        # One thread a rank: sums over more would depend on their number.
        given |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
        given["LOCAL_SIZE"] = str(stage.ranks // stage.machines.nodes)
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        given["TORCH_EXTENSIONS_DIR"] = str(extensions(ROOT / stage.environment, ROOT / stage.out))
    return given


def extensions(environment: Path, out: Path) -> Path:
    """Where deepspeed's extensions are compiled, a folder that no other program shares: in the environment, or, where
    that cannot be written, in the run's output."""
    return (environment if os.access(environment, os.W_OK) else out) / "torch_extensions"


def remove_stale_locks(folder: Path) -> None:
    """torch waits without end for a compiler that was killed. One that is at work has its lock open."""
    for path in folder.glob("*/lock"):
        try:
            if time.time() - path.lstat().st_mtime > STALE and not is_open(path):
                remove_below(path, folder)
        except FileNotFoundError:
            pass


def remove_left_buffers() -> None:
    """On CPUs each rank of deepspeed leaves a file of 66 MiB in memory, by which it spoke with the others: the study's
    trainings would leave 10 GB."""
    for path in SHARED.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*"):
        if not is_open(path):
            path.unlink(missing_ok=True)


def is_open(path: Path) -> bool:
    """Whether a process of this user and machine has this file open."""
    for descriptor in glob.iglob("/proc/[0-9]*/fd/*"):
        try:
            if os.path.samefile(descriptor, path):
                return True
        except OSError:  # another user's, or closed meanwhile
            pass
    return False


def progress(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
        text = file.read().decode(errors="replace").replace("\r", "\n")
    return (re.findall(r"[0-9]+/[0-9]+ \[.*\]", text) or [""])[-1]


def train(stage: Stage, log: Path, gpus: int, held: int) -> int:
    """Runs the ranks until they end, and returns the launcher's exit code. Whatever ends this ends them."""
    asked: list[int] = []
    stop_file, given = stage.out / "stop", variables(stage, gpus)
    own = Path(given["TORCH_EXTENSIONS_DIR"]) if "TORCH_EXTENSIONS_DIR" not in os.environ else None
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        if number == signal.SIGUSR1 or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: asked.append(number))
    driver = "stock.py" if gpus or stage.ranks == 1 else "gloo.py"
    with log.open("ab") as output:
        child = start(
            [*stage.launched(gpus), *stage.program(driver)], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env=given, pass_fds=[held], ignored=[signal.SIGUSR1],
        )  # fmt: skip
    shown = time.monotonic()
    try:
        while child.poll() is None:
            while asked:
                if (told := asked.pop(0)) in (signal.SIGINT, signal.SIGHUP):
                    sys.exit(128 + told)
                stop_file.touch()  # a launcher that is sent SIGTERM kills its ranks: they see this after a step
            time.sleep(0.1)
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                if own:
                    remove_stale_locks(own)
                print(f"{stage.name}: {stage.out} {progress(log)}", flush=True)
    finally:
        stop([child], patience=60)
        remove_left_buffers()
    return child.returncode


def main(argv: list[str]) -> int:
    os.chdir(ROOT)
    parser = Arguments(
        prog="train", usage=USAGE, description=__doc__, formatter_class=RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("experiment")
    parser.add_argument("stage", choices=config.STAGES)
    parser.add_argument("seed", nargs="?", default="0", type=seed)
    parser.add_argument("replay", nargs="?", choices=("replay",))
    args = parser.parse_args(argv)
    stage = plan(args.experiment, args.stage, args.seed, bool(args.replay))
    if os.environ.get("DRY_RUN"):
        print(shlex.join([*stage.launcher(), *stage.program()]))
        return 0
    out, node = stage.out, stage.machines.node
    goes_on = check_settings(stage)
    if (out / "done").exists() and not stage.replay:
        print(f"{stage.name}: {out} is done")
        return 0
    gpus = check_machine(stage)
    out.mkdir(parents=True, exist_ok=True)
    log = out / ("train.log" if node == 0 else f"train.node{node}.log")
    try:  # training holds it too
        held = lock(out / f".lock{node}", lambda problem: print(f"{stage.name}: {problem}", file=sys.stderr))
    except Busy:
        stage.fail(f"another run is training in {out}: wait for it, or stop it")
    except OSError as error:
        stage.fail(f"{out}/.lock{node} cannot be opened: {error.strerror}. Remove it if it is a link")
    if node == 0:
        if stage.replay:
            for path in out.iterdir():
                if path.name != ".lock0":
                    remove_below(path, out)
            if stage.replayed:
                (out / stage.replayed.name).symlink_to(f"../{stage.replayed.name}")
        write_whole(out / "command", json.dumps(stage.described, indent=1) + "\n")
        (out / "stop").unlink(missing_ok=True)
    if goes_on:
        print(f"{stage.name}: {goes_on}", flush=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{stage.name}: {goes_on}\n")
    code = train(stage, log, gpus, held)
    if code == 0:
        if stage.replay:
            losses = re.findall("{'loss'.*}", log.read_text(encoding="utf-8", errors="replace"))
            print(f"replay: finite on {stage.replayed}: {losses[-1] if losses else ''}")
        elif node == 0:
            write_whole(out / "done", time.strftime("%Y-%m-%dT%H:%M:%SZ\n", time.gmtime()))
        return 0
    if (out / "stop").exists():
        print(f"{stage.name}: stopped; the same command continues. The whole log is {log}")
        return 143
    with log.open(encoding="utf-8", errors="replace", newline="\n") as file:  # a progress bar is one line
        last = "".join(deque(file, 40))
    print(last, end="", file=sys.stderr)
    if "OutOfMemoryError" in last or "CUDA out of memory" in last:
        less = max(1, int(stage.settings["per_device_train_batch_size"]) // 2)
        print(f"{stage.name}: out of memory: PER_DEVICE={less} before the same command continues", file=sys.stderr)
    free = shutil.disk_usage(out).free >> 20  # what torch says of a full disk is "iostream error"
    if free < 100:
        print(f"{stage.name}: {free} MB are free where {out} lies: make room", file=sys.stderr)
    stage.fail(f"failed; the whole log is {log}; run the same command again to continue", 1)


def seed(text: str) -> str:
    try:
        return config.seed(text)
    except config.ConfigError as error:
        raise ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    common.run("train", main)
