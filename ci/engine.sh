#!/usr/bin/env bash
# A private Docker engine and a stand-in base image, from Debian packages alone: for testing the image where there is
# neither an engine nor a registry. Needs root.
#
#   ci/engine.sh start FOLDER      installs and starts the engine; prints its DOCKER_HOST
#   ci/engine.sh base FOLDER       makes the image vista-kit:base of it, a minimal Debian that trusts this machine's CAs
#   ci/engine.sh stop FOLDER
set -euo pipefail

usage='usage: ci/engine.sh start|base|stop FOLDER'
action=${1:?$usage} folder=$(realpath -m "${2:?$usage}")
export DOCKER_HOST=unix://$folder/docker.sock
[[ $(id -u) == 0 ]] || { echo "engine: starting a Docker engine takes root" >&2 && exit 2; }

case $action in
    start)
        command -v dockerd mmdebstrap docker-init >/dev/null ||
            { apt-get update -qq && apt-get install -y -qq --no-install-recommends docker.io iptables mmdebstrap tini; } >/dev/null
        mkdir -p "$folder"
        setsid dockerd --data-root "$folder/data" --exec-root "$folder/exec" -p "$folder/pid" -H "$DOCKER_HOST" \
            --iptables=false --ip-forward=false --bridge=none &>"$folder/log" &
        for _ in {1..60}; do
            ! /usr/bin/docker version &>/dev/null || { echo "$DOCKER_HOST" && exit 0; }
            sleep 0.5
        done
        tail -n 20 "$folder/log" >&2
        echo "engine: did not start; its log is $folder/log" >&2
        exit 1
        ;;
    base)
        conf=$(mktemp) hooks=()
        printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$conf"
        # A folder of wheels that pip knows of here (torch's CPU build, where the PyTorch index is out of reach) goes along.
        wheels=$(pip config list 2>/dev/null | sed -n "s/^.*find-links='\(.*\)'$/\1/p" | head -n 1)
        if [[ -d $wheels ]]; then
            echo "find-links = $wheels" >>"$conf"
            hooks=(--customize-hook="mkdir -p \"\$1$(dirname "$wheels")\"" --customize-hook="copy-in $wheels $(dirname "$wheels")")
        fi
        mmdebstrap --quiet --variant=minbase --include=ca-certificates "${hooks[@]}" \
            --customize-hook='upload /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt' \
            --customize-hook="upload $conf /etc/pip.conf" bookworm - |
            /usr/bin/docker import --change 'ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt' - vista-kit:base >/dev/null
        rm "$conf"
        echo "vista-kit:base"
        ;;
    stop)
        pid=$(<"$folder/pid")
        kill "$pid"
        while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
        umount "$folder/exec/netns/default" 2>/dev/null || true
        ;;
    *) echo "$usage" >&2 && exit 2 ;;
esac
