#!/usr/bin/env bash
# The shortest answer to "does it work at all": tests/test_smoke.py. Below five seconds.
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -d .venv/bin ] || export PATH=$PWD/.venv/bin:$PATH
exec python -m pytest -q tests/test_smoke.py "$@"
