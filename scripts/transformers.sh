#!/usr/bin/env bash
# Runs sessions into caches of several versions of transformers, each in an environment of its own that is then removed.
# Everything else, torch too, comes from the environment that this runs in: 15 to 25 MB to download for each version.
#   scripts/transformers.sh                 the oldest and the newest that work, and some between
#   scripts/transformers.sh VERSION...      these
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -d .venv/bin ] || export PATH=$PWD/.venv/bin:$PATH
[ "$#" -gt 0 ] || set -- 4.56.0 4.57.6 5.0.0 5.10.4 5.24.0
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
status=0
for version; do
    environment=$scratch/$version
    python -m venv --without-pip "$environment"
    # what is installed here lies behind the environment's own packages
    python -c 'import site; print(*site.getsitepackages(), sep="\n")' \
        > "$(echo "$environment"/lib/python3*/site-packages)/outer.pth"
    if ! python -m pip --python "$environment/bin/python" --disable-pip-version-check --quiet \
        install "transformers==$version" 2> "$scratch/pip.log"; then
        echo "transformers $version cannot be installed: $(grep -m 1 ERROR "$scratch/pip.log")" >&2
        exit 4
    fi
    echo "transformers $version"
    # old versions warn of things that are no concern of ours
    "$environment/bin/python" -m pytest --quiet --override-ini filterwarnings=default --disable-warnings \
        -p no:cacheprovider tests/testbed/connectors/test_huggingface.py tests/testbed/engine/test_model.py || status=1
done
exit $status
