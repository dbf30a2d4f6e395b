#!/usr/bin/env bash
# The front door of kvstream: sets up what is missing, then runs.
#   ./run_testbed.sh              the main job: policies compared over emulated links
#   ./run_testbed.sh test [ARGS]  the tests (ARGS go to pytest)
#   ./run_testbed.sh setup        only the set-up
#   ./run_testbed.sh ARGS...      kvstream ARGS...
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")"
VENV=${KVSTREAM_VENV:-.venv}

absolute_venv() { case $VENV in /*) printf '%s' "$VENV" ;; *) printf '%s/%s' "$PWD" "$VENV" ;; esac }
say() { printf 'kvstream: %s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        command -v "$candidate"
        return
    done
    say "Python 3.11 or newer is needed; install python3 or set PYTHON=/path/to/python3"
    exit 4
}

# command -> the Debian/Ubuntu package that has it
system_packages() {
    local need=() entry
    for entry in mnexec:mininet tc:iproute2 ip:iproute2 iptables:iptables ethtool:ethtool \
        tcpdump:tcpdump ifconfig:net-tools g++:g++; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${entry%%:*}" >/dev/null 2>&1 || need+=("${entry##*:}")
    done
    "$1" -c 'import ensurepip, venv' 2>/dev/null || need+=(python3-venv)
    # torchac and numba compile against the interpreter's headers
    "$1" - <<'PY' || need+=(python3-dev)
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))
PY
    printf '%s\n' "${need[@]}" | sort -u | grep . || true
}

install_system_packages() {
    local missing
    missing=$(system_packages "$1" | tr '\n' ' ')
    [ -n "${missing// /}" ] || return 0
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing system packages: $missing"
        # shellcheck disable=SC2086  # one word a package
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -qq --no-install-recommends $missing; } >/dev/null || {
            say "apt-get failed; run: apt-get update && apt-get install --no-install-recommends $missing"
            exit 4
        }
    else
        say "missing system packages; an administrator can add them with:"
        say "  sudo apt-get install --no-install-recommends $missing"
        case " $missing " in *" python3-venv "*) exit 4 ;; esac
        say "going on without them: what needs them says so"
    fi
}

setup() {
    local python stamp want
    python=$(find_python)
    stamp=$VENV/.kvstream-setup
    want=$({ cat pyproject.toml constraints.txt; "$python" -V; pwd; } | sha256sum | cut -d' ' -f1)
    install_system_packages "$python"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        say "setting up $VENV (once; a few minutes)"
        [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
            -c constraints.txt -e '.[run,torchac,dev]'
        printf '%s\n' "$want" >"$stamp"
    fi
    # Compiled kernels are cached per user.
    local warm=${XDG_CACHE_HOME:-$HOME/.cache}/kvstream/warm-$want
    if [ ! -e "$warm" ]; then
        say "compiling kernels (once)"
        PATH=$(absolute_venv)/bin:$PATH "$VENV/bin/python" -m testbed.warm >/dev/null
        mkdir -p "$(dirname "$warm")" && touch "$warm"
    fi
}

setup
BIN=$(absolute_venv)/bin
export PATH=$BIN:$PATH:/usr/sbin:/sbin
case ${1:-run} in
    setup) say "ready" ;;
    test)
        shift
        exec bash scripts/test.sh "$@"
        ;;
    *) exec "$BIN/python" -m testbed.cli "${@:-run}" ;;
esac
