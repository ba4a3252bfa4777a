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
if [[ $experiment == llava-tiny* ]]; then
    run=$(python3 scripts/config.py "$experiment" get run)
    python3 scripts/tiny_data.py "$run/data"
    python3 scripts/tiny_models.py "$run/data" "$run/models"
fi
missing=0
for stage in pretrain finetune; do
    flags=$(python3 scripts/config.py "$experiment" "$stage")
    while read -r flag path; do
        case $flag in
            --data_path | --image_folder | --model_name_or_path | --vision_tower)
                [[ -e $path ]] || { echo "data: $stage needs $path (${flag#--}), which is not there" >&2 && missing=1; }
                ;;
        esac
    done < <(paste - - <<<"$flags")
done
if ((missing)); then
    echo "data: put them there; scripts/configs/ says what they are, README.md where they come from" >&2
    exit 2
fi
