#!/usr/bin/env bash
# Tells what this machine lacks for a profile, before anything is installed or trained.
#
#   scripts/doctor.sh tiny|full [BACKBONE]...
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${1:?usage: scripts/doctor.sh tiny|full [BACKBONE]...}
[[ $profile == @(tiny|full) ]] || { echo "doctor: no profile '$profile': choose tiny or full" >&2 && exit 2; }
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
    need_disk=600 need_memory=128 # data 200 GB, and a 7B stage's checkpoints (scripts/cost.py)
    nvidia-smi &>/dev/null || problem "profile full needs a GPU (tiny runs on a CPU)"
    java -version &>/dev/null ||
        problem "RefCOCO's captions are tokenized by a Java program, and there is no java (Debian: apt-get install default-jre-headless)"
    [[ ${MMBENCH_JUDGE:-} ]] ||
        problem "MMBENCH_JUDGE is not set: who judges MMBench's answers that name no option? (scripts/eval.sh says the choices)"
    for backbone in "${@:-llava}"; do
        ".venv-$backbone/bin/python" -c 'import flash_attn, lmms_eval' 2>/dev/null ||
            problem "profile full needs .venv-$backbone with flash-attn: run in the image, or scripts/env.sh $backbone and docker/flash_attn.sh .venv-$backbone URL (docker/Dockerfile has the URL)"
    done
fi
((disk_gb >= need_disk)) || problem "$disk_gb GB of disk are free here, profile $profile needs $need_disk GB"
((memory_gb >= need_memory)) || problem "$memory_gb GB of memory are available, profile $profile needs $need_memory GB"
echo "doctor: $(nproc) cores, $memory_gb GB of memory, $disk_gb GB of disk; profile $profile takes up to $need_disk GB of disk"
((problems)) && exit 2
echo "doctor: nothing is missing"
