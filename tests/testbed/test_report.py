from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from testbed import report
from testbed.report import page as report_page
from testbed.report import sessions as report_sessions
from testbed.report.style import _KNOWN, level_colours, scheme_style
from testbed.results import Run
from tests.testbed.made_run import make_run, manifest

pytest.importorskip("seaborn", reason="figures need seaborn, from kvstream[run]")

ALIASES = ("lowest", "highest")
DARK, LIGHT = "#14181d", "#ffffff"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make_run(tmp_path_factory.mktemp("run"))
    report.write(run)
    return run


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return (run.path / "report.html").read_text()


class Page(HTMLParser):
    """Ids, and every attribute that could make a browser fetch something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.fetches: list[str] = []
        self.labels: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.labels += [given["aria-label"] or ""] if "aria-label" in given else []
        loads = {"script": "src", "img": "src", "link": "href", "iframe": "src", "image": "href"}
        if tag in loads and given.get(loads[tag]):
            self.fetches.append(given[loads[tag]] or "")


def test_the_page_fetches_nothing(page: str) -> None:
    assert [url for url in Page(page).fetches if not url.startswith("data:")] == []
    assert "@import" not in page
    assert not re.search(r"url\(\s*['\"]?https?:", page)


def test_ids_are_unique_though_figures_are_inlined(page: str) -> None:
    ids = Page(page).ids
    assert len(ids) == len(set(ids))


def test_every_figure_is_on_disk_in_both_forms_and_described_in_the_page(run: Run, page: str) -> None:
    for name in ("headline", "ttft", "regret", "levels", "timeline"):
        assert (run.path / "figures" / f"{name}.png").stat().st_size > 5_000
        assert "<svg" in (run.path / "figures" / f"{name}.svg").read_text()
        assert f'id="figure-{name}"' in page
    assert any("cachegen: deadline missed in 0 %" in label for label in Page(page).labels)


def test_the_svg_in_the_page_takes_the_colour_of_its_text(page: str) -> None:
    assert "currentColor" in page
    assert "#262626" not in page


def test_verdict_failures_and_invalid_units_are_told(page: str) -> None:
    assert "meets the deadline" in page
    assert "1 of 9 units left out" in page
    assert "text: 1 session failed" in page
    assert "p95 error 31 % over 5 %" in page


def test_captures_have_a_table_of_their_own() -> None:
    said = {
        "ok": False,
        "rtt_min_s": None,
        "rtt_s": 0.05,
        "one_way_s": 0.04,
        "retransmitted_bytes": 1448,
        "error": 0.02,
    }
    row = {"unit_id": "000-docs", "scheme": "<b>", "fidelity": {"ok": True}, "repeats": 0, "capture": said}
    section = report_page._fidelity([row])
    assert "in 0 of 1 sessions" in section
    assert "&lt;b&gt;<td>–<td>0.05<td>0.04<td>1448<td>0.02" in section
    assert "Packets were recorded" not in report_page._fidelity([row | {"capture": None}])


def test_what_the_numbers_depend_on_is_told(page: str) -> None:
    for fact in ("0123456789ab", "2 cores of a processor", "6.1.0-test", "torch 2.13.0", "9f1c2ab0 f1f1f1f1f1f1"):
        assert fact in page, fact
    assert "steady,scale_mean=30Mbps abababababab" in page
    assert "cachegen cdcdcdcdcdcd" in page
    assert "&quot;cc&quot;: &quot;cubic&quot;" in page
    assert "<dt>delay and loss<dd><code>delay=20ms: nfqueue</code>" in page


def test_names_from_a_run_are_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path, contexts=("docs",), spoil=False)
    text = "<script>alert(1)</script>"
    for cell in run.cells.glob("*.json"):
        cell.write_text(cell.read_text().replace("steady,scale_mean=30Mbps", text))
    assert text not in report.write(run).read_text()


def test_a_run_without_sessions_has_a_page_that_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.create(manifest())
    assert "nothing can be compared" in report.write(run).read_text()


def test_known_schemes_look_different_and_can_be_seen_on_both_papers() -> None:
    looks = [(style.colour, style.marker, style.dash) for name, style in _KNOWN.items() if name not in ALIASES]
    assert len(set(looks)) == len(looks)
    for colour in {style.colour for style in _KNOWN.values()} - {"#262626"} | set(level_colours(6)):
        assert contrast(colour, LIGHT) >= 3, colour
        assert contrast(colour, DARK) >= 3, colour


def test_an_unknown_scheme_keeps_its_look_from_run_to_run() -> None:
    row = {"scheme": "mine", "policy": "./mine.py:Mine", "depth": 2, "overlap": True}
    assert scheme_style(row) == scheme_style(dict(row))
    assert scheme_style(row | {"depth": 1}).hollow


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_the_viewer_gets_every_session_and_no_closing_tag_can_escape_it(page: str, run: Run) -> None:
    data = re.search(r'<script type="application/json" id="session-data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    sessions = json.loads(data[1])
    assert len(sessions) == len(run.rows())
    cell = next(cell for cell in run.load_cells() if cell["row"]["scheme"] == "cachegen")
    shown = next(
        one for one in sessions if (one["unit_id"], one["scheme"]) == (cell["row"]["unit_id"], cell["row"]["scheme"])
    )
    assert [chunk["level"] for chunk in shown["chunks"]] == cell["row"]["levels"]
    assert shown["link"]["delivered"][-1] == cell["link"][-1]["delivered_bytes"]


def test_a_large_run_leaves_units_out_of_the_viewer_but_never_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"scheme": "a", "codec": "c", "levels": [0], "oracle_levels": [], "deadline_s": 1.0, "ttft_s": 0.9}
    row |= {"trace": "steady", "offset_s": 0.0}
    cells = [{"row": row | {"unit_id": f"{n:03d}"}, "chunks": [], "link": []} for n in range(50)]
    monkeypatch.setattr(report_sessions, "MOST_BYTES", 2_000)
    data, left_out = report_sessions.embedded(cells, {}, "049")
    kept = [one["unit_id"] for one in json.loads(data)]
    assert kept[0] == "049"
    assert 0 < left_out == 50 - len(kept)


def test_thinning_keeps_the_last_sample() -> None:
    samples = [{"t_s": k / 100, "capacity_bps": 1e6, "delivered_bytes": k} for k in range(1001)]
    link = report_sessions.link(samples)
    assert len(link["t"]) <= report_sessions.MOST_SAMPLES + 1
    assert link["delivered"][-1] == 1000


def test_a_simulated_session_shows_its_trace_and_its_bytes() -> None:
    row = {"trace": "steady", "offset_s": 0.0, "deadline_s": 1.0, "ttft_s": 0.6}
    chunk = {"last_byte_s": 0.5, "first_byte_s": 0.1, "bytes": 956_400}
    samples = report_sessions.virtual_link(row, [chunk])
    assert samples[-1]["delivered_bytes"] == pytest.approx(1e6, rel=1e-3)
    assert min(sample["capacity_bps"] for sample in samples) > 1e6
    assert report_sessions.virtual_link(row | {"trace": "./gone.csv"}, [chunk])[0]["capacity_bps"] == 0


def test_another_codec_under_the_same_policy_looks_related_but_different() -> None:
    one = {"scheme": "cachegen", "policy": "cachegen", "depth": 2, "overlap": True}
    looks = [scheme_style(row) for row in (one, one | {"scheme": "cachegen-codec"}, one | {"depth": 1})]
    assert len({look.colour for look in looks}) == 1
    assert len({(look.marker, look.dash, look.hollow) for look in looks}) == 3


def test_every_lane_has_what_was_done_on_it() -> None:
    from testbed.report.timeline import spans_of

    first = {
        "level": 1, "request_s": 0.0, "last_byte_s": 0.2, "decode_start_s": 0.1, "decode_end_s": 0.25,
        "pieces_s": [[0.1, 0.12], [0.2, 0.25]], "copies_s": [[0.05, 0.06], [0.19, 0.2]],
    }  # fmt: skip
    second = {"level": "text", "request_s": 0.19, "last_byte_s": 0.3, "decode_start_s": 0.3, "decode_end_s": 0.5}
    third = {"level": 1, "request_s": 0.3, "last_byte_s": None}
    chunks = [first, second, third]
    assert spans_of(first, chunks) == {
        "transfer": [(0.0, 0.2)],
        "copy": first["copies_s"],
        "decode": first["pieces_s"],
    }
    assert spans_of(second, chunks) == {"transfer": [(0.2, 0.3)], "compute": [(0.3, 0.5)]}
    assert spans_of(third, chunks) == {}
