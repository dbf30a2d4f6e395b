"""What the figures of a report share: their size, their axes, their legend, and how a scheme's point is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from testbed.report.style import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.4, 3.9
"""Inches: small enough that the writing can still be read when a phone shrinks it."""
ROOM: Final = 66
"""Characters of a legend that stand side by side."""
FAR_APART: Final = 20
"""Distortions that differ by more than this factor stand on a logarithmic axis."""
NEAR: Final = 3
"""Times within this factor stand on a linear axis."""
STAR: Final = 1.7
"""Stars look smaller than other markers of their size."""


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


def line(style: Style) -> dict[str, Any]:
    """matplotlib's keywords for a scheme's line."""
    return {"color": style.colour, "linestyle": style.dash, "linewidth": style.width}


def distortion_axis(axes: Axes, values: Sequence[float]) -> None:
    """From zero; where values lie far apart, logarithmic, with zero (nothing is lost) below the smallest."""
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
    """From `low` to `high`, both above 0: logarithmic where they lie far apart."""
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
    """Below the axes, which keep the whole width. Lines need a `handle` that shows a whole dash, points a short one."""
    figure = axes.get_figure()
    assert figure is not None
    longest = max((len(label) for label in axes.get_legend_handles_labels()[1]), default=0)
    columns = max(1, min(3, int(ROOM / (longest + 2 * handle))))
    figure.legend(loc="outside lower center", ncols=columns, fontsize="small", handlelength=handle, columnspacing=1.2)
