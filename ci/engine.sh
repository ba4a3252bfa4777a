#!/usr/bin/env bash
# Tests of the image where there is no Docker engine and no registry: a private engine from Debian's packages, and a
# stand-in for the base image from Ubuntu's packages. Needs root, on Debian.
#
#   ci/engine.sh start FOLDER      installs and starts the engine; prints its DOCKER_HOST
#   ci/engine.sh base FOLDER       makes the image vista-kit:base of it: the real base's Ubuntu without CUDA
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
        work=$(mktemp -d)
        # Ubuntu's signing keys, of which Debian has no package.
        curl --fail --silent --show-error --retry 3 --output "$work/keys.deb" \
            http://archive.ubuntu.com/ubuntu/pool/main/u/ubuntu-keyring/ubuntu-keyring_2021.03.26_all.deb
        echo "0d0e7ed6b112f5d03eabf3c7eb01ebdacf9c57714b279e90495cfc58c8c4520f  $work/keys.deb" | sha256sum --check --quiet
        dpkg-deb --extract "$work/keys.deb" "$work"
        # This machine may not reach every host. What it has instead is copied into the base: its CAs, pip's folder of
        # wheels (torch's CPU build), the local clones that git takes for an upstream, and its Python 3.11 where that is
        # not the system's (uv would fetch one from GitHub).
        ca=/etc/host-ca.crt # installing Java writes ca-certificates.crt anew
        hooks=(--customize-hook="upload /etc/ssl/certs/ca-certificates.crt $ca")
        carry() { hooks+=(--customize-hook="mkdir -p \"\$1${1%/*}\"" --customize-hook="copy-in $1 ${1%/*}"); }
        printf '[global]\ncert = %s\n' "$ca" >"$work/pip.conf"
        wheels=$(pip config list 2>/dev/null | sed -n "s/^.*find-links='\(.*\)'$/\1/p" | head -n 1)
        if [[ -d $wheels ]]; then
            echo "find-links = $wheels" >>"$work/pip.conf"
            carry "$wheels"
        fi
        touch "$work/gitconfig"
        while IFS='= ' read -r key url; do
            copy=${key#url.} && copy=${copy%.insteadof}
            [[ -d $copy && $(<"${0%/*}/../patches/upstreams.toml") == *"\"$url\""* ]] || continue
            git config --file "$work/gitconfig" "$key" "$url"
            carry "$copy"
        done < <(git config --get-regexp '^url\..*\.insteadof$' | tr ' ' =)
        printf 'deb http://archive.ubuntu.com/ubuntu %s main universe\n' jammy{,-updates,-security} >"$work/sources.list"
        python=$(python3.11 -c 'import sys; print(sys.base_prefix)' 2>/dev/null || true)
        if [[ $python == /*/* ]]; then
            hooks+=(--customize-hook="cd $python && tar -c --exclude site-packages --exclude test --exclude '*.a' bin/python3.11 \
                include/python3.11 lib/libpython3.11.so* lib/python3.11 | tar -x -C \"\$1/usr/local\" && ldconfig -r \"\$1\"")
        fi
        mmdebstrap --quiet --variant=minbase --keyring="$work/usr/share/keyrings" \
            --include=apt,ca-certificates "${hooks[@]}" \
            --customize-hook="upload $work/pip.conf /etc/pip.conf" \
            --customize-hook="upload $work/gitconfig /etc/gitconfig" jammy - "$work/sources.list" |
            /usr/bin/docker import --change "ENV SSL_CERT_FILE=$ca" - vista-kit:base >/dev/null
        rm -r "$work"
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
