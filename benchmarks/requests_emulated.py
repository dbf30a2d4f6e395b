"""Requests in time by eight real receivers over an emulated link, beside the simulator, for three families of arrivals.

    sudo python benchmarks/requests_emulated.py [--count N] [--out FILE]

Each family is one `kvstream requests --emulated`. Printed and kept: attainment by scheme and rate, over the link and in
the simulator, and how far TTFTs are apart. Needs a quiet machine, and some seven minutes a family.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "requests-emulated.json"
FAMILIES = ("poisson", "bursts,size=4", "trace")
SPEC = """
workload = "mistral-7b,compute=a40"
trace = "uniform,low=40Mbps,high=160Mbps,hold=0.5s,seed=3"
link = "delay=1ms"
fleet = "receivers=8,slots=1,cache=0"
deadline_s = 2.0
rates = [3, 6, 9]
repetitions = 4
emulated = true
count = {count}
arrivals = "{arrivals}"

[[schemes]]
policy = "text"
codec = "kvstream"

[[schemes]]
policy = "cachegen"
codec = "cachegen"
depth = 1

[[schemes]]
policy = "kvstream"
codec = "kvstream"

[[schemes]]
policy = "lowest"
codec = "kvstream"
"""


def family(arrivals: str, count: int) -> dict[str, Any]:
    """One run; raises CalledProcessError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "requests.toml"
        spec.write_text(SPEC.format(arrivals=arrivals, count=count))
        command = [sys.executable, "-m", "kvstream.testbed.cli", "requests", str(spec), "--runs", folder, "--json"]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--count", type=int, default=36)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    body: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "families": {}}
    for arrivals in FAMILIES:
        found = body["families"][arrivals] = family(arrivals, options.count)
        for row in found["parity"]:
            print(
                f"{arrivals:<14} {row['scheme']:<10} {row['rate']:g}/s: {row['met_rate']:.0%} in time, "
                f"{row['simulated_met_rate']:.0%} in the simulator; TTFTs differ by {1e3 * row['ttft_p50_s']:.0f} ms "
                f"(p95 {1e3 * row['ttft_p95_s']:.0f} ms)",
                flush=True,
            )
        print(f"{arrivals}: {len(found['invalid'])} rows over the fidelity limits", flush=True)
        options.out.write_text(json.dumps(body, indent=1) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
