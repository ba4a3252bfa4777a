#!/usr/bin/env bash
# What a container does: the scripts by their names, with their own arguments.
set -euo pipefail
cd /opt/vista

command=${1:-reproduce}
shift || true
case $command in
    reproduce | train | eval | probe | report | smoke)
        [[ -w results ]] ||
            { echo "vista: user $(id -u) may not write to /opt/vista/results: mount a folder of that user's there, or run as its owner (--user)" >&2 && exit 2; }
        ;;
esac
case $command in
    reproduce | train | eval | probe | data | doctor) exec "scripts/$command.sh" "$@" ;;
    cost) exec .venv/bin/python -m scripts.training.cost "$@" ;;
    report) exec .venv/bin/python -m scripts.reporting.report "$@" ;;
    smoke) exec ci/smoke.sh "$@" ;;
    verify) exec .venv/bin/python docker/verify.py ;;
    shell) exec bash "$@" ;;
    *) echo "vista: no command '$command': choose reproduce, train, eval, probe, data, doctor, cost, report, smoke, verify or shell" >&2 && exit 2 ;;
esac
