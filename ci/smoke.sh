#!/usr/bin/env bash
# The smoke test that runs inside the image: stock LLaVA really trains (off is bitwise stock, the term falls, both stages
# with two ranks under ZeRO-2 and ZeRO-3, a killed stage continues, unpatched stock loads the result).
# Results: results/smoke.xml (JUnit).
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python -m pytest -p no:cacheprovider tests/test_loss.py tests/test_model.py tests/test_training.py tests/test_cluster.py \
    --junitxml results/smoke.xml "$@"
