"""scripts/eval.sh over the paper's suite: lmms-eval's stock tasks, unmodified, on the stand-ins of scripts/standins.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer

import psutil
import pytest

from tests.conftest import ROOT

COLUMNS = tomllib.loads((ROOT / "scripts/suite.toml").read_text())["column"]
TASKS = list(dict.fromkeys(column["task"] for column in COLUMNS))
WORDS = ["A", "B", "C", "D", "red", "circle", "yes", "no", "one"]  # all that the random model says


@pytest.fixture(scope="session")
def standins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standins")
    subprocess.run([sys.executable, "scripts/standins.py", folder], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, llava, vision_tower):
    """A random LLaVA as training leaves it, whose answers are a few of WORDS."""
    import sentencepiece
    import torch
    from transformers import LlamaTokenizer

    folder = tmp_path_factory.mktemp("checkpoint") / "llava"
    folder.mkdir()
    text = folder / "text.txt"
    text.write_text("A chat between a curious user and an artificial intelligence assistant. what color is the shape?\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        user_defined_symbols=WORDS, num_threads=1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"), legacy=False, pad_token="<unk>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = llava.LlavaLlamaForCausalLM(
        llava.LlavaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=2048, mm_vision_tower=str(vision_tower), mm_hidden_size=16,
            mm_projector_type="linear", mm_vision_select_layer=-2, mm_use_im_patch_token=False,
        )
    )  # fmt: skip
    words = tokenizer.convert_tokens_to_ids(WORDS)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[words] = torch.randn(len(words), 32)
    # An answer ends with "circle" or a letter: no 1,024 tokens.
    model.generation_config.eos_token_id = [2, *words[:4], words[5]]
    model.save_pretrained(folder)
    (folder / "done").touch()
    return folder


@pytest.fixture
def suite(tmp_path, standins, checkpoint):
    """suite(tasks=..., ranks=1, **environment) runs eval.sh in a folder that looks like the repository; its .out is
    where results go, and .start the same without waiting."""
    root = tmp_path / "kit"
    root.mkdir()
    for entry in (".venv", "upstream", "vista_patch"):
        (root / entry).symlink_to(ROOT / entry)
    shutil.copytree(ROOT / "scripts", root / "scripts")
    run = root / "results/suite/seed0"
    run.mkdir(parents=True)
    (run / "llava-mine-finetune").symlink_to(checkpoint)

    def start(tasks=TASKS, ranks=1, **environment):
        config = f'base = "llava-tiny-suite"\ntasks = {json.dumps(tasks)}\nranks = {ranks}\n'
        (root / "scripts/configs/llava-mine.toml").write_text(config)
        environment = {"HF_HOME": str(standins), "MMBENCH_JUDGE": "rules"} | environment
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MMBENCH", "OPENAI"))}
        return subprocess.Popen(
            [root / "scripts/eval.sh", "llava-mine"], env=inherited | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def evaluate(*args, **environment):
        process = start(*args, **environment)
        out, err = process.communicate()
        return process.returncode, out, err

    evaluate.start, evaluate.out, evaluate.root = start, run / "eval/llava-mine", root
    return evaluate


def results(folder):
    (file,) = folder.glob("*/[0-9]*_results.json")
    (samples,) = folder.glob("*/*_samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(file.read_text())["results"][folder.name], sorted(rows, key=lambda row: row["doc_id"])


def answers(folder):
    return [row["filtered_resps"] for row in results(folder)[1]]


def check_columns(out, tasks):
    """Each column of the paper's tables is a number in its task's results."""
    for column in COLUMNS:
        if column["task"] in tasks:
            value = results(out / column["task"])[0][column["key"]]
            value = value[column["field"]] if "field" in column else value
            assert 0 <= value * column["scale"] <= {"MME perception": 2000, "OCRBench": 1000}.get(column["name"], 800)


@pytest.mark.suite
def test_all_18_tasks_run_and_give_the_papers_19_columns(suite):
    assert len(TASKS) == 18 and len(COLUMNS) == 19
    start = time.time()
    code, out, err = suite()
    print(f"{time.time() - start:.0f} s\n{out}")
    assert code == 0, err
    check_columns(suite.out, TASKS)
    code, out, err = suite()
    assert code == 0 and out.count("is whole, skipped") == 18
