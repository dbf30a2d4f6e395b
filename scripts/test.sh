#!/usr/bin/env bash
# All checks, the fastest first: scripts/check.sh, the tests in parallel on all cores, and
# those with emulated links one by one, since they need the cores for themselves.
# Arguments go to pytest; with arguments, only pytest runs.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$#" -eq 0 ] || exec python -m pytest "$@"
scripts/check.sh
# what failed beside others, for want of time, is run again alone: both summaries say so
python -m pytest --numprocesses "$(nproc)" --maxprocesses 8 --dist worksteal -o timeout_method=thread --ignore tests/emulation ||
    python -m pytest --last-failed --last-failed-no-failures none --ignore tests/emulation
# what others do on this machine, or on its host, can spoil a measurement: it is made again a little later, and the
# summary says so
exec python -m pytest --reruns 2 --reruns-delay 10 -rR tests/emulation
