"""RUN/manifest-BACKBONE.json: what a run is made of, so that a figure in its report can be traced.

python -m scripts.reporting.manifest [--seeds N] EXPERIMENT...        of one backbone
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from scripts import config


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git(*args: str) -> str | None:
    """None outside a checkout (a source archive; the image has KIT_COMMIT instead)."""
    found = subprocess.run(["git", *args], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def gpus() -> list[str]:
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except FileNotFoundError:
        return []


PACKAGES = ["torch", "transformers", "tokenizers", "accelerate", "deepspeed", "peft", "numpy", "lmms-eval", "datasets"]
VERSIONS = f"""
import importlib.metadata, json, platform
print(json.dumps({{"python": platform.python_version(), **{{p: importlib.metadata.version(p) for p in {PACKAGES}}}}}))
"""

parser = argparse.ArgumentParser()
parser.add_argument("--seeds", type=int, default=1)
parser.add_argument("experiments", nargs="+")
args = parser.parse_args()

try:
    configs = {name: config.load(name) for name in args.experiments}
except config.ConfigError as error:
    sys.exit(f"manifest: {error}")
first = configs[args.experiments[0]]
run, backbone, environment = Path(first["run"]), first["backbone"], first["environment"]
source, lock = Path(f"upstream/{backbone}.source"), Path(environment, "lock.sha256")
if not source.is_file():
    sys.exit(f"manifest: {source} is missing: run scripts/setup/upstream.sh {backbone}")
if not lock.is_file():
    sys.exit(f"manifest: {environment} is missing: make it with scripts/setup/env.sh")
data = run / "data" / "manifest.json"
parts = {Path(first["train"][key]) for key in ("model_name_or_path", "vision_tower")}
commit = os.environ.get("KIT_COMMIT") or git("rev-parse", "HEAD")
told = subprocess.run([f"{environment}/bin/python", "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
manifest = {
    "kit": {"commit": commit, "changed": bool(git("status", "--porcelain"))},
    "upstream": source.read_text().strip(),
    "patches": {path.name: sha256(path) for path in sorted(Path("patches", backbone).glob("*.patch"))},
    "environment": {
        "lock": lock.read_text().strip(),
        **json.loads(told),
    },
    "data": sha256(data) if data.is_file() else None,
    "models": {p.parent.name: sha256(p) for part in sorted(parts) for p in sorted(part.glob("model*.safetensors"))},
    "hardware": {"cpu": cpu(), "cores": os.cpu_count(), "gpus": gpus()},
    "seeds": list(range(args.seeds)),
    "argv": {
        name: {stage: config.flags(loaded, stage) for stage in ("pretrain", "finetune")}
        for name, loaded in configs.items()
    },
}
run.mkdir(parents=True, exist_ok=True)
partial = run / f"manifest-{backbone}.json.partial"
partial.write_text(json.dumps(manifest, indent=1))
os.replace(partial, run / f"manifest-{backbone}.json")
