"""Turns pickled weights (*.bin) into safetensors.

    .venv/bin/python -m scripts.data.weights FOLDER

The stock trainers' torch 2.1 runs whatever code a pickle holds when it loads it; safetensors hold numbers alone. This
reads a pickle with a newer torch, which accepts nothing but tensors (`weights_only`). The .bin files stay; transformers
prefers the safetensors beside them. scripts/data.sh does this to what it downloads, and then deletes the .bin files.
"""

import argparse
import json
import pickle
import sys
from pathlib import Path

from scripts.outside import checked_name, scrub

PICKLED = "*.bin"
INDEX = "pytorch_model.bin.index.json"  # of several pickles
SAFE = "*.safetensors"
WHOLE = ("model.safetensors", "model.safetensors.index.json")  # of several files the index is written last


class WeightsError(ValueError):
    """A file that holds more than tensors, or is none of torch's."""


def pickled(folder: Path) -> list[Path]:
    """The weights in `folder` that are there as pickles alone: those that their index lists, where there is one.
    Others, such as LLaVA's mm_projector.bin, repeat what these hold. Raises WeightsError for a broken index."""
    if any((folder / name).exists() for name in WHOLE):
        return []
    index = folder / INDEX
    if not index.exists():
        return sorted(folder.glob(PICKLED))
    try:
        return sorted({folder / checked_name(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is no index of weights: {scrub(str(error))}") from None


def convert(folder: Path) -> list[Path]:
    """Writes safetensors, and their index if there are several, beside the pickled weights in `folder`; returns those.
    Raises WeightsError, and then leaves nothing new."""
    import torch
    from safetensors.torch import save_file

    found = pickled(folder)
    made: list[tuple[Path, Path]] = []
    where: dict[str, str] = {}
    size = 0
    try:
        for path in found:
            try:
                tensors = torch.load(path, map_location="cpu", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, AttributeError) as error:
                why = scrub(str(error).split("\n")[0])
                raise WeightsError(f"{path} holds more than tensors, or is damaged, and is not loaded: {why}") from None
            if not isinstance(tensors, dict) or not all(
                isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
            ):
                raise WeightsError(f"{path} holds more than tensors by their names")
            if twice := where.keys() & tensors.keys():
                raise WeightsError(f"{path}: {scrub(min(twice))} is in another file already")
            name = path.name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"
            seen: set[int] = set()
            for key, tensor in tensors.items():  # safetensors take no two names of one storage, as tied weights have
                storage = tensor.untyped_storage().data_ptr()
                tensors[key] = (
                    tensor.clone(memory_format=torch.contiguous_format) if storage in seen else tensor.contiguous()
                )
                seen.add(storage)
            where |= dict.fromkeys(tensors, name)
            size += sum(tensor.nbytes for tensor in tensors.values())
            made.append((path.with_name(name + ".partial"), path.with_name(name)))
            save_file(tensors, made[-1][0], metadata={"format": "pt"})
        if len(found) > 1:
            index = folder / "model.safetensors.index.json"
            made.append((index.with_name(index.name + ".partial"), index))
            about = {"metadata": {"total_size": size}, "weight_map": where}
            made[-1][0].write_text(json.dumps(about, indent=2, sort_keys=True), encoding="utf-8")
        for partial, path in made:
            partial.rename(path)
    finally:
        for partial, _ in made:
            partial.unlink(missing_ok=True)
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args(argv).folder
    try:
        if not (found := convert(folder)):
            raise WeightsError(f"{folder} has no {PICKLED}, or has {SAFE} already")
    except (WeightsError, OSError) as error:
        print(f"weights: {error}", file=sys.stderr)
        return 2
    print(f"weights: {folder}: {', '.join(path.name for path in found)} stand beside their safetensors now")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
