#!/usr/bin/env bash
# Puts VISTA's lines into upstream/LLaVA (patches/llava/*.patch shows them); does nothing where they are in already.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
python3 -m vista_patch apply upstream/LLaVA
