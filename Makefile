# The two commands of the README, and what keeps them honest.
.PHONY: reproduce setup test test-pins lint lock

reproduce:                ## set up everything and run the miniature (about 18 minutes on 2 cores)
	scripts/reproduce.sh --profile tiny

setup:
	scripts/doctor.sh tiny
	scripts/env.sh
	scripts/upstream.sh
	scripts/patch.sh

test: setup               ## set up everything and run the tests
	.venv/bin/python -m pytest

test-pins: setup          ## the same training on LLaVA's exact pins (installs 5 GB more)
	.venv/bin/python -m pytest -m pins

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/shellcheck scripts/*.sh ci/*.sh .ci/run

lock:                     ## docker/locks/*.in -> *.txt
	.uv/bin/uv pip compile docker/locks/cpu.in --python-version 3.11 --generate-hashes --no-header -o docker/locks/cpu.txt
	.uv/bin/uv pip compile docker/locks/cpu-tinyllava.in --python-version 3.10 --generate-hashes --no-header -o docker/locks/cpu-tinyllava.txt
