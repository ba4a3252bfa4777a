#!/usr/bin/env bash
# One training stage of a named experiment: the stock train.py of its upstream under the deepspeed launcher.
#
#   scripts/train.sh EXPERIMENT pretrain|finetune [SEED [replay]]
#
# Stage 1 (pretrain) trains the projector, stage 2 (finetune) the projector and the language model; the vision tower
# stays frozen. A stage that is done is skipped; one that was cut off continues from its newest whole checkpoint.
# SIGTERM (or SIGUSR1, Slurm's early warning) stops it after a checkpoint, with exit code 143.
# replay: the rows that a loss which was not finite left in nonfinite.json, as one step on the newest checkpoint.
#
# Another number of GPUs, or less memory: RANKS=4 PER_DEVICE=8 (scripts/config.py). Several machines with one folder:
#   HOSTFILE=FILE                           deepspeed starts them over ssh (scripts/training/cluster/hostfile)
#   NNODES=N NODE_RANK=R MASTER_ADDR=HOST   torchrun, this script on each of them (scripts/training/cluster/train.sbatch)
set -euo pipefail
cd "$(dirname "$0")/.."

usage='usage: scripts/train.sh EXPERIMENT pretrain|finetune [SEED [replay]]'
experiment=${1:?$usage} stage=${2:?$usage} seed=${3:-0} replay=${4:-}
nodes=${NNODES:-1} node=${NODE_RANK:-0} port=${MASTER_PORT:-29500}
fail() { echo "$stage: $*" >&2 && exit 2; }
[[ $seed =~ ^[0-9]+$ ]] || fail "seed '$seed': give a number from 0 on"
if [[ ${HOSTFILE:-} ]]; then
    [[ -f $HOSTFILE ]] || fail "HOSTFILE=$HOSTFILE: no such file" # deepspeed would train on this machine alone
    RANKS=$(sed -nE 's/^[^#]*slots=([0-9]+).*/\1/p' "$HOSTFILE" | paste -sd+)
    export RANKS=$((RANKS))
fi
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
if [[ $replay ]]; then
    rows=$out/nonfinite.json
    [[ $replay == replay && -f $rows ]] || fail "there is no $rows to replay. $usage"
    checkpoint=$(find "$out" -maxdepth 1 -name 'checkpoint-*' -printf '%f\n' | sort -V | tail -n 1)
    step=${checkpoint#checkpoint-} out=$out/replay
    flags+=(--data_path "$rows" --max_steps $((${step:-0} + 1)) --save_strategy no)
fi
program=(scripts/training/stock.py --train_module "$module" "${flags[@]}" --output_dir "$out" --seed "$seed")
if ((nodes > 1)); then
    ((ranks % nodes == 0)) || fail "$ranks ranks do not spread over $nodes nodes: set RANKS"
    launcher=(torchrun --nnodes "$nodes" --node_rank "$node" --nproc_per_node $((ranks / nodes))
        --master_addr "${MASTER_ADDR:?the host of node 0}" --master_port "$port")
elif [[ ${HOSTFILE:-} ]]; then
    launcher=(deepspeed --hostfile "$HOSTFILE" --master_port "$port")
else
    launcher=(deepspeed --num_gpus "$ranks")
fi

if [[ ${DRY_RUN:-} ]]; then
    printf '%q ' "${launcher[@]}" "${program[@]}"
    echo
    exit 0
fi
settings="$ranks ranks: ${program[*]}"
if [[ -s $out/command && ! $replay ]]; then
    # Once it is done, it does not matter how the global batch was spread.
    machine=
    [[ ! -f $out/done ]] ||
        machine='s/^[0-9]+ ranks//; s/--(per_device_train_batch_size|gradient_accumulation_steps|report_to) [^ ]+//g'
    if ! diff <(sed -E "$machine" "$out/command" | tr ' ' '\n') <(sed -E "$machine" <<<"$settings" | tr ' ' '\n') >&2; then
        fail "$out was begun with other settings: remove it, or undo the change"
    fi
fi
[[ -f $out/done ]] && echo "$stage: $out is done" && exit 0
[[ $stage == pretrain || -f $pretrained/done ]] || fail "$pretrained is not done: run the pretrain stage first"
[[ -d upstream/$backbone ]] || fail "upstream/$backbone is missing: run scripts/setup/upstream.sh $backbone"
[[ -x $environment/bin/python3 ]] || fail "the environment $environment is missing: make it with scripts/setup/env.sh"
[[ ! $replay ]] || rm -rf "$out"
mkdir -p "$out"
log=$out/train.log
((node == 0)) || log=$out/train.node$node.log
exec 8>"$out/.lock$node" # training holds it too, so one whose train.sh was killed is not joined by another
flock -n 8 || fail "another run is training in $out: wait for it, or stop it"
if ((node == 0)); then
    echo "$settings" >"$out/command"
    rm -f "$out/stop"
    [[ ! ${checkpoint:-} ]] || ln -s "../$checkpoint" "$out"
fi

PATH=$PWD/$environment/bin:$PATH
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
if ((gpus == 0)); then
    # One thread a rank: sums over more would depend on their number.
    export DS_ACCELERATOR=cpu ACCELERATE_TORCH_DEVICE=cpu LOCAL_SIZE=$((ranks / nodes)) OMP_NUM_THREADS=1
elif [[ ! ${HOSTFILE:-} ]] && ((ranks / nodes > gpus)); then
    fail "$((ranks / nodes)) ranks on $gpus GPUs: set RANKS=$((gpus * nodes))"
fi
export PYTHONPATH=upstream/$backbone HF_HUB_OFFLINE=1

if [[ ${launcher[1]} == --num_gpus ]]; then
    # A free port: other trainings may run beside this one.
    launcher+=(--master_port "$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')")
fi
# SIGUSR1, which Slurm sends to every process, must not end the launcher.
(trap '' USR1 && exec "${launcher[@]}" "${program[@]}") >>"$log" 2>&1 &
pid=$!
trap 'kill $pid 2>/dev/null; wait $pid; exit 130' INT
# A launcher that is sent SIGTERM kills its ranks after 30 s: they see this file at the end of a step instead.
trap 'touch "$out/stop"' TERM USR1
extensions=${TORCH_EXTENSIONS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/torch_extensions}
while kill -0 $pid 2>/dev/null; do
    # torch waits without end for a compiler of deepspeed's extension that was killed; it takes under a minute.
    [[ ! -d $extensions ]] || find "$extensions" -name lock -mmin +5 -delete || true
    timeout --foreground 5 tail -s 0.2 --pid $pid -f /dev/null 8>&- 9>&- || true
    printf '%s: %s %s\n' "$stage" "$out" "$(tail -c 4000 "$log" | tr '\r' '\n' | grep -oE '[0-9]+/[0-9]+ \[.*\]' | tail -n 1)"
done
if wait $pid; then
    if [[ $replay ]]; then
        echo "replay: finite on $checkpoint: $(grep -o "{'loss'.*}" "$log" | tail -n 1)"
    elif ((node == 0)); then
        touch "$out/done"
    fi
elif [[ -e $out/stop ]]; then
    echo "$stage: stopped; the same command continues. The whole log is $log"
    exit 143
else
    tail -n 40 "$log" >&2
    # What torch says of a full disk is "iostream error".
    free=$(df --output=avail -m "$out" | tail -n 1)
    ((free >= 100)) || echo "$stage: $((free)) MB are free where $out lies: make room" >&2
    echo "$stage: failed; the whole log is $log; run the same command again to continue" >&2
    exit 1
fi
