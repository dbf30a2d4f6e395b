"""The live dashboard of a real run over an emulated link: what a browser shows while bytes arrive."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvstream.testbed.emulator import sandbox, topology
from kvstream.testbed.errors import MachineError
from kvstream.testbed.events import FILE_NAME, read
from tests.browser.conftest import Open

expect: Any = pytest.importorskip("playwright.sync_api", reason="needs the package playwright").expect
ROOT = Path(__file__).parents[2]
SPEC = """
contexts = ["docs"]
traces = ["constant,rate=30Mbps"]
deadlines_s = [4.0]
max_repeats = 0

[[schemes]]
policy = "fixed,level=lowest"
codec = "uniform"
label = "low"

[[schemes]]
policy = "throughput"
codec = "uniform"
"""


@pytest.mark.emulation
def test_a_real_run_is_seen_as_it_goes_on(tmp_path: Path, open_page: Open) -> None:
    try:
        topology.require_programs(topology.PROGRAMS)
    except MachineError as error:
        pytest.skip(str(error))
    if (why_not := sandbox.available()) is not None:
        pytest.skip(why_not)
    (tmp_path / "live.toml").write_text(SPEC)
    with subprocess.Popen(
        [sys.executable, "-m", "kvstream.testbed.cli", "run", "live.toml", "--live"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as going:
        assert going.stdout is not None
        try:
            said = going.stdout.readline()
            assert said.startswith("Live: http://127.0.0.1:"), said
            page = open_page(said.split()[1]).page
            expect(page.locator("#mode")).to_have_text("live")
            title, chunks = page.locator(".v-title"), page.locator("#g-chunks")
            expect(title).to_contain_text("on docs over constant", timeout=240_000)
            expect(page.locator("#name")).to_have_text("live")
            # a session takes a second and more: some of its chunks are here, others are not
            expect(chunks).to_have_text(re.compile(r"^([2-9]|1[0-4]) of 16"), timeout=20_000)
            expect(page.locator(".v-lanes line.v-now")).to_have_count(1)
            expect(page.locator("#table tbody tr")).to_have_count(2, timeout=120_000)
            expect(title).to_contain_text("first token after", timeout=20_000)
            expect(chunks).to_have_text("16 of 16")
            page.goto("about:blank")  # the browser lets go before the server does
            rest, _ = going.communicate(timeout=120)
        finally:
            going.kill()
    assert going.returncode in (0, 3), rest
    assert "kvstream dashboard runs/live" in rest
    told = [json.loads(line) for line, _ in read(tmp_path / "runs" / "live" / FILE_NAME)]
    kinds = [event["event"] for event in told]
    assert (kinds[0], kinds[-1]) == ("run_start", "run_end")
    assert kinds.count("session_end") == 2
    partial = [e for e in told if e["event"] == "chunk" and 0 < e["record"]["received_bytes"] < e["record"]["bytes"]]
    assert partial, "chunks are told of while they travel"
