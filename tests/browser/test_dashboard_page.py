"""The dashboard in a browser: live, and a finished run played again."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstream.testbed.dashboard.server import make_app
from kvstream.testbed.events import FILE_NAME, ChunkNews, RunEnd, RunStart, SessionEnd, SessionStart, append
from kvstream.testbed.results.folder import Run
from kvstream.testbed.results.summary import of_run
from tests.browser.conftest import Open
from tests.testbed.made_run import make_run

expect: Any = pytest.importorskip("playwright.sync_api", reason="needs the package playwright").expect
Serve = Callable[[Any], str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("run"))


def fits(page: Any) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


def test_a_finished_run_can_be_played(finished: Run, serve: Serve, open_page: Open) -> None:
    watched = open_page(serve(lambda: make_app(finished, "t")) + "/t/")
    page = watched.page
    title, chunks = page.locator(".v-title"), page.locator("#g-chunks")
    expect(page.locator("#mode")).to_have_text("finished")
    expect(page.locator("#table tbody tr")).to_have_count(7)
    page.select_option("#session", index=0)
    expect(title).to_contain_text("buffer-based on docs")
    page.select_option("#speed", "0.25")
    page.click("#play")
    expect(page.locator("#clock")).to_have_text(re.compile(r"0\.[1-5]\d s"))
    expect(chunks).to_have_text(re.compile(r"([1-9]|1[0-4]) of 16"))
    watched.shoot("dashboard-playing")
    page.select_option("#speed", "8")
    expect(chunks).to_have_text("16 of 16")
    expect(page.locator("#play")).to_have_text("Play")
    expect(title).to_contain_text("first token after")
    page.locator("#time").fill("0.3")
    expect(page.locator("#clock")).to_have_text("0.30 s")
    expect(title).not_to_contain_text("first token after")
    assert fits(page)


def test_units_that_the_report_leaves_out_are_not_counted(tmp_path: Path, serve: Serve, open_page: Open) -> None:
    """One unit is invalid for one scheme, and one scheme has not run another: both are out, for all schemes."""
    run = make_run(tmp_path)
    next(run.cells.glob("000-*-oracle.json")).unlink()
    page = open_page(serve(lambda: make_app(run, "t")) + "/t/").page
    rows = page.locator("#table tbody tr")
    expect(rows).to_have_count(7)
    counted = {entry["scheme"]: entry for entry in of_run(run.rows(), run.manifest)["schemes"]}
    for row in rows.all():
        cells = row.locator("th, td").all_inner_texts()
        entry = counted[cells[0].split()[0]]
        assert cells[1:3] == ["10", f"{entry['met']}/10"]
        assert cells[8] == ("1" if entry["scheme"] == "oracle" else "2")


def test_a_run_is_followed_as_it_goes_on(tmp_path: Path, finished: Run, serve: Serve, open_page: Open) -> None:
    run = Run(tmp_path)
    run.create(finished.manifest)
    file = run.path / FILE_NAME
    cell = next(c for c in finished.load_cells() if c["row"]["scheme"] == "cachegen")
    row = cell["row"]
    unit = row["unit_id"]
    append(file, RunStart("made", "mininet", ["cachegen"], 3))
    watched = open_page(serve(lambda: make_app(run, "t")) + "/t/", scheme="dark")
    page = watched.page
    title = page.locator(".v-title")
    expect(page.locator("#mode")).to_have_text("live")
    steps = [(0.0, 3e7), (0.5, 1e7)]
    append(file, SessionStart(unit, "cachegen", "cachegen", "cachegen", "docs", "steady", 1.0, 16, 4, steps, 5.0))
    expect(title).to_contain_text("cachegen on docs over steady")
    for chunk in cell["chunks"][:9]:
        append(file, ChunkNews(unit, "cachegen", chunk["decode_end_s"], chunk))
    expect(page.locator("#g-chunks")).to_have_text("9 of 16")
    expect(page.locator(".v-detail")).to_contain_text("Chunk 8: level")
    expect(page.locator(".v-lanes line.v-now")).to_have_count(1)
    watched.shoot("dashboard-live")
    name = f"{unit}-cachegen.json"
    (run.cells / name).write_text((finished.cells / name).read_text())
    append(file, SessionEnd(row))
    expect(title).to_contain_text("first token after")
    expect(page.locator("#table tbody tr")).to_have_count(1)
    expect(page.locator("#facts")).to_contain_text("1 of 3 sessions")
    append(file, RunEnd("done"))
    expect(page.locator("#mode")).to_have_text("finished")


def test_it_connects_again_by_itself(tmp_path: Path, finished: Run, serve: Serve, open_page: Open) -> None:
    run = Run(tmp_path)
    run.create(finished.manifest)
    append(run.path / FILE_NAME, RunStart("made", "mininet", ["cachegen"], 3))
    page = open_page(serve(lambda: make_app(run, "t")) + "/t/").page
    expect(page.locator("#mode")).to_have_text("live")
    page.context.set_offline(True)
    page.context.set_offline(False)
    append(run.path / FILE_NAME, RunEnd("done"))
    expect(page.locator("#mode")).to_have_text("finished")


def test_on_a_phone(finished: Run, serve: Serve, open_page: Open) -> None:
    watched = open_page(serve(lambda: make_app(finished, "t")) + "/t/", width=390)
    expect(watched.page.locator(".v-title")).to_contain_text("over")
    assert fits(watched.page)
    watched.shoot("dashboard-phone")
