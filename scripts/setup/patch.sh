#!/usr/bin/env bash
# Puts VISTA's lines into an upstream (patches/ shows them); does nothing where they are in already.
#
#   scripts/setup/patch.sh [llava|tinyllava]
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PWD/.venv/bin:$PATH
case ${1:-} in -h | --help) sed -n 's/^#   scripts/usage: scripts/p; s/^# //p' scripts/setup/patch.sh && exit ;; esac
python3 -m vista_patch apply "upstream/${1:-llava}"
