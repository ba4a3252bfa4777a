#!/usr/bin/env bash
# The whole reproduction: a stock upstream, patched, trained in two stages as baseline, VISTA and VISTA (cosine),
# evaluated and reported.
#
#   scripts/reproduce.sh [--profile tiny|full] [--backbone llava|tinyllava|both] [--seeds N] [--dry-run]
#   scripts/reproduce.sh --experiment NAME [--seeds N] [--dry-run]       one of scripts/configs/ alone
#
# Every step is a script of its own, is skipped when its output is whole, and continues when it was cut off.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH

profile=tiny backbone=llava experiment='' seeds=1 dry_run=
usage() { sed -n '5,6s/^#   //p' scripts/reproduce.sh >&2 && exit 2; }
while (($#)); do
    case $1 in
        --profile) profile=${2:-} && shift ;;
        --backbone) backbone=${2:-} && shift ;;
        --experiment) experiment=${2:-} && shift ;;
        --seeds) seeds=${2:-} && shift ;;
        --dry-run) dry_run=1 ;;
        *) echo "reproduce: unknown option $1" >&2 && usage ;;
    esac
    shift || true # a flag without its value
done
if [[ $experiment ]]; then
    [[ -f scripts/configs/$experiment.toml ]] ||
        { echo "reproduce: no experiment '$experiment': $(basename -s .toml scripts/configs/*.toml | paste -sd ' ')" >&2 && usage; }
    backbone=${experiment%%-*} profile=full
    [[ $experiment != *-tiny* ]] || profile=tiny
fi
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
[[ ! $experiment ]] || baselines=("$experiment")

tiny() { [[ $profile == tiny ]]; } # the full profile's own environments are the image's
setup=("scripts/setup/doctor.sh $profile ${baselines[*]%%-*}" "scripts/setup/env.sh cpu") lanes=()
for baseline in "${baselines[@]}"; do
    backbone=${baseline%%-*} experiments=${experiment:-$baseline $baseline-vista $baseline-vista-cosine}
    setup+=("scripts/setup/upstream.sh $backbone" "scripts/setup/patch.sh $backbone")
    [[ $baseline != tinyllava-tiny* ]] || setup+=("scripts/setup/env.sh cpu-tinyllava")
    tiny || setup+=("python3 -m scripts.training.cost $baseline") # its variants cost the same
    setup+=("scripts/data.sh $baseline" "python3 -m scripts.reporting.manifest --seeds $seeds $experiments")
    for ((seed = 0; seed < seeds; seed++)); do
        for name in $experiments; do
            lane="scripts/train.sh $name pretrain $seed|scripts/train.sh $name finetune $seed"
            lane+="|scripts/eval.sh $name $seed"
            ! tiny || lane+="|scripts/probe.sh $name $seed"
            lanes+=("$lane")
        done
    done
done

run() { # STEPS, a | between them, one after the other; SIGTERM goes on to the one that runs
    local steps step words
    trap 'kill $! 2>/dev/null; wait $!; exit 143' TERM
    IFS='|' read -ra steps <<<"$1"
    for step in "${steps[@]}"; do
        printf '\n[%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$step"
        read -ra words <<<"$step"
        case "${dry_run:+dry }$step" in
            "dry scripts/setup/doctor.sh"*) "${words[@]}" || true ;; # tells the disk; what it lacks does not stop a dry run
            "dry scripts/train.sh"*) DRY_RUN=1 "${words[@]}" || return ;;
            "dry python3 -m scripts.training.cost"*) "${words[@]}" || return ;;
            "dry "*) ;;
            *) "${words[@]}" & wait $! || exit ;;
        esac
    done
}

if [[ ! $dry_run ]]; then
    mkdir -p results
    exec 9>results/.lock
    flock -n 9 || { echo "reproduce: another run is at work in results/: wait for it, or stop it" >&2 && exit 2; }
fi
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 143' TERM
without=none
for step in "${setup[@]}"; do
    [[ $step != *"$without"* ]] || continue
    run "$step" & wait $! || {
        # TinyLLaVA is on GitHub alone.
        [[ $step == "scripts/setup/upstream.sh tinyllava" ]] && ((${#baselines[@]} > 1)) || exit 1
        without=tinyllava
        echo "reproduce: going on without $without" >&2
    }
done
# On a CPU a training takes one core, whatever their number: then its bits do not depend on it, and lanes run abreast.
at_once=1 failed=0
! tiny || [[ $dry_run ]] || at_once=$(nproc)
for lane in "${lanes[@]}"; do
    [[ $lane != *"$without"* ]] || continue
    (($(jobs -rp | wc -l) < at_once)) || wait -n || failed=1
    ((!failed)) || break
    run "$lane" &
done
while (($(jobs -p | wc -l))); do wait -n || failed=1; done
((!failed)) || { echo "reproduce: a step failed, see above; the same command continues" >&2 && exit 1; }
run "python3 -m scripts.reporting.report results/$profile" & wait $!
