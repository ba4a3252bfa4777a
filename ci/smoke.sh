#!/usr/bin/env bash
# The smoke test of an image, run inside it. It takes the miniature's baseline and VISTA (l2) from data to evaluation and
# checks what came out (ci/smoke_checks.py). Then it runs the tests of the loss, the model and stock training on a CPU.
#
#   ci/smoke.sh [BACKBONE]...      default: each that is in upstream/
#
# On a GPU the configs are *-tiny-gpu: bf16, flash-attn, gradient checkpointing, ZeRO-2 and then ZeRO-3, on the exact pins.
# If interrupted, run it again: it continues. Results: results/smoke.xml (JUnit) and results/smoke.md (a page).
set -euo pipefail
cd "$(dirname "$0")/.."

backbones=("$@") gpu='' at_once=$(nproc)
((${#backbones[@]})) || mapfile -t backbones < <(find upstream -mindepth 1 -maxdepth 1 -type d -printf '%f\n' | sort)
! nvidia-smi &>/dev/null || gpu=-gpu at_once=1
experiments=()
for backbone in "${backbones[@]}"; do
    scripts/data.sh "$backbone-tiny"
    experiments+=("$backbone-tiny$gpu" "$backbone-tiny$gpu-vista")
done
lane() { # EXPERIMENT
    scripts/train.sh "$1" pretrain && scripts/train.sh "$1" finetune && scripts/eval.sh "$1" && scripts/probe.sh "$1"
}
export -f lane
printf '%s\n' "${experiments[@]}" | xargs -P "$at_once" -I NAME bash -c 'lane NAME'
tests=(tests/test_loss.py tests/test_model.py tests/test_training.py tests/test_cluster.py)
SMOKE="${backbones[*]/%/-tiny$gpu}" .venv/bin/python -m pytest -p no:cacheprovider ci/smoke_checks.py "${tests[@]}" \
    --junitxml results/smoke.xml
