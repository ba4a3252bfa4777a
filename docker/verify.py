"""Compares what is installed with what is pinned: every environment with its lock, every file in it with the hash that
its package tells (RECORD), every patched file with its hash, and every other file of the upstreams with the commit's.

.venv/bin/python docker/verify.py        in an image (its command `verify`), or in a checkout
"""

import argparse
import base64
import csv
import hashlib
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tomllib

from scripts.common import sha256

INSTALLED = """
import importlib.metadata, json
print(json.dumps({d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}))
"""
# What an environment may hold beyond its lock; flash-attn's wheel has a hash of its own (docker/flash_attn.sh).
EXTRA = {"flash-attn"}
# What no package's RECORD names: notes of the installer, and the kit's own path (scripts/setup/env.sh).
NOTES = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json", "vista_patch.pth", "_virtualenv.py"}
NOTES |= {"_virtualenv.pth"}
# Files that the published wheel, whose hash the lock holds, has otherwise than its own RECORD tells.
PUBLISHED = {"decord-0.6.0.dist-info/top_level.txt": "sha256=2gcXRGxvur2Z1iLmIE4fxL6cmywVZYD__8rzDGIEZDM"}
NAMED = 10


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def environment(venv: Path, lock: Path) -> list[str]:
    """What differs between the installed packages and the lock, a line each."""
    locked = dict(re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^ \\]+)", lock.read_text("utf-8")))
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


def packages(venv: Path) -> list[str]:
    """What differs between an environment's files and their RECORDs, a line each. Bytecode is not looked at."""
    (site,) = venv.glob("lib/python*/site-packages")
    told: dict[str, str] = {}
    for record in site.glob("*.dist-info/RECORD"):
        with open(record, encoding="utf-8", newline="") as file:
            told |= {path: digest for path, digest, *_ in csv.reader(file) if digest and "__pycache__/" not in path}
    told |= {path: digest for path, digest in PUBLISHED.items() if path in told}

    def wrong(path: str) -> str:
        kind, _, right = told[path].partition("=")
        try:
            with open(site / path, "rb") as file:
                digest = hashlib.file_digest(file, kind).digest()
        except OSError as error:
            return f"{site / path}: {error.strerror}"
        is_right = base64.urlsafe_b64encode(digest).decode().rstrip("=") == right
        return "" if is_right else f"{site / path} is not the file that its package's RECORD tells"

    with ThreadPoolExecutor() as pool:
        lines = [line for line in pool.map(wrong, sorted(told)) if line]
    strange = [
        path
        for path in site.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name not in NOTES
        if str(path.relative_to(site)) not in told
    ]
    return lines + [f"{path} is in no package's RECORD" for path in sorted(strange)]


def others(tree: Path, patched: set[str]) -> str:
    """The sha256 over "SHA256  PATH\\n" of each file of an upstream that the patch leaves alone, sorted by path."""
    lines = []
    for path in tree.rglob("*"):
        name = path.relative_to(tree).as_posix()
        parts = name.split("/")
        if (
            parts[0] in (".git", ".lock")
            or "__pycache__" in parts
            or parts[0].endswith(".dist-info")
            or name in patched
        ):
            continue
        if path.is_symlink():
            lines.append(f"{hashlib.sha256(str(path.readlink()).encode()).hexdigest()} -> {name}\n")
        elif path.is_file():
            lines.append(f"{sha256(path)}  {name}\n")
    return hashlib.sha256("".join(sorted(lines, key=lambda line: line[66:])).encode()).hexdigest()


def upstream(tree: Path, pin: dict) -> list[str]:
    """What differs between an upstream and patches/upstreams.toml, a line each."""
    lines = []
    for path, file in pin["files"].items():
        if not (tree / path).is_file() or sha256(tree / path) != file["patched"]:
            lines.append(f"{tree / path} is not the patched file that patches/upstreams.toml pins")
    source = tree.with_name(tree.name + ".source")
    package = pin.get("package", {})
    is_package = package and source.exists() and source.read_text().startswith(package["requirement"])
    own = {f"scripts/zero{stage}.json" for stage in (2, 3)} if is_package else set()  # the kit's, not in the wheel
    whole = package if is_package else pin
    if (digest := others(tree, set(pin["files"]) | own)) != whole["others"]:
        hint = f"`git -C {tree} status` names what differs" if (tree / ".git").exists() else "make it anew"
        lines.append(f"{tree}: a file that the patch does not touch is not the pinned one ({digest}): {hint}")
    return lines


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    wrong, compared = [], []
    for venv in sorted(Path().glob(".venv*")):
        lock = Path("docker/locks", f"{venv.name.removeprefix('.venv').removeprefix('-') or 'cpu'}.txt")
        files = packages(venv)
        wrong += environment(venv, lock) + files[:NAMED]
        if len(files) > NAMED:
            wrong.append(f"{venv}: and {len(files) - NAMED} more files")
        compared.append(str(venv))
    for name, pin in tomllib.loads(Path("patches/upstreams.toml").read_text("utf-8")).items():
        tree = Path("upstream", name)
        if tree.is_dir():
            compared.append(str(tree))
            wrong += upstream(tree, pin)
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"verify: {', '.join(compared)}: {len(wrong) or 'no'} differences")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
