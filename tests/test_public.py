"""A public checkpoint before its evaluation: what can be wrong with it is one line each, which says the mend."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from scripts import config
from scripts.data import catalog, download
from scripts.evaluation import checkpoint
from scripts.evaluation.results import ResultError

NAME = "llava-v1.5-7b-public"
PUBLIC, TOWER = Path("data/models/llava-v1.5-7b"), Path("data/models/clip-vit-large-patch14-336")
SHARD, INDEX = PUBLIC / "model-00002-of-00002.safetensors", PUBLIC / "model.safetensors.index.json"
CONFIG = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"}
CONFIG |= {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}


@pytest.fixture
def public(tmp_path, monkeypatch):
    """The checkpoint and its vision tower, small and whole, as data.sh leaves them, in the working folder."""
    monkeypatch.chdir(tmp_path)
    PUBLIC.mkdir(parents=True)
    TOWER.mkdir()
    files = {f"w{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    for name, file in files.items():
        save_file({name: np.ones(100)}, PUBLIC / file)
    save_file({"c": np.ones(1)}, TOWER / "model.safetensors")
    INDEX.write_text(json.dumps({"weight_map": files}))
    (PUBLIC / "config.json").write_text(json.dumps(CONFIG))
    for path in (PUBLIC / "tokenizer.model", TOWER / "config.json", TOWER / "merges.txt"):
        path.write_text("{}")
    loaded = config.load(NAME)
    for source in catalog.needed(loaded)[0]:
        if not source.tasks:
            download.take(source)
    return loaded


def test_its_vision_tower_is_found_under_the_name_that_its_config_has(public):
    assert checkpoint.parts(NAME, public) == {"openai/clip-vit-large-patch14-336": TOWER.absolute()}


def test_tinyllavas_needs_the_parts_that_its_factory_reads():
    sources = [source for source in catalog.needed(config.load("tinyllava-3b-public"))[0] if not source.tasks]
    assert {source.repo for source in sources} == {
        "tinyllava/TinyLLaVA-Phi-2-SigLIP-3.1B", "microsoft/phi-2", "google/siglip-so400m-patch14-384",
    }  # fmt: skip


def rewrite(path, **settings):
    return lambda: path.write_text(json.dumps(json.loads(path.read_text()) | settings))


DAMAGES = {  # what is wrong: damage, what the error says
    "missing": (
        lambda: shutil.rmtree(PUBLIC),
        f"{PUBLIC}: liuhaotian/llava-v1.5-7b is needed, and it is not there",
    ),
    "a part": (
        lambda: PUBLIC.rename(f"{PUBLIC}.partial"),
        f"liuhaotian/llava-v1.5-7b is needed, and only a part of it is there. Run scripts/data.sh {NAME}.",
    ),
    "no vision tower": (
        lambda: shutil.rmtree(TOWER),
        f"{TOWER}: openai/clip-vit-large-patch14-336 is needed, and it is not there. Run scripts/data.sh {NAME}.",
    ),
    "a file lost": (SHARD.unlink, f"1 of 5 files missing, first {SHARD}: rm -r {PUBLIC} and run again"),
    "cut off": (lambda: os.truncate(SHARD, 500), f"{SHARD}: is cut off or damaged"),
    "a tensor lost": (rewrite(INDEX, weight_map={"v": SHARD.name}), f"{SHARD}: lacks v, which {INDEX.name} lists"),
    "an index that leads out": (
        rewrite(INDEX, weight_map={"v": "../../v.safetensors"}),
        f"{INDEX}: is no index of weights",
    ),
    "half a config": (
        lambda: (PUBLIC / "config.json").write_text("{"),
        f"{PUBLIC}/config.json: is no model's config",
    ),
    "foreign class": (
        rewrite(PUBLIC / "config.json", architectures=["LlavaForConditionalGeneration"]),
        f"{PUBLIC}: holds a model of the class ['LlavaForConditionalGeneration']; the backbone llava evaluates "
        f"LlavaLlamaForCausalLM. Name another checkpoint in scripts/configs/{NAME}.toml.",
    ),
    "foreign vision tower": (
        rewrite(PUBLIC / "config.json", mm_vision_tower="laion/other"),
        f"{PUBLIC}/config.json: names laion/other, which is not here. Add it to the checkpoint's parts in sources",
    ),
}


@pytest.mark.parametrize("damage,message", DAMAGES.values(), ids=DAMAGES)
def test_one_that_is_not_whole_or_not_the_right_one_is_one_line(public, damage, message):
    damage()
    with pytest.raises(ResultError) as error:
        checkpoint.parts(NAME, public)
    assert message in str(error.value) and "\n" not in str(error.value)
