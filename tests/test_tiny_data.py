"""The miniature's data: the same bytes every time, nothing held out leaks into training, and the answers are right."""

import hashlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

for module in ("easy_vqa", "sklearn", "pyarrow.parquet"):
    pytest.importorskip(module, reason="needs the miniature's environment")

import pyarrow.parquet  # noqa: E402
from PIL import Image  # noqa: E402

from scripts.miniature import tiny_data  # noqa: E402

TASKS = ("easyvqa", "digits")
PROBED = ("describe", "caption", "maps")


def run(out, hash_seed="0"):
    return subprocess.run(
        [sys.executable, "-m", "scripts.miniature.tiny_data", out],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "data"
    done = run(out)
    assert done.returncode == 0, done.stderr
    return out


def load(data, name):
    return json.loads((data / f"{name}.json").read_text())


def rows(data, task):
    return pyarrow.parquet.read_table(data / "eval" / f"{task}.parquet").to_pylist()


def images(conversation_rows):
    return [row["image"] for row in conversation_rows if "image" in row]


def pairs(row):
    """(question without image tag and suffix, answer) of each turn."""
    values = [turn["value"] for turn in row["conversations"]]
    return [
        (q.replace("<image>", "").replace(tiny_data.SHORT, "").strip(), a)
        for q, a in zip(values[::2], values[1::2], strict=True)
    ]


def pixels(png):
    return hashlib.sha256(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).tobytes()).hexdigest()


def check_answer(question, answer, note):
    """Whether `answer` is right for a digit scene, from the annotation alone and by other code than the generator's."""
    seen = [d for d in note["digits"] if d is not None]
    if question.startswith("what digit is in the "):
        place = question.rstrip("?").split()[-1]
        return answer == str(note["digits"][2 * place.startswith("south") + place.endswith("east")])
    if question.startswith("how many"):
        return answer == ["one", "two", "three", "four"][len(seen) - 1]
    if question.startswith("what is the largest"):
        return answer == str(sorted(seen)[-1])
    if question.startswith("what are the digits"):
        return [int(d) for d in answer.split()] == seen
    if question.startswith("is there a"):
        return answer == ("yes" if int(question.split()[3]) in seen else "no")
    return None


def test_same_bytes_whatever_the_hash_seed(data, tmp_path):
    assert run(tmp_path / "again", "1").returncode == 0
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (data / "manifest.json").read_bytes()
    assert tiny_data.files(data) == load(data, "manifest")["files"]


def test_whole_output_is_kept_and_a_damaged_one_refused(data, tmp_path):
    assert "nothing to do" in run(data).stdout
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({"script": "other", "files": {}}))
    refused = run(tmp_path / "data")
    assert refused.returncode == 1 and "delete that folder" in refused.stderr and "Traceback" not in refused.stderr


def test_no_held_out_image_is_trained_on(data):
    trained = {pixels(path.read_bytes()) for path in (data / "images").rglob("*.png")}
    held_out = {pixels(row["image"]["bytes"]) for task in (*TASKS, *PROBED) for row in rows(data, task)}
    validation = {pixels(row["image"]["bytes"]) for task in TASKS for row in rows(data, f"../validation/{task}")}
    assert len(trained) > 11_000 and len(held_out) > 500 and len(validation) > 300
    assert not trained & held_out and not trained & validation and not held_out & validation


def test_the_digit_pools_are_disjoint():
    """Each scene repeats its digits' pixels: no digit of a held-out scene may be the same image as a training one."""
    from sklearn.datasets import load_digits

    digits = load_digits().data
    pools = [tiny_data.digit_pool(split) for split in tiny_data.SPLITS]
    assert sum(map(len, pools)) == len(digits) == 1797
    assert len({digits[i].tobytes() for pool in pools for i in pool}) == sum(
        len({digits[i].tobytes() for i in pool}) for pool in pools
    )


def test_digit_answers_follow_from_the_scene(data):
    notes = load(data, "annotations")
    checked = [
        check_answer(q, a, notes[row["image"]])
        for row in load(data, "finetune")
        if row.get("image", "").startswith("digits/")
        for q, a in pairs(row)
        if q not in tiny_data.DESCRIBE
    ]
    assert False not in checked and checked.count(True) > 5000
    for picture in tiny_data.digit_scenes(200, "evaluation", random.Random(7)):
        assert all(check_answer(q, a, picture.note) for q, a, _ in picture.questions)


def test_easyvqa_answers_are_its_own(data):
    import easy_vqa

    trained = [
        (q, a, int(Path(row["image"]).stem))
        for row in load(data, "finetune")
        if row.get("image", "").startswith("easyvqa/")
        for q, a in pairs(row)
        if q not in tiny_data.DESCRIBE
    ]
    evaluated = [
        (row["question"], row["answer"], int(Path(row["image"]["path"]).stem.split("-")[1]))
        for row in rows(data, "easyvqa")
    ]
    for split, asked in (("train", trained), ("test", evaluated)):
        real = set(zip(*getattr(easy_vqa, f"get_{split}_questions")(), strict=True))
        assert asked and set(asked) <= real


def test_easyvqa_annotations_agree_with_the_pixels(data):
    """The colors come from questions and answers alone: one color, one mean pixel value."""
    by_color = {}
    for name, note in list(load(data, "annotations").items())[:1000]:
        if note.get("color"):
            image = np.asarray(Image.open(data / "images" / name).convert("RGB")).reshape(-1, 3)
            values, counts = np.unique(image, axis=0, return_counts=True)
            by_color.setdefault(note["color"], set()).add(tuple(values[np.argsort(counts)[-2]] // 64))
    assert set(by_color) == set(tiny_data.COLORS)
    assert all(len(seen) <= 3 for seen in by_color.values()), by_color


def test_evaluation_rows(data):
    for task, types in (("easyvqa", 3), ("digits", 5)):
        true, blind = rows(data, task), rows(data, f"{task}_blind")
        assert list(true[0]) == ["question_id", "image", "question", "answer", "question_type"]
        assert 300 <= len(true) <= 400 and len({row["question_type"] for row in true}) == types
        assert len({row["question_id"] for row in true}) == len(true)
        drop = [{k: v for k, v in row.items() if k != "image"} for row in true]
        assert drop == [{k: v for k, v in row.items() if k != "image"} for row in blind]
        assert len({row["image"]["bytes"] for row in blind}) == 1


def test_long_answers_say_of_each_fact_where_it_stands(data):
    """60 words and more; facts at every depth; what a fact is and where it stands are independent."""
    described, depths = rows(data, "describe"), {}
    assert len(described) == 2 * tiny_data.SIZES["probe"]
    for row in described:
        assert len(row["answer"].split()) >= 60
        facts = [row["answer"][begin:end] for begin, end in row["facts"]]
        assert len(facts) == {"digits": 4, "easyvqa": 5}[row["question_type"]]
        known = {
            "missing",
            *map(str, range(10)),
            *tiny_data.SHAPES,
            *tiny_data.COLORS,
            "left",
            "right",
            "top",
            "bottom",
        }
        assert set(facts) <= known | {"center", "small", "large"}
        for fact, (begin, _) in zip(facts, row["facts"], strict=True):
            depths.setdefault("missing" if fact == "missing" else "told", []).append(begin / len(row["answer"]))
    told = np.array(depths["told"])
    assert [((told >= low) & (told < low + 0.2)).sum() > 30 for low in (0.2, 0.4, 0.6, 0.8)] == [True] * 4
    assert abs(np.mean(depths["missing"]) - np.mean(told)) < 0.08


def test_masks_show_what_the_question_asks_for(data):
    """By the annotations and the pixels themselves: a shape's mask has its color, a quarter's lies in that quarter."""
    quarters = dict(zip(tiny_data.CELLS, ((0, 0), (0, 32), (32, 0), (32, 32)), strict=True))
    kinds = set()
    for row in rows(data, "maps"):
        image = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
        mask = np.asarray(Image.open(io.BytesIO(row["mask"])).convert("L")) > 0
        kinds.add(row["question_type"])
        assert mask.shape == (64, 64) and 0 < mask.sum() < 2500
        if row["question_type"].startswith("easyvqa"):
            _, counts = np.unique(image[mask], axis=0, return_counts=True)
            assert counts.max() > 0.3 * mask.sum() and image[~mask].min() > 150
        elif row["question_type"].endswith("position"):
            top, left = next(corner for cell, corner in quarters.items() if f"the {cell}?" in row["question"])
            assert mask[top : top + 32, left : left + 32].sum() == mask.sum() and image[mask].min() > 64
    assert kinds == {"easyvqa shape", "easyvqa color", "digits position", "digits largest"}


def test_shape_of_the_training_rows(data):
    pretrain, finetune = load(data, "pretrain"), load(data, "finetune")
    assert len(set(images(pretrain))) == len(pretrain) and set(images(finetune)) <= set(images(pretrain))
    assert all(len(row["conversations"]) == 2 for row in pretrain)
    assert {"image" in row for row in finetune} == {True, False}
    assert {len(row["conversations"]) for row in finetune} >= {2, 4, 6, 8}
    assert any(len(a.split()) >= 20 for row in finetune for _, a in pairs(row))
    for row in pretrain + finetune:
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert ["<image>" in turn["value"] for turn in turns] == ["image" in row] + [False] * (len(turns) - 1)
        assert "image" not in row or (data / "images" / row["image"]).exists()


@pytest.fixture(scope="module")
def tokenizer(data, tmp_path_factory):
    pytest.importorskip("transformers", reason="needs the training environment")
    from scripts.miniature import tiny_models

    out = tmp_path_factory.mktemp("tokenizer")
    texts = [text for text, _ in tiny_models.lessons(data, random.Random(0))]
    tokenizer, _ = tiny_models.llama(tiny_models.lines(texts), out)
    tokenizer.model_max_length = 512
    return tokenizer


def test_stock_dataset_trains_on_exactly_the_answers(data, tokenizer, llava, capsys):
    """Stock LazySupervisedDataset reads both files, and its v1 masks leave every answer and its </s> (no
    "tokenization mismatch", which would silently drop the row)."""
    from llava.train import train
    from transformers import CLIPImageProcessor

    args = train.DataArguments(image_folder=str(data / "images"), is_multimodal=True)
    args.mm_use_im_start_end = False
    args.image_processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    before = train.conversation_lib.default_conversation
    try:
        for name, version in (("pretrain", "plain"), ("finetune", "vicuna_v1")):
            train.conversation_lib.default_conversation = train.conversation_lib.conv_templates[version]
            dataset = train.LazySupervisedDataset(str(data / f"{name}.json"), tokenizer, args)
            for i in range(300):
                sample, row = dataset[i], dataset.list_data_dict[i]
                kept = tokenizer.decode(sample["labels"][sample["labels"] >= 0])
                end = "\n" if version == "plain" else "</s>"
                assert kept.replace(" ", "") == "".join(a + end for _, a in pairs(row)).replace(" ", "")
                assert sample["image"].shape == (3, 64, 64)
    finally:
        train.conversation_lib.default_conversation = before
    assert "mismatch" not in capsys.readouterr().out


def test_the_language_model_meets_rows_in_stocks_tokens_and_targets(data, tokenizer, llava):
    """A lesson of tiny_models.py, and what stock preprocess makes of the same row."""
    from llava import conversation
    from llava.train import train

    from scripts.miniature import tiny_models

    taught = [text for text, _ in tiny_models.lessons(data, random.Random(0))]
    before, compared = train.conversation_lib.default_conversation, 0
    train.conversation_lib.default_conversation = conversation.conv_templates["vicuna_v1"]
    try:
        for text in (text for text in taught if text.startswith(f"{tiny_models.SYSTEM} USER: <image>")):
            rounds = [part.split(" ASSISTANT: ") for part in text.split("USER: ", 1)[1].split("</s>USER: ")]
            turns = [
                {"from": who, "value": value.removesuffix("</s>")}
                for pair in rounds
                for who, value in zip(("human", "gpt"), pair, strict=True)
            ]
            stock = train.preprocess([turns], tokenizer, has_image=True)
            ids, targets = tiny_models.encoded(tokenizer, text, 1)
            assert ids.tolist() == stock["input_ids"][0].tolist() and targets.tolist() == stock["labels"][0].tolist()
            compared += 1
            if compared == 200:
                break
    finally:
        train.conversation_lib.default_conversation = before
    assert compared == 200


def test_the_words_of_an_image_token_say_what_is_there(data):
    """By the pixels: a place with a shape's or a digit's pixels is told with it, an empty one without."""
    for picture in tiny_data.easyvqa_split("validation")[:50] + tiny_data.digit_scenes(
        50, "validation", random.Random(1)
    ):
        mask = np.any([*picture.masks.values()], axis=0)
        side = tiny_data.SIDE // tiny_data.GRID
        for place, words in enumerate(tiny_data.grid(picture.note)):
            row, column = divmod(place, tiny_data.GRID)
            inside = mask[side * row : side * (row + 1), side * column : side * (column + 1)].mean()
            if "digits" in picture.note:
                quarter = 2 * (row >= 2) + (column >= 2)
                digit = picture.note["digits"][quarter]
                assert words == ["missing" if digit is None else str(digit), tiny_data.CELLS[quarter]]
                assert inside == 0 or digit is not None
            else:
                assert (inside > 0.1) == (picture.note["size"] in words)
                assert words[-2:] == [tiny_data.DOWN[[0, 1, 1, 2][row]], tiny_data.ACROSS[[0, 1, 1, 2][column]]]


def test_the_probe_finds_the_facts_in_the_tokens(data, tokenizer):
    """Long answers have 60 tokens and more, and the tokens that the probe takes for a fact spell that word."""
    import torch

    from scripts.reporting.probe import Probe

    probe = SimpleNamespace(tokenizer=tokenizer)
    for row in rows(data, "describe"):
        ids = torch.tensor(tokenizer(f"ASSISTANT: {row['answer']}").input_ids)
        answer_t = ids[len(tokenizer("ASSISTANT:").input_ids) :]
        assert len(answer_t) >= 60
        found = [tokenizer.decode(answer_t[first:end]).strip() for first, end in Probe.facts(probe, row, answer_t)]
        assert found == [row["answer"][begin:end] for begin, end in row["facts"]]
    wrong = rows(data, "describe")[0] | {"answer": "something else", "question_id": "describe-000"}
    with pytest.raises(SystemExit, match="the tokens of describe-000's answer spell"):
        Probe.facts(probe, wrong, answer_t)
