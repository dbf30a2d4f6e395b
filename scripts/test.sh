#!/usr/bin/env bash
# Everything that is checked, in the order in which it fails fastest: scripts/check.sh, the tests on all processors, and
# those with emulated links, which need the processors for themselves, one by one.
# Arguments go to pytest; with arguments, only pytest runs.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$#" -eq 0 ] || exec python -m pytest "$@"
scripts/check.sh
python -m pytest --numprocesses "$(nproc)" --maxprocesses 8 --dist worksteal --ignore tests/emulation
exec python -m pytest tests/emulation
