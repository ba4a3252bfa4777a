"""RUN/manifest.json: what a run is made of, so that a figure in its report can be traced.

python scripts/manifest.py RUN --seeds N --experiments NAME...
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import config


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git(*args: str) -> str | None:
    """None outside a checkout (a container, a source archive)."""
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


parser = argparse.ArgumentParser()
parser.add_argument("run", type=Path)
parser.add_argument("--seeds", type=int, required=True)
parser.add_argument("--experiments", nargs="+", required=True)
args = parser.parse_args()

packages = ("torch", "transformers", "tokenizers", "accelerate", "deepspeed", "peft", "numpy", "lmms-eval", "datasets")
data = args.run / "data" / "manifest.json"
manifest = {
    "kit": {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))},
    "upstream": Path("upstream/LLaVA.source").read_text().strip(),
    "patches": {path.name: sha256(path) for path in sorted(Path("patches/llava").glob("*.patch"))},
    "environment": {
        "lock": sha256(Path("docker/locks/cpu.txt")),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    },
    "data": sha256(data) if data.is_file() else None,
    "models": {p.parent.name: sha256(p) for p in sorted(args.run.glob("models/*/model.safetensors"))},
    "hardware": {"cpu": cpu(), "cores": os.cpu_count(), "gpus": gpus()},
    "seeds": list(range(args.seeds)),
    "argv": {
        name: {stage: config.flags(config.load(name), stage) for stage in ("pretrain", "finetune")}
        for name in args.experiments
    },
}
partial = args.run / "manifest.json.partial"
partial.write_text(json.dumps(manifest, indent=1))
os.replace(partial, args.run / "manifest.json")
