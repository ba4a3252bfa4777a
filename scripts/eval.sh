#!/usr/bin/env bash
# Evaluates an experiment's checkpoint with lmms-eval 0.3.0's stock model: a run for each task, over all visible GPUs.
#
#   scripts/eval.sh EXPERIMENT [SEED]
#
# RUN/seedN/eval/EXPERIMENT/TASK/ holds lmms-eval's results and samples (in a folder that it names after the checkpoint)
# and log.txt. A task whose results are whole and newer than the checkpoint is skipped.
#
# The paper's tasks read their data sets from EVAL_DATA (data/eval, if that is not set), offline.
# MMBench wants a choice, for the answers in which its rules find no option: MMBENCH_JUDGE=rules calls them wrong;
# MMBENCH_JUDGE=https://HOST/v1/chat/completions asks MMBENCH_MODEL there, with the key in OPENAI_API_KEY or in the file
# OPENAI_API_KEY_FILE. no_option.json, beside the results, counts them.
set -euo pipefail
cd "$(dirname "$0")/.."

experiment=${1:?usage: scripts/eval.sh EXPERIMENT [SEED]}
# shellcheck source=scripts/experiment.sh
. scripts/experiment.sh
tasks=$(config get tasks)
processes=$(config get ranks)
run=$run/seed${2:-0}
mapfile -t tasks <<<"$tasks"
checkpoint=$run/$experiment-finetune out=$run/eval/$experiment
refuse() { echo "eval: $*" >&2 && exit 2; }
fail() { echo "eval: $*" >&2 && exit 1; }
[[ -f $checkpoint/done ]] || refuse "$checkpoint is not done: train this experiment first"
[[ $checkpoint$out != *[=,]* ]] || refuse "lmms-eval takes no '=' and no ',' in a path: $checkpoint $out"
[[ -d upstream/$backbone ]] || refuse "upstream/$backbone is missing: run scripts/setup/upstream.sh $backbone"
suite() { PATH=$PWD/.venv/bin:$PATH python3 -m scripts.evaluation.suite "$@"; }

mkdir -p "$out"
exec 9>"$out/.lock"
flock -n 9 || { echo "eval: waiting for another evaluation that is at work in $out" && flock 9; }
todo=()
for task in "${tasks[@]}"; do
    if suite whole "$out/$task" "$task" "$checkpoint/done"; then
        echo "eval: $checkpoint $task is whole, skipped"
    else
        todo+=("$task")
    fi
done
((${#todo[@]})) || exit 0

# All that a task needs is checked before the first one starts.
data=$(realpath -m "${EVAL_DATA:-data/eval}")
suite data "$data" "${todo[@]}"
if [[ " ${todo[*]} " == *" refcoco"* ]]; then
    java -version &>/dev/null ||
        refuse "RefCOCO's captions are tokenized by a Java program: install Java (Debian: apt-get install default-jre-headless)"
fi
if [[ " ${todo[*]} " == *" mmbench_"* ]]; then
    [[ ! ${OPENAI_API_KEY_FILE:-} ]] || OPENAI_API_KEY=$(<"$OPENAI_API_KEY_FILE")
    export MMBENCH_JUDGE OPENAI_API_KEY=${OPENAI_API_KEY:-} OPENAI_API_URL=${MMBENCH_JUDGE:-}
    case ${MMBENCH_JUDGE:-} in
        rules) ;;
        http://* | https://*) suite judge ;;
        *) refuse "who judges MMBench's answers that name no option? MMBENCH_JUDGE=rules calls them wrong;" \
            "MMBENCH_JUDGE=https://HOST/v1/chat/completions asks MMBENCH_MODEL there, with OPENAI_API_KEY" ;;
    esac
fi

PATH=$PWD/$environment/bin:$PATH
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
if ((gpus)); then
    device=cuda device_map='' processes=$gpus at_once=1
else
    # A row at a time through a tiny model: one thread is the fastest, and there is a core for each process.
    # Without device_map=auto both models insist on CUDA.
    device=cpu device_map=,device_map=auto at_once=$((($(nproc) + processes - 1) / processes))
    export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
fi
python=(python3)
((processes == 1)) || python+=(-m torch.distributed.run --standalone --nproc_per_node "$processes")

# datasets 2.16.1 finds a data set offline only as a folder OWNER/NAME below the one that lmms-eval runs in: so it runs in
# one that looks like this, with the data sets beside.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ln -s "$PWD"/* "$work"
[[ ! -d $data/.cache/sets ]] || ln -s "$data"/.cache/sets/* "$work"
# pycocoevalcap writes beside its own code, which may be read-only and which other runs share.
[[ " ${todo[*]} " != *" refcoco"* ]] ||
    cp -rs "$(python3 -c 'import importlib.util as u; print(*u.find_spec("pycocoevalcap").submodule_search_locations)')" "$work"
export PYTHONPATH=$work:$PWD/upstream/$backbone HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

evaluate() { # TASK
    local task=$1 start=$SECONDS partial=$out/.$1.partial cache=$data/.cache/converted
    # The miniature's data may be made anew, and a converted parquet must not outlive what it came from.
    [[ ! -f scripts/miniature/tasks/$task.yaml ]] || cache=$work/converted
    echo "eval: $checkpoint $task on $processes x $device"
    rm -rf "$partial" "${out:?}/$task"
    mkdir -p "$partial"
    # With a batch over 1 the models pad, which changes answers.
    (cd "$work" && HF_DATASETS_CACHE=$cache exec "${python[@]}" scripts/evaluation/stock.py --model "$backbone" \
        --model_args "pretrained=$checkpoint$device_map" --device "$device" --include_path scripts/miniature/tasks \
        --tasks "$task" --batch_size 1 --log_samples --timezone UTC --output_path "$partial") &>"$partial/log.txt" &
    local pid=$!
    trap 'kill $pid 2>/dev/null; wait $pid; exit 143' INT TERM
    wait $pid || true
    # What deepspeed 0.14.5 and safetensors leave of a ZeRO-3 model of one rank on a CPU, for instance.
    ! grep -q "newly initialized" "$partial/log.txt" ||
        fail "$checkpoint lacks weights, and loading made new ones up: $partial/log.txt names them"
    # lmms-eval exits 0 even when a run fails.
    if ! suite whole "$partial" "$task" "$checkpoint/done"; then
        tail -n 25 "$partial/log.txt" >&2
        fail "$task of $checkpoint left no whole results file; the whole log is $partial/log.txt"
    fi
    mv "$partial" "$out/$task"
    echo "eval: $checkpoint $task took $((SECONDS - start)) s"
}

trap 'kill $(jobs -p) 2>/dev/null; wait; exit 143' INT TERM
failed=0
for task in "${todo[@]}"; do
    (($(jobs -rp | wc -l) < at_once)) || wait -n || failed=1
    evaluate "$task" &
done
while (($(jobs -p | wc -l))); do wait -n || failed=1; done
exit $failed
