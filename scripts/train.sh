#!/usr/bin/env bash
# One training stage of a named experiment: the stock train.py of its upstream under the deepspeed launcher.
#
#   scripts/train.sh EXPERIMENT pretrain|finetune [SEED]
#
# Stage 1 (pretrain) trains the projector, stage 2 (finetune) the projector and the language model; the vision tower
# stays frozen. A stage that is done is skipped. LLaVA's stage 2 continues from its last checkpoint; its stage 1 starts
# over, since stock saves nothing but the projector there, and so do TinyLLaVA's, whose train.py never continues.
set -euo pipefail
cd "$(dirname "$0")/.."

experiment=${1:?usage: scripts/train.sh EXPERIMENT pretrain|finetune [SEED]}
stage=${2:?usage: scripts/train.sh EXPERIMENT pretrain|finetune [SEED]}
seed=${3:-0}
# shellcheck source=scripts/experiment.sh
. scripts/experiment.sh
flags=$(config "$stage")
ranks=$(config get ranks)
module=$(config get train_module)
run=$run/seed$seed
mapfile -t flags <<<"$flags"

out=$run/$experiment-$stage # TinyLLaVA saves what its own loader can read only where "finetune" is in the name
pretrained=$run/$experiment-pretrain
case $backbone-$stage in
    llava-finetune) flags+=(--pretrain_mm_mlp_adapter "$pretrained/mm_projector.bin") ;;
    tinyllava-finetune) flags+=(--pretrained_model_path "$pretrained") ;;
esac
command=(deepspeed --num_gpus "$ranks" scripts/train.py --train_module "$module" "${flags[@]}"
    --output_dir "$out" --seed "$seed")

if [[ ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
if [[ -f $out/command && $(<"$out/command") != "${command[*]}" ]]; then
    echo "$stage: $out was begun with other settings: remove it, or undo the change" >&2
    diff <(tr ' ' '\n' <"$out/command") <(printf '%s\n' "${command[@]}") >&2
    exit 2
fi
[[ -f $out/done ]] && echo "$stage: $out is done" && exit 0
[[ $stage == finetune && ! -f $pretrained/done ]] &&
    echo "finetune: $pretrained is not done: run the pretrain stage first" >&2 && exit 2
[[ -d upstream/$backbone ]] ||
    { echo "$stage: upstream/$backbone is missing: run scripts/upstream.sh $backbone" >&2 && exit 2; }
[[ -x $environment/bin/python3 ]] ||
    { echo "$stage: the environment $environment is missing: make it with scripts/env.sh" >&2 && exit 2; }
[[ $backbone-$stage == llava-finetune ]] || rm -rf "$out"
mkdir -p "$out"
echo "${command[*]}" >"$out/command"

PATH=$PWD/$environment/bin:$PATH
if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    # One thread a rank: sums over more would depend on their number.
    export DS_ACCELERATOR=cpu ACCELERATE_TORCH_DEVICE=cpu LOCAL_SIZE=$ranks OMP_NUM_THREADS=1
fi
export PYTHONPATH=upstream/$backbone HF_HUB_OFFLINE=1

# A free port: other trainings may run beside this one.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
deepspeed --master_port "$port" "${command[@]:1}" >>"$out/train.log" 2>&1 &
pid=$!
trap 'kill $pid 2>/dev/null; wait $pid; exit 130' INT TERM
while kill -0 $pid 2>/dev/null; do
    sleep 5
    printf '%s: %s %s\n' "$stage" "$out" "$(tail -c 4000 "$out/train.log" | tr '\r' '\n' | grep -oE '[0-9]+/[0-9]+ \[.*\]' | tail -n 1)"
done
if ! wait $pid; then
    tail -n 40 "$out/train.log" >&2
    echo "$stage: failed; the whole log is $out/train.log; run the same command again to continue" >&2
    exit 1
fi
touch "$out/done"
