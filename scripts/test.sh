#!/usr/bin/env bash
# Everything that is checked, in the order in which it fails fastest: style, types, tests.
# Arguments go to pytest; with arguments, only pytest runs.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$#" -eq 0 ]; then
    ruff check .
    mypy
fi
exec python -m pytest "$@"
