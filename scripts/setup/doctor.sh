#!/usr/bin/env bash
# Tells what this machine lacks for a profile, before anything is installed or trained.
#
#   scripts/setup/doctor.sh tiny|small|public|full [BACKBONE]...
set -euo pipefail
cd "$(dirname "$0")/../.."

case ${1:-} in -h | --help) sed -n 's/^#   scripts/usage: scripts/p; s/^# //p' scripts/setup/doctor.sh && exit ;; esac
profile=${1:-}
[[ $profile == @(tiny|small|public|full) ]] ||
    { echo "doctor: no profile '$profile': choose tiny, small, public or full; usage: scripts/setup/doctor.sh tiny|small|public|full [BACKBONE]..." >&2 && exit 2; }
shift
problems=0
problem() { echo "doctor: $*" >&2 && problems=1; }

for tool in git python3 g++ sha256sum; do
    command -v "$tool" >/dev/null || problem "$tool is not installed (Debian: apt-get install git python3-venv g++ coreutils)"
done
[[ $(uname -sm) == "Linux x86_64" ]] || problem "this is $(uname -sm); the locked environments are for Linux x86_64"
disk_gb=$(($(df --output=avail -k . | tail -n 1) / 1024 / 1024))
memory_gb=$(($(awk '/MemAvailable/ {print $2}' /proc/meminfo) / 1024 / 1024))
if [[ $profile == tiny ]]; then
    need_disk=4 need_memory=6
else
    need_disk=600 need_memory=128 # data 200 GB, and a 7B stage's checkpoints (scripts/training/cost.py)
    [[ $profile != small ]] || need_disk=120 need_memory=16 # tests/test_subset.py adds up the disk
    # The data sets, once more as datasets converts them, and 14 GB of weights: assumed, the hub tells the sizes.
    [[ $profile != public ]] || need_disk=200 need_memory=32
    if driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null); then
        ((${driver%%.*} >= 525)) || problem "the NVIDIA driver is ${driver%%$'\n'*}: CUDA 12.1 needs 525 or newer"
        shm_gb=$(($(df --output=size -k /dev/shm | tail -n 1) / 1024 / 1024))
        ((shm_gb >= 8)) || problem "/dev/shm has $shm_gb GB, NCCL and the data loaders need 8 GB: docker run --shm-size 16g"
    else
        problem "profile $profile needs a GPU (tiny runs on a CPU): nvidia-smi finds none"
    fi
    # The port of trainings on several machines; one machine takes any free one.
    ! (: </dev/tcp/127.0.0.1/"${MASTER_PORT:-29500}") 2>/dev/null ||
        problem "port ${MASTER_PORT:-29500} is taken here: set MASTER_PORT for trainings on several machines"
    for file in HF_TOKEN_PATH OPENAI_API_KEY_FILE; do
        [[ ! ${!file:-} || -s ${!file} ]] || problem "$file=${!file}: no such file, or an empty one"
    done
    [[ $profile == small ]] || java -version &>/dev/null ||
        problem "RefCOCO's captions are tokenized by a Java program, and there is no java (Debian: apt-get install default-jre-headless)"
    [[ $profile == small || ${MMBENCH_JUDGE:-} ]] ||
        problem "MMBENCH_JUDGE is not set: who judges MMBench's answers that name no option? (scripts/eval.sh says the choices)"
    for backbone in "${@:-llava}"; do
        # An import proves that the wheel fits torch's ABI.
        ".venv-$backbone/bin/python" -c 'import flash_attn, lmms_eval' 2>/dev/null ||
            problem "profile $profile needs .venv-$backbone with a flash-attn that loads: run in the image, or scripts/setup/env.sh $backbone and docker/flash_attn.sh .venv-$backbone URL (docker/Dockerfile has the URL)"
    done
fi
((disk_gb >= need_disk)) || problem "$disk_gb GB of disk are free here, profile $profile needs $need_disk GB"
((memory_gb >= need_memory)) || problem "$memory_gb GB of memory are available, profile $profile needs $need_memory GB"
[[ $profile == tiny ]] ||
    echo "doctor: $(find data/.sums -type f 2>/dev/null | wc -l) of $(grep -c '^\[' scripts/data/sources.toml) sources of data and weights are in data/; scripts/data.sh EXPERIMENT --offline checks them"
echo "doctor: $(nproc) cores, $memory_gb GB of memory, $disk_gb GB of disk; profile $profile takes up to $need_disk GB of disk"
((problems)) && exit 2
echo "doctor: nothing is missing"
