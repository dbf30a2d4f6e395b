"""A run with several deadlines, reference lines, and the same experiment in the simulator beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvstream.testbed import report
from kvstream.testbed.config import experiment
from kvstream.testbed.report import figures, page, tables, tradeoff
from kvstream.testbed.report.material import Material
from kvstream.testbed.results import summary as summaries
from kvstream.testbed.results.folder import SIMULATED, Run
from kvstream.testbed.run import simulated

MADE = experiment.from_dict(
    {
        "name": "made",
        "contexts": ["docs", "code"],
        "contexts_in_turn": True,
        "traces": ["uniform,low=3Mbps,high=30Mbps,hold=0.1s,seed={seed}", "step-down-up", "wifi", "lte-walk"],
        "deadlines_s": [0.4, 0.8],
        "offsets": "random",
        "baseline": "buffer-based",
        "schemes": [
            {"policy": "buffer-based", "codec": "kvstream"},
            {"policy": "fixed,level=lowest", "codec": "kvstream", "label": "fixed-lowest"},
            {"policy": "text", "codec": "kvstream", "reference": True},
        ],
        "simulated_repetitions": 3,
    }
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    made = Run(folder)
    simulated.run_simulated(MADE, made, quiet=True)
    simulated.run_simulated(MADE.simulated(), Run(folder / SIMULATED), quiet=True)
    report.write(made)
    return made


@pytest.fixture(scope="module")
def material(run: Run) -> Material:
    cells = list(run.load_cells())
    summary = summaries.summarise([cell["row"] for cell in cells], run.compared, "buffer-based")
    return page._material(summary, cells, run.manifest, summaries.beside(run))


def test_reference_lines_have_rows_of_their_own(material: Material) -> None:
    assert list(material.rows) == ["buffer-based", "fixed-lowest"]
    assert [len(rows) for rows in material.references.values()] == [3]
    assert "† " not in tables.beside(material)
    table = tables.schemes(material.summary, material)
    assert "<abbr title='reference line" in table
    assert table.count("baseline") == 2


def test_the_page_has_the_simulated_table_beside(run: Run, material: Material) -> None:
    text = (run.path / "report.html").read_text()
    assert "The same in the simulator" in text
    assert "24 units of the same kinds of links" in text
    body = tables.beside(material).partition("<tbody>")[2]
    assert body.count("<tr>") == 2
    assert body.partition("<tr>")[2].count("<td>") == 2 * (4 + 2)
    alone = replace(material, simulated=None)
    assert tables.beside(alone) == ""


def test_the_headline_shows_both_quantities_at_each_deadline_measured_and_simulated(material: Material) -> None:
    from matplotlib import pyplot

    with figures.theme():
        figure = tradeoff.by_deadline(material)
        assert figure is not None
        pyplot.close(figure)
    left, right = figure.axes
    for axes in (left, right):
        assert len(axes.get_lines()) == 2 * 2
        assert all(list(line.get_xdata()) == [0.4, 0.8] for line in axes.get_lines())
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert sorted(labels) == ["buffer-based", "fixed-lowest"]
    entry = material.summary["deadlines"][0]["schemes"][0]
    measured = next(line for line in left.get_lines() if line.get_label() == "buffer-based")
    assert measured.get_ydata()[0] == pytest.approx(100 * (1 - entry["met_rate"]))
    with figures.theme():
        assert tradeoff.by_deadline(replace(material, summary=material.summary | {"deadlines": []})) is None


def test_all_deadlines_together_are_a_figure_too(run: Run) -> None:
    names = {path.stem for path in Path(run.path / "figures").glob("*.svg")}
    assert {"headline", "plane", "ttft"} <= names
