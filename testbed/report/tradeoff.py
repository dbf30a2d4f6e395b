"""SLO violations and distortion of every scheme: by deadline, or as points of a plane."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from kvstream.testbed.report.axes import (
    HEIGHT,
    WIDTH,
    distortion_axis,
    group_of,
    label_of,
    label_points,
    legend,
    line,
    new,
    point,
    share_axis,
)
from kvstream.testbed.report.material import Json, Material
from kvstream.testbed.report.style import INK, scheme_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TICKS: Final = 8
"""With more deadlines, not each has one."""
FAR: Final = 3
"""Schemes whose distortion differs from those of a sweep by more than this factor are not shown beside it."""


def plane(material: Material) -> Figure | None:
    """One point per scheme, with its intervals."""
    entries = [entry for entry in material.summary["schemes"] if entry["n"] and entry["distortion"] is not None]
    if not entries:
        return None
    figure, axes = new()
    for entry in entries:
        style = scheme_style(material.rows[entry["scheme"]][0])
        late, mean, mark = 100 * (1 - entry["met_rate"]), entry["distortion"], group_of(entry["scheme"])
        spread = []
        if entry["met_low"] is not None:
            spread.append(axes.hlines(mean, 100 * (1 - entry["met_high"]), 100 * (1 - entry["met_low"])))
        if entry["distortion_low"] is not None:
            spread.append(axes.vlines(late, entry["distortion_low"], entry["distortion_high"]))
        for bar in spread:
            bar.set(color=style.colour, linewidth=1.3, alpha=0.7, zorder=2, gid=mark)
        order = 4 if entry["clairvoyant"] else 3
        look = point(style, 7.5) | {"linestyle": "none", "clip_on": False, "zorder": order, "gid": mark}
        axes.plot(late, mean, label=label_of(entry), **look)
    ends = ("met_low", "met_rate", "met_high")
    share_axis(axes.xaxis, [100 * (1 - entry[end]) for entry in entries for end in ends if entry[end] is not None])
    distortion_axis(axes, [entry["distortion"] for entry in entries])
    axes.set_xlabel("SLO violations (% of units)")
    axes.annotate("better", (0.82, 0.84), (0.9, 0.93), "axes fraction", arrowprops={"arrowstyle": "->", "color": INK})
    axes.grid()
    legend(axes, 1.0)
    return figure


def by_deadline(material: Material) -> Figure | None:
    """Violations and distortion at each deadline, side by side; the simulator's, if any, as thin lines behind. Where a
    scheme met no deadline there is no distortion to compare: what came was late.

    A policy may act on its deadline, so nothing is extrapolated. None with a single deadline.
    """
    parts = material.summary["deadlines"]
    if not parts:
        return None
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(1.9 * WIDTH, HEIGHT))
    schemes = [entry for entry in material.summary["schemes"] if entry["scheme"] in material.rows]
    known = [one for part in parts for one in part["schemes"]]
    behind = material.simulated["deadlines"] if material.simulated else []
    for entry in schemes:
        style = scheme_style(material.rows[entry["scheme"]][0])
        for found, look in (
            (behind, line(style) | {"linewidth": 1.0, "alpha": 0.55}),
            (parts, line(style) | point(style, 6) | {"label": label_of(entry)}),
        ):
            look["gid"] = group_of(entry["scheme"])
            _curves(left, right, found, entry["scheme"], look)
    shown = [*known, *(one for part in behind for one in part["schemes"])]
    share_axis(left.yaxis, [100 * (1 - one["met_rate"]) for one in shown])
    left.set_ylabel("SLO violations (% of units)")
    distortion_axis(right, [one["distortion"] for one in shown if one["met"] and one["distortion"]])
    for axes in (left, right):
        axes.set_xlabel("deadline (s)")
        if len(parts) <= TICKS:
            axes.set_xticks([part["deadline_s"] for part in parts], [f"{part['deadline_s']:g}" for part in parts])
        axes.grid()
    legend(left)
    return figure


def sweep(material: Material) -> Figure | None:
    """The plane around a sweep: one line per family of schemes with the values beside its points, other schemes that
    are near as points, and the Pareto front of all that are not clairvoyant. None without a sweep."""
    entries = {one["scheme"]: one for one in material.summary["schemes"] if one["n"] and one["distortion"] is not None}
    families = {name: [pair for pair in pairs if pair[0] in entries] for name, pairs in material.families.items()}
    families = {name: pairs for name, pairs in families.items() if len(pairs) > 1}
    if not families:
        return None
    figure, axes = new()
    front = _front([entry for entry in entries.values() if not entry["clairvoyant"]])
    axes.plot(*zip(*front, strict=True), color=INK, linewidth=5, alpha=0.13, solid_capstyle="round",
              drawstyle="steps-post", label="Pareto front", zorder=1)  # fmt: skip
    names = []
    for shared, pairs in families.items():
        row = material.rows[pairs[0][0]][0]
        policy = ",".join([row["policy"].partition(",")[0], *shared.split(", ")[1:]])
        style = scheme_style(row | {"policy": policy, "scheme": shared})
        points = [_place(entries[name]) for name, _ in pairs]
        key = pairs[0][1].partition("=")[0]
        axes.plot([], [], label=f"{shared} by {key}", **line(style) | point(style, 6))
        axes.plot(*zip(*points, strict=True), **line(style))
        for (name, _), at in zip(pairs, points, strict=True):
            axes.plot(*at, gid=group_of(name), **point(style, 6))
        names += [(value.partition("=")[2], *at, style.colour) for (_, value), at in zip(pairs, points, strict=True)]
    share_axis(axes.xaxis, [x for _, x, _, _ in names], 0.25)
    low, high = min(y for _, _, y, _ in names), max(y for _, _, y, _ in names)
    near = []
    for name, entry in entries.items():
        x, y = _place(entry)
        left, right = axes.get_xlim()
        if name in {name for pairs in families.values() for name, _ in pairs}:
            continue
        if left <= x <= right and low / FAR <= y <= high * FAR:
            near.append(y)
            look = point(scheme_style(material.rows[name][0]), 6) | {"linestyle": "none", "zorder": 3}
            axes.plot(x, y, label=label_of(entry), gid=group_of(name), **look)
    distortion_axis(axes, [low, high, *near])
    axes.set_xlabel("SLO violations (% of units)")
    axes.grid()
    legend(axes, 1.8)
    label_points(axes, names)
    return figure


def _front(entries: list[Json]) -> list[tuple[float, float]]:
    """The points that no other one beats in both, from the fewest violations on."""
    front: list[tuple[float, float]] = []
    for place in sorted(map(_place, entries)):
        if not front or place[1] < front[-1][1]:
            front.append(place)
    return front


def _place(entry: Json) -> tuple[float, float]:
    """SLO violations in per cent, and distortion."""
    return 100 * (1 - entry["met_rate"]), float(entry["distortion"])


def _curves(left: Axes, right: Axes, parts: list[Json], scheme: str, look: dict[str, Any]) -> None:
    """One scheme's curve in both panels."""
    known = [(part["deadline_s"], one) for part in parts for one in part["schemes"] if one["scheme"] == scheme]
    if not known:
        return
    left.plot([at for at, _ in known], [100 * (1 - one["met_rate"]) for _, one in known], **look)
    drawn = [(at, one["distortion"]) for at, one in known if one["met"] and one["distortion"] is not None]
    if drawn:
        right.plot(*zip(*drawn, strict=True), **{key: value for key, value in look.items() if key != "label"})
