"""Builds and runs the kit's image through Docker's SDK.

    .venv/bin/python docker/kit.py build [--base IMAGE] [--build-arg NAME=VALUE]... [--network MODE] cpu|cuda
    .venv/bin/python docker/kit.py run [--results DIR] [--data DIR] [--network MODE] [--dry-run] cpu|cuda COMMAND...

`run` is `docker run` with what training needs: all GPUs (cuda), shared memory, your user id (1000 for root), a
read-only root with DIRs mounted for what is written; COMMAND is docker/entrypoint.sh's. --dry-run prints that
`docker run` line. Signals go to the container, and its exit code comes back.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import docker
import tomllib
from docker.errors import APIError, DockerException, ImageNotFound
from docker.types import DeviceRequest, Mount, Ulimit

ROOT = Path(__file__).parents[1]
NEED_GB = {"cpu": 20, "cuda": 60}  # to build; cpu makes an image of 9.8 GB, cuda's is not known yet


def fail(message: str) -> None:
    sys.exit(f"docker: {message}")


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
    pins = {f"vista.upstream.{name}": f"{upstream['url']}@{upstream['commit']}" for name, upstream in upstreams.items()}
    for lock in (ROOT / "docker/locks").glob("*.txt"):
        pins[f"vista.lock.{lock.stem}"] = f"sha256:{hashlib.sha256(lock.read_bytes()).hexdigest()}"
        for name, version in re.findall(r"(?m)^(torch|transformers|deepspeed|lmms-eval)==([^ ]+)", lock.read_text()):
            pins[f"vista.lock.{lock.stem}.{name}"] = version
    return pins


def build(args) -> None:
    for pair in args.build_arg:
        if "=" not in pair:
            fail(f"--build-arg '{pair}': give NAME=VALUE")
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
            buildargs=buildargs, labels=labels(), network_mode=args.network, rm=True, decode=True,
        ):  # fmt: skip
            if "error" in event:
                fail(f"the build of {args.target} failed: {event['error'].strip()}")
            print(event.get("stream", ""), end="", flush=True)
    except APIError as error:
        fail(f"the build of {args.target} failed: {error}")


# What the scripts take from the environment, where the caller's has it.
PASSED = (
    "RANKS",
    "PER_DEVICE",
    "REPORT_TO",
    "MMBENCH_JUDGE",
    "MMBENCH_MODEL",
    "OPENAI_API_KEY",
    "HF_TOKEN",
    "HF_ENDPOINT",
)


def run(args) -> int:
    image = f"vista-kit:{args.target}"
    uid, gid = (os.getuid(), os.getgid()) if os.getuid() else (1000, 1000)
    folders = {Path(args.results).absolute(): "results", Path(args.data).absolute(): "data"}
    cuda = args.target == "cuda"
    options = {
        "user": f"{uid}:{gid}",
        "read_only": True,
        "init": True,
        "shm_size": "16g" if cuda else "1g",
        "network_mode": args.network,
        "tmpfs": {"/tmp": "exec"},
        "environment": {name: os.environ[name] for name in PASSED if name in os.environ},
        "mounts": [Mount(f"/opt/vista/{name}", str(folder), type="bind") for folder, name in folders.items()],
    }
    if cuda:
        options["device_requests"] = [DeviceRequest(count=-1, capabilities=[["gpu"]])]
        options["ulimits"] = [Ulimit(name="memlock", soft=-1, hard=-1)]
    if args.dry_run:
        words = ["docker", "run", "--rm", "--init", "--read-only", "--tmpfs", "/tmp:exec", "--user", options["user"]]
        words += ["--shm-size", options["shm_size"], *(["--network", args.network] if args.network else [])]
        words += ["--gpus", "all", "--ulimit", "memlock=-1"] if cuda else []
        for name in options["environment"]:
            words += ["--env", name]  # docker takes the value over: no secret is printed
        for folder, name in folders.items():
            words += ["--mount", f"type=bind,source={folder},target=/opt/vista/{name}"]
        print(shlex.join([*words, image, *args.command]))
        return 0
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.getuid():
                os.chown(folder, uid, gid)
        except OSError as error:
            fail(f"{folder} cannot be made: {error.strerror}")
        if not os.access(folder, os.W_OK):
            fail(f"user {uid} may not write to {folder}: give it to that user, or name another folder")
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="docker/kit.py", usage=__doc__.partition("\n\n")[2].partition("\n\n")[0])
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
            command.add_argument("--dry-run", action="store_true")
            command.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    return args.action(args) or 0


if __name__ == "__main__":
    sys.exit(main())
