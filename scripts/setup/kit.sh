#!/usr/bin/env bash
# Sourced by the scripts that a person types: goes to the repository, and names its Python.
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
export PYTHONUTF8=1 PATH=$PWD/.venv/bin:$PATH # UTF-8 whatever the locale says

# A clone that is not set up has no .venv; what plans a run needs no more than a new enough Python.
module() { # MODULE ARGUMENTS...: becomes `python3 -m MODULE`
    python3 -c 'import tomllib' 2>/dev/null ||
        { echo "${1##*.}: this takes Python 3.11, or the kit's own: run make setup" >&2 && exit 2; }
    exec python3 -m "$@"
}

need_setup() { # NAME
    [[ -x .venv/bin/python ]] || { echo "$1: this checkout is not set up yet: run make setup" >&2 && exit 2; }
}
