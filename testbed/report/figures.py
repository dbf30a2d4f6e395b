"""The static figures of a run, by seaborn: each as SVG and PNG, readable in print, the same colours everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from testbed.report.material import Material
from testbed.report.style import INK, Style, scheme_style
from testbed.report.timeline import timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Json: TypeAlias = dict[str, Any]

WIDTH, HEIGHT = 5.4, 3.9
"""Inches: small enough that the writing can still be read when a phone shrinks it."""
FAR_APART = 20
"""Distortions that differ by more than this factor stand on a logarithmic axis."""


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
            figure.savefig(svg, metadata={"Date": None, "Creator": "kvstream"})
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


def _new(height: float = HEIGHT) -> tuple[Figure, Axes]:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(WIDTH, height))


def _headline(material: Material) -> Figure | None:
    entries = [entry for entry in material.summary["schemes"] if entry["n"] and entry["distortion"] is not None]
    if not entries:
        return None
    figure, axes = _new()
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
            label=entry["scheme"] + (" (told the future)" if entry["clairvoyant"] else ""),
            **_point(style, 13 if style.marker == "*" else 7.5),
        )
    axes.set_xlim(-4, 104)
    _distortion_axis(axes, [entry["distortion"] for entry in entries])
    axes.set_xlabel("deadline missed (% of units)")
    axes.annotate("better", (0.02, 0.03), (0.1, 0.14), "axes fraction", arrowprops={"arrowstyle": "->", "color": INK})
    axes.grid()
    _legend(axes)
    return figure


def _ttft(material: Material) -> Figure | None:
    import seaborn

    deadlines_s = {row["deadline_s"] for rows in material.rows.values() for row in rows}
    if not deadlines_s:
        return None
    one = len(deadlines_s) == 1
    figure, axes = _new()
    for rows in material.rows.values():
        style = scheme_style(rows[0])
        values = [
            math.inf if row["ttft_s"] is None else row["ttft_s"] / (1 if one else row["deadline_s"]) for row in rows
        ]
        finite = sorted(value for value in values if math.isfinite(value))
        if not finite:
            continue
        seaborn.ecdfplot(
            x=finite,
            weights=[100 / len(values)] * len(finite),
            stat="count",
            ax=axes,
            color=style.colour,
            linestyle=style.dash,
            linewidth=1.8,
            label=rows[0]["scheme"],
        )
    axes.axvline(next(iter(deadlines_s)) if one else 1, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.text(
        next(iter(deadlines_s)) if one else 1,
        1.01,
        "deadline",
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="bottom",
        fontsize="small",
    )
    axes.set_xlim(left=0)
    axes.set_ylim(0, 101)
    axes.set_xlabel("TTFT (s)" if one else "TTFT / deadline")
    axes.set_ylabel("units finished (%)")
    axes.grid()
    _legend(axes)
    return figure


def _deadlines(material: Material) -> Figure | None:
    """Deadlines missed against the deadline given; a policy may act on its deadline, so no curve is extrapolated."""
    deadlines_s = sorted({row["deadline_s"] for rows in material.rows.values() for row in rows})
    if len(deadlines_s) < 2:
        return None
    from testbed.stats import wilson

    figure, axes = _new()
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
            linestyle=style.dash,
            label=rows[0]["scheme"],
            **_point(style, 6),
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
    _legend(axes)
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
    figure, axes = _new(height=0.9 + 0.42 * len(names))
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


def _levels(material: Material) -> Figure | None:
    ladders = {codec: levels for codec, levels in material.levels.items() if levels}
    if not ladders:
        return None
    figure, axes = _new()
    palette = ("#0b7abf", "#c97a00", "#0f9b76", "#b8599f", "#7a7a7a", "#a9713a")
    for index, (codec, levels) in enumerate(ladders.items()):
        ordered = sorted(levels, key=lambda level: level["bits_per_element"])
        colour = palette[index % len(palette)]
        axes.plot(
            [level["bits_per_element"] for level in ordered],
            [level["distortion"] for level in ordered],
            marker="os^Dvp"[index % 6],
            color=colour,
            label=codec,
        )
        # neighbours write on different sides, so that two ladders that meet can both be read
        place, side = ((5, 4), "left") if index % 2 == 0 else ((-5, -10), "right")
        for level in ordered:
            at = (level["bits_per_element"], level["distortion"])
            axes.annotate(level["name"], at, place, ha=side, textcoords="offset points", fontsize="x-small")
    _distortion_axis(axes, [level["distortion"] for levels in ladders.values() for level in levels])
    axes.set_xlim(left=0)
    axes.set_xlabel("bits per element of the KV cache")
    axes.grid()
    _legend(axes)
    return figure


def _point(style: Style, size: float) -> Json:
    return {
        "marker": style.marker,
        "markersize": size,
        "color": style.colour,
        "markerfacecolor": "none" if style.hollow else style.colour,
        "markeredgecolor": style.colour,
        "markeredgewidth": 1.4,
    }


def _distortion_axis(axes: Axes, values: Sequence[float]) -> None:
    """From zero; where values lie far apart, logarithmic, with zero (nothing is lost) below the smallest."""
    from matplotlib.ticker import NullLocator

    axes.set_ylabel("distortion (nats of KL)")
    positive = [value for value in values if value > 0]
    if not positive or max(positive) <= FAR_APART * min(positive):
        axes.set_ylim(bottom=0)
        return
    low, high = min(positive) / 1.5, max(positive) * 1.5
    within = (1, 2, 5) if high < 300 * low else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in within if low <= step * 10.0**decade <= high]
    if len(positive) < len(values):
        axes.set_yscale("symlog", linthresh=low, linscale=0.3)
        low, ticks = 0.0, [0.0, *ticks]
    else:
        axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def _legend(axes: Axes) -> None:
    """Below the axes, which keep the whole width."""
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", handlelength=1.8, columnspacing=1.2)


Painter: TypeAlias = Callable[[Material], "Figure | None"]
FIGURES: tuple[tuple[str, str, str, Painter], ...] = (
    (
        "headline",
        "Deadlines missed against distortion",
        "Each scheme once; bars are 95 % intervals (Wilson for the share, a bootstrap over traces for distortion).",
        _headline,
    ),
    (
        "ttft",
        "Time to first token",
        "Share of units with a first token by then; a failed session never arrives.",
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
        _levels,
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
