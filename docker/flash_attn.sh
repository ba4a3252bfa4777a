#!/usr/bin/env bash
# Installs flash-attn's wheel into an environment and proves that it loads.
#
#   docker/flash_attn.sh ENVIRONMENT URL
#
# Its hash is not known before the first download: this prints it and keeps it in ENVIRONMENT/flash_attn.sha256. Where
# docker/locks/flash_attn.sha256 stands (that file, committed), the wheel must match it.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:?usage: docker/flash_attn.sh ENVIRONMENT URL} url=${2:?usage: docker/flash_attn.sh ENVIRONMENT URL}
# An image keeps its build arguments, and this one as a label.
[[ $url =~ ^https?://[^/@?]+/[^?@]+$ ]] ||
    { echo "flash_attn: the URL must be http or https, without a user, a password or a query, which the image would keep" >&2 && exit 2; }
wheel=$(mktemp -d)/${url##*/}
curl --fail --location --silent --show-error --retry 3 --output "$wheel" "$url"
(cd "$(dirname "$wheel")" && sha256sum "${url##*/}") | tee "$venv/flash_attn.sha256"
if [[ -f docker/locks/flash_attn.sha256 ]]; then
    diff docker/locks/flash_attn.sha256 "$venv/flash_attn.sha256" ||
        { echo "flash_attn: $url is not the wheel that docker/locks/flash_attn.sha256 pins" >&2 && exit 1; }
else
    echo "flash_attn: this wheel is trusted as it came: check the hash above and commit it as docker/locks/flash_attn.sha256" >&2
fi
.uv/bin/uv pip install --quiet --python "$venv/bin/python" --no-deps "$wheel"
rm -r "$(dirname "$wheel")"
"$venv/bin/python" -c 'import flash_attn; print("flash_attn", flash_attn.__version__)'
