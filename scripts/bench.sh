#!/usr/bin/env bash
# Runs the benchmarks, all or those named: scripts/bench.sh [NAME...], NAME as in benchmarks/NAME.py.
# Each prints a table and can write JSON; the reference results are in benchmarks/results.
set -euo pipefail
cd "$(dirname "$0")/.."
[ ! -d .venv/bin ] || export PATH=$PWD/.venv/bin:$PATH
[ "$#" -gt 0 ] || set -- $(find benchmarks -maxdepth 1 -name '*.py' -not -name '_*' -exec basename {} .py \; | sort)
for name in "$@"; do
    [ -f "benchmarks/$name.py" ] || { printf 'no benchmark %s; there are:\n' "$name" >&2; ls benchmarks/*.py >&2; exit 2; }
    printf '== %s\n' "$name"
    python "benchmarks/$name.py"
done
