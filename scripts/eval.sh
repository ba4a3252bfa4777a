#!/usr/bin/env bash
# Evaluates an experiment's checkpoint with lmms-eval 0.3.0's stock model: a process per task, per-sample logs kept.
#
#   scripts/eval.sh EXPERIMENT [SEED]
#
# RUN/seedN/eval/EXPERIMENT/TASK/ holds lmms-eval's results and samples (in a folder that it names after the checkpoint)
# and log.txt. A task whose results are whole and newer than the checkpoint is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

experiment=${1:?usage: scripts/eval.sh EXPERIMENT [SEED]}
# shellcheck source=scripts/experiment.sh
. scripts/experiment.sh
tasks=$(config get tasks)
run=$run/seed${2:-0}
mapfile -t tasks <<<"$tasks"
checkpoint=$run/$experiment-finetune out=$run/eval/$experiment
fail() { echo "eval: $*" >&2 && exit 1; }
[[ -f $checkpoint/done ]] || fail "$checkpoint is not done: train this experiment first"
[[ $checkpoint$out != *[=,]* ]] || fail "lmms-eval takes no '=' and no ',' in a path: $checkpoint $out"
[[ -d upstream/$backbone ]] || fail "upstream/$backbone is missing: run scripts/upstream.sh $backbone"
PATH=$PWD/$environment/bin:$PATH

# lmms-eval exits 0 even when a run fails, so its files decide: every metric is a number, every sample is logged.
whole() { # FOLDER TASK
    python3 - "$1" "$2" "$checkpoint/done" <<'EOF'
import json, math, os, sys
from pathlib import Path
folder, task, done = sys.argv[1:]
files = list(Path(folder).glob("*/[0-9]*_results.json"))
if len(files) != 1 or files[0].stat().st_mtime < os.path.getmtime(done):
    sys.exit(1)
results = json.loads(files[0].read_text())
metrics = [v for k, v in results["results"].get(task, {}).items() if "," in k and "_stderr" not in k]
samples = files[0].with_name(files[0].name.replace("_results.json", f"_samples_{task}.jsonl"))
lines = len(samples.read_text().splitlines()) if samples.exists() else 0
numbers = metrics and all(isinstance(v, (int, float)) and math.isfinite(v) for v in metrics)
sys.exit(not (numbers and lines == results["n-samples"][task]["effective"]))
EOF
}

export PYTHONPATH=upstream/$backbone HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
# Its own cache each time: a converted parquet must not outlive the data that it came from.
HF_DATASETS_CACHE=$(mktemp -d)
export HF_DATASETS_CACHE
trap 'rm -rf "$HF_DATASETS_CACHE"' EXIT

evaluate() { # TASK
    local task=$1 start=$SECONDS partial=$out/.$1.partial
    echo "eval: $checkpoint $task on $device"
    rm -rf "$partial" "${out:?}/$task"
    mkdir -p "$partial"
    # With a batch over 1 the models pad, which changes answers.
    python3 -m lmms_eval --model "$backbone" --model_args "pretrained=$checkpoint$device_map" --device "$device" \
        --include_path scripts/tasks --tasks "$task" --batch_size 1 --log_samples --timezone UTC \
        --output_path "$partial" &>"$partial/log.txt" || true
    # What deepspeed 0.14.5 and safetensors leave of a ZeRO-3 model of one rank on a CPU, for instance.
    ! grep -q "newly initialized" "$partial/log.txt" ||
        fail "$checkpoint lacks weights, and loading made new ones up: $partial/log.txt names them"
    if ! whole "$partial" "$task"; then
        tail -n 25 "$partial/log.txt" >&2
        fail "$task of $checkpoint left no whole results file; the whole log is $partial/log.txt"
    fi
    mv "$partial" "$out/$task"
    echo "eval: $checkpoint $task took $((SECONDS - start)) s"
}

todo=()
for task in "${tasks[@]}"; do
    if whole "$out/$task" "$task"; then
        echo "eval: $checkpoint $task is whole, skipped"
    else
        todo+=("$task")
    fi
done
((${#todo[@]})) || exit 0
device=$(python3 -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')
# Without device_map=auto both models insist on CUDA; with it, tinyllava stays on the CPU.
device_map=,device_map=auto at_once=1
[[ $backbone-$device != tinyllava-cuda ]] || device_map=
if [[ $device == cpu ]]; then
    # A row at a time through a tiny model: one thread is the fastest, and there is a core for each task.
    at_once=$(nproc)
    export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
fi
failed=0
for task in "${todo[@]}"; do
    (($(jobs -rp | wc -l) < at_once)) || wait -n || failed=1
    evaluate "$task" &
done
while (($(jobs -p | wc -l))); do wait -n || failed=1; done
exit $failed
