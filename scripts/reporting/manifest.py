"""RUN/manifest-BACKBONE.json (of a public checkpoint manifest-EXPERIMENT.json): what a run is made of, so that a figure
in its report can be traced.

What could not be found out is null.
"""

import json
import os
import shutil
import subprocess
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from scripts import common, config
from scripts.common import ROOT, Arguments, cpu_name, fail, need_setup, sha256, write_whole

PACKAGES = ["torch", "transformers", "tokenizers", "accelerate", "deepspeed", "peft", "numpy", "lmms-eval", "datasets"]
VERSIONS = f"""
import importlib.metadata, json, platform
print(json.dumps({{"python": platform.python_version(), **{{p: importlib.metadata.version(p) for p in {PACKAGES}}}}}))
"""


def told(*command: str | Path) -> str | None:
    """What a command prints; None where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def kit() -> dict[str, Any]:
    """The commit, and whether files differ from it. Outside a checkout (a source archive), and where git refuses to
    read one that another user owns, neither is known; the image has KIT_COMMIT."""
    status = told("git", "status", "--porcelain")
    commit = os.environ.get("KIT_COMMIT") or told("git", "rev-parse", "HEAD")
    return {"commit": commit, "changed": None if status is None else bool(status)}


def gpus() -> list[str] | None:
    if not shutil.which("nvidia-smi"):
        return []
    listed = told("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return listed.splitlines() if listed is not None else None


def made_of(configs: dict[str, config.Config], seeds: int) -> dict[str, Any]:
    """Ends the program where the upstream or the environment is missing."""
    first = next(iter(configs.values()))
    run, backbone, environment = Path(first["run"]), first["backbone"], first["environment"]
    source, lock = Path(f"upstream/{backbone}.source"), Path(environment, "lock.sha256")
    if not source.is_file():
        fail("manifest", f"{source} is missing: run scripts/setup/upstream.sh {backbone}")
    if not lock.is_file():
        fail("manifest", f"{environment} is missing: make it with scripts/setup/env.sh")
    data = run / "data" / "manifest.json"
    train = first["train"]
    parts = {Path(first["checkpoint"] or train["model_name_or_path"]), Path(train["vision_tower"])}
    versions = told(f"{environment}/bin/python", "-c", VERSIONS)
    if versions is None:
        fail("manifest", f"{environment} is not whole: make it with scripts/setup/env.sh", 1)
    return {
        "kit": kit(),
        "upstream": source.read_text(encoding="utf-8").strip(),
        "patches": {path.name: sha256(path) for path in sorted(Path("patches", backbone).glob("*.patch"))},
        "environment": {"lock": lock.read_text(encoding="utf-8").strip(), **json.loads(versions)},
        "data": sha256(data) if data.is_file() else None,
        "models": {
            f"{p.parent.name}/{p.name}": sha256(p)
            for part in sorted(parts)
            for p in sorted(part.glob("model*.safetensors"))
        },
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "gpus": gpus()},
        "seeds": list(range(seeds)),
        "argv": {
            name: {stage: config.flags(loaded, stage) for stage in config.STAGES}
            for name, loaded in configs.items()
            if not loaded["checkpoint"]
        },
    }


def main(argv: list[str]) -> int:
    os.chdir(ROOT)
    usage = "python -m scripts.reporting.manifest [--seeds N] EXPERIMENT...        of one backbone"
    parser = Arguments(prog="manifest", usage=usage, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("experiments", nargs="+")
    args = parser.parse_args(argv)
    try:
        configs = {name: config.load(name) for name in args.experiments}
        need_setup("manifest")
        manifest = made_of(configs, args.seeds)
    except config.ConfigError as error:
        fail("manifest", str(error))
    first = configs[args.experiments[0]]
    run = Path(first["run"])
    run.mkdir(parents=True, exist_ok=True)
    of = args.experiments[0] if first["checkpoint"] else first["backbone"]
    write_whole(run / f"manifest-{of}.json", json.dumps(manifest, indent=1))
    return 0


if __name__ == "__main__":
    common.run("manifest", main)
