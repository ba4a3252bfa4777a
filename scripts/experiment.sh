#!/usr/bin/env bash
# Sourced by train.sh, eval.sh and probe.sh: what the config of $experiment says.
# shellcheck disable=SC2034,SC2154 # the scripts that source this set experiment, and use the rest

config() { PATH=$PWD/.venv/bin:$PATH python3 -m scripts.config "$experiment" "$@"; }
backbone=$(config get backbone)
environment=$(config get environment)
run=$(config get run)
