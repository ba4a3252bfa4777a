#!/usr/bin/env bash
# Makes .venv: the CPU environment of docker/locks/cpu.txt, every package checked against its hash, and this package.
# Runs again in a second when nothing changed; continues where it was cut off.
set -euo pipefail
cd "$(dirname "$0")/.."

lock=docker/locks/cpu.txt
stamp=.venv/lock.sha256
want=$(sha256sum "$lock" pyproject.toml)
if [[ -f $stamp && $(<"$stamp") == "$want" ]]; then
    echo "env: .venv matches $lock"
    exit 0
fi

if [[ ! -x .uv/bin/uv ]]; then
    echo "env: installing uv into .uv"
    python3 -m venv .uv || { echo "env: python3 -m venv failed: install your system's python3-venv package" >&2; exit 1; }
    .uv/bin/pip install --quiet uv==0.13.9
fi
# torch's CPU build is on the PyTorch index, or in a folder of wheels that pip already knows of.
links=$(.uv/bin/pip config list | sed -n "s/^.*find-links='\(.*\)'$/\1/p" | tr ' ' '\n' | sort -u | paste -sd, -)
torch_source=(--torch-backend cpu)
if [[ -n $links ]] && compgen -G "${links%%,*}/torch-*+cpu-*.whl" >/dev/null; then
    export UV_FIND_LINKS=$links
    torch_source=()
fi
echo "env: installing $(grep -c == "$lock") packages into .venv (about 1.5 GB; ${torch_source[*]:-torch from $links})"
rm -f "$stamp"
[[ -x .venv/bin/python ]] || .uv/bin/uv venv --quiet --python 3.11 .venv
.uv/bin/uv pip sync --quiet --python .venv/bin/python --require-hashes "${torch_source[@]}" "$lock"
.uv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
echo "env: checking imports"
.venv/bin/python -c "import torch, deepspeed, peft, transformers, lmms_eval, easy_vqa, sklearn, vista_patch"
echo "$want" >"$stamp"
