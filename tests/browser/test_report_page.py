"""The report as a person meets it: in a browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kvstream.testbed import report
from tests.browser.conftest import Open
from tests.testbed.made_run import make_run
from tests.testbed.report.test_report import contrast

expect: Any = pytest.importorskip("playwright.sync_api", reason="needs the package playwright").expect
pytest.importorskip("seaborn", reason="figures need seaborn, from the extra [run]")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("run")
    return report.write(make_run(folder)).as_uri()


def lanes(page: Any) -> dict[str, float]:
    """[name]: upper edge of every lane, by their beds and words."""
    names = page.locator(".v-lane").all_text_contents()
    tops = page.locator(".v-bed").evaluate_all("beds => beds.map((bed) => +bed.getAttribute('y') + 2)")
    return dict(zip(names, tops, strict=True))


def lane_of(page: Any, chunk: int) -> set[float]:
    rects = page.locator(f'.v-lanes rect[data-chunk="{chunk}"]')
    return set(rects.evaluate_all("rects => rects.map((rect) => +rect.getAttribute('y'))"))


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


def choose(page: Any, scheme: str) -> None:
    page.get_by_role("radio", name=scheme, exact=True).check(force=True)


def test_recomputing_has_a_lane_of_its_own(url: str, open_page: Open) -> None:
    page = open_page(url).page
    choose(page, "fixed-lowest")
    lane = lanes(page)
    assert list(lane) == ["transfer", "decode", "compute"]
    assert lane_of(page, 3) == {lane["transfer"], lane["decode"]}
    prefill = page.locator(".v-prefill")
    assert float(prefill.get_attribute("y")) == lane["compute"]
    choose(page, "text")
    assert lane_of(page, 3) == {lane["transfer"], lane["compute"]}


def test_the_best_plan_is_not_called_by_a_scheme_s_name(url: str, open_page: Open) -> None:
    page = open_page(url).page
    choose(page, "oracle")
    assert page.locator(".v-strip th").all_inner_texts() == ["oracle", "optimum"]
    assert "(optimum" in page.locator(".v-title").inner_text()
    assert "(optimum: level" in page.locator(".v-detail").inner_text()


INKS = """() => {
    const probe = document.body.appendChild(document.createElement("i"));
    const plain = (colour) => { probe.style.color = colour; return getComputedStyle(probe).color; };
    const fill = (node) => getComputedStyle(node).fill;
    const cells = [...document.querySelectorAll(".v-strip td")];
    const words = [...document.querySelectorAll("text.v-digit")];
    return [...cells.map((td) => [getComputedStyle(td).color, plain(td.style.getPropertyValue("--level"))]),
            ...words.map((word) => [fill(word), fill(word.previousElementSibling)])];
}"""
"""[(ink, paper)] of every digit and word on a level's colour, as rgb(...)."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_digits_can_be_read_on_their_colours(url: str, open_page: Open, scheme: str) -> None:
    page = open_page(url, scheme=scheme).page
    for name in ("cachegen", "buffer-based", "text", "fixed-highest"):
        choose(page, name)
        pairs = page.evaluate(INKS)
        assert len(pairs) >= 32
        assert min(contrast(as_hex(ink), as_hex(paper)) for ink, paper in pairs) >= 4.5


def as_hex(colour: str) -> str:
    """`#rrggbb` of `rgb(r, g, b)`."""
    return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", colour)[:3])


def test_on_a_phone_the_numbers_stay_in_sight(url: str, open_page: Open) -> None:
    """The first column is sticky: if it were wide it would cover them. The axis on the right needs room for a size."""
    page = open_page(url, 390).page
    first = page.locator("#by-trace tbody th").evaluate_all(
        "cells => cells.map((c) => c.getBoundingClientRect().width)"
    )
    assert max(first) <= 0.41 * 390
    right = page.evaluate(
        """() => document.querySelector("#viewer canvas").getBoundingClientRect().right
               - document.querySelector("#viewer .u-over").getBoundingClientRect().right"""
    )
    assert right >= 62  # "1.25 MB" in 12 px, the tick and the gap


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


def names(page: Any) -> list[str]:
    return [text.split()[0] for text in page.locator("#scheme-table tr[data-row] th").all_inner_texts()]


def test_the_table_is_sorted_and_has_more_columns(url: str, open_page: Open) -> None:
    page = open_page(url).page
    before = names(page)
    page.get_by_role("button", name=re.compile("^TTFT p50")).click()
    head = page.locator("#scheme-table th[aria-sort]")
    expect(head).to_have_attribute("aria-sort", "descending")
    slowest = names(page)
    assert slowest[0] == "text"
    page.get_by_role("button", name=re.compile("^TTFT p50")).click()
    expect(head).to_have_attribute("aria-sort", "ascending")
    assert names(page) == slowest[::-1] != before
    page.get_by_role("button", name="scheme", exact=True).click()
    assert names(page) in (sorted(before), sorted(before, reverse=True))
    seen = "[...document.querySelectorAll('#scheme-table thead th')].filter((th) => th.offsetParent).length"
    assert page.evaluate(seen) == 9
    page.get_by_role("button", name="more columns").click()
    assert page.evaluate(seen) == 13
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_schemes_are_hidden_in_every_figure(url: str, open_page: Open) -> None:
    page = open_page(url).page
    drawn = page.locator("#figure-ttft [data-scheme=cachegen]").first
    expect(drawn).to_be_visible()
    page.locator(".chips").get_by_label("cachegen", exact=True).uncheck()
    expect(drawn).to_be_hidden()
    expect(page.locator("#figure-headline [data-scheme=cachegen]").first).to_be_hidden()
    expect(page.locator("#figure-headline [data-scheme=oracle]").last).to_be_visible()  # its marker
    expect(page.locator("#scheme-table tr.off")).to_have_count(1)


def test_two_sessions_stand_one_above_the_other(url: str, open_page: Open) -> None:
    page = open_page(url).page
    choose(page, "cachegen")
    titles = page.locator(".v-title")
    expect(page.locator("#viewer-below")).to_be_hidden()
    page.select_option("#beside", "fixed-highest")
    expect(titles).to_have_count(2)
    assert [title.split(" on ")[0] for title in titles.all_inner_texts()] == ["cachegen", "fixed-highest"]
    assert "delivered, fixed-highest" in page.locator("#viewer .u-legend").inner_text()
    marks = page.locator(".v-lanes .v-deadline").evaluate_all("lines => lines.map((line) => +line.getAttribute('x1'))")
    assert abs(marks[0] - marks[1]) < 1.5, "one time axis for both"
    page.reload()
    expect(titles).to_have_count(2)
    page.select_option("#beside", "")
    expect(page.locator("#viewer-below")).to_be_hidden()
    assert "fixed-highest" not in page.locator("#viewer .u-legend").inner_text()


def test_the_table_can_be_taken_along(url: str, open_page: Open) -> None:
    page = open_page(url).page
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").click()
    assert download.value.suggested_filename == "schemes.csv"
    assert Path(download.value.path()).read_text().startswith("scheme,policy,codec")


def test_print_has_no_controls_and_full_pages(url: str, open_page: Open, tmp_path: Path) -> None:
    page = open_page(url).page
    page.emulate_media(media="print")
    for control in (".chips", ".tools", "#picker"):
        expect(page.locator(control)).to_be_hidden()
    expect(page.locator("#figure-timeline")).to_be_visible()
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert len(re.findall(rb"/Type /Page\b", (tmp_path / "report.pdf").read_bytes())) <= 5
