"""What several steps need: one error line, hashes, whole files, locks, and children that do not outlive their parent.

Needs nothing but Python's own library when it is imported: a bare clone's `python3` runs it.
"""

import argparse
import ctypes
import errno
import fcntl
import hashlib
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
PR_SET_PDEATHSIG = 1  # linux/prctl.h
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # what file systems without locks answer


def fail(step: str, message: str, code: int = 2) -> NoReturn:
    """Ends the program with one line on stderr, "STEP: MESSAGE". Code 2: nothing was begun; 1: it broke off."""
    print(f"{step}: {message}", file=sys.stderr)
    sys.exit(code)


class Arguments(argparse.ArgumentParser):
    """argparse with an error that is one line, for a script that a person types."""

    def error(self, message: str) -> NoReturn:
        fail(Path(self.prog).stem, f"{message}; {' '.join(self.format_usage().split())}")


def run(step: str, main: Callable[[list[str]], int]) -> NoReturn:
    """Calls main with the command line. What the system refuses (a full disk, a closed terminal) is one line too."""
    try:
        sys.exit(main(sys.argv[1:]))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(step, f"{where}{error.strerror or error}", 1)
    except KeyboardInterrupt:
        sys.exit(130)


def need_setup(step: str) -> None:
    """Refuses on a clone whose environment was not made yet."""
    if not (ROOT / ".venv/bin/python").exists():
        fail(step, "this checkout is not set up yet: run make setup")


def sha256(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file such that it is there whole or as it was before. What a link of that name leads to stays as it is.

    Text is written as UTF-8; names of files that are not UTF-8 keep their bytes (surrogateescape).
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    with open(partial, "xb") as file:
        file.write(content if isinstance(content, bytes) else content.encode(errors="surrogateescape"))
    os.replace(partial, path)


def cpu_name() -> str:
    import cpuinfo

    return cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()


def remove_below(path: Path, folder: Path) -> None:
    """Removes a file or folder, or a link and not what it names. Raises ValueError where it is not below `folder`."""
    above, base = Path(os.path.abspath(path)).parents, Path(os.path.abspath(folder))
    if base not in above or base == base.parent:
        raise ValueError(f"{path} is not below {folder}: it is not removed")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def count_gpus(step: str, environment: Path) -> int:
    """That this environment's torch sees, under CUDA_VISIBLE_DEVICES."""
    count = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([environment / "bin/python3", "-c", count], capture_output=True, text=True)
    if done.returncode:
        fail(step, f"{environment} has no torch that loads: {''.join(done.stderr.splitlines()[-1:])}", 1)
    return int(done.stdout)


class Busy(Exception):
    """Another process holds the lock."""


def lock(path: Path, say: Callable[[str], None], waits: Callable[[], None] | None = None) -> int:
    """Takes the lock on `path`; it is held until this process, and every child that was given the descriptor, ends.

    Where the lock is taken it raises Busy, or with `waits` it calls that once and then waits until the lock is free.

    The file is made where it is missing, and never emptied; a link is not followed. On a file system without locks
    (Lustre, CIFS, some NFS) an abstract socket of the same name keeps this machine's processes apart, and `say` is
    told. Returns the descriptor. Raises OSError where the file cannot be opened.
    """
    told = False
    while True:
        try:
            return try_lock(path, say)
        except Busy:
            if not waits:
                raise
            if not told:
                waits()
            told = True
            time.sleep(1)


def try_lock(path: Path, say: Callable[[str], None]) -> int:
    """`lock`, without waiting."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        os.close(file)
        raise Busy from None
    except OSError as error:
        os.close(file)
        if error.errno not in NO_LOCKS:
            raise
        reason = error.strerror
    held = socket.socket(socket.AF_UNIX)
    try:
        held.bind("\0vista-kit " + hashlib.sha256(os.fsencode(path.resolve())).hexdigest())
    except OSError as error:
        held.close()
        if error.errno == errno.EADDRINUSE:
            raise Busy from None
        raise
    say(
        f"the file system of {path.parent} has no locks ({reason}). Runs on this machine are kept apart without them: "
        f"start no other on another machine or in another container, or have {path.parent} on a file system with locks "
        "(Lustre: option flock)"
    )
    return held.detach()


def die_with_parent(with_signal: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Has the kernel send this process a signal when the thread that started it ends, whatever ends that."""
    parent = parent or os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(with_signal), 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), with_signal)


def start(
    command: Sequence[str | os.PathLike[str]], ignored: Sequence[signal.Signals] = (), **options: Any
) -> subprocess.Popen[bytes]:
    """Starts a child that ignores these signals, and gets SIGTERM when this process ends, even by SIGKILL.

    Call it from the main thread: the kernel goes by the thread."""
    parent = os.getpid()

    def prepare() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        die_with_parent(signal.SIGTERM, parent)

    return subprocess.Popen(command, preexec_fn=prepare, **options)


def stop(children: Sequence[subprocess.Popen[bytes]], patience: float | None = None) -> None:
    """Sends SIGTERM to the children and waits until they have ended; after `patience` seconds, SIGKILL."""
    children = [child for child in children if child.poll() is None]
    if not children:
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]  # what is being ended is not left half-way
    for child in children:
        child.terminate()
    until = None if patience is None else time.monotonic() + patience
    for child in children:
        try:
            child.wait(None if until is None else max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP raise SystemExit(128 + number), so that `finally` runs. An ignored one (nohup) stays
    ignored."""

    def raise_exit(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, raise_exit)
    yield


@dataclass(frozen=True)
class Job:
    """A child to start, and what is done when it has ended: `end` takes its exit code and says whether all is well."""

    begin: Callable[[], subprocess.Popen[bytes]]
    end: Callable[[int], bool] = lambda code: code == 0


def run_abreast(lanes: Sequence[Sequence[Job]], at_once: int, go_on: bool = False) -> bool:
    """Runs each lane's jobs one after the other, and as many lanes at once. True where all went well.

    A lane ends at its first job that fails; with go_on the other lanes begin all the same, without it none does any
    more. Whatever ends this function ends its children.
    """
    waiting, running, well = [iter(lane) for lane in lanes], [], True

    def next_job(lane: Iterator[Job]) -> None:
        if job := next(lane, None):
            running.append((job.begin(), job, lane))

    try:
        while running or (waiting and (well or go_on)):
            while waiting and len(running) < at_once and (well or go_on):
                next_job(waiting.pop(0))
            for entry in list(running):
                child, job, lane = entry
                if (code := child.poll()) is not None:
                    running.remove(entry)
                    if job.end(code):
                        next_job(lane)
                    else:
                        well = False
            time.sleep(0.05)
    finally:
        stop([child for child, _, _ in running])
    return well
