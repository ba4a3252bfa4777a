"""Real stock LLaVA, patched, with random tiny weights. scripts/setup/upstream.sh puts it in upstream/llava."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers import ROOT, UPSTREAM, small_experiment

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def llava():
    if not UPSTREAM.is_dir():
        pytest.fail("upstream/llava is missing: run scripts/setup/upstream.sh (make test does)")
    sys.path.insert(0, str(UPSTREAM))
    import llava.model.language_model.llava_llama as module

    return module


@pytest.fixture(scope="session")
def vision_tower(tmp_path_factory):
    """A folder with a random 4-patch CLIP, in the format that stock LLaVA loads."""
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    shape = {"image_size": 8, "patch_size": 4}
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **shape)
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture
def make_model(llava, vision_tower):
    """make_model(vista={...}, **config): a random LLaVA in training mode; equal weights every time.

    `module`: another one that holds its classes.
    """
    import torch

    def make(vista=None, module=llava, **overrides):
        torch.manual_seed(0)
        config = module.LlavaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            mm_vision_tower=str(vision_tower), mm_hidden_size=16, mm_projector_type="linear", use_cache=False,
            mm_vision_select_layer=-2, mm_vision_select_feature="patch", **overrides,
        )  # fmt: skip
        if vista is not None:
            config.vista = vista
        model = module.LlavaLlamaForCausalLM(config)
        model.get_vision_tower().load_model()
        return model.train()

    return make


WORDS = ("red", "green", "blue", "square", "circle", "star", "left", "right", "above", "one", "two", "three", "what")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory, vision_tower):
    """A folder with data (image rows, text-only rows, several turns), a random Llama and its tokenizer."""
    import sentencepiece
    import torch
    from PIL import Image
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    folder = tmp_path_factory.mktemp("work")
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    rows = []
    for i in range(64):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"images/{i}.png")
        turns = []
        for turn in range(random.integers(1, 3)):
            picture = "<image>\n" if turn == 0 and i % 4 else ""
            turns.append({"from": "human", "value": picture + " ".join(random.choice(WORDS, 5))})
            turns.append({"from": "gpt", "value": " ".join(random.choice(WORDS, random.integers(1, 12)))})
        rows.append({"id": str(i), "conversations": turns} | ({"image": f"{i}.png"} if i % 4 else {}))
    (folder / "finetune.json").write_text(json.dumps(rows))
    captions = [row | {"conversations": row["conversations"][:2]} for row in rows if "image" in row]
    (folder / "pretrain.json").write_text(json.dumps(captions))

    text = [turn["value"] for row in rows for turn in row["conversations"]]
    text += ["A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:"] * 9
    (folder / "text.txt").write_text("\n".join(text))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=420, model_type="bpe",
        byte_fallback=True, num_threads=1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    llama = folder / "llama"
    LlamaTokenizer(str(folder / "tokenizer.model"), legacy=False, pad_token="<unk>").save_pretrained(llama)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **shape)).save_pretrained(llama)
    shutil.copytree(vision_tower, folder / "clip")
    return folder


@pytest.fixture
def kit(workshop, tmp_path):
    """kit(stage, *arguments, **environment): the real train.sh, in a tree of its own, on the experiment "small"."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in (".venv", "upstream"):
        (tmp_path / name).symlink_to(ROOT / name)
    train = {"model_max_length": 96, "save_steps": 4}
    small_experiment(tmp_path, "llava-tiny-vista", workshop, ("llama", "clip"), ("pretrain",), train)

    def start(stage, *arguments, without=(), **environment):
        command = [tmp_path / "scripts/train.sh", "small", stage, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        inherited = {key: value for key, value in os.environ.items() if key not in without}
        return subprocess.Popen(command, env=inherited | environment, **pipes)

    return start
