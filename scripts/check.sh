#!/usr/bin/env bash
# Checks that need no test run: lint, format, types, generated files. Changes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -d .venv/bin ] || export PATH=$PWD/.venv/bin:$PATH
status=0
ruff check . || status=1
ruff format --check . || status=1
mypy || status=1
python scripts/make_reference.py --check || status=1
python scripts/make_experiment.py --check || status=1
python scripts/draw_architecture.py --check || status=1
python scripts/codec_results.py --check || status=1
python scripts/scale_results.py --check || status=1
python scripts/engine_results.py --check || status=1
exit $status
