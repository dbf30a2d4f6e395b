#!/usr/bin/env bash
# Everything that is checked, in the order in which it fails fastest: scripts/check.sh, then the tests.
# Arguments go to pytest; with arguments, only pytest runs.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$#" -gt 0 ] || scripts/check.sh
exec python -m pytest "$@"
