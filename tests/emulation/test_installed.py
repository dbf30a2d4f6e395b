"""An emulated session from the installed package: its processes are started by name, from outside the tree."""

from __future__ import annotations

import json

import pytest

from tests import installed

pytest.importorskip("hatchling", reason="the extra [dev] is not installed")

SPEC = """
contexts = ["docs"]
traces = ["constant,rate=30Mbps"]
deadlines_s = [3.0]
links = ["delay=10ms,queue=50ms"]
max_repeats = 6
limits = {starved = 0.5, crowded = 2.0, gap_s = 0.2}  # of the machine; what the link did is judged as ever

[[schemes]]
policy = "./policies.py:Lowest"
codec = "uniform"
"""
POLICY = """
from kvstream import Choice

class Lowest:
    def choose(self, obs):
        return Choice(0)
"""


def test_a_session_is_emulated_from_the_wheel(tmp_path):
    tree = installed.sources(tmp_path / "kvstream")
    site = installed.install(installed.build(tree, "wheel", tmp_path / "wheel"), tmp_path / "site")
    work = tmp_path / "work"
    work.mkdir()
    (work / "policies.py").write_text(POLICY)
    for room in ("traces", "codec", "testbed"):
        (work / f"{room}.py").write_text('raise SystemExit(f"{__file__} was imported")\n')
    (work / "once.toml").write_text(SPEC)
    done = installed.kvstream(site, "run", "once.toml", "--json", cwd=work)
    assert done.returncode == 0, done.stderr
    [cell] = [json.loads(file.read_text()) for file in (work / "runs" / "once" / "cells").glob("*.json")]
    assert cell["row"]["status"] == "ok"
    assert cell["row"]["backend"] == "mininet"
    assert cell["row"]["policy_faults"] == 0
