#!/usr/bin/env bash
# Makes an environment of docker/locks/, every package checked against its hash.
#
#   scripts/env.sh            .venv: training, evaluation, report and tests on a CPU (Python 3.11), with this package
#   scripts/env.sh llava      .venv-llava: stock LLaVA's exact pins (Python 3.10, 5 GB), for the test that compares them
#
# Takes no time when nothing changed; continues where it was cut off.
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-cpu} in
    cpu) venv=.venv lock=docker/locks/cpu.txt python=3.11 imports="lmms_eval, easy_vqa, sklearn" ;;
    llava) venv=.venv-llava lock=docker/locks/llava.txt python=3.10 imports="torchvision" ;;
    *) echo "env: no environment '$1': choose cpu or llava" >&2 && exit 2 ;;
esac
want=$(sha256sum "$lock")
if [[ -f $venv/lock.sha256 && $(<"$venv/lock.sha256") == "$want" ]]; then
    echo "env: $venv matches $lock"
    exit 0
fi

if [[ ! -x .uv/bin/uv ]]; then
    echo "env: installing uv into .uv"
    python3 -m venv .uv || { echo "env: python3 -m venv failed: install your system's python3-venv package" >&2; exit 1; }
    .uv/bin/pip install --quiet uv==0.13.9
fi
# torch's CPU build is on the PyTorch index, or in a folder of wheels that pip already knows of.
torch_source=()
if [[ $venv == .venv ]]; then
    links=$(.uv/bin/pip config list | sed -n "s/^.*find-links='\(.*\)'$/\1/p" | tr ' ' '\n' | sort -u | paste -sd, -)
    if [[ -n $links ]] && compgen -G "${links%%,*}/torch-*+cpu-*.whl" >/dev/null; then
        export UV_FIND_LINKS=$links
    else
        torch_source=(--torch-backend cpu)
    fi
fi
# pyenv's interpreters are out of sight until it is told to show them all.
if command -v pyenv >/dev/null; then
    PYENV_VERSION=$(pyenv versions --bare | paste -sd: -)
    export PYENV_VERSION
fi
echo "env: installing $(grep -c == "$lock") packages into $venv"
rm -f "$venv/lock.sha256"
[[ -x $venv/bin/python ]] || .uv/bin/uv venv --quiet --python "$python" "$venv"
.uv/bin/uv pip sync --quiet --compile-bytecode --python "$venv/bin/python" --require-hashes "${torch_source[@]}" "$lock"
[[ $venv != .venv ]] || .uv/bin/uv pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation --editable .
echo "env: checking imports"
# A caller's DS_ACCELERATOR=cpu makes the pinned deepspeed look for Intel's extension of torch.
env -u DS_ACCELERATOR "$venv/bin/python" -c "import torch, deepspeed, peft, transformers, vista_patch, $imports" >/dev/null
echo "$want" >"$venv/lock.sha256"
