"""The figure of `kvstream requests`: SLO attainment against the rate of requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvstream.testbed.report.axes import decade_ticks, legend, line, new, point
from kvstream.testbed.report.figures import theme
from kvstream.testbed.report.style import INK, scheme_style

NAME = "attainment"
BELOW = 0.01
"""Rates at which every scheme attains less are not shown."""


def draw(body: dict[str, Any], folder: Path) -> Path:
    """Write the figure of a run's results as SVG and PNG. Raises ModuleNotFoundError without seaborn."""
    folder.mkdir(parents=True, exist_ok=True)
    with theme():
        from matplotlib import pyplot
        from matplotlib.ticker import NullLocator

        figure, axes = new()
        shown = []
        for curve in body["curves"]:
            style, points = scheme_style(curve), curve["points"]
            rates = [one["rate"] for one in points]
            shown += [one["rate"] for one in points if one["met_rate"] >= BELOW]
            shares = [100 * one["met_rate"] for one in points]
            axes.plot(rates, shares, label=curve["scheme"], **line(style) | point(style, 4))
            low, high = ([100 * (one["met_rate"] if one[end] is None else one[end]) for one in points]
                         for end in ("low", "high"))  # fmt: skip
            axes.fill_between(rates, low, high, color=style.colour, alpha=0.2, linewidth=0)
        for curve in body.get("simulated", ()):
            style = scheme_style(curve)
            rates = [one["rate"] for one in curve["points"]]
            shares = [100 * one["met_rate"] for one in curve["points"]]
            axes.plot(rates, shares, color=style.colour, linewidth=1, linestyle=(0, (2, 2)))
        if "simulated" in body:
            axes.plot([], [], color=INK, linewidth=1, linestyle=(0, (2, 2)), label="simulator")
        for target in body["spec"]["targets"]:
            axes.axhline(100 * target, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        if len(set(shown)) > 1:
            low, high = min(shown) / 1.1, max(shown) * 1.1
            axes.set_xscale("log")
            axes.set_xlim(low, high)
            axes.set_xticks(ticks := decade_ticks(low, high), [f"{tick:g}" for tick in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, 101)
        axes.set_xlabel("requests per second")
        axes.set_ylabel(f"TTFT within {body['spec']['deadline_s']:g} s (% of requests)")
        axes.grid()
        legend(axes)
        svg = folder / f"{NAME}.svg"
        figure.savefig(svg, dpi=160, metadata={"Date": None, "Creator": "kvstream"})
        figure.savefig(folder / f"{NAME}.png", dpi=160, metadata={"Software": "kvstream"})
        pyplot.close(figure)
    return svg
