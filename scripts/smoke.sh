#!/usr/bin/env bash
# Does it work at all? tests/test_smoke.py, in under five seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -d .venv/bin ] || export PATH=$PWD/.venv/bin:$PATH
exec python -m pytest -q tests/test_smoke.py "$@"
