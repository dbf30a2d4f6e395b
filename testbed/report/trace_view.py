"""A trace drawn: in the terminal, or as a figure file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvstream.testbed.errors import MachineError, install
from kvstream.testbed.report.style import INK
from kvstream.traces.errors import TraceError
from kvstream.traces.trace import Floats, Trace
from kvstream.traces.units import format_rate, format_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 10
"""Rows of a drawing in the terminal."""
MAX_POINTS = 5000
"""Rows that a figure draws as they are; a longer trace is averaged."""
FIGURES = (".svg", ".png", ".pdf")
LINE = "#0b7abf"

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_AFTER = {"loop": "then repeats", "hold": "then holds the last rate", "stop": "then stops"}


def draw_terminal(trace: Trace, width: int | None = None) -> str:
    """The trace as lines of text: what it is, its rates over time (or chunk), its story and where it comes from.

    Each column is the exact mean over its share of the trace; `·` is a column in which nothing is sent. `width` is that
    of the terminal unless given. In a terminal the drawing has colour, in a pipe it is plain.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(width=width, highlight=False)
    total = max(console.width, 40)
    axis = [format_rate(trace.peak_bps), format_rate(trace.peak_bps / 2), "0"]
    margin = max(map(len, axis)) + 1
    heights, ends = _columns(trace, total - margin - 2)
    text = Text()
    text.append(f"{trace.name}\n", style="bold")
    text.append(_facts(trace) + "\n\n")
    label = {HEIGHT: axis[0], HEIGHT // 2: axis[1], 1: axis[2]}
    for row in range(HEIGHT, 0, -1):
        text.append(f"{label.get(row, ''):>{margin}} ", style="dim")
        text.append("┤" if row in label else "│", style="dim")
        text.append("".join(_cell(height, row) for height in heights), style="cyan")
        text.append("\n")
    first, last = ends
    gap = " " * max(1, len(heights) - len(first) - len(last))
    text.append(" " * (margin + 2) + first + gap + last + "\n", style="dim")
    if trace.story:
        text.append(f"\n{trace.story}\n")
    for record in trace.provenance:
        did = "".join(f"; {transform}" for transform in record.transforms)
        how = f"{record.format}, {record.chosen}" if record.chosen else record.format
        text.append(f"\nfrom {record.source} ({how}, licence {record.licence}){did}", style="dim")
    with console.capture() as captured:
        console.print(text)
    return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").splitlines())


def _facts(trace: Trace) -> str:
    n = len(trace)
    extent = f"{n} chunks" if trace.per == "chunk" else f"{format_time(trace.duration_s)} in {n} row{'s' * (n != 1)}"
    held = {"capacity": "layer-2 capacity", "achieved": "layer-2 rate from achieved throughput"}[trace.kind]
    low, mean, high = map(format_rate, (float(trace.rates_bps.min()), trace.mean_bps, trace.peak_bps))
    return f"{extent}, {_AFTER[trace.end]}; mean {mean}, {low} to {high}; {held}"


def _columns(trace: Trace, width: int) -> tuple[Floats, tuple[str, str]]:
    """Column heights from 0 to HEIGHT, and the labels of the axis' two ends."""
    if trace.per == "chunk":
        chunks = min(len(trace), width)
        each = max(1, min(width // chunks, 4))
        rates, ends = np.repeat(trace.rates_bps[:chunks], each), ("chunk 0", f"{chunks - 1}")
    else:
        edges = np.minimum(np.linspace(0.0, trace.duration_s, width + 1), trace.duration_s)
        # stop at the last row's end, where a loop would begin again
        bits = trace.with_end("stop").bits_by(edges)
        rates, ends = np.diff(bits) / np.diff(edges), ("0 s", format_time(trace.duration_s))
    return HEIGHT * np.clip(rates / (trace.peak_bps or 1.0), 0.0, 1.0), ends


def _cell(height: float, row: int) -> str:
    if row == 1:
        if height <= 1e-9:
            return "·"
        return _EIGHTHS[max(1, min(8, round(height * 8)))]
    return _EIGHTHS[max(0, min(8, round((height - row + 1) * 8)))]


def draw_figure(trace: Trace, path: str | Path) -> None:
    """Write the trace as an SVG, PNG or PDF figure; delay and loss, where it has them, in panels below.

    Raises TraceError for another kind of file or one that cannot be written, MachineError without seaborn.
    """
    path = Path(path)
    if path.suffix.lower() not in FIGURES:
        raise TraceError(f"{path}: a figure must end in {', '.join(FIGURES)}")
    try:
        import matplotlib
        import seaborn
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MachineError(f"figures need {error.name}; install it with: {install(error.name)}") from None
    columns: list[tuple[str, Floats]] = [_scaled(trace)]
    if trace.delay_s is not None:
        columns.append(("delay (ms)", trace.delay_s * 1e3))
    if trace.loss is not None:
        columns.append(("loss (%)", trace.loss * 100.0))
    look = {
        **seaborn.axes_style("ticks"),
        "svg.fonttype": "none",
        "svg.hashsalt": "kvstream",
        "text.color": INK,
        "axes.labelcolor": INK,
    }
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(8.0, 2.4 + 1.2 * len(columns)), layout="constrained")
        FigureCanvasAgg(figure)
        ratios = [3.0] + [1.0] * (len(columns) - 1)
        panels = figure.subplots(len(columns), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        for axes, (label, values) in zip(panels, columns, strict=True):
            _steps(axes, trace, values)
            axes.set_ylabel(label)
            seaborn.despine(ax=axes)
        mean = float(columns[0][1].max()) * trace.mean_bps / (trace.peak_bps or 1.0)
        panels[0].axhline(mean, color=INK, linewidth=0.8, linestyle="--", label=f"mean {format_rate(trace.mean_bps)}")
        panels[0].legend(frameon=False, loc="upper right")
        panels[0].set_title(trace.name, loc="left", parse_math=False)
        panels[-1].set_xlabel("chunk" if trace.per == "chunk" else f"time (s), {_AFTER[trace.end]}")
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
        try:
            figure.savefig(path, dpi=160, metadata=metadata)
        except OSError as error:
            raise TraceError(f"{path}: cannot write this figure ({error.strerror or error})") from None


def _scaled(trace: Trace) -> tuple[str, Floats]:
    for factor, unit in ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")):
        if trace.peak_bps >= factor:
            return f"rate ({unit})", trace.rates_bps / factor
    return "rate (bit/s)", trace.rates_bps


def _steps(axes: Axes, trace: Trace, values: Floats) -> None:
    """Draw a column as steps, each row from its start to its end."""
    widths = np.ones(len(trace)) if trace.per == "chunk" else trace.durations_s
    edges = np.concatenate(([0.0], np.cumsum(widths)))
    if len(values) > MAX_POINTS:
        coarse = np.linspace(0.0, edges[-1], MAX_POINTS + 1)
        sums = np.concatenate(([0.0], np.cumsum(widths * values)))
        values, edges = np.diff(np.interp(coarse, edges, sums)) / np.diff(coarse), coarse
    axes.stairs(values, edges, fill=True, color=LINE, alpha=0.25)
    axes.stairs(values, edges, color=LINE, linewidth=1.2)
    axes.set_xlim(0.0, float(edges[-1]))
    axes.set_ylim(0.0, max(float(values.max()) * 1.15, 1e-9))
