"""Evaluates an experiment's checkpoint with lmms-eval 0.3.0's stock model: a run for each task, over all visible GPUs.

The checkpoint is what training left, or the public one that the config names. TASKs: these instead of the config's.

RUN/seedN/eval/EXPERIMENT/TASK/ holds lmms-eval's results and samples (in a folder that it names after the checkpoint),
log.txt, and checkpoint.json, which says by a hash what was evaluated. A task whose results are whole and of this
checkpoint is skipped; whole results of another one are moved to .replaced/.

The paper's tasks read their data sets from EVAL_DATA (data/eval, if that is not set), offline.
MMBench wants a choice, for the answers in which its rules find no option: MMBENCH_JUDGE=rules calls them wrong;
MMBENCH_JUDGE=https://HOST/v1/chat/completions asks MMBENCH_MODEL there, with the key in OPENAI_API_KEY or in the file
OPENAI_API_KEY_FILE. no_option.json, beside the results, counts them.
"""

import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts import common, config
from scripts.common import (
    ROOT,
    Arguments,
    Job,
    count_gpus,
    fail,
    lock,
    need_setup,
    remove_below,
    run_abreast,
    signals_raise,
    start,
)

USAGE = "scripts/eval.sh EXPERIMENT [SEED [TASK...]]"
ASKS_JUDGE = "MMBENCH_JUDGE=https://HOST/v1/chat/completions asks MMBENCH_MODEL there, with OPENAI_API_KEY"
FIND_COCO = "import importlib.util as u; print(*u.find_spec('pycocoevalcap').submodule_search_locations)"


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint's tasks, and how they run on this machine."""

    checkpoint: Path
    identity: str
    out: Path
    backbone: str
    environment: Path
    data: Path
    parts: dict[str, Path]  # of a public checkpoint, by the names that its config.json has for them
    work: Path
    processes: int
    gpus: int

    def command(self, task: str) -> list[str]:
        words = [str(ROOT / self.environment / "bin/python3")]
        if self.processes > 1:
            words += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
        # Without device_map=auto both models insist on CUDA. With a batch over 1 they pad, which changes answers.
        where = "" if self.gpus else ",device_map=auto"
        words += ["scripts/evaluation/stock.py", "--model", self.backbone, "--model_args"]
        words += [f"pretrained={self.checkpoint}{where}", "--device", self.device]
        words += ["--include_path", "scripts/miniature/tasks", "--tasks", task, "--batch_size", "1", "--log_samples"]
        return [*words, "--timezone", "UTC", "--output_path", str(self.partial(task))]

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    def partial(self, task: str) -> Path:
        return self.out / f".{task}.partial"

    def variables(self, task: str) -> dict[str, str]:
        # The miniature's data may be made anew, and a converted parquet must not outlive what it came from.
        own = Path("scripts/miniature/tasks", f"{task}.yaml").exists()
        given = dict(os.environ)
        given["PATH"] = f"{ROOT / self.environment}/bin:{given.get('PATH', os.defpath)}"
        given |= {"HF_DATASETS_CACHE": str((self.work if own else self.data / ".cache") / "converted")}
        given |= {"PYTHONPATH": f"{self.work / task}:{ROOT}/upstream/{self.backbone}", "PYTHONUTF8": "1"}
        given |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_TRUST_REMOTE_CODE": "0"}
        given.setdefault("HOME", str(self.work))  # datasets and torch write below it, and fail without
        if not self.gpus:  # a row at a time through a tiny model: one thread is the fastest
            given |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        return given

    def make_work(self, task: str) -> None:
        """datasets 2.16.1 and transformers find offline what the hub calls OWNER/NAME only as a folder of that name,
        below the one that lmms-eval runs in: so it runs in one that looks like the repository, with these beside."""
        from scripts.evaluation import suite

        work = self.work / task
        work.mkdir()
        links = dict(self.parts)
        if name := suite.data_of(task):
            links["/".join(name.split("/")[-2:])] = self.data / suite.VIEWS / name
        owners = {name.partition("/")[0] for name in links}
        links |= {path.name: path for path in ROOT.iterdir() if path.name[0] != "." and path.name not in owners}
        for name, path in links.items():
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).symlink_to(path)
        if task.startswith("refcoco"):
            # pycocoevalcap writes beside its own code, which may be read-only and which other runs share.
            found = subprocess.run(
                [self.environment / "bin/python3", "-c", FIND_COCO], capture_output=True, text=True, check=True
            ).stdout.strip()
            shutil.copytree(found, work / "pycocoevalcap", copy_function=os.symlink)

    def job(self, task: str) -> Job:
        begun = time.monotonic()

        def begin() -> subprocess.Popen[bytes]:
            nonlocal begun
            begun = time.monotonic()
            print(f"eval: {self.checkpoint} {task} on {self.processes} x {self.device}", flush=True)
            partial = self.partial(task)
            remove_below(partial, self.out)
            partial.mkdir()
            self.make_work(task)
            with (partial / "log.txt").open("wb") as log:
                return start(
                    self.command(task), cwd=self.work / task, env=self.variables(task), stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log,
                )  # fmt: skip

        def end(_: int) -> bool:  # lmms-eval exits 0 even when a run fails
            return self.keep(task, time.monotonic() - begun)

        return Job(begin, end)

    def keep(self, task: str, seconds: float) -> bool:
        """Whether a run left whole results; they are moved to their place."""
        from scripts.evaluation.results import ResultError, read, record

        partial, final = self.partial(task), self.out / task
        log = partial / "log.txt"
        text = log.read_text(encoding="utf-8", errors="replace")
        # What deepspeed 0.14.5 and safetensors leave of a ZeRO-3 model of one rank on a CPU, for instance.
        if "newly initialized" in text:
            problem = f"{self.checkpoint} lacks weights, and loading made new ones up: {log} names them"
            print(f"eval: {problem}", file=sys.stderr)
            return False
        try:
            record(partial, self.identity)
            read(partial, task, self.identity)
        except ResultError as error:
            print(*text.splitlines()[-25:], sep="\n", file=sys.stderr)
            problem = f"{task} of {self.checkpoint} left no whole results file; the whole log is {log}"
            print(f"eval: {problem} ({error})", file=sys.stderr)
            return False
        move_aside(final, task)
        partial.rename(final)
        print(f"eval: {self.checkpoint} {task} took {seconds:.0f} s", flush=True)
        return True


def move_aside(folder: Path, task: str) -> None:
    """Makes room for a task's new results: whole ones are kept, in .replaced/, others are removed."""
    from scripts.evaluation.results import ResultError, read

    if not folder.exists() and not folder.is_symlink():
        return
    try:
        read(folder, task)
    except ResultError:
        remove_below(folder, folder.parent)
        return
    replaced = folder.parent / ".replaced"
    replaced.mkdir(exist_ok=True)
    number = 1 + sum(1 for path in replaced.iterdir() if path.name.startswith(f"{task}."))
    folder.rename(replaced / f"{task}.{number}")
    print(f"eval: {folder} was of another checkpoint: it is in {replaced}/{task}.{number} now", flush=True)


def is_whole(folder: Path, task: str, checkpoint: Path, identity: str) -> bool:
    """Whether a task's results are whole and of this checkpoint, by what they say."""
    from scripts.evaluation.results import ResultError, read, record

    try:
        there = read(folder, task)
    except ResultError:
        return False
    if there.checkpoint is not None:
        return there.checkpoint == identity
    done = checkpoint / "done"
    if not done.is_file() or done.stat().st_size:
        return False
    # Both are from before results named their checkpoint, and `done` gave its date.
    record(folder, identity)
    print(
        f"eval: {folder} did not say which checkpoint it is of: taken for this one's. If the checkpoint was trained "
        "again since then, move that folder away",
        file=sys.stderr,
    )
    return True


def check_tasks(tasks: Sequence[str], data: Path) -> None:
    """All that the tasks need, before the first one starts. Sets what MMBench's code reads."""
    from scripts.evaluation import suite

    problems = suite.make_ready(data, tasks)
    if problems:
        for problem in problems:
            print(f"eval: {problem}", file=sys.stderr)
        sys.exit(2)
    if any(task.startswith("refcoco") for task in tasks):
        java = shutil.which("java")
        if not java or subprocess.run([java, "-version"], capture_output=True).returncode:
            fail(
                "eval",
                "RefCOCO's captions are tokenized by a Java program: install Java (Debian: apt-get install "
                "default-jre-headless)",
            )
    if any(task.startswith("mmbench_") for task in tasks):
        judge = os.environ.get("MMBENCH_JUDGE", "")
        if key := os.environ.get("OPENAI_API_KEY_FILE"):
            try:
                os.environ["OPENAI_API_KEY"] = Path(key).read_text(encoding="utf-8").strip()
            except (OSError, ValueError) as error:
                fail("eval", f"OPENAI_API_KEY_FILE={key}: {error}")
        os.environ.setdefault("OPENAI_API_KEY", "")
        os.environ["OPENAI_API_URL"] = judge
        if judge.startswith(("http://", "https://")):
            if silent := suite.judge():
                fail("eval", silent)
        elif judge != "rules":
            fail(
                "eval",
                f"who judges MMBench's answers that name no option? MMBENCH_JUDGE=rules calls them wrong; {ASKS_JUDGE}",
            )


def wait_for_lock(out: Path) -> None:
    """Holds OUT's lock until this process ends."""

    def waits() -> None:
        print(f"eval: waiting for another evaluation that is at work in {out}", flush=True)

    try:
        lock(out / ".lock", lambda problem: print(f"eval: {problem}", file=sys.stderr), waits)
    except OSError as error:
        fail("eval", f"{out}/.lock cannot be opened: {error.strerror}. Remove it if it is a link")


def main(argv: list[str]) -> int:
    os.chdir(ROOT)
    parser = Arguments(prog="eval", usage=USAGE, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("seed", nargs="?", default="0")
    parser.add_argument("tasks", nargs="*", metavar="TASK")
    args = parser.parse_args(argv)
    try:
        loaded, seed = config.load(args.experiment, tasks=args.tasks), config.seed(args.seed)
    except config.ConfigError as error:
        fail("eval", str(error))
    backbone, environment = loaded["backbone"], Path(loaded["environment"])
    run = Path(loaded["run"], f"seed{seed}")
    checkpoint = Path(loaded["checkpoint"] or run / f"{args.experiment}-finetune")
    out = run / "eval" / args.experiment
    if not loaded["checkpoint"] and not (checkpoint / "done").is_file():
        fail("eval", f"{checkpoint} is not done: train this experiment first")
    if any(mark in f"{checkpoint}{out}" for mark in "=,"):
        fail("eval", f"lmms-eval takes no '=' and no ',' in a path: {checkpoint} {out}")
    if not Path("upstream", backbone).is_dir():
        fail("eval", f"upstream/{backbone} is missing: run scripts/setup/upstream.sh {backbone}")
    need_setup("eval")
    from scripts.evaluation.checkpoint import parts
    from scripts.evaluation.results import ResultError, identity

    try:
        named = parts(args.experiment, loaded) if loaded["checkpoint"] else {}
    except ResultError as error:
        fail("eval", str(error))
    out.mkdir(parents=True, exist_ok=True)
    wait_for_lock(out)
    try:
        of = identity(checkpoint)
    except ResultError as error:
        fail("eval", str(error))
    todo = []
    for task in loaded["tasks"]:
        if is_whole(out / task, task, checkpoint, of):
            print(f"eval: {checkpoint} {task} is whole, skipped", flush=True)
        else:
            todo.append(task)
    if not todo:
        return 0
    data = Path(os.environ.get("EVAL_DATA") or "data/eval").resolve()
    check_tasks(todo, data)
    gpus = count_gpus("eval", environment)
    processes = gpus or loaded["ranks"]
    at_once = 1 if gpus else math.ceil((os.cpu_count() or 1) / processes)  # on a CPU a core for each process
    with signals_raise(), tempfile.TemporaryDirectory() as work:
        evaluation = Evaluation(
            checkpoint, of, out.absolute(), backbone, environment, data, named, Path(work), processes, gpus
        )
        return 0 if run_abreast([[evaluation.job(task)] for task in todo], at_once, go_on=True) else 1


if __name__ == "__main__":
    common.run("eval", main)
