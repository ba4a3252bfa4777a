"""Real stock LLaVA, patched, with random tiny weights. scripts/setup/upstream.sh puts it in upstream/llava."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UPSTREAM = ROOT / "upstream" / "llava"
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
    """make_model(vista={...}, **config): a random LLaVA in training mode; equal weights every time."""
    import torch

    def make(vista=None, **overrides):
        torch.manual_seed(0)
        config = llava.LlavaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            mm_vision_tower=str(vision_tower), mm_hidden_size=16, mm_projector_type="linear", use_cache=False,
            mm_vision_select_layer=-2, mm_vision_select_feature="patch", **overrides,
        )  # fmt: skip
        if vista is not None:
            config.vista = vista
        model = llava.LlavaLlamaForCausalLM(config)
        model.get_vision_tower().load_model()
        return model.train()

    return make
