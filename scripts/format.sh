#!/usr/bin/env bash
# Sorts imports, formats the code, and regenerates the files that are made from it.
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -d .venv/bin ] || export PATH=$PWD/.venv/bin:$PATH
ruff check --fix --quiet . || true
ruff format --quiet .
python scripts/make_reference.py
python scripts/make_experiment.py
python scripts/draw_architecture.py
ruff check .
