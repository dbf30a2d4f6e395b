from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, ClientTimeout
from aiohttp.test_utils import TestServer

from kvstream.testbed.dashboard.feed import Feed
from kvstream.testbed.dashboard.live import live_dashboard
from kvstream.testbed.dashboard.server import make_app
from kvstream.testbed.events import FILE_NAME, ChunkNews, RunEnd, RunStart, SessionEnd, SessionStart, append
from kvstream.testbed.results.folder import Run
from tests.testbed.made_run import make_run

TOKEN = "secret"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("run"), contexts=("docs",))


@pytest.fixture
def empty(tmp_path: Path, finished: Run) -> Run:
    run = Run(tmp_path)
    run.create(finished.manifest)
    return run


def start(scheme: str = "cachegen") -> SessionStart:
    return SessionStart("000", scheme, scheme, "cachegen", "docs", "steady", 1.0, 16, 4, [(0.0, 3e7)])


def end(run: Run, scheme: str = "cachegen") -> SessionEnd:
    row = next(row for row in run.rows() if row["scheme"] == scheme)
    return SessionEnd(row | {"unit_id": "000"})


@asynccontextmanager
async def browser(run: Run) -> AsyncIterator[tuple[ClientSession, str]]:
    async with TestServer(make_app(run, TOKEN)) as server, ClientSession(timeout=ClientTimeout(total=20)) as client:
        yield client, str(server.make_url("/"))


async def heard(client: ClientSession, url: str, count: int) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    async with client.get(f"{url}{TOKEN}/events") as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        async for raw in response.content:
            if raw.startswith(b"data: "):
                events.append(json.loads(raw[6:]))
            if len(events) == count:
                break
    return events


def test_without_the_token_there_is_nothing(finished: Run) -> None:
    async def scenario() -> None:
        async with browser(finished) as (client, url):
            for path in ("", "wrong/", "wrong/events", "wrong/static/viewer.js", "secre/", "secrett/", "events"):
                async with client.get(url + path) as response:
                    assert response.status == 404, path
                    assert "not found" in (await response.text()).lower()

    asyncio.run(scenario())


def test_it_is_read_only_and_serves_only_its_own_files(finished: Run) -> None:
    async def scenario() -> None:
        async with browser(finished) as (client, url):
            for method in ("POST", "PUT", "DELETE", "PATCH"):
                async with client.request(method, f"{url}{TOKEN}/session") as response:
                    assert response.status in (404, 405)
            for name in ("..%2fserver.py", "%2e%2e/server.py", "server.py", "nothing"):
                async with client.get(f"{url}{TOKEN}/static/{name}") as response:
                    assert response.status == 404
            async with client.get(f"{url}{TOKEN}/static/viewer.js") as response:
                assert response.status == 200
                assert "default-src 'none'" in response.headers["Content-Security-Policy"]
                assert response.headers["Referrer-Policy"] == "no-referrer"

    asyncio.run(scenario())


def test_a_session_by_its_names_and_never_by_a_path(finished: Run) -> None:
    async def scenario() -> None:
        row = finished.rows()[0]
        async with browser(finished) as (client, url):
            good = {"unit": row["unit_id"], "scheme": row["scheme"]}
            async with client.get(f"{url}{TOKEN}/session", params=good) as response:
                found = await response.json()
            assert [chunk["level"] for chunk in found["chunks"]] == row["levels"]
            for bad in ({"unit": "../cells/x", "scheme": "y"}, {"unit": "*", "scheme": "*"}, {}):
                async with client.get(f"{url}{TOKEN}/session", params=bad) as response:
                    assert response.status == 404

    asyncio.run(scenario())


def test_a_run_without_events_is_shown_from_its_cells(finished: Run) -> None:
    state, offset = Feed(finished).state()
    assert offset == 0
    assert not state["live"]
    assert len(state["rows"]) == len(finished.rows())


def test_who_connects_late_gets_the_state_and_then_what_happens(empty: Run, finished: Run) -> None:
    file = empty.path / FILE_NAME
    append(file, RunStart("made", "mininet", ["cachegen", "text"], 2))
    append(file, start())
    append(file, ChunkNews("000", "cachegen", 0.1, {"chunk": 0, "level": 1}))
    append(file, ChunkNews("000", "cachegen", 0.2, {"chunk": 0, "level": 1, "last_byte_s": 0.2}))
    append(file, end(finished))
    append(file, start("text"))
    append(file, ChunkNews("000", "text", 0.1, {"chunk": 0, "level": "text"}))

    async def scenario() -> list[dict[str, Any]]:
        async with browser(empty) as (client, url):
            listening = asyncio.create_task(heard(client, url, 3))
            await asyncio.sleep(0.3)
            append(file, end(finished, "text"))
            append(file, RunEnd("done"))
            return await asyncio.wait_for(listening, 10)

    state, ended, over = asyncio.run(scenario())
    assert state["live"]
    assert [row["scheme"] for row in state["rows"]] == ["cachegen"]
    assert state["current"]["start"]["scheme"] == "text"
    assert [one["record"]["level"] for one in state["current"]["chunks"]] == ["text"]
    assert ended["event"] == "session_end"
    assert ended["row"]["colour"].startswith("#")
    assert over == {"event": "run_end", "verdict": "done"}


def test_a_session_that_is_repeated_starts_afresh(empty: Run) -> None:
    file = empty.path / FILE_NAME
    append(file, RunStart("made", "mininet", ["cachegen"], 1))
    append(file, start())
    append(file, ChunkNews("000", "cachegen", 0.1, {"chunk": 0}))
    append(file, start())
    state, _ = Feed(empty).state()
    assert state["current"]["chunks"] == []


def test_a_run_that_went_on_after_a_break_counts_each_session_once(empty: Run, finished: Run) -> None:
    file = empty.path / FILE_NAME
    for _ in range(2):
        append(file, RunStart("made", "mininet", ["cachegen", "text"], 2))
        append(file, start())
        append(file, end(finished))
    state, _ = Feed(empty).state()
    assert len(state["rows"]) == 1
    assert state["live"]


def test_a_run_that_has_not_begun_is_waited_for_and_one_started_over_shown_afresh(tmp_path: Path) -> None:
    run = Run(tmp_path / "later")

    async def scenario() -> list[dict[str, Any]]:
        async with browser(run) as (client, url):
            listening = asyncio.create_task(heard(client, url, 4))
            await asyncio.sleep(0.3)
            run.path.mkdir()
            append(run.path / FILE_NAME, RunStart("later", "mininet", ["cachegen", "text"], 2))
            append(run.path / FILE_NAME, start())
            await asyncio.sleep(0.5)
            (run.path / FILE_NAME).unlink()
            append(run.path / FILE_NAME, RunStart("again", "mininet", ["text"], 1))
            return await asyncio.wait_for(listening, 10)

    state, begun, _, again = asyncio.run(scenario())
    assert (state["live"], state["rows"]) == (True, [])
    assert (begun["event"], begun["name"]) == ("run_start", "later")
    assert (again["event"], again["name"], again["sessions"]) == ("state", "again", 1)


def test_the_live_dashboard_is_a_process_that_ends_with_the_block(finished: Run) -> None:
    with live_dashboard(finished.path) as url:
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(url, timeout=10) as response:
            assert b"kvstream dashboard" in response.read()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=2)


def test_its_events_end_properly(finished: Run) -> None:
    """An incomplete response is an error in a browser's console."""
    with live_dashboard(finished.path) as url:
        response = urllib.request.urlopen(url + "events", timeout=10)
        assert response.readline().startswith(b"data: ")
    with response:
        assert response.read() == b"\n"  # or http.client.IncompleteRead


def test_it_does_not_outlive_a_run_that_is_killed(finished: Run) -> None:
    code = f"""
import pathlib, time
from kvstream.testbed.dashboard.live import live_dashboard
with live_dashboard(pathlib.Path({str(finished.path)!r})) as url:
    print(url, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        url = run.stdout.readline().strip()
        with urllib.request.urlopen(url, timeout=10) as response:
            assert response.status == 200
        run.kill()
        run.wait()
    for _ in range(100):
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except ConnectionResetError:
            continue
        except urllib.error.URLError:
            return
        time.sleep(0.1)
    pytest.fail("the dashboard is still there 10 s after its run was killed")
