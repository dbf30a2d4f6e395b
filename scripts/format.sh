#!/usr/bin/env bash
# Puts everything into shape that a program can: imports, layout, the files that are generated from the code.
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -d .venv/bin ] || export PATH=$PWD/.venv/bin:$PATH
ruff check --fix --quiet . || true
ruff format --quiet .
python scripts/make_reference.py
python scripts/draw_architecture.py
ruff check .
