"""The static figures of a run, by seaborn: each as SVG and PNG, readable in print, the same colours everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from testbed.report.axes import HEIGHT, WIDTH, distortion_axis, legend, line, new, point, time_axis
from testbed.report.ladders import ladders
from testbed.report.material import Material
from testbed.report.style import INK, scheme_style
from testbed.report.timeline import timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Json: TypeAlias = dict[str, Any]

MOST_STEPS = 400
"""Of a curve over units: more could not be seen."""
MOST_DOTS = 1500
"""With more dots in a figure, they are drawn as pixels: as vectors they would take megabytes."""


@dataclass(frozen=True)
class Drawn:
    """A figure on disk. `alt` says in words what it shows."""

    name: str
    title: str
    caption: str
    alt: str
    svg: Path


def draw(material: Material, folder: Path) -> list[Drawn]:
    """Write every figure that has something to show into `folder`. Raises ModuleNotFoundError without seaborn."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with theme():
        from matplotlib import pyplot

        for name, title, caption, painter in FIGURES:
            figure = painter(material)
            if figure is None:
                continue
            svg = folder / f"{name}.svg"
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


def _headline(material: Material) -> Figure | None:
    entries = [entry for entry in material.summary["schemes"] if entry["n"] and entry["distortion"] is not None]
    if not entries:
        return None
    figure, axes = new()
    for entry in entries:
        style = scheme_style(material.rows[entry["scheme"]][0])
        late, mean = 1 - entry["met_rate"], entry["distortion"]
        spread = [
            axes.hlines(mean, 100 * (1 - entry["met_high"]), 100 * (1 - entry["met_low"])),
            *(
                [axes.vlines(100 * late, entry["distortion_low"], entry["distortion_high"])]
                if entry["distortion_low"] is not None
                else []
            ),
        ]
        for lines in spread:
            lines.set(color=style.colour, linewidth=1.3, alpha=0.7, zorder=2)
        axes.plot(
            100 * late,
            mean,
            linestyle="none",
            clip_on=False,
            zorder=4 if entry["clairvoyant"] else 3,
            label=entry["scheme"] + (" *" if entry["clairvoyant"] else ""),
            **point(style, 7.5),
        )
    axes.set_xlim(-4, 104)
    distortion_axis(axes, [entry["distortion"] for entry in entries])
    axes.set_xlabel("deadline missed (% of units)")
    axes.annotate("better", (0.02, 0.03), (0.1, 0.14), "axes fraction", arrowprops={"arrowstyle": "->", "color": INK})
    axes.grid()
    legend(axes, 1.0)
    return figure


def _ttft(material: Material) -> Figure | None:
    """Share of units over time; where times lie far apart, on a logarithmic axis, so that curves near the deadline can
    be told from each other. Each has its marker at the median."""
    deadlines_s = {row["deadline_s"] for rows in material.rows.values() for row in rows}
    one = len(deadlines_s) == 1
    due = min(deadlines_s) if one else 1.0
    arrived = {
        name: sorted(row["ttft_s"] / (1 if one else row["deadline_s"]) for row in rows if row["ttft_s"] is not None)
        for name, rows in material.rows.items()
    }
    times = [due, *(time for found in arrived.values() for time in found)]
    if len(times) == 1:
        return None
    low, high = min(times) / 1.1, max(times) * 1.1
    figure, axes = new()
    for name, found in arrived.items():
        rows = material.rows[name]
        style = scheme_style(rows[0])
        axes.plot([], [], label=name, **line(style) | point(style, 6))
        if not found:
            continue
        steps = sorted({*range(0, len(found), -(-len(found) // MOST_STEPS)), len(found) - 1})
        shares = [100 * (step + 1) / len(rows) for step in steps]
        xs, ys = [low, *(found[step] for step in steps), high], [0.0, *shares, shares[-1]]
        axes.plot(xs, ys, drawstyle="steps-post", **line(style))
        median = -(-len(rows) // 2) - 1
        if median < len(found):
            axes.plot(found[median], 50, **point(style, 6))
    axes.axvline(due, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.text(due, 1.01, "deadline", transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize="small")
    time_axis(axes, low, high)
    axes.set_ylim(0, 101)
    axes.set_xlabel("TTFT (s)" if one else "TTFT / deadline")
    axes.set_ylabel("units finished (%)")
    axes.grid()
    legend(axes)
    return figure


def _deadlines(material: Material) -> Figure | None:
    """Deadlines missed against the deadline given; a policy may act on its deadline, so no curve is extrapolated."""
    deadlines_s = sorted({row["deadline_s"] for rows in material.rows.values() for row in rows})
    if len(deadlines_s) < 2:
        return None
    from testbed.stats import wilson

    figure, axes = new()
    for rows in material.rows.values():
        style = scheme_style(rows[0])
        shares = []
        for deadline_s in deadlines_s:
            late = [not row["met"] for row in rows if row["deadline_s"] == deadline_s]
            low, high = wilson(sum(late), len(late))
            shares.append((100 * sum(late) / len(late), 100 * (low or 0), 100 * (high or 0)))
        axes.plot(
            deadlines_s,
            [share for share, _, _ in shares],
            label=rows[0]["scheme"],
            **line(style) | point(style, 6),
        )
        axes.fill_between(
            deadlines_s,
            [low for _, low, _ in shares],
            [high for _, _, high in shares],
            color=style.colour,
            alpha=0.08,
            linewidth=0,
        )
    axes.set_ylim(-2, 102)
    axes.set_xlabel("deadline (s)")
    axes.set_ylabel("deadline missed (% of units)")
    axes.grid()
    legend(axes)
    return figure


def _regret(material: Material) -> Figure | None:
    import seaborn

    data = [
        (rows[0]["scheme"], row["regret"])
        for rows in material.rows.values()
        for row in rows
        if row["regret"] is not None and not row["clairvoyant"]
    ]
    if not data:
        return None
    names = list(dict.fromkeys(name for name, _ in data))
    figure, axes = new(height=0.9 + 0.42 * len(names))
    colours = {name: scheme_style(material.rows[name][0]).colour for name in names}
    seaborn.stripplot(
        x=[value for _, value in data],
        y=[name for name, _ in data],
        hue=[name for name, _ in data],
        palette=colours,
        order=names,
        ax=axes,
        size=5,
        alpha=0.6,
        jitter=0.18,
        legend=False,
        zorder=1,
        rasterized=len(data) > MOST_DOTS,
    )
    for y, name in enumerate(names):
        values = [value for key, value in data if key == name]
        mean = math.fsum(values) / len(values)
        axes.plot([mean, mean], [y - 0.32, y + 0.32], color=colours[name], linewidth=2.6)
    axes.set_yticks(range(len(names)), [f"{name} (n = {sum(key == name for key, _ in data)})" for name in names])
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("regret (nats)")
    axes.set_ylabel("")
    axes.grid(axis="x")
    return figure


Painter: TypeAlias = Callable[[Material], "Figure | None"]
FIGURES: tuple[tuple[str, str, str, Painter], ...] = (
    (
        "headline",
        "Deadlines missed against distortion",
        "Each scheme once; bars are 95 % intervals (Wilson for the share, a bootstrap over traces for distortion). "
        "* is told the future of the link.",
        _headline,
    ),
    (
        "ttft",
        "Time to first token",
        "Share of units with a first token by then, the marker at half of them; a failed session never arrives.",
        _ttft,
    ),
    (
        "deadlines",
        "Deadlines missed against the deadline",
        "Measured at each deadline, with Wilson's 95 % band.",
        _deadlines,
    ),
    (
        "regret",
        "Regret to the oracle",
        "Distortion above the oracle's, over units that both met: a dot a unit, the bar is the mean.",
        _regret,
    ),
    (
        "levels",
        "Rate and distortion of the levels",
        "As measured with the model on held-out text and written into the manifest.",
        ladders,
    ),
    (
        "timeline",
        "One session",
        "What the link could carry, what arrived, and what was decoded when. The dashed line is the deadline.",
        timeline,
    ),
)


def _alt(name: str, material: Material) -> str:
    """The figure's message for those who cannot see it; the numbers are in the table."""
    entries = [entry for entry in material.summary["schemes"] if entry["n"]]
    if name in ("headline", "ttft", "deadlines"):
        return "; ".join(
            f"{entry['scheme']}: deadline missed in {100 - 100 * entry['met_rate']:.0f} %" for entry in entries
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
