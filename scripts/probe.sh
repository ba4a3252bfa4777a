#!/usr/bin/env bash
# Measures on an experiment's checkpoint what the report's pictures show (scripts/reporting/probe.py says what); or draws
# the paper's Figures 2 and 3 for any image, prompt and checkpoints of either backbone, on one colour scale. The report
# shows what lies in RUN/maps/.
#
#   scripts/probe.sh EXPERIMENT [SEED]
#   scripts/probe.sh --image IMAGE --prompt TEXT --out PNG CHECKPOINT...
set -euo pipefail
here=$PWD
# shellcheck source=scripts/setup/kit.sh
. "$(dirname "$0")/setup/kit.sh"
usage() { sed -n 's/^#   /usage: /p' scripts/probe.sh; }
fail() { echo "probe: $*" >&2 && exit 2; }
misused() { usage >&2 && exit 2; }
case ${1:-} in
    -h | --help) usage && exit ;;
    '') misused ;;
esac
need_setup probe
# One thread, as in training.
export PYTHONPATH=. HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
unset DS_ACCELERATOR # a caller's "cpu" makes the pinned deepspeed look for Intel's extension of torch

if [[ $1 != --* ]]; then
    experiment=$1 seed=${2:-0}
    [[ $seed =~ ^(0|[1-9][0-9]{0,9})$ ]] || fail "seed '$seed': give a number from 0 on"
    settings=$(python3 -m scripts.config "$experiment" get backbone environment run)
    { read -r backbone && read -r environment && read -r run; } <<<"$settings"
    [[ -x $environment/bin/python3 ]] || fail "$environment is missing: make it with scripts/setup/env.sh"
    PYTHONPATH+=:upstream/$backbone
    exec "$environment/bin/python3" -m scripts.reporting.probe "$run/seed$seed/$experiment-finetune" "$run/data/eval"
fi

image='' prompt='' out=''
while [[ ${1:-} == --* ]]; do
    case $1 in
        --image) image=$(cd "$here" && realpath -m "${2:-}") ;;
        --prompt) prompt=${2:-} ;;
        --out) out=$(cd "$here" && realpath -m "${2:-}") ;;
        *) misused ;;
    esac
    shift 2 || misused
done
[[ $image && $prompt && $out && $# -gt 0 ]] || misused
mapfile -t checkpoints < <(cd "$here" && realpath -m "$@")
[[ -f $image ]] || fail "$image: no such image"
[[ -d $(dirname "$out") ]] || fail "$(dirname "$out"): no such folder for $out"
maps=$(mktemp -d)
trap 'rm -rf "$maps"' EXIT
named=()
for checkpoint in "${checkpoints[@]}"; do
    [[ -f $checkpoint/config.json ]] || fail "$checkpoint holds no config.json: give a checkpoint's folder"
    # Whichever of the backbone's environments is here: for a GPU, or for a CPU.
    backbone=llava environments=(.venv-llava .venv)
    ! grep -Eq '"model_type": *"tinyllava"' "$checkpoint/config.json" ||
        { backbone=tinyllava && environments=(.venv-tinyllava .venv-cpu-tinyllava); }
    python=''
    for environment in "${environments[@]}"; do
        [[ $python || ! -x $environment/bin/python3 ]] || python=$environment/bin/python3
    done
    [[ $python && -d upstream/$backbone ]] || fail "$checkpoint is $backbone's: run scripts/setup/env.sh and upstream.sh for it"
    name=$(basename "$(dirname "$checkpoint")")/$(basename "$checkpoint") map=$maps/${#named[@]}.npz
    [[ ${named[*]} != *"$name="* ]] || fail "two checkpoints are called $name"
    PYTHONPATH=.:upstream/$backbone "$python" -m scripts.reporting.probe "$checkpoint" "$image" "$prompt" "$map"
    named+=("$name=$map")
done
.venv/bin/python -m scripts.reporting.figures "$out" "${named[@]}"
echo "probe: $out"
