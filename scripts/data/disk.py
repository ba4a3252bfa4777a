"""Files of the data, and what is said of them."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from scripts.common import sha256
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
    found = sorted(files(path))
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(found, pool.map(sha256, found), strict=True))
