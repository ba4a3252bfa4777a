#!/usr/bin/env bash
# The whole reproduction, from a stock upstream to the report; scripts/reproduce.py holds its plan.
#
#   scripts/reproduce.sh [--profile tiny|small|full] [--backbone llava|tinyllava|both] [--seeds N] [--dry-run]
#   scripts/reproduce.sh --experiment NAME [--seeds N] [--dry-run]       one of scripts/configs/ alone
set -euo pipefail
# shellcheck source=scripts/setup/kit.sh
. "$(dirname "$0")/setup/kit.sh"
# On a system with an older Python the plan itself needs the kit's.
python3 -c 'import tomllib' 2>/dev/null || [[ " $* " =~ " "(--dry-run|--help|-h)" " ]] || scripts/setup/env.sh cpu
module scripts.reproduce "$@"
