#!/usr/bin/env bash
# What every change must pass.
set -euo pipefail
cd "$(dirname "$0")/.."

# The report's tests open it in a browser. Everything else that they need, the project installs by itself.
if ! command -v chromium >/dev/null && [[ $(id -u) == 0 ]]; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null
fi
make lint
make test
