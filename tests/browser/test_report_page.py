"""The report as a person meets it: in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testbed import report
from tests.browser.conftest import Open
from tests.testbed.made_run import make_run

expect: Any = pytest.importorskip("playwright.sync_api", reason="needs the package playwright").expect
pytest.importorskip("seaborn", reason="figures need seaborn, from kvstream[run]")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("run")
    return report.write(make_run(folder)).as_uri()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_figures_are_there_and_the_page_fits(url: str, open_page: Open, width: int, scheme: str) -> None:
    watched = open_page(url, width, scheme)
    page = watched.page
    for name in ("headline", "ttft", "regret", "levels"):
        box = page.locator(f"#figure-{name} svg").bounding_box()
        assert box["width"] > 250
        assert box["height"] > 100
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    watched.shoot(f"report-{scheme}-{width}")


def test_a_unit_and_a_scheme_can_be_chosen(url: str, open_page: Open) -> None:
    page = open_page(url).page
    page.select_option("#unit", label="docs · steady,scale_mean=30Mbps · 1 s")
    page.get_by_role("radio", name="fixed-highest").check(force=True)
    assert "fixed-highest on docs over steady" in page.locator(".v-title").inner_text()
    assert "missed" in page.locator(".v-title").inner_text()
    page.reload()
    assert "fixed-highest on docs" in page.locator(".v-title").inner_text(), "the choice stands in the address"


def test_the_plot_is_drawn(url: str, open_page: Open) -> None:
    page = open_page(url).page
    colours = page.evaluate(
        """() => {
            const canvas = document.querySelector("#viewer canvas"), seen = new Set();
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            for (let i = 0; i < pixels.length; i += 4) seen.add(pixels.slice(i, i + 4).join());
            return seen.size;
        }"""
    )
    assert colours > 20


def test_chunks_by_mouse_and_by_keyboard(url: str, open_page: Open) -> None:
    page = open_page(url).page
    lanes = page.locator(".v-lanes")
    detail = page.locator(".v-detail")
    page.locator('.v-strip td[data-chunk="5"]').first.click()
    assert detail.inner_text().startswith("Chunk 5: level")
    assert "Why: estimate" in detail.inner_text()
    lanes.focus()
    page.keyboard.press("ArrowRight")
    assert detail.inner_text().startswith("Chunk 6:")
    page.keyboard.press("End")
    assert detail.inner_text().startswith("Chunk 15:")
    page.locator('.v-lanes [data-chunk="2"]').first.click()
    assert detail.inner_text().startswith("Chunk 2:")
    assert lanes.locator(".v-chunk.v-on").count() == 2


def test_the_table_of_chunks_holds_every_chunk(url: str, open_page: Open) -> None:
    page = open_page(url).page
    page.get_by_text("All chunks").click()
    expect(page.locator(".v-table tbody tr")).to_have_count(16)  # filled when the fold has opened
    assert "Mbit/s" in page.locator(".v-table tbody tr").first.inner_text()


def test_a_stretch_of_time_can_be_looked_at_closely(url: str, open_page: Open) -> None:
    page = open_page(url).page
    over = page.locator("#viewer .u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    wide = page.locator('.v-lanes rect[data-chunk="5"]').first.bounding_box()["width"]
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50, steps=5)
    page.mouse.up()
    page.wait_for_function(
        f"document.querySelector('.v-lanes rect[data-chunk=\"5\"]').getBoundingClientRect().width > {2 * wide}"
    )


def test_everything_that_acts_has_a_name(url: str, open_page: Open) -> None:
    """What a screen reader would say of a control must not be empty."""
    page = open_page(url).page
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("select, button, input, svg[role=img], [tabindex='0']")]
            .filter((e) => !(e.getAttribute("aria-label") || (e.labels && e.labels.length) || e.textContent.trim()))
            .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
