#!/usr/bin/env bash
# The images, conversations, pre-trained parts and evaluation sets that an experiment's config names.
#
#   scripts/data.sh EXPERIMENT [--offline] [--verify] [--decode]
#
# For the miniature it makes them (scripts/miniature/tiny_data.py, scripts/miniature/tiny_models.py), for the others it
# downloads them (scripts/data/download.py, scripts/data/sources.toml). Then it checks every training row and its picture
# (scripts/data/rows.py). --offline only checks and names what is missing; --verify hashes every file again; --decode
# decodes every picture whole. TINY_DATA and TINY_MODELS are flags for the first two, by which tests make a smaller
# miniature: TINY_DATA="--scenes 100" TINY_MODELS="--vision-steps 20".
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH
export PYTHONUTF8=1 # names of files and lists are UTF-8, whatever the locale says

experiment=${1:?usage: scripts/data.sh EXPERIMENT [--offline] [--verify] [--decode]}
if [[ $experiment == *-tiny* ]]; then
    words=$(python3 -m scripts.config "$experiment" pretrain)
    data=$(python3 -m scripts.config "$experiment" get run)/data
    mapfile -t models < <(paste - - <<<"$words" | awk '/^--(model_name_or_path|vision_tower)\t/ {print $2}' | sort -u)
    read -ra data_flags <<<"${TINY_DATA:-}"
    read -ra model_flags <<<"${TINY_MODELS:-}"
    python3 -m scripts.miniature.tiny_data "$data" "${data_flags[@]}"
    # Abreast, one thread each: sums over more would depend on their number.
    export OMP_NUM_THREADS=1
    trap 'kill $(jobs -p) 2>/dev/null; wait; exit 143' TERM
    for model in "${models[@]}"; do python3 -m scripts.miniature.tiny_models "$data" "$model" "${model_flags[@]}" & done
    failed=0
    for _ in "${models[@]}"; do wait -n || failed=1; done
    ((!failed)) || exit 1
fi
exec python3 -m scripts.data.download "$@"
