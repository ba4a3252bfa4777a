#!/usr/bin/env bash
# docker/kit.py run; see there.
set -euo pipefail
exec "$(dirname "$0")/../.venv/bin/python" "$(dirname "$0")/../docker/kit.py" run "$@"
