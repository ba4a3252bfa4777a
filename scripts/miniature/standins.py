"""Small stand-ins for the data sets of scripts/evaluation/suite.toml, so that every stock
task of lmms-eval runs without the hub.

    python -m scripts.miniature.standins FOLDER          then: EVAL_DATA=FOLDER scripts/eval.sh EXPERIMENT

Each, FOLDER/OWNER/NAME, has its data set's own configs, splits and columns, as far as lmms-eval 0.3.0 reads them, and
8 to 16 rows: held-out pictures of easy-vqa, asked in that benchmark's way. Scores on them say nothing about a model.
Two runs write the same bytes. A stand-in replaces an older one, and never a data set that the kit did not make.
"""

import io
import os
import random
import shutil
import sys
from pathlib import Path

import datasets
from PIL import Image

from scripts.miniature.tiny_data import COLORS, SEED, SHAPES, anew, easyvqa_split, made_by_kit

CHINESE = dict(zip(COLORS, ("黑色", "蓝色", "棕色", "灰色", "绿色", "红色", "青色", "黄色"), strict=True))
BRIEF = "Please answer directly with only the letter of the correct option and nothing else."


def pictures(count):
    """[{image, shape, color, question, answer}]: pictures whose shape and color easy-vqa's questions give away."""
    found = [
        {"image": Image.open(io.BytesIO(p.png)), "shape": p.note["shape"], "color": p.note["color"]}
        | {"question": p.questions[0][0], "answer": p.questions[0][1]}
        for p in easyvqa_split("validation") + easyvqa_split("evaluation")
        if p.note["shape"] and p.note["color"]
    ]
    return random.Random(SEED).sample(found, count)


def options(picture, rng):
    """Four colors in random order, and the letter of the right one."""
    colors = [*rng.sample([c for c in COLORS if c != picture["color"]], 3), picture["color"]]
    rng.shuffle(colors)
    return colors, "ABCD"[colors.index(picture["color"])]


def vqav2(pics, _):
    for i, p in enumerate(pics):
        row = {"image": p["image"], "image_id": i, "question": p["question"], "question_id": i, "question_type": "what"}
        row |= {"answer_type": "other", "multiple_choice_answer": p["answer"]}
        people = [{"answer": p["answer"], "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)]
        yield row | {"answers": people}


def vqav2_test(pics, rng):
    for row in vqav2(pics, rng):
        yield row | {"multiple_choice_answer": None, "answers": None}


def ok_vqa(pics, _):
    for i, p in enumerate(pics):
        row = {"image": p["image"], "question": p["question"], "question_id": str(i), "question_type": "eight"}
        yield row | {"answer_type": "other", "answers": [p["answer"]] * 9 + ["shape"]}


def textvqa(pics, _):
    for i, p in enumerate(pics):
        row = {"image": p["image"], "image_id": str(i), "image_width": 64, "image_height": 64, "set_name": "val"}
        row |= {"question": p["question"], "question_id": i, "question_tokens": p["question"].split()}
        row |= {"ocr_tokens": [p["color"]], "image_classes": [p["shape"]]}
        yield row | {"answers": [p["answer"]] * 9 + ["unanswerable"]}


def gqa_instructions(pics, _):
    for i, p in enumerate(pics):
        yield {"id": str(i), "imageId": f"n{i}", "question": p["question"], "answer": p["answer"], "isBalanced": True}


def gqa_images(pics, _):
    for i, p in enumerate(pics):
        yield {"id": f"n{i}", "image": p["image"]}


def realworldqa(pics, rng):
    for i, p in enumerate(pics):
        colors, letter = options(p, rng)
        listed = "\n".join(f"{a}. {c}" for a, c in zip("ABCD", colors, strict=True))
        question = f"What color is the shape?\n\n{listed}\n{BRIEF}"
        if i % 2:  # a part of RealWorldQA asks without options
            question, letter = f"{p['question']} Please answer directly with a single word or number.", p["answer"]
        yield {"image": p["image"], "image_path": f"{i}.png", "question": question, "answer": letter}


def docvqa(pics, _):
    for i, p in enumerate(pics):
        row = {"questionId": str(i), "question": p["question"], "question_types": ["form"], "image": p["image"]}
        row |= {"docId": i, "ucsf_document_id": "", "ucsf_document_page_no": "1", "data_split": "val"}
        yield row | {"answers": [p["answer"], p["answer"].upper()]}


def seedbench(pics, rng):
    for i, p in enumerate(pics):
        colors, letter = options(p, rng)
        video = i >= len(pics) - 2  # its frames are several images
        row = {f"choice_{a}": c for a, c in zip("abcd", colors, strict=True)}
        row |= {"question": "What color is the shape?", "answer": letter, "question_id": str(i), "question_type_id": 1}
        row |= {"data_type": "video" if video else "image", "data_id": str(i), "segment": [0.0, 1.0]}
        yield row | {"image": [p["image"]] * (8 if video else 1)}


def ai2d(pics, rng):
    for p in pics:
        colors, letter = options(p, rng)
        row = {"question": "What color is the shape?", "options": colors, "image": p["image"]}
        yield row | {"answer": str("ABCD".index(letter))}


def mmmu(pics, rng):
    for i, p in enumerate(pics):
        colors, letter = options(p, rng)
        row = {f"image_{k}": None for k in range(2, 8)} | {"image_1": p["image"], "subfield": "", "img_type": "[]"}
        row |= {"question": "<image 1> What color is the shape?", "options": str(colors), "answer": letter}
        row |= {"question_type": "multiple-choice", "explanation": "", "topic_difficulty": "Easy"}
        if i == 0:
            row |= {"question": "What color is the shape in <image 1>, not in <image 2>?", "image_2": pics[1]["image"]}
        if i >= len(pics) - 2:
            row |= {"question_type": "open", "options": "[]", "answer": p["color"]}
        yield row | {"id": f"validation_{('Art', 'Music', 'Math')[i % 3]}_{i}"}


def mmstar(pics, rng):
    kinds = (
        ("coarse perception", "image style & quality"), ("fine-grained perception", "recognition"),
        ("instance reasoning", "single-instance reasoning"), ("logical reasoning", "diagram reasoning"),
        ("science & technology", "biology & chemistry & physics"), ("math", "geometry"),
    )  # fmt: skip
    for i, p in enumerate(pics):
        colors, letter = options(p, rng)
        listed = ", ".join(f"{a}: {c}" for a, c in zip("ABCD", colors, strict=True))
        row = {"index": i, "question": f"What color is the shape?\nOptions: {listed}", "image": p["image"]}
        row |= dict(zip(("category", "l2_category"), kinds[i % len(kinds)], strict=True))
        yield row | {"answer": letter, "meta_info": {"source": "easy-vqa", "split": "test"}}


def mmt(pics, rng):
    for i, p in enumerate(pics):
        colors, letter = options(p, rng)
        row = dict.fromkeys("EFGHI", "") | dict(zip("ABCD", colors, strict=True))
        row |= {"index": i, "question": "What color is the shape?", "answer": letter, "split": "VAL"}
        row |= {"category": "color_recognition", "l2-category": ("visual_recognition", "counting")[i % 2]}
        yield row | {"image": [p["image"]] * (1 + i % 2)}


def ocrbench(pics, _):
    kinds = ("Regular Text Recognition", "Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction")
    for i, p in enumerate(pics):
        row = {"dataset": "HME100k" if i == 0 else "IIIT5K", "question": p["question"], "answer": [p["answer"]]}
        row |= {"question_type": kinds[i % 4], "image": p["image"]}
        yield row | ({"question_type": "Handwritten Mathematical Expression Recognition"} if i == 0 else {})


def mmbench(pics, rng, question="What color is the shape?", names=None):
    for i, p in enumerate(pics[:4]):
        colors, letter = options(p, rng)
        right = colors["ABCD".index(letter)]
        for turn in range(4):  # circular evaluation asks with the options in every rotation
            turned = colors[turn:] + colors[:turn]
            row = {a: names[c] if names else c for a, c in zip("ABCD", turned, strict=True)}
            row |= {"index": i + turn * 1_000_000, "question": question, "answer": "ABCD"[turned.index(right)]}
            row |= {"image": p["image"], "hint": "nan" if i % 2 else "A drawing.", "comment": "nan", "split": "dev"}
            row |= {"category": "attribute_recognition", "L2-category": "finegrained_perception (instance-level)"}
            yield row | {"source": "easy-vqa"}


def mmbench_chinese(pics, rng):
    return mmbench(pics, rng, "图中的形状是什么颜色", CHINESE)


def mme(pics, rng):
    kinds = ("existence", "color", "OCR", "commonsense_reasoning", "code_reasoning")
    for i, p in enumerate(pics[: len(kinds)]):
        for right in (True, False):  # a yes and a no for each picture
            shape = p["shape"] if right else rng.choice([s for s in SHAPES if s != p["shape"]])
            row = {"question_id": f"{kinds[i]}/{i}.png", "image": p["image"], "category": kinds[i]}
            question = f"Is there a {shape} in the image? Please answer yes or no."
            yield row | {"question": question, "answer": "Yes" if right else "No"}


def refcoco(pics, _):
    for i, p in enumerate(pics):
        row = {"question_id": str(i), "image": p["image"], "question": "", "bbox": [4.0, 4.0, 56.0, 56.0]}
        row |= {"segmentation": [4.0, 4.0, 60.0, 4.0, 60.0, 60.0], "iscrowd": 0, "file_name": f"COCO_train2014_{i}.jpg"}
        yield row | {"answer": [f"{p['color']} {p['shape']}", f"the {p['shape']}"]}


# data set: {config: (split, rows)}; without rows: a config that no task reads, in the card alone, as after a download
SETS = {
    "lmms-lab/VQAv2": {"default": ("validation", vqav2)},
    "test/lmms-lab/VQAv2": {"default": ("test", vqav2_test)},
    "lmms-lab/OK-VQA": {"default": ("val2014", ok_vqa)},
    "lmms-lab/GQA": {
        "challenge_all_images": ("challenge", None),
        "testdev_balanced_instructions": ("testdev", gqa_instructions),
        "testdev_balanced_images": ("testdev", gqa_images),
    },
    "lmms-lab/textvqa": {"default": ("validation", textvqa)},
    "lmms-lab/RealWorldQA": {"default": ("test", realworldqa)},
    "lmms-lab/DocVQA": {"DocVQA": ("validation", docvqa)},
    "lmms-lab/SEED-Bench": {"default": ("test", seedbench)},
    "lmms-lab/ai2d": {"default": ("test", ai2d)},
    "lmms-lab/MMMU": {"default": ("validation", mmmu)},
    "Lin-Chen/MMStar": {"default": ("val", mmstar)},
    "lmms-lab/MMT-Benchmark": {"default": ("val", mmt)},
    "echo840/OCRBench": {"default": ("test", ocrbench)},
    "lmms-lab/MMBench": {"cc": ("test", None), "en": ("dev", mmbench), "cn": ("dev", mmbench_chinese)},
    "lmms-lab/MME": {"default": ("test", mme)},
    "lmms-lab/RefCOCO": {"default": ("val", refcoco)},
    "lmms-lab/RefCOCOplus": {"default": ("val", refcoco)},
    "lmms-lab/RefCOCOg": {"default": ("val", refcoco)},
}


def write(folder, configs, pics):
    """README.md, which names the configs as the hub's cards do, and a parquet file for each."""
    card = ["---", "configs:"]
    for config, (split, rows) in configs.items():
        where = "data" if config == "default" else config  # as on the hub
        card += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f"    path: {where}/{split}-*"]
        if not rows:
            continue
        (folder / where).mkdir(parents=True)
        table = datasets.Dataset.from_list(list(rows(pics, random.Random(SEED))))
        if "image" in table.features and isinstance(table.features["image"], list):  # several pictures in a row
            table = table.cast_column("image", datasets.Sequence(datasets.Image()))
        table.to_parquet(folder / where / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("\n".join([*card, "---", "A stand-in made by scripts.miniature.standins.", ""]))


def main(out):
    datasets.disable_progress_bar()
    pics = pictures(8)
    for name in SETS:  # before anything is replaced
        made_by_kit(out / name)
        made_by_kit(out / f"{name}.partial")
    for cache in ("sets", "converted"):  # of older ones, by scripts/eval.sh
        shutil.rmtree(out / ".cache" / cache, ignore_errors=True)
    for name, configs in SETS.items():
        final, partial = out / name, out / f"{name}.partial"
        anew(partial)
        write(partial, configs, pics)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    print(f"{out}: stand-ins for {len(SETS)} data sets")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
