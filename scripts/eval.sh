#!/usr/bin/env bash
# Evaluates an experiment's checkpoint with lmms-eval's stock model; scripts/evaluation/launch.py says how, and --help.
#
#   scripts/eval.sh EXPERIMENT [SEED [TASK...]]
set -euo pipefail
# shellcheck source=scripts/setup/kit.sh
. "$(dirname "$0")/setup/kit.sh"
module scripts.evaluation.launch "$@"
