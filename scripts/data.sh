#!/usr/bin/env bash
# The data and models that an experiment's config names; scripts/data/launch.py says how, and so does --help.
#
#   scripts/data.sh EXPERIMENT [--tasks TASK...] [--offline] [--verify] [--decode]
set -euo pipefail
# shellcheck source=scripts/setup/kit.sh
. "$(dirname "$0")/setup/kit.sh"
module scripts.data.launch "$@"
