#!/usr/bin/env bash
# The smoke test that runs inside the image; ci/smoke.py says what it does.
#
#   ci/smoke.sh [BACKBONE]...      default: each that is in upstream/
set -euo pipefail
# shellcheck source=scripts/setup/kit.sh
. "$(dirname "$0")/../scripts/setup/kit.sh"
module ci.smoke "$@"
