#!/usr/bin/env bash
# Puts VISTA's lines into an upstream (patches/ shows them); does nothing where they are in already.
#
#   scripts/setup/patch.sh [llava|tinyllava]
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PWD/.venv/bin:$PATH
python3 -m vista_patch apply "upstream/${1:-llava}"
