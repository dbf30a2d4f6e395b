"""The dashboard beside a real run over an emulated link: what a browser shows while bytes move."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from testbed.dashboard.beside import beside
from testbed.dashboard.events import FILE_NAME, read
from testbed.emulator import sandbox, topology
from testbed.errors import MachineError
from tests.browser.conftest import Open

expect: Any = pytest.importorskip("playwright.sync_api", reason="needs the package playwright").expect
ROOT = Path(__file__).parents[2]
SPEC = """
contexts = ["docs"]
traces = ["constant,rate=30Mbps"]
deadlines_s = [4.0]
most_repeats = 0

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
    run = tmp_path / "runs" / "live"
    with beside(run) as url:
        page = open_page(url).page
        expect(page.locator("#mode")).to_have_text("live")
        going = subprocess.Popen(
            [sys.executable, "-m", "testbed.cli", "run", "live.toml", "--json"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            expect(page.locator(".v-title")).to_contain_text("on docs over constant", timeout=240_000)
            expect(page.locator("#name")).to_have_text("live")
            expect(page.locator("#table tbody tr")).to_have_count(2, timeout=120_000)
            expect(page.locator(".v-title")).to_contain_text("first token after", timeout=20_000)
            expect(page.locator("#g-chunks")).to_have_text("16 of 16")
            _, errors = going.communicate(timeout=120)
        finally:
            going.kill()
            going.wait()
        assert going.returncode in (0, 3), errors
        page.goto("about:blank")  # the browser lets go before the server does
    kinds = [json.loads(line)["event"] for line, _ in read(run / FILE_NAME)]
    assert kinds[0] == "run_start"
    assert kinds.count("session_end") == 2
