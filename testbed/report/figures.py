"""The static figures of a run, by seaborn: each as SVG and PNG, readable in print, the same colours everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kvstream.testbed.report.axes import HEIGHT, WIDTH, group_of, label_of, legend, line, new, point, time_axis
from kvstream.testbed.report.ladders import ladders
from kvstream.testbed.report.material import Material
from kvstream.testbed.report.style import INK, scheme_style
from kvstream.testbed.report.timeline import timeline
from kvstream.testbed.report.tradeoff import by_deadline, plane, sweep
from kvstream.testbed.results.words import CLAIRVOYANT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Json: TypeAlias = dict[str, Any]

MAX_STEPS = 400
"""Points of a curve over units: more would not be visible."""
ZOOM = 0.2
"""How far around the deadline the closer look goes, as a part of it."""
MAX_DOTS = 1500
"""Above this number, dots are drawn as pixels: as vectors they would take megabytes."""


@dataclass(frozen=True)
class Drawn:
    """A figure on disk. `alt` says in words what it shows."""

    name: str
    title: str
    caption: str
    alt: str
    svg: Path


def draw(material: Material, folder: Path) -> list[Drawn]:
    """Write every figure that has data into `folder`. Raises ModuleNotFoundError without seaborn."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with theme():
        from matplotlib import pyplot

        for name, title, caption, painter in FIGURES:
            figure = None if name in OF_RESULTS and material.problem else painter(material)
            svg = folder / f"{name}.svg"
            if figure is None:
                for stale in (svg, svg.with_suffix(".png")):  # of the run as it was before
                    stale.unlink(missing_ok=True)
                continue
            figure.savefig(svg, dpi=160, metadata={"Date": None, "Creator": "kvstream"})
            figure.savefig(folder / f"{name}.png", dpi=160, metadata={"Software": "kvstream"})
            pyplot.close(figure)
            drawn.append(Drawn(name, title, caption, _alt(name, material), svg))
    return drawn


@contextmanager
def theme() -> Iterator[None]:
    """Seaborn's look without touching anyone else's settings, and without a display.

    Raises ModuleNotFoundError without seaborn.
    """
    import matplotlib
    import seaborn

    settings = {
        **seaborn.axes_style("ticks"),
        **seaborn.plotting_context("notebook", font_scale=0.9),
        "figure.figsize": (WIDTH, HEIGHT),
        "figure.constrained_layout.use": True,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "axes.facecolor": "none",
        "grid.color": INK,
        "grid.alpha": 0.13,
        "svg.fonttype": "none",
        "svg.hashsalt": "kvstream",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
    }
    backend = matplotlib.get_backend()
    matplotlib.use("agg")
    with matplotlib.rc_context(settings):
        yield
    matplotlib.use(backend)


def _ttft(material: Material) -> Figure | None:
    """Share of units over TTFT / deadline: all of it, and the surroundings of the deadline. Each scheme has its marker
    at the median."""
    from matplotlib import pyplot

    arrived = {
        name: sorted(row["ttft_s"] / row["deadline_s"] for row in rows if row["ttft_s"] is not None)
        for name, rows in material.rows.items()
    }
    times = [1.0, *(time for found in arrived.values() for time in found)]
    if len(times) == 1:
        return None
    low, high = min(times) / 1.1, max(times) * 1.1
    figure, (whole, near) = pyplot.subplots(2, 1, figsize=(WIDTH, 1.55 * HEIGHT), height_ratios=(1.2, 1))
    for entry in material.summary["schemes"]:
        if entry["scheme"] not in arrived:
            continue
        found, rows = arrived[entry["scheme"]], material.rows[entry["scheme"]]
        style = scheme_style(rows[0])
        whole.plot([], [], label=label_of(entry), **line(style) | point(style, 6))
        if not found:
            continue
        steps = sorted({*range(0, len(found), -(-len(found) // MAX_STEPS)), len(found) - 1})
        shares = [100 * (step + 1) / len(rows) for step in steps]
        xs, ys = [low, *(found[step] for step in steps), high], [0.0, *shares, shares[-1]]
        median = -(-len(rows) // 2) - 1
        for axes in (whole, near):
            axes.plot(xs, ys, drawstyle="steps-post", gid=group_of(entry["scheme"]), **line(style))
            if median < len(found):
                axes.plot(found[median], 50, gid=group_of(entry["scheme"]), **point(style, 6))
    for axes in (whole, near):
        axes.axvline(1.0, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_ylim(0, 101)
        axes.set_ylabel("units finished (%)")
        axes.grid()
    whole.text(1.0, 1.01, "deadline", transform=whole.get_xaxis_transform(), ha="center", va="bottom", fontsize="small")
    time_axis(whole, low, high)
    near.set_xlim(1 - ZOOM, 1 + ZOOM)
    near.set_xlabel("TTFT / deadline")
    legend(whole)
    return figure


def _regret(material: Material) -> Figure | None:
    """A row for each scheme that is not clairvoyant; one that met no unit that the oracle met says so."""
    import seaborn

    found = {
        entry["scheme"]: [row["regret"] for row in material.rows[entry["scheme"]] if row["regret"] is not None]
        for entry in material.summary["schemes"]
        if entry["scheme"] in material.rows and not entry["clairvoyant"]
    }
    if not any(found.values()):
        return None
    figure, axes = new(height=0.9 + 0.42 * len(found))
    data = [(name, value) for name, values in found.items() for value in values]
    colours = {name: scheme_style(material.rows[name][0]).colour for name in found}
    seaborn.stripplot(
        x=[value for _, value in data],
        y=[name for name, _ in data],
        hue=[name for name, _ in data],
        palette=colours,
        order=list(found),
        ax=axes,
        size=5,
        alpha=0.6,
        jitter=0.18,
        legend=False,
        zorder=1,
        rasterized=len(data) > MAX_DOTS,
    )
    for y, (name, values) in enumerate(found.items()):
        if values:
            mean = math.fsum(values) / len(values)
            axes.plot([mean, mean], [y - 0.32, y + 0.32], color=colours[name], linewidth=2.6, gid=group_of(name))
        else:
            axes.text(0.01, y, "  no unit that it and the oracle met", transform=axes.get_yaxis_transform(),
                      va="center", fontsize="small", fontstyle="italic")  # fmt: skip
    for dots in axes.collections:
        if len(places := np.asarray(dots.get_offsets())):
            dots.set_gid(group_of(list(found)[round(float(places[0, 1]))]))
    axes.set_yticks(range(len(found)), [f"{name} (n = {len(values)})" for name, values in found.items()])
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("regret (nats)")
    axes.set_ylabel("")
    axes.grid(axis="x")
    return figure


OF_RESULTS = ("headline", "sweep", "ttft", "plane", "regret")
"""Figures that a run with too many invalid units does not have."""
Painter: TypeAlias = Callable[[Material], "Figure | None"]
FIGURES: tuple[tuple[str, str, str, Painter], ...] = (
    (
        "headline",
        "SLO violations vs distortion",
        "By deadline, where there are several; without a distortion where a scheme met none in time. Thin lines are "
        f"simulated. * {CLAIRVOYANT}.",
        lambda material: by_deadline(material) or plane(material),
    ),
    (
        "sweep",
        "The sweep",
        f"One line per scheme that is swept, with the value at each point. * {CLAIRVOYANT}.",
        sweep,
    ),
    (
        "ttft",
        "Time to first token",
        "Share of units with a first token by then, below around the deadline; the marker is the median; a failed "
        "session never arrives.",
        _ttft,
    ),
    (
        "plane",
        "All deadlines together",
        f"One point per scheme; bars are 95 % intervals, with whole traces as the sample. * {CLAIRVOYANT}.",
        lambda material: plane(material) if material.summary["deadlines"] else None,
    ),
    (
        "regret",
        "Regret to the oracle",
        "Distortion above the oracle's, over units that both met: one dot per unit, the bar is the mean.",
        _regret,
    ),
    (
        "levels",
        "Rate and distortion of the levels",
        "What a context takes at each level, and what the level loses: measured with the model on held-out text, as "
        "recorded in the manifest. Thin lines are levels on SmolLM2-135M, a real model; the dotted line is the rate at "
        "which CacheGen's paper sends Mistral-7B's caches (its loss is in other units).",
        ladders,
    ),
    (
        "timeline",
        "One session",
        "Link capacity, arrivals, and decoding over time. The dashed line is the deadline.",
        timeline,
    ),
)


def _alt(name: str, material: Material) -> str:
    """Alternative text: the figure's message; the numbers are in the table."""
    entries = [entry for entry in material.summary["schemes"] if entry["n"]]
    if name in ("headline", "sweep", "plane", "ttft"):
        return "; ".join(
            f"{entry['scheme']}: SLO violations {100 - 100 * entry['met_rate']:.0f} %" for entry in entries
        )
    if name == "regret":
        return "; ".join(
            f"{entry['scheme']}: mean regret {entry['regret']:.2g} nats" for entry in entries if entry["regret_n"]
        )
    if name == "levels":
        return "; ".join(
            f"{codec} {level['name']}: {level['bits_per_element']:.2f} bit, {level['distortion']:.2g} nats"
            for codec, levels in material.levels.items()
            for level in levels
        )
    assert material.session is not None
    row = material.session["row"]
    return f"{row['scheme']} on {row['unit_id']}: levels {', '.join(map(str, row['levels']))}"
