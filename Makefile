# The two commands of the README, and what keeps them honest.
.PHONY: reproduce setup test test-pins test-docker lint lock

reproduce:                ## set up everything and run the miniature (about 25 minutes on 2 cores)
	scripts/reproduce.sh --profile tiny

setup:
	scripts/doctor.sh tiny
	scripts/env.sh
	scripts/upstream.sh
	scripts/patch.sh

test: setup               ## set up everything and run the tests
	.venv/bin/python -m pytest

test-pins: setup          ## what needs other environments (installs 15 GB more)
	.venv/bin/python -m pytest -m pins

test-docker: setup        ## the image's cpu target, built and run (as root, on Debian)
	.venv/bin/python -m pytest -m docker

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/shellcheck scripts/*.sh docker/*.sh ci/*.sh .ci/run

lock:                     ## docker/locks/*.in -> *.txt
	for name in cpu:3.11 cpu-tinyllava:3.10 llava:3.10 tinyllava:3.10; do \
	    .uv/bin/uv pip compile --quiet docker/locks/$${name%:*}.in --python-version $${name#*:} --generate-hashes --no-header \
	        -o docker/locks/$${name%:*}.txt; \
	done
