"""Traces drawn: what the terminal shows is what the trace holds, and figures come out as files."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from kvstream.testbed.report import trace_view
from kvstream.traces import library
from kvstream.traces.errors import TraceError
from kvstream.traces.generators import constant, paper_uniform, square, uniform
from kvstream.traces.trace import Trace


def plot(trace: Trace, width: int = 100) -> list[str]:
    """The columns of the drawing, as rows of equal length from the top."""
    lines = trace_view.draw_terminal(trace, width).splitlines()
    rows = [line.split(mark, 1)[1] for line in lines for mark in ("┤", "│") if mark in line]
    assert len(rows) == trace_view.HEIGHT
    longest = max(map(len, rows))
    return [row.ljust(longest) for row in rows]


def height(rows: list[str], column: int) -> float:
    return sum(" ▁▂▃▄▅▆▇█".find(row[column]) / 8 for row in rows if row[column] != "·")


def test_columns_are_as_high_as_the_rate():
    rows = plot(square(high=40e6, low=10e6, period=10.0, duty=0.5, length=10.0))
    n = len(rows[0])
    assert n > 70
    assert height(rows, n // 4) == trace_view.HEIGHT
    assert height(rows, 3 * n // 4) == pytest.approx(trace_view.HEIGHT / 4, abs=0.13)


def test_an_outage_is_a_dot_and_a_trickle_is_not():
    rows = plot(Trace("t", [1.0, 1.0, 1.0], [40e6, 0.0, 1e3]))
    n = len(rows[0])
    assert rows[-1][n // 2] == "·"
    assert rows[-1][5 * n // 6] == "▁"


def test_words_say_what_it_is():
    shown = trace_view.draw_terminal(library.load("lab-cliff"), 90)
    assert "lab-cliff" in shown
    assert "then holds the last rate" in shown
    assert "Lesson 2." in shown
    assert "from step,rates=18000000bps:3200000bps" in " ".join(shown.split())
    assert "layer-2 capacity" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 90


def test_per_chunk_and_flat_and_empty_links_can_be_drawn():
    assert "64 chunks" in trace_view.draw_terminal(paper_uniform(), 80)
    assert height(plot(constant()), 10) == trace_view.HEIGHT
    assert set(plot(Trace("dead", [1.0], [0.0]))[-1]) == {"·"}
    assert trace_view.draw_terminal(uniform(), 10)


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
@pytest.mark.parametrize(
    "trace",
    [
        library.load("lte-walk"),
        paper_uniform(),
        Trace("$x_1$ & <b>", [1.0, 2.0], [5e3, 0.0], delay_s=[0.01, 0.02], loss=[0.0, 0.1]),
        uniform(hold=0.001, length=10.0),
    ],
    ids=["walk", "per-chunk", "columns", "long"],
)
def test_figures_are_written(trace, suffix, tmp_path):
    pytest.importorskip("seaborn", reason="figures need seaborn")
    path = tmp_path / f"trace{suffix}"
    trace_view.draw_figure(trace, path)
    if suffix == ".svg":
        text = "".join(ElementTree.parse(path).getroot().itertext())
        assert trace.name in text
        assert "mean" in text
        assert ("delay (ms)" in text) == (trace.delay_s is not None)
    else:
        assert path.read_bytes().startswith((b"\x89PNG", b"%PDF"))


def test_bad_targets_are_refused(tmp_path):
    pytest.importorskip("seaborn", reason="figures need seaborn")
    with pytest.raises(TraceError, match=r"must end in \.svg"):
        trace_view.draw_figure(constant(), tmp_path / "trace.gif")
    with pytest.raises(TraceError, match="cannot write"):
        trace_view.draw_figure(constant(), tmp_path / "no" / "trace.png")
