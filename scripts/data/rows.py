"""Checks the rows of a training JSON against what the stock stage does with them, and that their pictures can be read.

It costs seconds or minutes; a training that meets such a row stops hours later, or learns what was not meant.
The rules are those of LLaVA's preprocess_plain and preprocess_v1 (llava/train/train.py) and of TinyLLaVA's templates
(tinyllava/data/template).
"""

import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from scripts.common import write_whole
from scripts.data.catalog import DATA, DataError
from scripts.data.disk import files, say
from scripts.outside import checked_name

NAMED = 10  # problems that are printed; a file lists all
IMAGE = "<image>"
# The end of an answer, of the templates whose labels are found again by splitting the prompt at it and at this sign.
ENDS = {"v1": "</s>", "llama": "</s>", "phi": "<|endoftext|>", "qwen2_base": "<|endoftext|>"}
ANSWER = " ASSISTANT: "
SYSTEM = 22  # words before the first question, in the templates above


@dataclass(frozen=True)
class Stage:
    """A stage's data, and the conversation template that stock reads it by."""

    data: Path
    pictures: Path
    backbone: str
    template: str
    longest: int  # tokens
    grouped: bool = False  # by TinyLLaVA's group_by_modality_length

    @classmethod
    def of(cls, loaded: dict, name: str) -> "Stage":
        stage = loaded["train"] | loaded[name]
        template = stage.get("version") or stage["conv_version"]
        folders = Path(stage["data_path"]), Path(stage["image_folder"])
        grouped = loaded["backbone"] == "tinyllava" and stage.get("group_by_modality_length", False)
        return cls(*folders, loaded["backbone"], template, stage["model_max_length"], grouped)

    @property
    def one_pair(self) -> bool:
        return self.template in ("plain", "pretrain")


def check(stage: Stage, decode: bool) -> list[str]:
    """What keeps the stage from training, a line each; nothing if it can. `decode`: every picture is read whole."""
    rows = read(stage.data)
    wrong = [(i, fault) for i, row in enumerate(rows) if (fault := row_fault(row, stage))]
    if wrong:
        return tell(stage.data, "problems", [f"{label(rows, i)}: {fault}" for i, fault in wrong], "cannot be trained")
    with_one = sum("image" in row for row in rows)
    if stage.grouped and with_one in (0, len(rows)):
        all_have = "every row has a picture" if with_one else "no row has a picture"
        both = "stock's group_by_modality_length needs rows with and without: set it to false in the config"
        return [f"{stage.data}: {all_have}, and {both}"]
    asked: dict[str, int] = {}  # picture -> the first row that names it
    for i, row in enumerate(rows):
        if "image" in row:
            asked.setdefault(row["image"], i)
    there = {file[len(str(stage.pictures)) + 1 :] for file in files(stage.pictures)}
    if lost := missing(stage, asked, there):
        return lost
    broken = [
        f"{stage.pictures / name} ({label(rows, asked[name])}): {fault}"
        for name, fault in unreadable(stage.pictures, list(asked), decode)
    ]
    if broken:
        return tell(stage.data, "problems", broken, "name pictures that cannot be read")
    silent = [f"{label(rows, i)}: {why}" for i, row in enumerate(rows) if (why := unlabelled(row, stage))]
    for line in tell(stage.data, "unlabelled", silent, "have no label: stock trains nothing on them"):
        say(f"note: {line}")
    remove(stage.data, "problems")
    rest = f"{with_one} with one of {len(asked)} images of {stage.pictures}, where all are"
    say(f"{stage.data}: {len(rows)} rows, {rest}; {len(there - asked.keys())} others are there")
    return []


def read(path: Path) -> list[dict]:
    """The rows. Raises DataError for what stock's `json.load(open(path, "r"))` does not take, and for no rows."""
    data = path.read_bytes()
    if data.startswith(b"\xef\xbb\xbf"):
        raise DataError(f"{path} begins with a byte order mark, at which stock's json.load fails: save it without one")
    try:
        rows = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a list of conversations: {error}") from None
    if not isinstance(rows, list) or not rows:
        what = "holds no rows" if rows == [] else f"is not a list of conversations, but a {type(rows).__name__}"
        raise DataError(f"{path} {what}")
    return rows


def label(rows: list, i: int) -> str:
    """A row by its number, counted from 0, and its id."""
    row = rows[i]
    name = f", id {str(row['id'])[:80]!r}" if isinstance(row, dict) and "id" in row else ""
    return f"row {i}{name}"


def row_fault(row: object, stage: Stage) -> str:
    """What stock would fail at, or read otherwise than it was meant; "" if nothing."""
    if not isinstance(row, dict):
        return f"is a {type(row).__name__}, not an object with conversations"
    if "image" in row:
        image = row["image"]
        if not isinstance(image, str) or not image:
            return f"image is {json.dumps(image)[:80]}, where stock wants the name of one picture, or no such key"
        try:
            checked_name(image)
        except ValueError as error:
            return f"image {error}"
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "has no conversations" if not turns else f"conversations are a {type(turns).__name__}, not a list"
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return f"a turn is {json.dumps(turn)[:80]}, not {{'from': ..., 'value': TEXT}}"
        if turn.get("from") not in ("human", "gpt"):
            return f"a turn is from {json.dumps(turn.get('from'))[:80]}, where stock knows human and gpt"
    return turns_fault(asked_of(turns, stage), "image" in row, stage)


def asked_of(turns: list[dict], stage: Stage) -> list[dict]:
    """The turns from the first question on: stock skips one turn before it, but for LLaVA's stage 1."""
    return turns[1:] if turns[0]["from"] != "human" and stage.template != "plain" else turns


def turns_fault(turns: list[dict], has_image: bool, stage: Stage) -> str:
    if [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2) + ["human"] * (len(turns) % 2):
        return "human and gpt do not take turns"
    if not turns or (len(turns) % 2 and stage.backbone == "tinyllava"):
        return "a question has no answer, or there is none"
    if stage.one_pair and len(turns) != 2:
        return f"has {len(turns)} turns, where stage 1 takes one question and one answer"
    marks = sum(marks_of(turn, stage) for turn in turns)
    if stage.template == "plain" and IMAGE not in turns[0]["value"]:
        return f"the question has no {IMAGE}, which stage 1 takes its place for the picture from"
    if marks > 1 and (has_image or stage.backbone == "tinyllava"):
        return f"has {marks} {IMAGE} for one picture: stock would take the next row's for the others"
    return ""


def marks_of(turn: dict, stage: Stage) -> int:
    """How often the stage puts the picture at this turn."""
    if stage.template == "pretrain":
        return int(turn["from"] == "human")
    if stage.backbone == "tinyllava" and turn["from"] == "gpt":
        return turn["value"].count(IMAGE)
    return int(IMAGE in turn["value"])  # stock moves them to the front, as one


def unlabelled(row: dict, stage: Stage) -> str:
    """Why stock ignores every label of a row that it takes, as far as that is known without its tokenizer; "" if it is
    not: its tokens must be found again by splitting the prompt, and an answer must begin before the longest length."""
    if stage.template not in ENDS:
        return ""
    turns, end = asked_of(row["conversations"], stage), ENDS[stage.template]
    if len(turns) % 2:
        return "its last question has no answer"
    if stage.template == "v1" and not all(turn["value"] for turn in turns):
        return "a turn is empty"
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        text = f"USER: {question['value']}{ANSWER}{answer['value']}"
        if text.count(ANSWER) != 1 or end in text:
            return f"a turn holds {ANSWER.strip()!r} or {end!r}, by which stock finds the answers"
    if (words := len(turns[0]["value"].split()) + SYSTEM) > stage.longest:
        return f"{words} words come before the first answer, and {stage.longest} tokens are read"
    return ""


def missing(stage: Stage, asked: dict[str, int], there: set[str]) -> list[str]:
    lost = [name for name in sorted(asked.keys() - there) if not (stage.pictures / name).exists()]
    listed = DATA / f"{stage.data.stem}.missing.txt"
    if not lost:
        listed.unlink(missing_ok=True)
        return []
    DATA.mkdir(exist_ok=True)
    write_whole(listed, "".join(f"{name}\n" for name in lost))
    what = f"{len(lost)} of {len(asked)} images are not in {stage.pictures}"
    return [f"{stage.data}: {what}: {', '.join(lost[:3])} ... ({listed} has them all)"]


def tell(path: Path, kind: str, lines: list[str], what: str) -> list[str]:
    """At most NAMED lines, and where the rest is listed. Where there are none, no list stays from the last time."""
    if not lines:
        remove(path, kind)
        return []
    DATA.mkdir(exist_ok=True)
    listed = DATA / f"{path.stem}.{kind}.txt"
    write_whole(listed, "".join(f"{line}\n" for line in lines))
    return [f"{path}: {len(lines)} rows {what} ({listed} has them all)", *(f"{path}: {line}" for line in lines[:NAMED])]


def remove(path: Path, kind: str) -> None:
    (DATA / f"{path.stem}.{kind}.txt").unlink(missing_ok=True)


def unreadable(folder: Path, names: list[str], decode: bool) -> Iterator[tuple[str, str]]:
    """(picture, what is wrong with it)"""
    cores = len(os.sched_getaffinity(0))
    watched = sys.stderr.isatty()
    bar = partial(
        tqdm, total=len(names), desc=f"pictures of {folder}", unit="", mininterval=1 if watched else 30, delay=5
    )
    fault = partial(picture_fault, decode)
    paths = [os.path.join(folder, name) for name in names]
    if len(names) < 2000:  # another process takes longer to start
        yield from ((name, what) for name, what in zip(names, map(fault, paths), strict=True) if what)
        return
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        for name, what in zip(names, bar(pool.map(fault, paths, chunksize=500)), strict=True):
            if what:
                yield name, what


def picture_fault(decode: bool, path: str) -> str:
    """Why stock cannot read a picture, or not all of it; "" if it can. Reads the header, and the end, where a JPEG or
    PNG says that it is whole; any other picture, and every one with `decode`, is decoded."""
    from PIL import Image

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as picture:
            if decode or not has_end(path, picture.format):
                picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, MemoryError) as error:
        return str(error).replace(f" {path!r}", "") or type(error).__name__
    except Exception as error:  # Pillow's readers raise what their formats' parsers meet: struct.error, IndexError, ...
        return f"{type(error).__name__}: {error}"
    return ""


def has_end(path: str, kind: str | None) -> bool:
    end = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(kind or "")
    if not end:
        return False
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        return end in file.read()
