#!/usr/bin/env bash
# The entry point of kvstream: sets up what is missing, then runs.
#   ./run_testbed.sh              the main job: policies compared over emulated links
#   ./run_testbed.sh test [ARGS]  the tests (ARGS go to pytest)
#   ./run_testbed.sh setup        only the set-up
#   ./run_testbed.sh ARGS...      kvstream ARGS..., in the caller's directory
set -euo pipefail
ROOT=$(dirname "$(readlink -f "$0")")
VENV=${KVSTREAM_VENV:-.venv}
case $VENV in /*) ;; *) VENV=$ROOT/$VENV ;; esac
BIN=$VENV/bin

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

can_install() { [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; }

# apt-get, quietly; waits while another holds its locks (fresh machines update themselves), and ends what a kill left half
apt() {
    local errors left=100 mended=
    until errors=$(DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" 2>&1 >/dev/null); do
        case $errors in
            *"dpkg --configure -a"*)
                [ -z "$mended" ] || break
                mended=yes
                DEBIAN_FRONTEND=noninteractive dpkg --configure -a >/dev/null 2>&1 || break
                continue
                ;;
            *[Ll]ock*)
                [ "$left" -lt 100 ] || say "waiting for another apt-get to end"
                if [ $((left -= 1)) -gt 0 ]; then
                    sleep 3
                    continue
                fi
                ;;
        esac
        printf '%s\n' "$errors" >&2
        return 1
    done
}

apt_install() { apt update && apt install -y --no-install-recommends "$@"; }

install_system_packages() {
    local missing
    missing=$(system_packages "$1" | tr '\n' ' ')
    [ -n "${missing// /}" ] || return 0
    if can_install; then
        say "installing system packages: $missing"
        # shellcheck disable=SC2086  # one word per package
        apt_install $missing || {
            say "apt-get failed; run: apt-get update && apt-get install --no-install-recommends $missing"
            exit 4
        }
    else
        say "missing system packages; an administrator can add them with:"
        say "  sudo apt-get install --no-install-recommends $missing"
        case " $missing " in *" python3-venv "*) exit 4 ;; esac
        say "continuing without them; whatever needs one will say so"
    fi
}

# Only the browser tests need it; without a browser they are skipped.
install_chromium() {
    command -v chromium >/dev/null 2>&1 || command -v chromium-browser >/dev/null 2>&1 && return 0
    if can_install; then
        say "installing the system package chromium (for the browser tests)"
        apt_install chromium || say "apt-get cannot install chromium here: the browser tests are skipped"
    else
        say "no Chromium: the browser tests are skipped; an administrator can add it with:"
        say "  sudo apt-get install --no-install-recommends chromium"
    fi
}

new_environment() {
    if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
        say "$VENV is not a virtual environment; set KVSTREAM_VENV to another folder"
        exit 4
    fi
    "$1" -m venv --clear "$VENV"
}

# setup EXTRAS: the virtual environment with these extras of the package; in a subshell, because it changes directory
setup() (
    cd "$ROOT"
    local python stamp want extras
    extras=$1
    python=$(find_python)
    stamp=$VENV/.kvstream-setup-$extras
    want=$({ cat pyproject.toml constraints.txt; "$python" -V; pwd; } | sha256sum | cut -d' ' -f1)
    install_system_packages "$python"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        # one at a time; the lock ends with this subshell, however that ends
        exec 9>"$VENV.lock"
        flock 9
    fi
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        say "setting up $VENV (once; a few minutes)"
        # a kill may leave packages that pip takes for whole
        if [ -e "$VENV/.unfinished" ] || ! "$BIN/python" -m pip --version >/dev/null 2>&1; then
            new_environment "$python"
        fi
        touch "$VENV/.unfinished"
        # kvstream-testbed was called kvstream: both would own the command and the import name
        ! "$BIN/python" -m pip show --quiet kvstream 2>/dev/null ||
            "$BIN/python" -m pip uninstall --quiet --disable-pip-version-check --yes kvstream
        "$BIN/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
        printf '%s\n' "$want" | tee "$stamp" >"$VENV/.kvstream-setup-$TO_RUN"
        rm "$VENV/.unfinished"
        flock -u 9
    fi
    # Compiled kernels are cached per user.
    local warm=${XDG_CACHE_HOME:-$HOME/.cache}/kvstream/warm-$want
    if [ ! -e "$warm" ]; then
        say "compiling kernels (once)"
        "$BIN/python" -c "import kvstream.policies._kernel" &
        PATH=$BIN:$PATH "$BIN/python" -m kvstream.codec.warm >/dev/null
        wait $!
        mkdir -p "$(dirname "$warm")" && touch "$warm"
    fi
)

TO_RUN=run,torchac
TO_TEST=run,torchac,dev
export PATH=$BIN:$PATH:/usr/sbin:/sbin
case ${1:-run} in
    setup)
        setup "$TO_TEST"
        say "ready"
        ;;
    test)
        shift
        setup "$TO_TEST"
        install_chromium
        exec bash "$ROOT/scripts/test.sh" "$@"
        ;;
    *)
        setup "$TO_RUN"
        exec "$BIN/kvstream" "${@:-run}"
        ;;
esac
