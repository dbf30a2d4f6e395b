"""The simulator agrees with the emulated link: the small form of benchmarks/parity.py and its bars."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_chunks_arrive_when_the_simulator_says(tmp_path):
    out = tmp_path / "parity.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "parity.py"), "--small", "--out", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert out.is_file(), done.stderr
    result = json.loads(out.read_text())
    assert done.returncode == 0, f"{done.stderr}\n{json.dumps(result['summary'], indent=1)}"
    counted = [unit for unit in result["units"] if unit["status"] == "ok" and unit["drops"] == 0]
    assert len(counted) >= 4, [unit["why"] for unit in result["units"]]
    assert all(len(unit["emulated_s"]) == len(unit["simulated_s"]) >= 8 for unit in counted)
    # it is the same link and not only the same mean: finish times rise, and differ between units
    assert all(unit["emulated_s"] == sorted(unit["emulated_s"]) for unit in counted)
    assert len({round(unit["emulated_s"][-1], 2) for unit in counted}) > 1
