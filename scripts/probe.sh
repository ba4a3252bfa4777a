#!/usr/bin/env bash
# Measures on an experiment's checkpoint what the report's pictures show (scripts/probe.py says what).
#
#   scripts/probe.sh EXPERIMENT [SEED]
set -euo pipefail
cd "$(dirname "$0")/.."

experiment=${1:?usage: scripts/probe.sh EXPERIMENT [SEED]}
# shellcheck source=scripts/experiment.sh
. scripts/experiment.sh
PATH=$PWD/$environment/bin:$PATH
# One thread, as in training.
export PYTHONPATH=.:upstream/$backbone HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
python3 scripts/probe.py "$run/seed${2:-0}/$experiment-finetune" "$run/data/eval"
