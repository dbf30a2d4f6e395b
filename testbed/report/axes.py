"""What the figures of a report share: size, axes, legend, and the markers of schemes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from kvstream.testbed.report.style import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

WIDTH, HEIGHT = 5.4, 3.9
"""Inches: small enough to stay legible on a phone."""
ROOM: Final = 66
"""Characters per line of a legend."""
ROWS: Final = 3
"""Of a legend, for which a figure's usual height has room; every other one makes it higher by ROW_HEIGHT inches."""
ROW_HEIGHT: Final = 0.19
FAR_APART: Final = 20
"""Distortions that differ by more than this factor get a logarithmic axis."""
NEAR: Final = 3
"""Times within this factor get a linear axis."""
OFFSETS: Final = (
    *((5, 4, "left"), (-5, -10, "right"), (5, -10, "left"), (-5, 4, "right"), (8, -3, "left"), (-8, -3, "right")),
    *((5, 13, "left"), (-5, -19, "right"), (5, -19, "left"), (-5, 13, "right"), (24, 4, "left"), (-24, -10, "right")),
)
"""Candidate positions of a label, in points from its level, nearest first."""
STEP: Final = 3
"""Pixels between the points at which collisions with a line are checked."""
STAR: Final = 1.7
"""Stars look smaller than other markers of the same size."""


def new(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of the report's width with one pair of axes."""
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(WIDTH, height))


def point(style: Style, size: float) -> dict[str, Any]:
    """matplotlib's keywords for a scheme's marker, `size` in points."""
    return {
        "marker": style.marker,
        "markersize": size * (STAR if style.marker == "*" or isinstance(style.marker, tuple) else 1.0),
        "color": style.colour,
        "markerfacecolor": "none" if style.hollow else style.colour,
        "markeredgecolor": style.colour,
        "markeredgewidth": 1.4,
    }


def label_of(entry: Mapping[str, Any]) -> str:
    """A scheme's name in every legend."""
    return str(entry["scheme"]) + (" *" if entry["clairvoyant"] else "")


def group_of(scheme: str) -> str:
    """Marks what is drawn of a scheme, so that the page can hide it."""
    return "scheme:" + re.sub(r"[^A-Za-z0-9._-]", "_", scheme)


def line(style: Style) -> dict[str, Any]:
    """matplotlib's keywords for a scheme's line."""
    return {"color": style.colour, "linestyle": style.dash, "linewidth": style.width}


def distortion_axis(axes: Axes, values: Sequence[float]) -> None:
    """From zero; logarithmic for values far apart, with zero below the smallest."""
    from matplotlib.ticker import NullLocator

    axes.set_ylabel("distortion (nats of KL)")
    positive = [value for value in values if value > 0]
    if not positive or max(positive) <= FAR_APART * min(positive):
        axes.set_ylim(bottom=0)
        return
    low, high = min(positive) / 1.5, max(positive) * 1.5
    ticks = decade_ticks(low, high)
    if len(positive) < len(values):
        axes.set_yscale("symlog", linthresh=low, linscale=0.3)
        low, ticks = 0.0, [0.0, *ticks]
    else:
        axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def time_axis(axes: Axes, low: float, high: float) -> None:
    """From `low` to `high`, both above 0: logarithmic if they are far apart."""
    from matplotlib.ticker import NullLocator

    axes.set_xlim(low, high)
    if high > NEAR * low:
        axes.set_xscale("log")
        ticks = decade_ticks(low, high)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())


def decade_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... from `low` to `high`; only powers of ten where these would be too many."""
    within = (1, 2, 5) if high < 1000 * low else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**decade for decade in decades for step in within if low <= step * 10.0**decade <= high]


def legend(axes: Axes, handle: float = 2.8) -> None:
    """Below the axes, which keep the whole width and, as the figure grows for it, their height. Lines need a `handle`
    that shows a whole dash, points a short one."""
    figure: Any = axes.get_figure()
    labels = axes.get_legend_handles_labels()[1]
    room = ROOM * figure.get_figwidth() / WIDTH
    columns = max(1, min(len(labels), int(room / (max(map(len, labels), default=0) + 2 * handle))))
    rows = -(-len(labels) // columns)
    columns = max(1, -(-len(labels) // max(1, rows)))
    figure.set_figheight(figure.get_figheight() + max(0, rows - ROWS) * ROW_HEIGHT)
    figure.legend(loc="outside lower center", ncols=columns, fontsize="small", handlelength=handle, columnspacing=1.2)


def share_axis(axis: Any, values: Sequence[float], room: float = 0.08) -> None:
    """Percentages: limits that fit the values with room on both sides, at least ten points apart."""
    low, high = min(values), max(values)
    more = max(room * (high - low), (10 - (high - low)) / 2)
    limit = axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim
    limit(max(low - more, -2.0), min(high + more, 102.0))


def label_points(axes: Axes, names: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each label (text, x, y, colour) at its first position that is free of lines and other labels."""
    figure: Any = axes.get_figure()
    figure.draw_without_rendering()  # computes where the lines are
    drawn = [at for curve in axes.get_lines() for at in _along(axes.transData.transform(curve.get_xydata()))]
    taken: list[Bbox] = []
    for text, x, y, colour in names:
        for dx, dy, side in OFFSETS:
            note = axes.annotate(text, (x, y), (dx, dy), ha=side, textcoords="offset points", fontsize="x-small",
                                 color=colour)  # fmt: skip
            note.set_in_layout(False)  # the axes stay where they are
            box = note.get_window_extent()
            inside = figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            if inside and not (box.count_overlaps(taken) or any(box.contains(*at) for at in drawn)):
                taken.append(box.padded(2 * STEP))
                break
            note.remove()
        else:  # no room: better over a line than nowhere
            axes.annotate(text, (x, y), OFFSETS[0][:2], textcoords="offset points", fontsize="x-small", color=colour)


def _along(corners: Any) -> Iterator[tuple[float, float]]:
    """Closely spaced points on the line through `corners`, in pixels."""
    yield from corners
    for (x0, y0), (x1, y1) in pairwise(corners):
        steps = max(1, round(max(abs(x1 - x0), abs(y1 - y0)) / STEP))
        yield from ((x0 + (x1 - x0) * k / steps, y0 + (y1 - y0) * k / steps) for k in range(1, steps))
