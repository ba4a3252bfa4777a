"""A stock upstream at the commit of patches/upstreams.toml, in upstream/NAME.

From GitHub; where GitHub is out of reach, LLaVA from the package index: llava-torch, checked by hash, a little older
than the commit. TinyLLaVA_Factory is on no package index. upstream/NAME.source says which it is; the report repeats it.
A folder that this script did not make is left alone.
"""

import os
import shutil
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import tomllib

from scripts import common
from scripts.common import ROOT, Arguments, Busy, fail, lock, remove_below, signals_raise, start, stop, write_whole

FOLDER = Path("upstream")
# The package has no scripts/: the two DeepSpeed configs that training names are here, with upstream's settings.
ZERO = sorted(Path(__file__).parent.glob("zero?.json"))


def ran(*command: str | Path) -> bool:
    """Whether a command ended well. Whatever ends this ends it."""
    child = start([str(word) for word in command])
    try:
        return child.wait() == 0
    finally:
        stop([child], patience=10)


def from_git(pin: dict[str, Any], tree: Path) -> bool:
    git = ("git", "-C", tree)
    return (
        ran("git", "clone", "--quiet", "--filter=blob:none", "--no-checkout", pin["url"], tree)
        # Before 2.37 git takes these for patterns, and leaves out the files beside the folders.
        and ran(*git, "-c", "core.sparseCheckoutCone=true", "sparse-checkout", "set", *pin["sparse"])
        and ran(*git, "checkout", "--quiet", pin["commit"])
    )


def from_index(package: dict[str, str], tree: Path) -> bool:
    requirement = tree.with_name(f"{tree.name}.requirement")
    write_whole(requirement, f"{package['requirement']} --hash=sha256:{package['sha256']}\n")
    install = (".uv/bin/uv", "pip", "install", "--quiet", "--no-deps", "--require-hashes")
    well = ran(*install, "--target", tree, "-r", requirement)
    requirement.unlink()
    if well:
        (tree / "scripts").mkdir()
        for file in ZERO:
            shutil.copy(file, tree / "scripts")
    return well


def get(name: str, pin: dict[str, Any]) -> str:
    """Makes upstream/NAME where it is not there, and returns where it is from."""
    tree, source = FOLDER / name, FOLDER / f"{name}.source"
    if source.is_file() and source.stat().st_size and tree.is_dir():
        return source.read_text(encoding="utf-8").strip()
    if tree.exists() or tree.is_symlink():
        fail("upstream", f"{tree} was not made by this script (there is no {source}): move it away")
    work = FOLDER / f".{name}.work"  # what is left of a run that was cut off goes
    for path in (work, work.with_name(f"{work.name}.requirement")):
        if path.exists() or path.is_symlink():
            remove_below(path, FOLDER)
    try:
        if from_git(pin, work):
            said = f"{pin['url']}@{pin['commit']}"
        elif "package" not in pin:
            fail("upstream", f"{pin['url']} cannot be cloned from here, and no package index carries it", 3)
        else:
            package = pin["package"]
            print(
                f"upstream: no git clone of {pin['url']} could be had: taking {package['requirement']} from the "
                "package index",
                file=sys.stderr,
            )
            if work.exists():
                remove_below(work, FOLDER)
            if not from_index(package, work):
                fail("upstream", f"{package['requirement']} could not be had from the package index either", 1)
            said = (
                f"{package['requirement']} from the package index (sha256 {package['sha256']}), close to "
                f"{pin['commit']}"
            )
        write_whole(source, said + "\n")
        os.rename(work, tree)
        return said
    finally:
        if work.exists():
            remove_below(work, FOLDER)


def main(argv: list[str]) -> int:
    os.chdir(ROOT)
    with open("patches/upstreams.toml", "rb") as file:
        pins = tomllib.load(file)
    parser = Arguments(
        prog="upstream",
        usage=f"scripts/setup/upstream.sh [{'|'.join(pins)}]",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", default="llava")
    name = parser.parse_args(argv).name
    if name not in pins:
        fail("upstream", f"no upstream {name!r}: choose {', '.join(pins)}")
    FOLDER.mkdir(exist_ok=True)
    try:
        lock(FOLDER / ".lock", lambda problem: print(f"upstream: {problem}", file=sys.stderr))
    except Busy:
        fail("upstream", "another run is at work in upstream/: wait for it")
    except OSError as error:  # an image's, which is read-only and whole
        if not (FOLDER / f"{name}.source").is_file():
            fail("upstream", f"upstream/ cannot be written to: {error.strerror}")
    with signals_raise():
        print(f"upstream: {get(name, pins[name])}")
    return 0


if __name__ == "__main__":
    common.run("upstream", main)
