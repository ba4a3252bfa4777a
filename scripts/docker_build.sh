#!/usr/bin/env bash
# docker/kit.py build; see there.
set -euo pipefail
exec "$(dirname "$0")/../.venv/bin/python" "$(dirname "$0")/../docker/kit.py" build "$@"
