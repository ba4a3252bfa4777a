"""scripts/data/rows.py: rows and pictures that cannot train are named before training."""

import copy
import io
import json
import os
import subprocess
from dataclasses import replace

import pytest
from PIL import Image, ImageFile

from scripts import config
from scripts.data import rows
from scripts.data.catalog import DataError
from tests.helpers import ROOT, picture, row

PLAIN, V1 = ("llava", "plain"), ("llava", "v1")
PRETRAIN, PHI = ("tinyllava", "pretrain"), ("tinyllava", "phi")
ALL = (PLAIN, V1, PRETRAIN, PHI)


def turns(*pairs):
    return {"conversations": [{"from": who, "value": value} for who, value in pairs]}


ONE = ("human", "<image>\nWhat?"), ("gpt", "Red.")
BAD = {  # what is wrong: the row, what is said, the stages of which it is true
    "image null": (row("a.png") | {"image": None}, "image is null, where stock wants the name of one picture", ALL),
    "image empty": (row("a.png") | {"image": ""}, 'image is ""', ALL),
    "image a list of one": (row("a.png") | {"image": ["a.png"]}, 'image is ["a.png"]', ALL),
    "image a number": (row("a.png") | {"image": 3}, "image is 3", ALL),
    "image outside": (row("../a.png"), "leads out of its folder", ALL),
    "image absolute": (row("/etc/passwd"), "leads out of its folder", ALL),
    "image with a line separator": (row("a\u2028.png"), "leads out of its folder", ALL),
    "image that no file system encodes": (row("\ud800.png"), "leads out of its folder", ALL),
    "no object": ([1], "is a list, not an object", ALL),
    "no conversations": ({"id": 1}, "has no conversations", ALL),
    "empty conversations": ({"conversations": []}, "has no conversations", ALL),
    "conversations a text": ({"conversations": "hello"}, "are a str, not a list", ALL),
    "a turn is a text": ({"conversations": ["hello", "you"]}, 'a turn is "hello"', ALL),
    "a value is null": (turns(ONE[0], ("gpt", None)), "a turn is {", ALL),
    "a foreign role": (turns(("user", "<image>"), ("assistant", "Red.")), 'a turn is from "user"', ALL),
    "a system turn": (turns(("system", "Be kind."), *ONE), 'a turn is from "system"', ALL),
    "two questions": (turns(ONE[0], ("human", "And?"), ONE[1]), "do not take turns", ALL),
    "no answer": (turns(ONE[0]), "no answer", (PHI, PRETRAIN)),
    "four turns": (turns(*ONE, ("human", "And?"), ("gpt", "Blue.")), "has 4 turns", (PLAIN, PRETRAIN)),
    "no place for the picture": (row("a.png") | turns(("human", "What?"), ONE[1]), "has no <image>", (PLAIN,)),
    "two places": (row("a.png") | turns(*ONE, *ONE), "has 2 <image> for one picture", (V1, PHI)),
    "a place in the answer": (
        row("a.png") | turns(ONE[0], ("gpt", "<image><image>")), "for one picture", (V1, PHI)
    ),
}  # fmt: skip


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """stage(rows or bytes, template): the stage of a folder that holds a.png."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval, in another test, sets it for good
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(picture())

    def make(content, template=V1, longest=2048):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / "rows.json").write_bytes(content)
        return rows.Stage((tmp_path / "rows.json").relative_to(tmp_path), rows.Path("pictures"), *template, longest)

    return make


@pytest.mark.parametrize("bad, message, templates", BAD.values(), ids=BAD)
def test_a_row_that_cannot_train_is_named(stage, tmp_path, bad, message, templates):
    for template in templates:
        problems = rows.check(stage([row("a.png"), bad, row("a.png", id="last")], template), False)
        assert len(problems) == 2 and "rows.json: row 1" in problems[1] and message in problems[1], (template, problems)
        assert "1 rows cannot be trained (data/rows.problems.txt has them all)" in problems[0]
        assert message in (tmp_path / "data/rows.problems.txt").read_text()


@pytest.mark.parametrize("template", ALL, ids=str)
def test_what_trains_is_taken_and_an_old_list_goes(stage, tmp_path, template):
    rows.check(stage([{}], template), False)
    assert (tmp_path / "data/rows.problems.txt").exists()
    good = [row("a.png"), row("a.png", id="été 图.png"), turns(*ONE)]
    if template in (V1, PHI):
        good += [turns(("gpt", "Hello."), *ONE), turns(*ONE, ("human", "And?"), ("gpt", "Blue.")), row()]
    assert rows.check(stage(good, template), False) == []
    assert not (tmp_path / "data/rows.problems.txt").exists()


def test_ten_are_printed_and_all_are_listed(stage, tmp_path):
    problems = rows.check(stage([{"id": f"x{i}\x1b[2J"} for i in range(40)]), False)
    assert len(problems) == 11 and "40 rows" in problems[0]
    listed = (tmp_path / "data/rows.problems.txt").read_text()
    assert listed.count("\n") == 40 and "\x1b" not in listed and "row 39, id 'x39\\x1b[2J': has no" in listed


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xef\xbb\xbf[]", "begins with a byte order mark"),
        (b"[]", "holds no rows"),
        (b"{}", "is not a list of conversations, but a dict"),
        (b'[{"id": "caf\xe9"}]', "is not a list of conversations: 'utf-8' codec"),
        ('[{"id": "x"}]'.encode("utf-16"), "is not a list of conversations"),
        (b"[" * 100_000, "is not a list of conversations"),
        (b'[{"id": 1}', "is not a list of conversations"),
    ],
)
def test_a_file_that_stock_cannot_read_is_one_error(stage, content, message):
    with pytest.raises(DataError, match=r"rows\.json") as raised:
        rows.check(stage(content), False)
    assert message in str(raised.value)


UNLABELLED = {
    "an empty answer": (turns(ONE[0], ("gpt", "")), "a turn is empty", V1),
    "a question without an answer": (turns(*ONE, ("human", "And?")), "its last question has no answer", V1),
    "the sign of an answer": (turns(ONE[0], ("gpt", "I said: ASSISTANT: yes")), "'ASSISTANT:'", V1),
    "the end of an answer": (turns(ONE[0], ("gpt", "a </s> b")), "'</s>'", V1),
    "phi's end of an answer": (turns(ONE[0], ("gpt", "a <|endoftext|> b")), "'<|endoftext|>'", PHI),
    "a long question": (turns(("human", "word " * 60), ONE[1]), "82 words come before the first answer", V1),
}


@pytest.mark.parametrize("silent, why, template", UNLABELLED.values(), ids=UNLABELLED)
def test_rows_whose_labels_stock_ignores_are_told_and_listed(stage, tmp_path, capsys, silent, why, template):
    assert rows.check(stage([row("a.png"), silent], template, longest=64), False) == []
    assert "note: rows.json: 1 rows have no label" in capsys.readouterr().err
    assert why in (tmp_path / "data/rows.unlabelled.txt").read_text()


def jpeg():
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 50).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


JPEG = jpeg()
PICTURES = {  # bytes, what is wrong, whether only --decode finds it
    "half a JPEG": (JPEG[: len(JPEG) // 2], "image file is truncated", False),
    "a tenth of a PNG": (picture()[:40], "", False),
    "empty": (b"", "cannot identify image file", False),
    "a web page": (b"<html>not found</html>", "cannot identify image file", False),
    "half a GIF": (picture("GIF")[:20], "", False),
    "damaged inside": (picture().replace(b"IDAT", b"IDAT\xff\xff\xff\xff", 1), "", True),
}


@pytest.mark.parametrize("data, message, inside", PICTURES.values(), ids=PICTURES)
def test_a_picture_that_stock_cannot_read_is_named_with_its_row(stage, tmp_path, data, message, inside):
    (tmp_path / "pictures/b.jpg").write_bytes(data)
    made = stage([row("a.png"), row("b.jpg", id="x9")])
    problems = rows.check(made, decode=inside)
    assert len(problems) == 2 and f"pictures/b.jpg (row 1, id 'x9'): {message}" in problems[1], problems
    assert not inside or rows.check(made, decode=False) == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_odd_formats_that_stock_reads_are_taken(stage, tmp_path, kind):
    (tmp_path / "pictures/b.jpg").write_bytes(picture(kind))
    assert rows.check(stage([row("b.jpg")]), True) == []


def test_many_pictures_are_read_by_several_processes(stage, tmp_path):
    for i in range(2100):
        os.link(tmp_path / "pictures/a.png", tmp_path / f"pictures/{i}.png")
    (tmp_path / "pictures/77.png").unlink()
    (tmp_path / "pictures/77.png").write_bytes(b"no picture")
    problems = rows.check(stage([row(f"{i}.png") for i in range(2100)]), False)
    assert len(problems) == 2 and "pictures/77.png (row 77)" in problems[1]


def test_names_and_lists_do_not_hang_on_the_locale(tmp_path):
    """A locale that cannot encode the names; and a name on disk that is no UTF-8."""
    for name in ("scripts", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    folder = tmp_path / "results/tiny/data"
    (folder / "images").mkdir(parents=True)
    for name in ("图.png".encode(), b"caf\xe9.png"):
        (folder / "images" / os.fsdecode(name)).write_bytes(picture())
    asked = [row("图.png"), row("caf\udce9.png"), row("не здесь.png")]
    for stage in ("pretrain", "finetune"):
        (folder / f"{stage}.json").write_text(json.dumps(asked), encoding="utf-8")
    command = [ROOT / ".venv/bin/python", "-m", "scripts.data.download", "llava-tiny"]
    for model in {config.load("llava-tiny")["train"][key] for key in ("model_name_or_path", "vision_tower")}:
        (tmp_path / model).mkdir(parents=True)
    assert '. "$(dirname "$0")/setup/kit.sh"' in (ROOT / "scripts/data.sh").read_text()
    script = (ROOT / "scripts/setup/kit.sh").read_text()
    assert "export PYTHONUTF8=1" in script  # which the line below stands for: data.sh would make the miniature anew
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 2 and b"1 of 3 images are not in" in done.stderr and b"Traceback" not in done.stderr
    assert (tmp_path / "data/pretrain.missing.txt").read_text("utf-8") == "не здесь.png\n"


def test_the_rules_are_stocks(stage, llava, tmp_path):
    """Stock LLaVA's own preprocessing fails at, or ignores the labels of, what is called so here, and at no other."""
    import torch
    from llava import conversation
    from llava.train import train as stock

    class Words:  # a tokenizer in which every character is a token: enough for masking by lengths
        legacy, bos_token_id, pad_token_id, model_max_length = True, 1, 0, 100_000

        def __call__(self, text, return_tensors=None, **_):
            ids = [[1, *map(ord, t.replace("</s>", "\2"))] for t in ([text] if isinstance(text, str) else text)]
            shaped = torch.tensor(ids) if return_tensors else ids[0] if isinstance(text, str) else ids
            return type("Encoding", (), {"input_ids": shaped})

    was = conversation.default_conversation
    data_args = type("", (), {"is_multimodal": True, "mm_use_im_start_end": False})
    try:
        for template in (PLAIN, V1):
            conversation.default_conversation = conversation.conv_templates[template[1]]
            checked = stage([{}], template)
            made = {
                name: case[0]
                for name, case in (BAD | UNLABELLED).items()
                if template in case[2:] or case[2] is ALL or template in case[2]
            }
            good = {"good": row("a.png"), "text": turns(*ONE)}
            for name, case in (made | good).items():
                if (
                    name == "a long question"
                    or "<image> for one" in str(BAD.get(name))
                    or "for one picture" in str(BAD.get(name))
                ):
                    continue  # what the collator cuts, and what the splice takes from the next row
                known = bool(rows.row_fault(case, checked) or rows.unlabelled(case, checked))
                try:
                    image = case.get("image")
                    with Image.open(os.path.join("pictures", image)) if "image" in case else open(os.devnull):
                        sources = stock.preprocess_multimodal(copy.deepcopy([case["conversations"]]), data_args)
                    labels = stock.preprocess(sources, Words(), has_image="image" in case)["labels"][0]
                    trains = bool((labels != -100).any())
                except Exception:
                    trains = False
                assert known == (name not in good), (name, template)
                if name not in ("image outside", "image absolute", "a foreign role", "a system turn", "two questions"):
                    assert trains == (name in good), (name, template)
    finally:
        conversation.default_conversation = was


def test_tinyllavas_grouping_by_modality_needs_rows_with_and_without_a_picture(stage):
    """get_modality_length_grouped_indices of stock unpacks both kinds, and fails where there is none of one."""
    text = row(id=1)
    for content, said in (([row("a.png")] * 2, "every row has a picture"), ([text] * 2, "no row has a picture")):
        made = stage(content, PHI)
        assert rows.check(made, decode=False) == []
        (problem,) = rows.check(replace(made, grouped=True), decode=False)
        assert said in problem and "set it to false in the config" in problem
    assert rows.check(replace(stage([row("a.png"), text], PHI), grouped=True), decode=False) == []


def test_only_tinyllavas_full_second_stage_is_grouped():
    """The small profile's rows all have a picture, and stock LLaVA groups such a list as it is."""
    grouped = {
        (name, one)
        for name in ("llava-v1.5-7b", "tinyllava-3b", "tinyllava-0.5b")
        for one in config.STAGES
        if rows.Stage.of(config.load(name), one).grouped
    }
    assert grouped == {("tinyllava-3b", "finetune")}
