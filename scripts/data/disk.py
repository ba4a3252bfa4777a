"""Files of the data, and what is said of them."""

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from scripts.outside import scrub

DATA = Path("data")
THREADS = 4  # that hash


class DataError(Exception):
    """What the user must mend; its text is the whole message."""


def say(text: str) -> None:
    tqdm.write(f"data: {scrub(text)}", file=sys.stderr)


def files(path: Path) -> list[str]:
    """The files below a folder, links followed: one scan of each folder, no stat of each file. Of a file: itself."""
    if path.is_file():
        return [str(path)]
    return [os.path.join(parent, name) for parent, _, names in os.walk(path, followlinks=True) for name in names]


def hash_all(path: Path) -> dict[str, str]:
    """{file: sha256}"""

    def sha256(file: str) -> str:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    found = sorted(files(path))
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(found, pool.map(sha256, found), strict=True))


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all; what a link of that name leads to stays as it is."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with open(partial, "x", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
    os.replace(partial, path)
