"""Rate and distortion of every codec's levels, each named beside its point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from testbed.report.axes import distortion_axis, legend, line, new, point
from testbed.report.material import Material
from testbed.report.style import codec_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

PLACES: Final = (
    *((5, 4, "left"), (-5, -10, "right"), (5, -10, "left"), (-5, 4, "right"), (8, -3, "left"), (-8, -3, "right")),
    *((5, 13, "left"), (-5, -19, "right"), (5, -19, "left"), (-5, 13, "right"), (24, 4, "left"), (-24, -10, "right")),
)
"""Where a name may stand, in points from its level: the nearest first."""
STEP: Final = 3
"""Pixels between the points at which a line is looked for."""


def ladders(material: Material) -> Figure | None:
    """A line a codec, a point a level."""
    found = {codec: levels for codec, levels in material.levels.items() if levels}
    if not found:
        return None
    figure, axes = new()
    names: list[tuple[str, float, float]] = []
    for codec, levels in found.items():
        style = codec_style(codec)
        ordered = sorted(levels, key=lambda level: level["bits_per_element"])
        points = [(level["bits_per_element"], level["distortion"]) for level in ordered]
        axes.plot(*zip(*points, strict=True), label=codec, **line(style) | point(style, 6))
        names += [(level["name"], *at) for level, at in zip(ordered, points, strict=True)]
    distortion_axis(axes, [level["distortion"] for levels in found.values() for level in levels])
    axes.set_xlim(0, 1.1 * max(bits for _, bits, _ in names))
    axes.set_xlabel("bits per element of the KV cache")
    axes.grid()
    legend(axes)
    _write(axes, names)
    return figure


def _write(axes: Axes, names: Sequence[tuple[str, float, float]]) -> None:
    """Write each name (text, x, y) in the first of its places that is free of lines and of other names."""
    figure: Any = axes.get_figure()
    figure.draw_without_rendering()  # now it is known where lines will be
    drawn = [at for curve in axes.get_lines() for at in _along(axes.transData.transform(curve.get_xydata()))]
    taken: list[Bbox] = []
    for text, x, y in names:
        for dx, dy, side in PLACES:
            note = axes.annotate(text, (x, y), (dx, dy), ha=side, textcoords="offset points", fontsize="x-small")
            note.set_in_layout(False)  # the axes stay where they are
            box = note.get_window_extent()
            if not (box.count_overlaps(taken) or any(box.contains(*at) for at in drawn)):
                taken.append(box.padded(2 * STEP))
                break
            note.remove()
        else:  # no room: rather over a line than nowhere
            axes.annotate(text, (x, y), PLACES[0][:2], textcoords="offset points", fontsize="x-small")


def _along(corners: Any) -> Iterator[tuple[float, float]]:
    """Points close to each other on the line through `corners`, pixels."""
    yield from corners
    for (x0, y0), (x1, y1) in pairwise(corners):
        steps = max(1, round(max(abs(x1 - x0), abs(y1 - y0)) / STEP))
        yield from ((x0 + (x1 - x0) * k / steps, y0 + (y1 - y0) * k / steps) for k in range(1, steps))
