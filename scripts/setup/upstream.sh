#!/usr/bin/env bash
# A stock upstream at the commit of patches/upstreams.toml, in upstream/NAME; scripts/setup/upstream.py says from where.
#
#   scripts/setup/upstream.sh [llava|tinyllava]
set -euo pipefail
# shellcheck source=scripts/setup/kit.sh
. "$(dirname "$0")/kit.sh"
module scripts.setup.upstream "$@"
