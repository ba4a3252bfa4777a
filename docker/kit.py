"""Builds and runs the kit's image through Docker's SDK.

    .venv/bin/python docker/kit.py build [--base IMAGE] [--build-arg NAME=VALUE]... [--network MODE] cpu|cuda
    .venv/bin/python docker/kit.py run [--results DIR] [--data DIR] [--env NAME[=VALUE]]... [--network MODE] [--dry-run]
                                       cpu|cuda COMMAND...
    .venv/bin/python docker/kit.py variables        what docs/variables.md holds

`run` is `docker run` with what training needs: all GPUs (cuda; CUDA_VISIBLE_DEVICES chooses among them), shared memory,
your user id (1000 for root), a read-only root with DIRs mounted for what is written; COMMAND is docker/entrypoint.sh's.
The variables of docker/variables.toml go along, and so does what they name; --env adds others. --dry-run prints that
`docker run` line. Signals go to the container, and its exit code comes back.
"""

import argparse
import csv
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import docker
import tomllib
from docker.errors import APIError, DockerException, ImageNotFound
from docker.types import DeviceRequest, Mount, Ulimit

from scripts.common import sha256
from scripts.outside import scrub

ROOT = Path(__file__).parents[1]  # of this file, whatever kit the environment's path names

NEED_GB = {"cpu": 20, "cuda": 60}  # to build; without the CUDA base, cpu makes an image of 9.8 GB, cuda writes 34 GB


VARIABLES = tomllib.loads(Path(__file__).with_name("variables.toml").read_text("utf-8"))


def fail(message: str) -> NoReturn:
    sys.exit(f"docker: {scrub(message)}")


def engine() -> docker.DockerClient:
    try:
        client = docker.from_env(timeout=600)
        client.ping()
    except DockerException as error:
        where = os.environ.get("DOCKER_HOST", "the default socket")
        fail(f"no engine answers at {where}: start one, or set DOCKER_HOST ({error})")
    return client


def labels() -> dict[str, str]:
    """Every pin: the upstreams' commits, each lock's hash and the versions in it that decide most."""
    upstreams = tomllib.loads((ROOT / "patches/upstreams.toml").read_text())
    pins = {f"vista.upstream.{name}": scrub(f"{pin['url']}@{pin['commit']}") for name, pin in upstreams.items()}
    for lock in (ROOT / "docker/locks").glob("*.txt"):
        pins[f"vista.lock.{lock.stem}"] = f"sha256:{sha256(lock)}"
        for name, version in re.findall(r"(?m)^(torch|transformers|deepspeed|lmms-eval)==([^ ]+)", lock.read_text()):
            pins[f"vista.lock.{lock.stem}.{name}"] = version
    return pins


def build(args) -> None:
    for pair in args.build_arg:
        if "=" not in pair:
            fail(f"--build-arg '{pair}': give NAME=VALUE")
        if scrub(pair) != pair:
            fail(f"--build-arg {pair}: a password, query or token would stay in the image's history: leave it out")
    if args.target == "cuda" and not (ROOT / "docker/locks/flash_attn.sha256").exists():
        why = "no one has committed docker/locks/flash_attn.sha256 yet; the build prints its hash"
        print(f"docker: flash-attn's wheel is trusted as it comes: {why}", file=sys.stderr)
    client = engine()
    folder = client.info()["DockerRootDir"]
    if Path(folder).is_dir() and (free := shutil.disk_usage(folder).free / 2**30) < NEED_GB[args.target]:
        fail(f"{free:.0f} GB are free in {folder}, building {args.target} takes {NEED_GB[args.target]}: make room")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    buildargs = {"KIT_COMMIT": commit or "unknown", **dict(pair.split("=", 1) for pair in args.build_arg)}
    if args.base:
        buildargs["BASE_IMAGE"] = args.base
    try:
        for event in client.api.build(
            path=str(ROOT), dockerfile="docker/Dockerfile", target=args.target, tag=f"vista-kit:{args.target}",
            buildargs=buildargs, labels=labels(), network_mode=args.network, forcerm=True, decode=True,
        ):  # fmt: skip
            if "error" in event:
                fail(f"the build of {args.target} failed: {event['error'].strip()}")
            print(event.get("stream", ""), end="", flush=True)
    except APIError as error:
        fail(f"the build of {args.target} failed: {error}")


def spelled(name: str) -> list[str]:
    """A variable's name as programs look for it: proxies' are written in small letters too."""
    return [name, name.lower()] if name.endswith("_PROXY") else [name]


def mounted(source: str | Path, target: str, read_only: bool = False) -> Mount:
    source = Path(source).absolute()
    if not str(source).isprintable():
        fail(f"{str(source)!r}: a path with control characters cannot be mounted")
    return Mount(target, str(source), type="bind", read_only=read_only)


def taken_along(uid: int, more: list[str]) -> tuple[dict[str, str], list[Mount]]:
    """The variables that a container gets, and the mounts of what they name."""
    for pair in more:
        name, given, value = pair.partition("=")
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            fail(f"--env {pair!r}: give NAME or NAME=VALUE")
        if given:
            os.environ[name] = value
        elif name not in os.environ:
            fail(f"--env {name}: this variable is not set here")
    environment = {pair.partition("=")[0]: os.environ[pair.partition("=")[0]] for pair in more}
    mounts = []
    for variable, about in VARIABLES.items():
        for name in spelled(variable):
            if about["container"] not in ("passed", "file", "folder") or not os.environ.get(name):
                continue
            environment[name] = os.environ[name]
            if about["container"] != "passed":
                path = Path(os.environ[name])
                if not (path.is_file() if about["container"] == "file" else path.is_dir()):
                    fail(f"{name}={path}: there is no such {about['container']}")
                if not may(path, uid, os.R_OK):
                    fail(f"{name}={path}: user {uid}, who runs the container, may not read it")
                environment[name] = f"/run/vista/{name}"
                mounts.append(mounted(path, environment[name], read_only=about["container"] == "file"))
    return environment, mounts


def may(path: Path, uid: int, how: int) -> bool:
    """Whether the container's user may read or write `path`; root may all, so for another its owner and mode tell."""
    if uid == os.getuid():
        return os.access(path, how)
    found = path.stat()
    return bool(found.st_mode & (how << 6 if found.st_uid == uid else how))


def run(args) -> int:
    image = f"vista-kit:{args.target}"
    uid, gid = (os.getuid(), os.getgid()) if os.getuid() else (1000, 1000)
    folders = {Path(args.results).absolute(): "results", Path(args.data).absolute(): "data"}
    environment, mounts = taken_along(uid, args.env)
    mounts = [mounted(folder, f"/opt/vista/{name}") for folder, name in folders.items()] + mounts
    cuda = args.target == "cuda"
    options = {
        "user": f"{uid}:{gid}",
        "read_only": True,
        "init": True,
        "shm_size": "16g" if cuda else "1g",
        "network_mode": args.network,
        "tmpfs": {"/tmp": "exec"},
        "environment": environment,
        "mounts": mounts,
    }
    if cuda:
        options["device_requests"] = [DeviceRequest(count=-1, capabilities=[["gpu"]])]
        options["ulimits"] = [Ulimit(name="memlock", soft=-1, hard=-1)]
    if args.dry_run:
        words = ["docker", "run", "--rm", "--init", "--read-only", "--tmpfs", "/tmp:exec", "--user", options["user"]]
        words += ["--shm-size", options["shm_size"], *(["--network", args.network] if args.network else [])]
        words += ["--gpus", "all", "--ulimit", "memlock=-1"] if cuda else []
        for name, value in environment.items():
            # docker takes the value over: no secret is printed
            words += ["--env", f"{name}={value}" if value == f"/run/vista/{name}" else name]
        for mount in mounts:
            parts = ["type=bind", f"source={mount['Source']}", f"target={mount['Target']}"]
            parts += ["readonly"] if mount["ReadOnly"] else []
            line = io.StringIO()  # docker reads these as a line of CSV: a comma in a path needs quotes
            csv.writer(line, lineterminator="").writerow(parts)
            words += ["--mount", line.getvalue()]
        if given := [pair.partition("=")[0] for pair in args.env if "=" in pair]:
            print(f"docker: set {', '.join(given)} before you run this line, which has no values", file=sys.stderr)
        print(shlex.join([*words, image, *args.command]))
        return 0
    for folder in folders:
        try:
            if not folder.is_dir():
                folder.mkdir(parents=True)
                if not os.getuid():
                    os.chown(folder, uid, gid, follow_symlinks=False)
        except OSError as error:
            fail(f"{folder} cannot be made: {error.strerror}")
        if not may(folder, uid, os.W_OK):
            fail(f"user {uid} may not write to {folder}: give it to that user (chown {uid}), or name another folder")
    client = engine()
    try:
        container = client.containers.create(image, args.command, **options)
    except ImageNotFound:
        fail(f"there is no image {image}: build it first, scripts/docker_build.sh {args.target}")
    try:
        # Attached before the start, as `docker run` does: following the log can lose a last line without its end.
        output = container.attach(stream=True, demux=True)
        container.start()
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda number, _: container.kill(number))
        for chunks in output:
            for chunk, stream in zip(chunks, (sys.stdout, sys.stderr), strict=True):
                if chunk:
                    stream.buffer.write(chunk)
                    stream.flush()
        return container.wait()["StatusCode"]
    except APIError as error:
        if "device driver" in str(error):
            fail("this engine cannot hand out GPUs: install NVIDIA's container toolkit, or use the target cpu")
        fail(f"the container did not run: {error.explanation or error}")
    finally:
        container.remove(force=True)


def variables(args) -> None:
    """Prints docs/variables.md."""
    how = {
        "passed": "yes", "file": "yes, with the file that it names, read-only", "folder": "yes, with that folder",
        "set": "set there", "outside": "no",
    }  # fmt: skip
    print(
        "# Variables\n\nWhat the kit's scripts read from the environment. `scripts/docker_run.sh` passes those marked"
    )
    print("`yes` to the container; `--env NAME` passes any other. This page is made of `docker/variables.toml`:")
    print("`.venv/bin/python docker/kit.py variables > docs/variables.md`.\n")
    print("| variable | what it is | in the container |\n|---|---|---|")
    for name, about in VARIABLES.items():
        print(f"| `{name}` | {about['what']} | {how[about['container']]} |")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="docker/kit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="action", required=True)
    for name, action in (("build", build), ("run", run)):
        command = commands.add_parser(name)
        command.set_defaults(action=action)
        command.add_argument("target", choices=("cpu", "cuda"))
        command.add_argument("--network")
        if name == "build":
            command.add_argument("--base")
            command.add_argument("--build-arg", action="append", default=[])
        else:
            command.add_argument("--results", default="results")
            command.add_argument("--data", default="data")
            command.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]")
            command.add_argument("--dry-run", action="store_true")
            command.add_argument("command", nargs=argparse.REMAINDER)
    commands.add_parser("variables").set_defaults(action=variables)
    args = parser.parse_args()
    return args.action(args) or 0


if __name__ == "__main__":
    sys.exit(main())
