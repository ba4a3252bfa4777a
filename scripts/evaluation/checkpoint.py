"""A public checkpoint, before its evaluation: all of it is there, of the class that the backbone evaluates.

Its config.json names its parts (the vision tower, a tokenizer) as the hub does, OWNER/NAME. `parts` says where these
lie here; the evaluation runs in a folder that has them under these names, as it has the data sets.
"""

import json
from pathlib import Path

from scripts.config import Config
from scripts.data import catalog, download
from scripts.evaluation.results import ODD, ResultError
from scripts.outside import checked_name

CLASSES = {"llava": "LlavaLlamaForCausalLM", "tinyllava": "TinyLlavaForConditionalGeneration"}
PARTS = ("mm_vision_tower", "llm_model_name_or_path", "tokenizer_name_or_path", "vision_model_name_or_path")


def parts(name: str, loaded: Config) -> dict[str, Path]:
    """{OWNER/NAME: folder} of what the checkpoint of this experiment is loaded with. Raises ResultError."""
    folder, bring = Path(loaded["checkpoint"]), f"Run scripts/data.sh {name}."
    try:
        sources = [source for source in catalog.needed(loaded)[0] if not source.tasks]
    except catalog.DataError as error:
        raise ResultError(folder, str(error), bring) from None
    for source in sources:
        if not (source.sums.exists() and source.to.exists()):
            have = "only a part of it is there" if source.partial.exists() else "it is not there"
            raise ResultError(source.to, f"{source.repo} is needed, and {have}", bring)
        if lacks := download.lacking(source, verify=False):
            raise ResultError(source.to, lacks, f"Then run scripts/data.sh {name}.")
    if not folder.is_dir():
        raise ResultError(folder, "is no folder", f"Put the checkpoint there that {name} names.")
    check_weights(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        classes, named = config.get("architectures"), {str(config[key]) for key in PARTS if config.get(key)}
    except ODD as error:
        raise ResultError(folder / "config.json", f"is no model's config ({error})", bring) from None
    backbone = loaded["backbone"]
    if classes != [CLASSES[backbone]]:
        problem = f"holds a model of the class {classes}; the backbone {backbone} evaluates {CLASSES[backbone]}"
        raise ResultError(folder, problem, f"Name another checkpoint in scripts/configs/{name}.toml.")
    there = {source.repo: source.to.absolute() for source in sources}
    if lost := sorted(part for part in named if part not in there and not Path(part).is_dir()):
        problem = f"names {lost[0]}, which is not here"
        raise ResultError(folder / "config.json", problem, "Add it to the checkpoint's parts in sources.toml.")
    return {part: path for part, path in there.items() if part in named}


def check_weights(folder: Path) -> None:
    """Raises ResultError unless the safetensors in a folder are whole, and all that their index lists."""
    from safetensors import SafetensorError, safe_open

    index, one, again = folder / "model.safetensors.index.json", "model.safetensors", "Download it again."
    listed: dict[str, str] = {}
    if index.exists():
        try:
            weights = json.loads(index.read_bytes())["weight_map"]
            listed = {str(key): checked_name(file) for key, file in weights.items()}
        except ODD as error:
            raise ResultError(index, f"is no index of weights ({error})", again) from None
    found = set()
    for file in sorted(set(listed.values())) or [one]:
        if not (folder / file).is_file():
            raise ResultError(folder / file, "is missing", again)
        try:
            with safe_open(folder / file, "np") as tensors:
                found |= {(key, file) for key in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ResultError(folder / file, f"is cut off or damaged ({error})", again) from None
    if lost := sorted(listed.items() - found):
        raise ResultError(folder / lost[0][1], f"lacks {lost[0][0]}, which {index.name} lists", again)
