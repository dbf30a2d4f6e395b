#!/usr/bin/env bash
# Runs the emulated link on a Linux machine with a GPU but without network tools and without a way to install them.
#   scripts/gpu_machine.sh fetch KIT [3.12]     here, once: the Debian packages and Python wheels it takes, into KIT;
#                                               for the Python that is there
#   scripts/gpu_machine.sh run KIT COMMAND...   there: unpack KIT into a prefix of its own, and run COMMAND with it
# Nothing is written outside the prefix (KVSTREAM_PREFIX, by default under TMPDIR); unpacking needs no root.
# torch, triton, numba, transformers and aiohttp must be installed already.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)

PACKAGES=(iproute2 libelf1 libbpf1 libmnl0 libcap2 libdb5.3 libxtables12 net-tools ethtool libbsd0 libmd0 mininet
    iptables libip4tc2 libip6tc2 libnfnetlink0 libnetfilter-conntrack3 libnftnl11)
WHEELS=(mininet pyroute2 scapy isal)

fetch() {
    mkdir -p "$1" && cd "$1"
    apt-get download -qq "${PACKAGES[@]}" 2> >(grep -v 'unsandboxed as root' >&2)
    "${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$2" \
        --dest . -c "$ROOT/constraints.txt" "${WHEELS[@]}"
}

unpack() {
    local kit=$1 prefix=$2 part=$2.part.$$ package tool
    rm -rf "$part" && mkdir -p "$part"
    for package in "$kit"/*.deb; do dpkg -x "$package" "$part"; done
    # what the packages' own scripts would link
    for tool in iptables iptables-save iptables-restore; do ln -sf xtables-legacy-multi "$part/usr/sbin/$tool"; done
    "${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$part/python" "$kit"/*.whl
    # programs of wheels are left out: mininet's wants to be its own package's
    rm -rf "$part/python/bin" && mv "$part" "$prefix"
}

run() {
    local kit prefix libraries
    kit=$(cd "$1" && pwd)
    prefix=${KVSTREAM_PREFIX:-${TMPDIR:-/tmp}/kvstream-tools-$(id -u)}
    shift
    [ -d "$prefix" ] || unpack "$kit" "$prefix"
    libraries=$(find "$prefix" -name 'lib*.so.*' -printf '%h\n' | sort -u | paste -sd:)
    export PATH=$prefix/usr/sbin:$prefix/sbin:$prefix/usr/bin:$prefix/bin:$PATH
    export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export XTABLES_LIBDIR=$(dirname "$(find "$prefix" -name libxt_standard.so | head -n 1)")
    export PYTHONPATH=$ROOT:$prefix/python${PYTHONPATH:+:$PYTHONPATH}
    exec "$@"
}

case ${1:-} in
    fetch) fetch "${2:?give the folder to fetch into}" "${3:-3.12}" ;;
    run) [ $# -ge 3 ] || { sed -n '2,6p' "$0" >&2; exit 2; }
        run "${@:2}" ;;
    *) sed -n '2,6p' "$0" >&2; exit 2 ;;
esac
