#!/usr/bin/env bash
# One training stage of a named experiment: stock LLaVA's train.py under the deepspeed launcher.
#
#   scripts/train.sh EXPERIMENT pretrain|finetune [SEED]
#
# Stage 1 (pretrain) trains the projector, stage 2 (finetune) the projector and the language model; the vision tower
# stays frozen. A stage that is done is skipped. Stage 2 continues from its last checkpoint; stage 1 starts over, since
# stock saves nothing but the projector there.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PWD/.venv/bin:$PATH

experiment=${1:?usage: scripts/train.sh EXPERIMENT pretrain|finetune [SEED]}
stage=${2:?usage: scripts/train.sh EXPERIMENT pretrain|finetune [SEED]}
seed=${3:-0}
flags=$(python3 scripts/config.py "$experiment" "$stage")
ranks=$(python3 scripts/config.py "$experiment" get ranks)
module=$(python3 scripts/config.py "$experiment" get train_module)
run=$(python3 scripts/config.py "$experiment" get run)/seed$seed
mapfile -t flags <<<"$flags"

projector=$run/$experiment-pretrain/mm_projector.bin
case $stage in
    pretrain)
        out=${projector%/*}
        flags+=(--tune_mm_mlp_adapter True)
        ;;
    finetune)
        out=$run/$experiment
        flags+=(--pretrain_mm_mlp_adapter "$projector")
        ;;
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
[[ $stage == finetune && ! -f ${projector%/*}/done ]] &&
    echo "finetune: ${projector%/*} is not done: run the pretrain stage first" >&2 && exit 2
[[ $stage == pretrain ]] && rm -rf "$out"
mkdir -p "$out"
echo "${command[*]}" >"$out/command"

if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export DS_ACCELERATOR=cpu ACCELERATE_TORCH_DEVICE=cpu LOCAL_SIZE=$ranks
    OMP_NUM_THREADS=$((($(nproc) + ranks - 1) / ranks))
    export OMP_NUM_THREADS
fi
export PYTHONPATH=upstream/LLaVA HF_HUB_OFFLINE=1

"${command[@]}" >>"$out/train.log" 2>&1 &
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
# deepspeed 0.14.5 gives the tensors of a single rank's ZeRO-3 model on a CPU one storage; safetensors drops them then, and
# loading would make new ones up.
if [[ $stage == finetune ]]; then
    python3 - "$out" "$projector" <<'EOF'
import sys
from pathlib import Path
import torch
from safetensors import safe_open
out, saved = Path(sys.argv[1]), set()
for path in out.glob("*.safetensors"):
    saved |= set(safe_open(path, "pt").keys())
for path in out.glob("pytorch_model*.bin"):
    saved |= set(torch.load(path, weights_only=True, mmap=True))
lost = set(torch.load(sys.argv[2], weights_only=True)) - saved
if lost:
    sys.exit(f"finetune: {out} lacks {', '.join(sorted(lost))}: set save_safetensors = false in the experiment's config")
EOF
fi
touch "$out/done"
