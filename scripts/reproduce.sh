#!/usr/bin/env bash
# The whole reproduction: a stock upstream, patched, trained in two stages as baseline, VISTA and VISTA (cosine),
# evaluated and reported.
#
#   scripts/reproduce.sh [--profile tiny|full] [--backbone llava|tinyllava|both] [--seeds N] [--dry-run]
#
# Every step is a script of its own, is skipped when its output is whole, and continues when it was cut off.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH

profile=tiny backbone=llava seeds=1 dry_run=
usage() { sed -n '5s/^# *//p' scripts/reproduce.sh >&2 && exit 2; }
while (($#)); do
    case $1 in
        --profile) profile=${2:-} && shift ;;
        --backbone) backbone=${2:-} && shift ;;
        --seeds) seeds=${2:-} && shift ;;
        --dry-run) dry_run=1 ;;
        *) echo "reproduce: unknown option $1" >&2 && usage ;;
    esac
    shift
done
case $backbone-$profile in
    llava-tiny | tinyllava-tiny) baselines=("$backbone-tiny") ;;
    both-tiny) baselines=(llava-tiny tinyllava-tiny) ;;
    llava-full) baselines=(llava-v1.5-7b) ;;
    tinyllava-full) baselines=(tinyllava-3b) ;;
    both-full) baselines=(llava-v1.5-7b tinyllava-3b) ;;
    *-tiny | *-full) echo "reproduce: --backbone '$backbone': choose llava, tinyllava or both" >&2 && usage ;;
    *) echo "reproduce: --profile '$profile': choose tiny or full" >&2 && usage ;;
esac
[[ $seeds =~ ^[1-9][0-9]*$ ]] || { echo "reproduce: --seeds '$seeds': give a number from 1 on" >&2 && usage; }

tiny() { [[ $profile == tiny ]]; } # the full profile's own environments are the image's
plan=("scripts/doctor.sh $profile ${baselines[*]%%-*}" "scripts/env.sh cpu")
for baseline in "${baselines[@]}"; do
    backbone=${baseline%%-*} experiments="$baseline $baseline-vista $baseline-vista-cosine"
    plan+=("scripts/upstream.sh $backbone" "scripts/patch.sh $backbone")
    [[ $baseline != tinyllava-tiny ]] || plan+=("scripts/env.sh cpu-tinyllava")
    plan+=("scripts/data.sh $baseline" "python3 scripts/manifest.py --seeds $seeds $experiments")
    for ((seed = 0; seed < seeds; seed++)); do
        for experiment in $experiments; do
            plan+=("scripts/train.sh $experiment pretrain $seed" "scripts/train.sh $experiment finetune $seed")
            plan+=("scripts/eval.sh $experiment $seed")
            ! tiny || plan+=("scripts/probe.sh $experiment $seed")
        done
    done
done
! tiny || plan+=("python3 scripts/report.py results/tiny")

without=
for i in "${!plan[@]}"; do
    [[ ! $without || ${plan[i]} != *"$without"* ]] || continue
    printf '\n[%d/%d, %d:%02d] %s\n' $((i + 1)) ${#plan[@]} $((SECONDS / 60)) $((SECONDS % 60)) "${plan[i]}"
    read -ra step <<<"${plan[i]}"
    case "${dry_run:+dry }${plan[i]}" in
        "dry scripts/doctor.sh"*) "${step[@]}" || true ;; # tells the disk; what it lacks does not stop a dry run
        "dry scripts/train.sh"*) DRY_RUN=1 "${step[@]}" ;;
        "dry "*) ;;
        "scripts/upstream.sh tinyllava") # on GitHub alone
            "${step[@]}" || {
                ((${#baselines[@]} > 1)) || exit 1
                without=tinyllava
                echo "reproduce: going on without $without" >&2
            }
            ;;
        *) "${step[@]}" ;;
    esac
done
tiny || echo "reproduce: the results of each task lie in results/full/seed*/eval (the report reads the miniature's tasks only)"
