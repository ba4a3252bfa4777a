"""Data of the miniature: easy-vqa's pictures and scenes of scikit-learn's handwritten digits, in LLaVA's JSON format.

    python -m scripts.miniature.tiny_data [OUT] [--scenes N] [--easyvqa N] [--digits N] [--describe N]

OUT defaults to results/tiny/data, and the sizes to the miniature's; tests make less:
--scenes            digit scenes for training
--easyvqa, --digits evaluation rows of each question type (3 and 5 types)
--describe          long-answer evaluation rows of each image set

OUT/images/...            64x64 RGB PNGs of the training split
OUT/pretrain.json         stage 1, image -> caption, one row per training image (as blip_laion_cc_sbu_558k.json)
OUT/finetune.json         stage 2, one- and multi-turn conversations, some without an image (as mix665k)
OUT/annotations.json      training image -> what is known of it: shape, color, digits (top left ... bottom right)
OUT/eval/TASK.parquet     held-out rows: question_id, image, question, answer, question_type. Tasks: easyvqa, digits,
                          their rows with a grey image (easyvqa_blind, digits_blind), and describe (long answers)
OUT/manifest.json         the sizes, and sha256 of every file and of this script; written last, so its presence means
                          "whole"
OUT/.made_by              says that the kit made the folder; no folder without it is deleted

Held out: easy-vqa's own test split, and scenes made only of digit images that no training scene contains.
Everything follows from SEED: two runs write the same bytes.
"""

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import sys
from pathlib import Path

SEED = 0
SHAPES = ["circle", "rectangle", "triangle"]
COLORS = ["black", "blue", "brown", "gray", "green", "red", "teal", "yellow"]
CELLS = ["top left", "top right", "bottom left", "bottom right"]
NUMBERS = ["no", "one", "two", "three", "four"]
SIZES = {"scenes": 4000, "easyvqa": 120, "digits": 60, "describe": 32}  # easy-vqa has 4,000 training images too
HELD_OUT_DIGITS = 360  # of the 1,797 digit images
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


def easyvqa_split(split):
    """[(png bytes, annotation, [(question, answer, type)])] of easy-vqa's "train" or "test" split."""
    import easy_vqa

    rows = list(zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True))
    paths, facts, questions = getattr(easy_vqa, f"get_{split}_image_paths")(), easyvqa_facts(rows), {}
    for question, answer, image in rows:
        kind = "yes_no" if answer in ("yes", "no") else "shape" if answer in SHAPES else "color"
        questions.setdefault(image, []).append((question, answer, kind))
    out = []
    for image in sorted(questions):
        shape, color = (values[0] if len(values) == 1 else None for values in facts[image])
        out.append((Path(paths[image]).read_bytes(), {"shape": shape, "color": color}, questions[image]))
    return out


def digit_pool(held_out):
    """Indices into load_digits of the digit images for held-out or for training scenes."""
    order = random.Random(SEED).sample(range(1797), 1797)
    return order[:HELD_OUT_DIGITS] if held_out else order[HELD_OUT_DIGITS:]


def digit_scenes(count, held_out, rng):
    """Like easyvqa_split, for `count` scenes of 1-4 digits, each in a quarter of the canvas, drawn from one of the two
    disjoint pools of digit images. A digit is 24 of the quarter's 32 pixels wide, at a random place in it."""
    from PIL import Image
    from sklearn.datasets import load_digits

    images, values = load_digits(return_X_y=True)
    pool = digit_pool(held_out)
    out = []
    for _ in range(count):
        canvas, digits = Image.new("RGB", (64, 64)), [None] * 4
        for cell in rng.sample(range(4), rng.randint(1, 4)):
            index = rng.choice(pool)
            digit = Image.fromarray((images[index].reshape(8, 8) * 15.9).astype("uint8")).resize((24, 24))
            canvas.paste(digit, (32 * (cell % 2) + rng.randint(0, 8), 32 * (cell // 2) + rng.randint(0, 8)))
            digits[cell] = int(values[index])
        out.append((png(canvas), {"digits": digits}, digit_questions(digits, rng)))
    return out


def digit_questions(digits, rng):
    """[(question, answer, type)]: every question of the five types that this scene answers, in random order."""
    seen = [d for d in digits if d is not None]
    other = rng.choice([d for d in range(10) if d not in seen])
    out = [
        (f"what digit is at the {cell}?", str(d), "position")
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
    cells = [f"{d} at the {cell}" for cell, d in zip(CELLS, note["digits"], strict=True) if d is not None]
    count = f"{NUMBERS[len(cells)]} handwritten digit{'s' * (len(cells) > 1)}"
    return rng.choice([f"{count}: " + ", ".join(cells), ", ".join(cells), f"a picture of {count}, " + ", ".join(cells)])


def description(note):
    """The long answer (20 words and more) to DESCRIBE_QUESTIONS; None where easy-vqa's questions leave the shape or
    the color open."""
    if "digits" in note:
        count = sum(d is not None for d in note["digits"])
        parts = [
            f"The {cell} part {'is empty' if d is None else f'shows the digit {d}'}."
            for cell, d in zip(CELLS, note["digits"], strict=True)
        ]
        verb = "is one handwritten digit" if count == 1 else f"are {NUMBERS[count]} handwritten digits"
        return f"There {verb} in the image. " + " ".join(parts)
    if not (note["shape"] and note["color"]):
        return None
    no = [s for s in SHAPES if s != note["shape"]]
    return (
        f"The image shows one shape on a plain background. The shape is a {note['shape']} and its color is "
        f"{note['color']}. There is no {no[0]} and no {no[1]} in the image."
    )


SHORT = "Answer the question using a single word or phrase."  # as in mix665k, once, and in the evaluation's prompt
DESCRIBE_QUESTIONS = ["describe the image in detail.", "please describe everything that you see."]


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
    for name, samples in (("easyvqa", easyvqa_split("train")), ("digits", digit_scenes(scenes, False, rng))):
        (out / "images" / name).mkdir(parents=True)
        for i, (data, note, questions) in enumerate(samples):
            row = {"id": f"{name}-{i}", "image": f"{name}/{i}.png"}
            (out / "images" / row["image"]).write_bytes(data)
            annotations[row["image"]] = note
            prompt = rng.choice(["Describe the image briefly.", "What is in the image?", "Write a short caption."])
            pretrain.append({**row, "conversations": with_image([(prompt, caption(note, rng))], rng)})
            asked, long = [(q, a) for q, a, _ in rng.sample(questions, len(questions))], description(note)
            if long and rng.random() < 0.4:
                finetune.append({**row, "conversations": with_image([(rng.choice(DESCRIBE_QUESTIONS), long)], rng)})
            asked[0] = (f"{asked[0][0]}\n{SHORT}", asked[0][1])
            finetune.append({**row, "conversations": with_image(asked[: rng.randint(1, 6)], rng)})
    for i in range(600):
        pairs = [text_only(rng) for _ in range(rng.randint(1, 4))]
        finetune.append({"id": f"text-{i}", "conversations": turns(pairs)})
    for name, rows in (("pretrain", pretrain), ("finetune", finetune)):
        (out / f"{name}.json").write_text(json.dumps(rng.sample(rows, len(rows)), indent=1))
    (out / "annotations.json").write_text(json.dumps(annotations, indent=1))


def write_eval(out, sizes, rng):
    from PIL import Image

    blank, describe = png(Image.new("RGB", (64, 64), GREY)), []
    for name, samples in (("easyvqa", easyvqa_split("test")), ("digits", digit_scenes(1000, True, rng))):
        rows = [(i, data, *qa) for i, (data, _, questions) in enumerate(samples) for qa in questions]
        rows = rng.sample(rows, len(rows))
        chosen = [
            row
            for kind in sorted({row[4] for row in rows})
            for row in [row for row in rows if row[4] == kind][: sizes[name]]
        ]
        write_parquet(out / f"{name}.parquet", name, chosen)
        write_parquet(out / f"{name}_blind.parquet", name, [(i, blank, *qa) for i, _, *qa in chosen])
        long = [
            (i, data, DESCRIBE_QUESTIONS[0], description(note), name)
            for i, (data, note, _) in enumerate(samples)
            if description(note)
        ]
        describe += rng.sample(long, sizes["describe"])
    write_parquet(out / "describe.parquet", "describe", describe)


def write_parquet(path, name, rows):
    """rows: (image number, png bytes, question, answer, type). The metadata lets `datasets` decode the image column."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(exist_ok=True)
    text = ["question_id", "question", "answer", "question_type"]
    features = {"image": {"_type": "Image"}} | {key: {"dtype": "string", "_type": "Value"} for key in text}
    table = pyarrow.table(
        {
            "question_id": [f"{name}-{i:03d}" for i in range(len(rows))],
            "image": [{"bytes": row[1], "path": f"{row[4]}-{row[0]}.png"} for row in rows],
            "question": [row[2] for row in rows],
            "answer": [row[3] for row in rows],
            "question_type": [row[4] for row in rows],
        }
    )
    info = {"huggingface": json.dumps({"info": {"features": {key: features[key] for key in table.column_names}}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(info), path)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    (partial / "eval").mkdir()
    write_eval(partial / "eval", sizes, rng)
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
