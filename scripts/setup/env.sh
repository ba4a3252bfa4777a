#!/usr/bin/env bash
# Makes an environment of docker/locks/, every package checked against its hash.
#
#   scripts/setup/env.sh [ENVIRONMENT]
#
#   cpu               .venv: LLaVA's training and evaluation on a CPU, data, report and tests (Python 3.11)
#   cpu-tinyllava     .venv-cpu-tinyllava: TinyLLaVA's training and evaluation on a CPU (Python 3.10, 5 GB)
#   llava, tinyllava  .venv-llava, .venv-tinyllava: the upstreams' exact pins (Python 3.10, 5 GB each), for the tests
#                     that compare them with the CPU's
#   families-RELEASE  .venv-families-RELEASE: transformers 4.46, 4.51, 4.57 or 5, its trainers and adapters, for
#                     make test-families (Python 3.11)
#   torch             .venv-torch: torch alone, in which the wheel of vista_patch is tried (Python 3.11)
#
# Takes no time when nothing changed; continues where it was cut off.
set -euo pipefail
cd "$(dirname "$0")/../.."

case ${1:-} in -h | --help) sed -n 's/^#   scripts/usage: scripts/p; s/^# //p' scripts/setup/env.sh && exit ;; esac
name=${1:-cpu}
case $name in
    cpu) venv=.venv python=3.11 imports="peft, transformers, deepspeed, lmms_eval, easy_vqa, sklearn" ;;
    cpu-tinyllava) venv=.venv-cpu-tinyllava python=3.10 imports="peft, transformers, deepspeed, lmms_eval, einops_exts" ;;
    llava | tinyllava) venv=.venv-$name python=3.10 imports="peft, transformers, deepspeed, torchvision" ;;
    families-4.46 | families-4.51 | families-4.57 | families-5) venv=.venv-$name python=3.11 imports="peft, transformers, accelerate, pytest" ;;
    torch) venv=.venv-torch python=3.11 imports="torch" ;;
    *) echo "env: no environment '$name': choose cpu, cpu-tinyllava, llava, tinyllava, torch or families-RELEASE" >&2 && exit 2 ;;
esac
lock=docker/locks/$name.txt
want=$(sha256sum "$lock")
if [[ -f $venv/lock.sha256 && $(<"$venv/lock.sha256") == "$want" ]]; then
    echo "env: $venv matches $lock"
    exit 0
fi

if [[ ! -x .uv/bin/uv ]]; then
    echo "env: installing uv into .uv"
    python3 -m venv .uv || { echo "env: python3 -m venv failed: install your system's python3-venv package" >&2; exit 1; }
    .uv/bin/pip install --quiet --require-hashes -r docker/locks/uv.txt
fi
# uv reads none of pip's settings: what pip's files and variables say of indexes and certificates is handed on to it,
# where uv's own variables do not say otherwise.
settings=$(.uv/bin/pip config list)
pip_says() {
    local where value
    for where in :env: install global; do
        value=$(sed -n "s/^$where\.$1='\(.*\)'$/\1/p" <<<"$settings")
        [[ ! $value ]] || break
    done
    xargs <<<"${value//'\n'/ }"
}
hand_on() { # VARIABLE of uv, SETTING of pip
    local value
    value=$(pip_says "$2")
    [[ ! $value || ${!1:-} ]] || export "$1=$value"
}
hand_on UV_DEFAULT_INDEX index-url
hand_on UV_INDEX extra-index-url
# pip looks for a version on every index; so may uv, since each package is checked against its hash.
export UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}
hand_on UV_INSECURE_HOST trusted-host
hand_on SSL_CERT_FILE cert
# torch's CPU build is on the PyTorch index, or in a folder of wheels that pip already knows of.
torch_source=()
if [[ $name == cpu || $name == torch || $name == families-* ]]; then
    links=$(sed -n "s/^.*find-links='\(.*\)'$/\1/p" <<<"$settings" | tr ' ' '\n' | sort -u | paste -sd, -)
    if [[ -n $links ]] && compgen -G "${links%%,*}/torch-*+cpu-*.whl" >/dev/null; then
        export UV_FIND_LINKS=$links
    elif [[ ${UV_INDEX:-} != */whl/cpu* ]]; then # a mirror of that index
        torch_source=(--torch-backend cpu)
    fi
fi
# pyenv's interpreters are out of sight until it is told to show them all.
if command -v pyenv >/dev/null; then
    PYENV_VERSION=$(pyenv versions --bare | paste -sd: -)
    export PYENV_VERSION
fi
# A caller's DS_ACCELERATOR=cpu makes the pinned deepspeed look for Intel's extension of torch, when built and imported.
unset DS_ACCELERATOR
echo "env: installing $(grep -c == "$lock") packages into $venv"
rm -f "$venv/lock.sha256"
[[ -x $venv/bin/python ]] || .uv/bin/uv venv --quiet --python "$python" "$venv"
.uv/bin/uv pip sync --quiet --compile-bytecode --python "$venv/bin/python" --require-hashes "${torch_source[@]}" "$lock"
# vista_patch comes from this folder.
echo "$PWD" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vista_patch.pth"
echo "env: checking imports"
"$venv/bin/python" -c "import $imports" >/dev/null
echo "$want" >"$venv/lock.sha256"
