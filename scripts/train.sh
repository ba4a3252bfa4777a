#!/usr/bin/env bash
# One training stage of a named experiment; scripts/training/launch.py says what it does, and so does --help.
#
#   scripts/train.sh EXPERIMENT pretrain|finetune [SEED [replay]]
set -euo pipefail
# shellcheck source=scripts/setup/kit.sh
. "$(dirname "$0")/setup/kit.sh"
module scripts.training.launch "$@"
