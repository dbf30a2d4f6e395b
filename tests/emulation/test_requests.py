"""Requests in time by real receivers over an emulated link, as `kvstream requests --emulated` serves them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = (
    "--emulated", "--workload", "mistral-7b,compute=a40", "--trace", "constant,rate=100Mbps", "--link", "delay=1ms",
    "--fleet", "receivers=8,slots=1,cache=0", "--count", "30", "--repetitions", "1", "--rate", "3", "--deadline", "2s",
    "--policy", "kvstream", "--policy", "lowest", "--json",
)  # fmt: skip


def test_eight_receivers_serve_requests_as_the_simulator_says(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-m", "kvstream.testbed.cli", "requests", *WORDS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["backend"] == "mininet"
    assert body["invalid"] == []
    assert [row["scheme"] for row in body["parity"]] == ["kvstream", "lowest"]
    for row, curve, simulated in zip(body["parity"], body["curves"], body["simulated"], strict=True):
        assert row["ttft_p50_s"] < 0.08
        assert abs(row["met_rate"] - row["simulated_met_rate"]) <= 0.1
        [real], [virtual] = curve["points"], simulated["points"]
        assert real["bytes_per_request"] > 0.0
        assert real["stored"] > 0.3
        assert abs(real["stored"] - virtual["stored"]) < 0.1
    lowest, virtual = body["curves"][1]["points"][0], body["simulated"][1]["points"][0]
    assert abs(lowest["bytes_per_request"] - virtual["bytes_per_request"]) < 0.05 * virtual["bytes_per_request"]
