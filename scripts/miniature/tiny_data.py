"""Data of the miniature: easy-vqa's pictures and scenes of scikit-learn's handwritten digits, in LLaVA's JSON format.

    python -m scripts.miniature.tiny_data [OUT] [--scenes N] [--easyvqa N] [--digits N] [--probe N]

OUT defaults to results/tiny/data, and the sizes to the miniature's; tests make less:
--scenes            digit scenes for training
--easyvqa, --digits evaluation rows of each question type (3 and 5 types)
--probe             rows of each image set in describe, caption and maps

OUT/images/...            64x64 RGB PNGs of the training split
OUT/pretrain.json         stage 1, image -> caption, one row per training image (as blip_laion_cc_sbu_558k.json)
OUT/finetune.json         stage 2, one- and multi-turn conversations, some without an image (as mix665k)
OUT/annotations.json      training image -> what is known of it (Picture.note)
OUT/eval/TASK.parquet     held-out rows: question_id, image, question, answer, question_type. Tasks: easyvqa, digits,
                          and their rows with a grey image (easyvqa_blind, digits_blind). For scripts/probe.py:
                          describe   long answers; facts: where the words begin and end that only the image tells
                          caption    captions as in stage 1, for the CE with the true and with a swapped image
                          maps       questions for one object; mask: a PNG, white where that object's pixels are
OUT/validation/...        easyvqa and digits again, of other pictures: settings were chosen on them
OUT/manifest.json         the sizes, and sha256 of every file and of this script; written last, so its presence means
                          "whole"
OUT/.made_by              says that the kit made the folder; no folder without it is deleted

Held out: easy-vqa's own test split, and scenes made only of digit images that no training scene contains. Validation
and evaluation share neither pictures nor digit images.
Everything follows from SEED: two runs write the same bytes.
"""

import argparse
import io
import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scripts.common import sha256

SEED = 0
SHAPES = ["circle", "rectangle", "triangle"]
COLORS = ["black", "blue", "brown", "gray", "green", "red", "teal", "yellow"]
CELLS = ["northwest", "northeast", "southwest", "southeast"]
ACROSS, DOWN = ["left", "center", "right"], ["top", "center", "bottom"]
SMALL = 300  # pixels of a shape: half of easy-vqa's have fewer
NUMBERS = ["no", "one", "two", "three", "four"]
SIZES = {"scenes": 8000, "easyvqa": 120, "digits": 60, "probe": 64}  # easy-vqa has 4,000 training images
SPLITS = ("training", "validation", "evaluation")
DIGITS = {"validation": 120, "evaluation": 240}  # of the 1,797 digit images; the rest is for training
VALIDATION_PICTURES = 300  # of the 1,000 in easy-vqa's test split
SIDE, GRID = 64, 4  # pixels, and image tokens, in each direction
GREY = (128, 128, 128)


def easyvqa_facts(rows):
    """{image id: (shapes, colors) that its questions and answers leave possible}, each a sorted list."""
    facts = {}
    for question, answer, image in rows:
        words = question.rstrip("?").split()
        sets = facts.setdefault(image, [set(SHAPES), set(COLORS)])
        for known, values in zip(sets, (SHAPES, COLORS), strict=True):
            for value in values:
                if value == answer or (value in words and answer not in ("yes", "no")):
                    known &= {value}
                elif value in words:
                    present = (answer == "yes") != ("not" in words or "no" in words)
                    known.intersection_update({value}) if present else known.discard(value)
    return {image: tuple(sorted(known) for known in sets) for image, sets in facts.items()}


class Picture(NamedTuple):
    """png: bytes. note: what is known of it: shape and color (None: not known), across, down and size, and cells (the
    GRID x GRID places that the shape covers, row by row); or the digits (northwest ... southeast, None: empty).
    questions: [(question, answer, type)]. masks: {object: [64, 64] bool}, of "shape", or of each quarter with a digit.
    number: easy-vqa's of the picture, or the scene's.
    """

    png: bytes
    note: dict
    questions: list
    masks: dict
    number: int


def easyvqa_split(split):
    """easy-vqa's pictures of one of SPLITS."""
    import easy_vqa
    from PIL import Image

    of = "train" if split == "training" else "test"
    rows = list(zip(*getattr(easy_vqa, f"get_{of}_questions")(), strict=True))
    paths, facts, questions = getattr(easy_vqa, f"get_{of}_image_paths")(), easyvqa_facts(rows), {}
    for question, answer, image in rows:
        kind = "yes_no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "color"
        questions.setdefault(image, []).append((question, answer, kind))
    wanted = sorted(questions)
    if of == "test":
        wanted = wanted[:VALIDATION_PICTURES] if split == "validation" else wanted[VALIDATION_PICTURES:]
    out = []
    for image in wanted:
        shape, color = (values[0] if len(values) == 1 else None for values in facts[image])
        data = Path(paths[image]).read_bytes()
        mask = foreground(Image.open(io.BytesIO(data)))
        note = {"shape": shape, "color": color} | where(mask)
        out.append(Picture(data, note, questions[image], {"shape": mask}, image))
    return out


def foreground(image):
    """[64, 64] bool: the pixels of easy-vqa's one shape. The background is plain, and its color the commonest."""
    background = max(image.convert("RGB").getcolors(SIDE**2))[1]
    return np.abs(np.asarray(image.convert("RGB")).astype(int) - background).max(-1) > 64


def where(mask):
    """across, down and size of an object in words, and the cells of the grid that it covers to a tenth and more."""
    down, across = (int(3 * np.flatnonzero(mask.any(axis)).mean() / SIDE) for axis in (1, 0))
    cells = mask.reshape(GRID, SIDE // GRID, GRID, SIDE // GRID).mean((1, 3)).ravel()
    size = "small" if mask.sum() < SMALL else "large"
    return {"across": ACROSS[across], "down": DOWN[down], "size": size, "cells": (cells > 0.1).tolist()}


def digit_pool(split):
    """Indices into load_digits of the digit images for one of SPLITS; none is in two."""
    order, held_out = random.Random(SEED).sample(range(1797), 1797), sum(DIGITS.values())
    return {
        "training": order[held_out:],
        "validation": order[: DIGITS["validation"]],
        "evaluation": order[DIGITS["validation"] : held_out],
    }[split]


def digit_scenes(count, split, rng):
    """`count` scenes of 1-4 digits, each in a quarter of the canvas, drawn from the digit images of one of SPLITS. A
    digit is 24 of the quarter's 32 pixels wide, at a random place in it."""
    from PIL import Image
    from sklearn.datasets import load_digits

    images, values = load_digits(return_X_y=True)
    pool = digit_pool(split)
    out = []
    for number in range(count):
        canvas, digits, masks = np.zeros((SIDE, SIDE), "uint8"), [None] * 4, {}
        for cell in rng.sample(range(4), rng.randint(1, 4)):
            index = rng.choice(pool)
            digit = Image.fromarray((images[index].reshape(8, 8) * 15.9).astype("uint8")).resize((24, 24))
            left, top = 32 * (cell % 2) + rng.randint(0, 8), 32 * (cell // 2) + rng.randint(0, 8)
            canvas[top : top + 24, left : left + 24] = digit
            digits[cell] = int(values[index])
            masks[cell] = np.zeros((SIDE, SIDE), bool)
            masks[cell][top : top + 24, left : left + 24] = np.asarray(digit) > 64
        data = png(Image.fromarray(canvas).convert("RGB"))
        out.append(Picture(data, {"digits": digits}, digit_questions(digits, rng), masks, number))
    return out


def digit_questions(digits, rng):
    """[(question, answer, type)]: every question of the five types that this scene answers, in random order."""
    seen = [d for d in digits if d is not None]
    other = rng.choice([d for d in range(10) if d not in seen])
    out = [
        (f"what digit is in the {cell}?", str(d), "position")
        for cell, d in zip(CELLS, digits, strict=True)
        if d is not None
    ]
    out += [
        (
            rng.choice(["how many digits are there?", "how many digits does the image contain?"]),
            NUMBERS[len(seen)],
            "count",
        ),
        ("what is the largest digit?", str(max(seen)), "largest"),
        ("what are the digits in reading order?", " ".join(map(str, seen)), "read"),
        *[(f"is there a {d} in the image?", a, "yes_no") for d, a in ((rng.choice(seen), "yes"), (other, "no"))],
    ]
    return rng.sample(out, len(out))


def caption(note, rng):
    """A short caption from a training annotation."""
    if "digits" not in note:
        thing = " ".join(filter(None, [note["color"], note["shape"] or "shape"]))
        return rng.choice([f"a {thing}", f"a picture of a {thing}", f"one {thing} on a plain background"])
    cells = [f"{d} in the {cell}" for cell, d in zip(CELLS, note["digits"], strict=True) if d is not None]
    count = f"{NUMBERS[len(cells)]} handwritten digit{'s' * (len(cells) > 1)}"
    return rng.choice([f"{count}: " + ", ".join(cells), ", ".join(cells), f"a picture of {count}, " + ", ".join(cells)])


def grid(note):
    """The words for what each of GRID x GRID image tokens shows, row by row."""
    places = [divmod(place, GRID) for place in range(GRID**2)]
    if "digits" in note:
        quarters = [2 * (2 * row // GRID) + 2 * column // GRID for row, column in places]
        return [[digit_word(note["digits"][q]), CELLS[q]] for q in quarters]
    thing = [word for word in (note["color"], note["shape"], note["size"]) if word]
    return [
        [*thing * covered, DOWN[(3 * row + 1) // GRID], ACROSS[(3 * column + 1) // GRID]]
        for (row, column), covered in zip(places, note["cells"], strict=True)
    ]


def facts(note):
    """[(key, value)] in words: what the long answers tell, too."""
    if "digits" in note:
        return [(cell, digit_word(digit)) for cell, digit in zip(CELLS, note["digits"], strict=True)]
    return [(key, note[key]) for key in ("shape", "color", "across", "down", "size") if note[key]]


def digit_word(digit):
    return "missing" if digit is None else str(digit)


def description(note, rng):
    """The long answer (60 tokens and more) to DESCRIBE: [(text, whether only the image tells it)], to be
    joined. Its sentences stand in random order, so that a fact's kind says nothing about its position. None where
    easy-vqa's questions leave the shape or the color open."""
    if "digits" in note:
        told = [(f" In the {cell} part of the picture the digit is ", value) for cell, value in facts(note)]
    elif note["shape"] and note["color"]:
        told = [
            (" The shape that the picture shows is a ", note["shape"]),
            (" The color of the shape in the picture is ", note["color"]),
            (" Seen from left to right its place is the ", note["across"]),
            (" Seen from top to bottom its place is the ", note["down"]),
            (" Beside other shapes of this kind it is ", note["size"]),
        ]
    else:
        return None
    parts = [("This is what one can see in the picture, told part by part and in no order.", False)]
    for sentence, fact in rng.sample(told, len(told)):
        parts += [(sentence, False), (fact, True), (".", False)]
    return parts


SHORT = "Answer the question using a single word or phrase."  # as in mix665k, once, and in the evaluation's prompt
CAPTION = ["Describe the image briefly.", "What is in the image?", "Write a short caption."]
DESCRIBE = ["describe the image in detail.", "please describe everything that you see."]


def text_only(rng):
    """One question and answer that needs no image."""
    a, b = rng.sample(range(10), 2)
    return rng.choice(
        [
            (f"which is larger, {a} or {b}?", str(max(a, b))),
            (f"which is smaller, {a} or {b}?", str(min(a, b))),
            (f"count from {min(a, b)} to {max(a, b)}.", " ".join(map(str, range(min(a, b), max(a, b) + 1)))),
            ("how many sides does a triangle have?", "three"),
            ("how many sides does a rectangle have?", "four"),
            (f"is {rng.choice(COLORS)} a color or a shape?", "a color"),
            (f"is a {rng.choice(SHAPES)} a color or a shape?", "a shape"),
        ]
    )


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def turns(pairs):
    return [{"from": who, "value": value} for pair in pairs for who, value in zip(("human", "gpt"), pair, strict=True)]


def with_image(pairs, rng):
    """The first question with "<image>" before or after it, as in mix665k."""
    (question, answer), *rest = pairs
    return turns([(rng.choice([f"<image>\n{question}", f"{question}\n<image>"]), answer), *rest])


def write_training(out, scenes, rng):
    pretrain, finetune, annotations = [], [], {}
    pictures = {"easyvqa": easyvqa_split("training"), "digits": digit_scenes(scenes, "training", rng)}
    for name, pictures_of in pictures.items():
        (out / "images" / name).mkdir(parents=True)
        for data, note, questions, _, number in pictures_of:
            row = {"id": f"{name}-{number}", "image": f"{name}/{number}.png"}
            (out / "images" / row["image"]).write_bytes(data)
            annotations[row["image"]] = note
            pretrain.append({**row, "conversations": with_image([(rng.choice(CAPTION), caption(note, rng))], rng)})
            long = description(note, rng)
            if long and rng.random() < 0.25:
                answer = "".join(text for text, _ in long)
                finetune.append({**row, "conversations": with_image([(rng.choice(DESCRIBE), answer)], rng)})
            asked = [(q, a) for q, a, _ in rng.sample(questions, len(questions))]
            asked[0] = (f"{asked[0][0]}\n{SHORT}", asked[0][1])
            finetune.append({**row, "conversations": with_image(asked[: rng.randint(1, 4)], rng)})
    for i in range(600):
        pairs = [text_only(rng) for _ in range(rng.randint(1, 4))]
        finetune.append({"id": f"text-{i}", "conversations": turns(pairs)})
    for name, rows in (("pretrain", pretrain), ("finetune", finetune)):
        (out / f"{name}.json").write_text(json.dumps(rng.sample(rows, len(rows)), indent=1))
    (out / "annotations.json").write_text(json.dumps(annotations, indent=1))


def write_held_out(out, split, sizes, rng):
    """The tasks of one split, and for the evaluation what is probed."""
    from PIL import Image

    out.mkdir()
    probed = {"describe": [], "caption": [], "maps": []}
    for name, pictures in (("easyvqa", easyvqa_split(split)), ("digits", digit_scenes(1000, split, rng))):
        rows = [(p.number, p.png, *qa) for p in pictures for qa in p.questions]
        rows = rng.sample(rows, len(rows))
        chosen = [
            row
            for kind in sorted({row[4] for row in rows})
            for row in [row for row in rows if row[4] == kind][: sizes[name]]
        ]
        write_parquet(out / f"{name}.parquet", name, chosen)
        if split == "validation":
            continue
        blank = png(Image.new("RGB", (SIDE, SIDE), GREY))
        write_parquet(out / f"{name}_blind.parquet", name, [(i, blank, *qa) for i, _, *qa in chosen])
        known = [p for p in pictures if description(p.note, rng) and for_one_object(p)]
        for p in rng.sample(known, sizes["probe"]):
            parts, facts, text = description(p.note, rng), [], ""
            for part, fact in parts:
                facts += [[len(text), len(text) + len(part)]] * fact
                text += part
            probed["describe"].append((p.number, p.png, DESCRIBE[0], text, name, facts))
            probed["caption"].append((p.number, p.png, CAPTION[0], caption(p.note, rng), name))
            question, answer, kind, objects = rng.choice(for_one_object(p))
            mask = np.any([p.masks[key] for key in objects], axis=0)
            probed["maps"].append((p.number, p.png, question, answer, f"{name} {kind}", png(Image.fromarray(mask))))
    for name, rows in probed.items():
        if rows:
            write_parquet(out / f"{name}.parquet", name, rows)


def for_one_object(picture):
    """[(question, answer, type, keys of its masks)] of the questions that ask for one thing in the picture."""
    digits, out = picture.note.get("digits"), []
    for question, answer, kind in picture.questions:
        if digits is None and kind in ("shape", "color"):
            out.append((question, answer, kind, ["shape"]))
        elif kind == "position":
            out.append(
                (question, answer, kind, [next(i for i, cell in enumerate(CELLS) if f"the {cell}?" in question)])
            )
        elif kind == "largest":
            out.append((question, answer, kind, [i for i, digit in enumerate(digits) if str(digit) == answer]))
    return out


def write_parquet(path, name, rows):
    """rows: (image number, png bytes, question, answer, type), and a describe row's facts or a map's mask. The metadata
    lets `datasets` decode the image column."""
    import pyarrow
    import pyarrow.parquet

    text = ["question_id", "question", "answer", "question_type"]
    features = {"image": {"_type": "Image"}} | {key: {"dtype": "string", "_type": "Value"} for key in text}
    columns = {
        "question_id": [f"{name}-{i:03d}" for i in range(len(rows))],
        "image": [{"bytes": row[1], "path": f"{row[4]}-{row[0]}.png"} for row in rows],
        "question": [row[2] for row in rows],
        "answer": [row[3] for row in rows],
        "question_type": [row[4] for row in rows],
    }
    info = {"huggingface": json.dumps({"info": {"features": {key: features[key] for key in columns}}})}
    if name in ("describe", "maps"):
        columns["facts" if name == "describe" else "mask"] = [row[5] for row in rows]
        info = None
    pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata(info), path)


def files(folder):
    """{path below folder: sha256} of every file but the manifest."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {p.relative_to(folder).as_posix(): sha256(p) for p in found}


def made_by_kit(folder):
    """Exits where something lies at `folder` that does not say that the kit made it; an empty folder is no one's."""
    theirs = any(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else os.path.lexists(folder)
    if theirs and not (folder / ".made_by").is_file():
        sys.exit(f"{folder} was not made by this kit, which would replace it: move it away and run again")


def anew(folder):
    """Makes an empty `folder` that says who made it, in the place of an older one that says so too."""
    made_by_kit(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / ".made_by").write_text("The kit made this folder and replaces it when it makes it anew.\n")


def main(out, sizes):
    expected = {"sizes": sizes, "script": sha256(Path(__file__))}
    if out.exists():
        manifest = out / "manifest.json"
        if not manifest.is_file() or manifest.read_text() != json.dumps(expected | {"files": files(out)}, indent=1):
            sys.exit(
                f"{out} is not what this version of scripts/miniature/tiny_data.py writes with {sizes}: "
                "move or delete that folder and run again"
            )
        return print(f"{out}: whole, nothing to do")
    partial = out.with_name(out.name + ".partial")
    anew(partial)
    rng = random.Random(SEED)
    write_training(partial, sizes["scenes"], rng)
    write_held_out(partial / "validation", "validation", sizes, rng)
    write_held_out(partial / "eval", "evaluation", sizes, rng)
    expected["files"] = files(partial)
    (partial / "manifest.json").write_text(json.dumps(expected, indent=1))
    os.replace(partial, out)
    print(f"{out}: {len(expected['files'])} files written")


def size(text):
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1 on")
    return int(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", metavar="OUT", nargs="?", type=Path, default="results/tiny/data")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=size, default=default)
    given = vars(parser.parse_args())
    main(given.pop("out"), given)
