#!/usr/bin/env bash
# Writes an environment's software bill of materials, ENVIRONMENT/sbom.json (CycloneDX, by cyclonedx-py).
#
#   docker/sbom.sh ENVIRONMENT
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:?usage: docker/sbom.sh ENVIRONMENT}
tool=$(mktemp -d)
trap 'rm -r "$tool"' EXIT
.uv/bin/uv venv --quiet --python 3.10 "$tool/venv"
.uv/bin/uv pip sync --quiet --python "$tool/venv/bin/python" --require-hashes docker/locks/sbom.txt
"$tool/venv/bin/cyclonedx-py" environment --output-reproducible --output-file "$venv/sbom.json" "$venv/bin/python"
