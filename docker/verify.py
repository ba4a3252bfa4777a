"""Compares what is installed with what is pinned: every environment with its lock, every patched file with its hash.

.venv/bin/python docker/verify.py        in an image (its command `verify`), or in a checkout
"""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import tomllib

INSTALLED = """
import importlib.metadata, json
print(json.dumps({d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}))
"""
# What an environment may hold beyond its lock; flash-attn's wheel has a hash of its own (docker/flash_attn.sh).
EXTRA = {"flash-attn"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def environment(venv: Path, lock: Path) -> list[str]:
    """What differs between the installed packages and the lock, a line each."""
    locked = dict(re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^ \\]+)", lock.read_text()))
    told = subprocess.run([venv / "bin/python", "-c", INSTALLED], capture_output=True, text=True, check=True).stdout
    installed = {normal(name): version for name, version in json.loads(told).items()}
    locked = {normal(name): version for name, version in locked.items()}
    names = (locked.keys() | installed.keys()) - EXTRA
    return [
        f"{venv}: {name} is {installed.get(name)}, {lock} says {locked.get(name)}"
        for name in sorted(names)
        # A build of a version, such as torch 2.13.0+cpu, is that version.
        if str(installed.get(name)).partition("+")[0] != str(locked.get(name)).partition("+")[0]
    ]


def main() -> int:
    wrong, compared = [], []
    for venv in sorted(Path().glob(".venv*")):
        lock = Path("docker/locks", f"{venv.name.removeprefix('.venv').removeprefix('-') or 'cpu'}.txt")
        wrong += environment(venv, lock)
        compared.append(str(venv))
    for name, upstream in tomllib.loads(Path("patches/upstreams.toml").read_text()).items():
        tree = Path("upstream", name)
        if not tree.is_dir():
            continue
        compared.append(str(tree))
        for path, pin in upstream["files"].items():
            if hashlib.sha256((tree / path).read_bytes()).hexdigest() != pin["patched"]:
                wrong.append(f"{tree / path} is not the patched file that patches/upstreams.toml pins")
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"verify: {', '.join(compared)}: {len(wrong) or 'no'} differences")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
