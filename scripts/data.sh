#!/usr/bin/env bash
# The images, conversations and pre-trained parts that an experiment's config names.
#
#   scripts/data.sh EXPERIMENT
#
# For the miniature it makes them (scripts/tiny_data.py, scripts/tiny_models.py), for the others it checks that they are
# there and names what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH

experiment=${1:?usage: scripts/data.sh EXPERIMENT}
words=$(python3 scripts/config.py "$experiment" pretrain && python3 scripts/config.py "$experiment" finetune)
paths() { # FLAG...: what these flags of both stages hold
    paste - - <<<"$words" | awk -v names=" $* " 'index(names, " " $1 " ") {print $2}' | sort -u
}
if [[ $experiment == *-tiny* ]]; then
    data=$(python3 scripts/config.py "$experiment" get run)/data
    mapfile -t models < <(paths --model_name_or_path --vision_tower)
    python3 scripts/tiny_data.py "$data"
    # Abreast, one thread each: sums over more would depend on their number.
    export OMP_NUM_THREADS=1
    for model in "${models[@]}"; do python3 scripts/tiny_models.py "$data" "$model" & done
    failed=0
    for _ in "${models[@]}"; do wait -n || failed=1; done
    ((!failed)) || exit 1
fi
missing=0
for path in $(paths --data_path --image_folder --model_name_or_path --vision_tower); do
    [[ -e $path ]] || { echo "data: $experiment needs $path, which is not there" >&2 && missing=1; }
done
if ((missing)); then
    echo "data: put them there; scripts/configs/ says what they are, README.md where they come from" >&2
    exit 2
fi
