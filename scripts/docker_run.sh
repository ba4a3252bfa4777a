#!/usr/bin/env bash
# docker/kit.py run; see there.
set -euo pipefail
root=$(dirname "$0")/..
[[ -x $root/.venv/bin/python ]] || { echo "docker: .venv is missing: run make setup" >&2 && exit 2; }
exec "$root/.venv/bin/python" "$root/docker/kit.py" run "$@"
