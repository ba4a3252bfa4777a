#!/usr/bin/env bash
# The whole reproduction: stock LLaVA, patched, trained in two stages as baseline, VISTA and VISTA (cosine), evaluated
# and reported.
#
#   scripts/reproduce.sh [--profile tiny|v1.5-7b] [--seeds N] [--dry-run]
#
# Every step is a script of its own, is skipped when its output is whole, and continues when it was cut off.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=tiny seeds=1 dry_run=
usage() { sed -n '5s/^# *//p' scripts/reproduce.sh >&2 && exit 2; }
while (($#)); do
    case $1 in
        --profile) profile=${2:-} && shift ;;
        --seeds) seeds=${2:-} && shift ;;
        --dry-run) dry_run=1 ;;
        *) echo "reproduce: unknown option $1" >&2 && usage ;;
    esac
    shift
done
[[ $profile == tiny || $profile == v1.5-7b ]] || { echo "reproduce: --profile '$profile': choose tiny or v1.5-7b" >&2 && usage; }
[[ $seeds =~ ^[1-9][0-9]*$ ]] || { echo "reproduce: --seeds '$seeds': give a number from 1 on" >&2 && usage; }

baseline=llava-$profile
experiments=("$baseline" "$baseline-vista" "$baseline-vista-cosine")
steps=$((6 + 3 * seeds * ${#experiments[@]})) step=0
[[ $profile != tiny ]] || steps=$((steps + 2))
step() {
    step=$((step + 1))
    printf '\n[%d/%d, %d:%02d] %s\n' "$step" "$steps" $((SECONDS / 60)) $((SECONDS % 60)) "$*"
    [[ $dry_run ]] || "$@"
}

export PATH=$PWD/.venv/bin:$PATH
step scripts/doctor.sh "$profile"
[[ ! $dry_run ]] || scripts/doctor.sh "$profile" || true # tells the disk; what it lacks does not stop a dry run
[[ $profile != tiny ]] || step scripts/env.sh # a GPU profile runs in the environment that it is started in
step scripts/upstream.sh
step scripts/patch.sh
step scripts/data.sh "$baseline"
run=$(python3 scripts/config.py "$baseline" get run)
step python3 scripts/manifest.py "$run" --seeds "$seeds" --experiments "${experiments[@]}"
for ((seed = 0; seed < seeds; seed++)); do
    for experiment in "${experiments[@]}"; do
        for stage in pretrain finetune; do
            step scripts/train.sh "$experiment" "$stage" "$seed"
            [[ ! $dry_run ]] || DRY_RUN=1 scripts/train.sh "$experiment" "$stage" "$seed"
        done
        tasks=$(python3 scripts/config.py "$experiment" get tasks)
        mapfile -t tasks <<<"$tasks"
        step scripts/eval.sh "$run/seed$seed/$experiment" "$run/seed$seed/eval/$experiment" "${tasks[@]}"
    done
done
if [[ $profile == tiny ]]; then
    step python3 scripts/probe.py "$run"
    step python3 scripts/report.py "$run"
else
    echo "reproduce: the results of each task lie in $run/seed*/eval (the report reads the miniature's tasks only)"
fi
