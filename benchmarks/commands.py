"""How soon do the commands that people type most often answer?

    python benchmarks/commands.py [--runs N] [--json FILE]

Each runs in a process of its own, imports and all, as from a shell. Processor seconds (median and least of N runs)
stand beside the wall clock's, since another program on the machine lengthens only the latter much.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    ("--help",),
    ("trace", "info", "steady"),
    ("policy", "list"),
    ("lab", "check", "buffer-based"),
    ("lab", "check", "kvstream"),
)


def seconds(command: tuple[str, ...]) -> tuple[float, float]:
    """(wall, processor) seconds of `kvstream COMMAND...`."""
    before, begin_s = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "kvstream.testbed.cli", *command], cwd=ROOT, capture_output=True, check=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - begin_s, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = {}
    print(f"{'command':<28} {'wall s':>8} {'processor s: median':>20} {'least':>7}")
    for command in COMMANDS:
        taken = [seconds(command) for _ in range(options.runs)]
        wall, used = zip(*taken, strict=True)
        rows[" ".join(command)] = {"wall_s": median(wall), "processor_s": median(used), "least_processor_s": min(used)}
        print(f"{' '.join(command):<28} {median(wall):8.2f} {median(used):20.2f} {min(used):7.2f}")
    if options.json:
        result = {"command": "python benchmarks/commands.py", "runs": options.runs, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
