from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kvstream.testbed import report
from kvstream.testbed.config import experiment
from kvstream.testbed.report import export, figures, ladders, tables, timeline, tradeoff
from kvstream.testbed.report import page as report_page
from kvstream.testbed.report import sessions as report_sessions
from kvstream.testbed.report.material import Material
from kvstream.testbed.report.style import (
    _CODECS,
    _POLICIES,
    TEXT_COLOUR,
    Style,
    codec_style,
    ink_on,
    level_colours,
    scheme_style,
)
from kvstream.testbed.results import summary as summaries
from kvstream.testbed.results.folder import Run
from tests.testbed.made_run import make_run, manifest

pytest.importorskip("seaborn", reason="figures need seaborn, from the extra [run]")

ROOT = Path(__file__).parents[3]
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
    assert any("cachegen: SLO violations 0 %" in label for label in Page(page).labels)


def test_the_svg_in_the_page_takes_the_colour_of_its_text(page: str) -> None:
    assert "currentColor" in page
    assert "#262626" not in page


def test_verdict_failures_and_invalid_units_are_told(page: str) -> None:
    assert "Deadlines met and distortion over 11 units" in page
    assert "1 of 12 units excluded" in page
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
    row |= {"ttft_s": 0.5, "distortion": 0.01}
    section = report_page._fidelity([row])
    assert "In 0 of 1 session " in section
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
    assert "nothing to compare" in report.write(run).read_text()


def test_policies_and_codecs_have_colours_of_their_own_that_are_seen_on_both_papers() -> None:
    policies = [colour for colour, _ in _POLICIES.values()]
    codecs = [style.colour for style in _CODECS.values()]
    assert len({*policies, *codecs}) == len(policies) + len(codecs)
    for colour in {*policies, *codecs, *level_colours(6)} - {"#262626"}:
        assert contrast(colour, LIGHT) >= 3, colour
        assert contrast(colour, DARK) >= 3, colour


def row_of(policy: str, codec: str = "kvstream", **more: object) -> dict[str, object]:
    return {"scheme": policy.replace(",", "-"), "policy": policy, "codec": codec, "depth": 2, "overlap": True} | more


def as_line(style: Style) -> tuple[object, ...]:
    return style.colour, style.dash, style.width


def as_point(style: Style) -> tuple[object, ...]:
    return style.colour, style.marker, style.hollow


@pytest.mark.parametrize("look", [as_line, as_point])
@pytest.mark.parametrize("policy", [*_POLICIES, "./mine.py:Mine"])
def test_one_policy_on_several_codecs_can_be_told_apart(policy: str, look: Callable[[Style], object]) -> None:
    rows = [row_of(policy, codec, depth=depth) for codec in _CODECS for depth in (1, 2)]
    assert len({look(scheme_style(row)) for row in rows}) == len(rows)
    assert len({scheme_style(row).colour for row in rows}) == 1


@pytest.mark.parametrize("look", [as_line, as_point])
@pytest.mark.parametrize(
    "file", [experiment.MAIN_JOB, *sorted((ROOT / "examples").glob("*.toml"))], ids=lambda f: f.stem
)
def test_no_two_schemes_of_our_experiments_look_the_same(file: Path, look: Callable[[Style], object]) -> None:
    rows = [vars(scheme) | {"scheme": scheme.name} for scheme in experiment.load(file).schemes]
    assert len({look(scheme_style(row)) for row in rows}) == len(rows)


@pytest.mark.parametrize("look", [as_line, as_point])
@pytest.mark.parametrize(
    "settings",
    [("fixed,level=0", "fixed,level=1", "fixed,level=2", "fixed,level=3"), ("mpc", "mpc,horizon=1", "mpc,horizon=3"),
     ("./my_policy.py:MyPolicy", "./my_policy.py:MyPolicy,safety=0.6")],
)  # fmt: skip
def test_settings_of_one_policy_can_be_told_apart(settings: tuple[str, ...], look: Callable[[Style], object]) -> None:
    assert len({look(scheme_style(row_of(policy, scheme=policy))) for policy in settings}) == len(settings)


def test_a_look_depends_on_names_and_not_on_their_order() -> None:
    row = row_of("./mine.py:Mine")
    assert scheme_style(row) == scheme_style(dict(row))
    assert scheme_style(row_of("fixed,level=lowest", scheme="a-label")) == scheme_style(row_of("lowest"))
    assert scheme_style(row_of("oracle,margin=0.1", scheme="oracle")) == scheme_style(row_of("oracle"))
    assert scheme_style(row_of("oracle,margin=0.1")).marker != scheme_style(row_of("oracle")).marker
    assert codec_style("cachegen") == _CODECS["cachegen"]
    assert codec_style("cachegen,coder=ac") == dataclasses.replace(_CODECS["cachegen"], hollow=True)
    assert codec_style("other") == codec_style("other")


@pytest.mark.parametrize("n_levels", range(1, 17))
def test_digits_can_be_read_on_every_level(n_levels: int) -> None:
    for colour in (*level_colours(n_levels), TEXT_COLOUR):
        assert contrast(colour, ink_on(colour)) >= 4.5


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
    monkeypatch.setattr(report_sessions, "MAX_BYTES", 2_000)
    data, left_out = report_sessions.embedded(cells, {}, "049")
    kept = [one["unit_id"] for one in json.loads(data)]
    assert kept[0] == "049"
    assert 0 < left_out == 50 - len(kept)


def test_thinning_keeps_the_last_sample() -> None:
    samples = [{"t_s": k / 100, "capacity_bps": 1e6, "delivered_bytes": k} for k in range(1001)]
    link = report_sessions.link(samples)
    assert len(link["t"]) <= report_sessions.MAX_SAMPLES + 1
    assert link["delivered"][-1] == 1000


def test_a_simulated_session_shows_its_trace_and_its_bytes() -> None:
    row = {"trace": "steady", "offset_s": 0.0, "deadline_s": 1.0, "ttft_s": 0.6}
    chunk = {"last_byte_s": 0.5, "first_byte_s": 0.1, "bytes": 956_400}
    samples = report_sessions.virtual_link(row, [chunk])
    assert samples[-1]["delivered_bytes"] == pytest.approx(1e6, rel=1e-3)
    assert min(sample["capacity_bps"] for sample in samples) > 1e6
    assert report_sessions.virtual_link(row | {"trace": "./gone.csv"}, [chunk])[0]["capacity_bps"] == 0


def test_nothing_arrives_during_an_outage_and_no_more_than_the_link_carries() -> None:
    rates, hold_s = [10e6, 0.0, 2e6, 30e6], 0.1
    spec = "step,rates=10Mbps:0Mbps:2Mbps:30Mbps,hold=0.1s"
    row = {"trace": spec, "offset_s": 0.0, "deadline_s": 0.4, "ttft_s": 0.4}
    carried = sum(rates) * hold_s / 8.0 * 0.9564
    samples = report_sessions.virtual_link(row, [{"last_byte_s": 0.4, "first_byte_s": 0.0, "bytes": carried}])
    times_s, drawn_mbps = timeline.delivered_rate(samples)
    for t_s, until_s, mbps in zip(times_s[:-1], times_s[1:], drawn_mbps[:-1], strict=True):
        if until_s < 0.4:
            assert mbps <= max(rates[int(t_s / hold_s)], rates[int(until_s / hold_s)]) / 1e6 * 1.01, t_s
    dark = [mbps for t_s, mbps in zip(times_s, drawn_mbps, strict=True) if 0.101 < t_s < 0.18]
    assert dark
    assert max(dark) == 0.0


def material(run: Run, **change: object) -> Material:
    cells = list(run.load_cells())
    rows = [cell["row"] for cell in cells]
    summary = summaries.of_run(rows, run.manifest)
    return dataclasses.replace(report_page._material(summary, cells, run.manifest), **change)  # type: ignore[arg-type]


def drawn(painter: Callable[[Material], Any], of: Material) -> Any:
    """The axes of a figure; the figure itself is closed."""
    from matplotlib import pyplot

    with figures.theme():
        figure = painter(of)
        figure.draw_without_rendering()
        pyplot.close(figure)
    return figure.axes[0]


def test_names_of_levels_do_not_cover_each_other(run: Run) -> None:
    near = [{"name": f"bins x{k}", "distortion": 0.1 / 2**k, "bits_per_element": 2 + 0.15 * k} for k in range(5)]
    crossing = [{"name": f"{k}-bit", "distortion": 0.2 / 4**k, "bits_per_element": 1.6 + k} for k in range(3)]
    axes = drawn(ladders.ladders, material(run, levels={"cachegen": near, "uniform": crossing}))
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 8
    assert all(box.count_overlaps(boxes) == 1 for box in boxes), "each overlaps itself only"


@pytest.mark.parametrize(("factor", "scale"), [(1.0, "linear"), (100.0, "log")])
def test_times_far_apart_stand_on_a_logarithmic_axis(run: Run, factor: float, scale: str) -> None:
    rows = {
        name: [row | {"ttft_s": 0.9 * factor if name == "text" else 0.8} for row in rows]
        for name, rows in material(run).rows.items()
    }
    axes = drawn(figures._ttft, material(run, rows=rows))
    assert axes.get_xscale() == scale
    low, high = axes.get_xlim()
    assert low < 0.8 < 0.9 * factor < high
    assert len(axes.get_xticks()) >= 3


def test_a_curve_ends_at_the_share_that_arrived_and_has_few_steps(run: Run) -> None:
    many = [{"ttft_s": 0.2 + k / 1e4 if k < 3000 else None, "deadline_s": 1.0} for k in range(4000)]
    one = row_of("cachegen") | {"clairvoyant": False}
    axes = drawn(figures._ttft, material(run, rows={"cachegen": [one | row for row in many]}))
    curve = max(axes.get_lines(), key=lambda line: len(line.get_xdata()))
    assert curve.get_ydata()[-1] == pytest.approx(75)
    assert len(curve.get_xdata()) <= figures.MAX_STEPS + 3
    assert any(list(line.get_ydata()) == [50] for line in axes.get_lines()), "the marker at the median"


def test_many_dots_are_pixels(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "MAX_DOTS", 10)
    [regret] = [figure for figure in figures.draw(material(run), tmp_path) if figure.name == "regret"]
    assert "<image" in regret.svg.read_text()
    assert "data:image/png" in report_page.inline(regret)


def cells_of(section: str) -> dict[str, dict[str, str]]:
    """[scheme][heading without its small print]: the cell, of the table of schemes."""
    table = section.partition('id="scheme-table"')[2].partition("</table>")[0]
    heads = [re.split("<small>|</?tr", text)[0].strip() for text in re.split(r"<th scope=col[^>]*>", table)[1:]]
    heads[-1] = heads[-1].partition("</thead")[0]
    found = {}
    for row in re.findall(r"<tr data-row=.*?(?=<tr|<tbody|$)", table, re.DOTALL):
        name, *cells = re.split(r"<td[^>]*>", row)
        label = re.sub("<[^>]*>", "", name.partition("<th scope=row>")[2]).strip(" *†")
        found[label] = dict(zip(heads[1:], cells, strict=True))
    return found


def test_the_table_has_intervals_and_differences_of_distortion(run: Run) -> None:
    section = tables.schemes(material(run).summary, material(run))
    assert "vs fixed-highest <small>distortion, nats</small>" in section
    cells = cells_of(section)
    assert re.fullmatch(r"[\d.]+ <small>[\d.]+ to [\d.]+</small>", cells["cachegen"]["distortion, all sessions"])
    difference = cells["fixed-lowest"]["vs fixed-highest"]  # the later of the two columns of that name
    assert re.fullmatch(r"[-+\d.]+ <small>[-+\d.]+ to [-+\d.]+</small>", difference)


def test_a_row_has_eight_numbers_and_more_on_demand(run: Run) -> None:
    section = tables.schemes(material(run).summary, material(run))
    heads = section.partition("<thead>")[2].partition("</thead>")[0]
    assert heads.count("<th scope=col>") == 1 + 8
    assert heads.count("<th scope=col class=more>") == 4
    assert 'id="more"' in section


def test_columns_without_a_number_are_left_out(run: Run) -> None:
    empty = material(run)
    for entry in empty.summary["schemes"]:
        entry |= {"answers": 0, "measured_kl": None, "fidelity_n": 0}
    heads = next(iter(cells_of(tables.schemes(empty.summary, empty)).values())).keys()
    assert "TTFT p50" in heads
    assert heads.isdisjoint({"correct answers", "measured KL", "fidelity"})


def test_reference_lines_stand_apart(run: Run) -> None:
    made = material(run)
    *schemes, last = made.summary["schemes"]
    summary = made.summary | {"schemes": schemes, "references": [last | {"reference": True}]}
    section = tables.schemes(summary, dataclasses.replace(made, references={last["scheme"]: made.rows[last["scheme"]]}))
    bodies = section.split("<tbody>")[1:]
    assert len(bodies) == 2
    assert "Reference lines, on" in bodies[1]
    assert last["scheme"] in bodies[1]


def test_the_table_in_other_forms(run: Run) -> None:
    summary = material(run).summary
    [entry] = [entry for entry in summary["schemes"] if entry["scheme"] == "fixed-lowest"]
    rows = {row["scheme"]: row for row in csv.DictReader(export.csv_text(summary).splitlines())}
    assert float(rows["fixed-lowest"]["distortion"]) == entry["distortion"]
    assert rows["text"]["regret"] == ""
    assert list(rows) == [entry["scheme"] for entry in summary["schemes"]]
    lines = export.markdown(summary).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[1].startswith("| --- | ---:")
    latex = export.latex(summary).splitlines()
    columns = latex[0].partition("{tabular}")[2].strip("{}")
    assert {line.count("&") for line in latex if line.endswith(r"\\")} == {len(columns) - 1}
    assert not re.search(r"(?<!\\)[%#_]", export.latex(summary | {"schemes": [entry | {"scheme": "50%_of#it"}]}))


def test_the_report_opens_on_what_the_verdict_is_about(run: Run) -> None:
    made = material(run)
    about = made.summary["standing"]["winner"] or made.summary["standing"]["pareto"][0]
    assert made.session is not None
    assert made.session["row"]["scheme"] == about
    chosen = report_page._most_telling(list(run.load_cells()), "cachegen", "fixed-highest")
    assert chosen is not None
    late = {row["unit_id"] for row in made.rows["fixed-highest"] if not row["met"]}
    assert chosen["row"]["scheme"] == "cachegen"
    assert chosen["row"]["met"]
    assert chosen["row"]["unit_id"] in late


def test_an_invalid_run_has_no_headline_but_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, contexts=("docs",))
    report.write(run)
    assert (tmp_path / "figures" / "headline.svg").is_file()
    for file in list(run.cells.glob("*-cachegen.json"))[:2]:
        file.write_text(file.read_text().replace('"status": "ok"', '"status": "invalid"'))
    page = report.write(run).read_text()
    figure_names = {file.stem for file in (tmp_path / "figures").glob("*.svg")}
    assert figure_names.isdisjoint(figures.OF_RESULTS)
    assert "levels" in figure_names
    assert "No headline: 2 of 4 units are invalid: the link deviated from its trace" in page


def test_a_scheme_without_a_met_unit_is_said(run: Run) -> None:
    rows = {name: [row | {"regret": None} if name == "text" else row for row in found]
            for name, found in material(run).rows.items()}  # fmt: skip
    axes = drawn(figures._regret, material(run, rows=rows))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert "text (n = 0)" in labels
    assert {text.get_text().strip() for text in axes.texts} == {"no unit that it and the oracle met"}
    assert len(axes.texts) == sum(label.endswith("(n = 0)") for label in labels)


def test_sizes_are_of_a_context_where_they_are_known(run: Run) -> None:
    levels = [level | {"bytes": 1e6 * (at + 1)} for at, level in enumerate(material(run).levels["cachegen"])]
    axes = drawn(ladders.ladders, material(run, levels={"cachegen": levels}))
    assert axes.get_xlabel() == "size of a context's KV cache (MB)"
    assert list(axes.get_lines()[0].get_xdata()) == [1, 2, 3, 4]
    assert {text.get_color() for text in axes.texts} == {axes.get_lines()[0].get_color()}
    assert drawn(ladders.ladders, material(run)).get_xlabel() == "bits per element of the KV cache"


def test_axes_fit_what_is_drawn(run: Run) -> None:
    made = material(run)
    for entry in made.summary["schemes"]:
        entry |= {"met_rate": 0.97, "met_low": 0.95, "met_high": 0.99}
    low, high = drawn(tradeoff.plane, made).get_xlim()
    assert low < 1 < 5 < high < 12


def test_every_drawing_of_a_scheme_is_marked(page: str) -> None:
    for name in ("headline", "ttft"):
        figure = page.partition(f'id="figure-{name}"')[2].partition("</figure>")[0]
        assert set(re.findall(r'data-scheme="([^"]*)"', figure)) >= {"cachegen", "oracle", "fixed-lowest"}


@pytest.mark.parametrize(
    ("name", "rows", "folded"),
    [("uniform,low=5Mbps,seed={}", 1, False), ("link-{}.csv", 40, True)],
)
def test_many_traces_share_rows_or_are_folded(run: Run, name: str, rows: int, folded: bool) -> None:
    many = [row_of("cachegen") | {"trace": name.format(k), "met": k % 2 == 0} for k in range(40)]
    table = tables.by_trace(material(run, rows={"cachegen": many}))
    assert table.count("<tr><th scope=row>") == rows
    assert ("<details>" in table) == folded
    assert ("20/40" in table) == (rows == 1)


def test_over_synthetic_caches_the_verdict_comes_first_and_the_mark_beside_it(run: Run) -> None:
    summary = material(run).summary
    header = report_page._header(
        run.manifest, summary | {"verdict": "Synthetic caches, timing only. Simulated: a wins. b."}
    )
    assert '<h1 id="verdict">Simulated: a wins. <span class="mark">synthetic caches, timing only</span></h1>' in header
    assert "mark" not in report_page._header(run.manifest, summary)


def test_every_lane_has_what_was_done_on_it() -> None:
    from kvstream.testbed.report.timeline import spans_of

    first = {
        "level": 1, "request_s": 0.0, "last_byte_s": 0.2, "decode_start_s": 0.1, "decode_end_s": 0.25,
        "pieces_s": [[0.1, 0.12], [0.2, 0.25]],
    }  # fmt: skip
    second = {"level": "text", "request_s": 0.19, "last_byte_s": 0.3, "decode_start_s": 0.3, "decode_end_s": 0.5}
    third = {"level": 1, "request_s": 0.3, "last_byte_s": None}
    chunks = [first, second, third]
    assert spans_of(first, chunks) == {
        "transfer": [(0.0, 0.2)],
        "decode": first["pieces_s"],
    }
    assert spans_of(second, chunks) == {"transfer": [(0.2, 0.3)], "compute": [(0.3, 0.5)]}
    assert spans_of(third, chunks) == {}


def test_invalid_sessions_keep_their_numbers_greyed_out_beside_the_limit_that_failed():
    why = "CPU contention 0.31 s/s (limit 0.10)"
    row = {"unit_id": "000-docs", "scheme": "mpc", "repeats": 2, "capture": None, "ttft_s": 0.523, "distortion": 0.0123}
    invalid = row | {"fidelity": {"ok": False, "state": "invalid", "reasons": [why], "coverage": 0.91}}
    unjudged = row | {"fidelity": {"ok": False, "state": "unjudged", "reasons": ["unjudged: 3%"], "coverage": 0.03}}
    section = report_page._fidelity([invalid, unjudged, row | {"fidelity": {"ok": True}}])
    assert "In 1 of 3 sessions the link followed its trace" in section
    assert "In 1 too little of it could be judged" in section
    assert section.count("<tr class=greyed>") == 2
    [greyed] = [line for line in section.split("<tr") if why in line]
    assert "91%" in greyed
    assert "0.523" in greyed
    assert "<td>0.012<td>" in greyed
