"""Files of the data, and what is said of them."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from scripts.common import sha256
from scripts.outside import scrub

THREADS = 4  # that hash


@contextmanager
def ends_where_nobody_reads() -> Iterator[None]:
    """Around what tqdm writes: where that fails (a closed terminal), tqdm keeps its lock, for which every other thread
    would wait without end. All that was begun continues the next time."""
    try:
        yield
    except OSError:
        os._exit(1)


def say(text: str) -> None:
    with ends_where_nobody_reads():
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
