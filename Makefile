# README's two commands, and what keeps them honest. `make` alone prints the targets.
.PHONY: help reproduce study setup test test-pins test-suite test-rehearsal test-faults test-families test-docker image lint lock

help:
	@sed -n 's/^\([a-z-]*\):[a-z ]*## \(.*\)/make \1 \t\2/p' Makefile | expand -t 24

reproduce:                ## set up everything and run the miniature (13 minutes on 2 cores)
	scripts/reproduce.sh --profile tiny

study: setup              ## the study's runs, hours of them; what is there is kept (docs/study.md)
	scripts/setup/env.sh cpu-tinyllava
	scripts/setup/upstream.sh tinyllava
	scripts/setup/patch.sh tinyllava
	scripts/data.sh llava-tiny
	scripts/data.sh tinyllava-tiny
	.venv/bin/python -m scripts.miniature.study
	.venv/bin/python -m scripts.reporting.study

setup:                    ## make .venv, clone stock LLaVA, patch it
	scripts/setup/doctor.sh tiny
	scripts/setup/env.sh
	scripts/setup/upstream.sh
	scripts/setup/patch.sh

test: setup               ## set up everything and run the tests; prints their coverage
	.venv/bin/python -m pytest --cov -n auto --dist loadfile

test-pins: setup          ## what needs other environments (installs 15 GB more)
	.venv/bin/python -m pytest -m pins

test-suite: setup         ## lmms-eval over the paper's 18 tasks, on stand-ins of their data (5 minutes)
	.venv/bin/python -m pytest -m suite

test-rehearsal: setup     ## the full profile of both backbones, from a local hub to Tables 1-3 (5 GB more)
	.venv/bin/python -m pytest -m rehearsal

test-faults: setup        ## the miniature killed at 20 moments, a full disk, damaged checkpoints
	.venv/bin/python -m pytest -m faults

test-families:            ## families of models and trainers, in four releases of transformers (4 GB more)
	for release in 4.46 4.51 4.57 5; do \
	    scripts/setup/env.sh families-$$release && .venv-families-$$release/bin/python -m pytest -m families tests/families || exit 1; \
	done

test-docker: setup        ## the image, built and run on an engine of its own (as root, on Debian; 60 GB of disk)
	.venv/bin/python -m pytest -m docker

image: setup              ## the image's target cuda, with your Docker engine
	scripts/docker_build.sh cuda

lint: setup               ## check style, types and shell
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy scripts
	.venv/bin/mypy --strict vista_patch
	.venv/bin/shellcheck scripts/*.sh scripts/setup/*.sh scripts/training/cluster/*.sbatch docker/*.sh ci/*.sh .ci/run
	.venv/bin/hadolint docker/Dockerfile

lock:                     ## resolve docker/locks/*.in into the hash-locked *.txt
	for name in cpu:3.11 cpu-tinyllava:3.10 llava:3.10 tinyllava:3.10 sbom:3.10 uv:3.10 \
	    families-4.46:3.11 families-4.51:3.11 families-4.57:3.11 families-5:3.11 torch:3.11; do \
	    .uv/bin/uv pip compile --quiet docker/locks/$${name%:*}.in --python-version $${name#*:} --generate-hashes --no-header \
	        -o docker/locks/$${name%:*}.txt; \
	done
