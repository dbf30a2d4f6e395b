"""Figures of the codec commands: rate and distortion of a bench, and the three panels of an insight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstream.testbed.errors import MachineError, SpecError, install
from kvstream.testbed.report.axes import line
from kvstream.testbed.report.style import INK, codec_style
from kvstream.testbed.report.trace_view import FIGURES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvstream.testbed.encoding.insight import Insight

COLOURS = {"keys": "#0b7abf", "keys, RoPE undone": "#0f9b76", "values": "#c97a00"}


def check_path(path: Path) -> None:
    """Raise SpecError for a file name that is not a figure's, before anything is measured."""
    if path.suffix.lower() not in FIGURES:
        raise SpecError(f"{path}: a figure must end in {', '.join(FIGURES)}")


def rate_distortion(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line per codec, one point per level, hollow where an answer was wrong. Rows are those of `bench.measure`."""
    with _figure(path, (7.6, 4.0)) as figure:
        axes = figure.subplots()
        for codec in dict.fromkeys(row["codec"] for row in rows):
            own = [row for row in rows if row["codec"] == codec]
            style = codec_style(codec)
            bits, kl = [r["bits_per_element"] for r in own], [r["distortion"] for r in own]
            axes.plot(bits, kl, zorder=2, **line(style))
            axes.plot([], [], marker=style.marker, label=codec, **line(style))
            for row, x, y in zip(own, bits, kl, strict=True):
                whole = all(
                    result["right"] == result["asked"] for kind in ("lines", "english") if (result := row[kind])
                )
                face = style.colour if whole else "white"
                axes.plot(x, y, marker=style.marker, markersize=7, color=style.colour, markerfacecolor=face, zorder=3)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_xlabel("bits per element, without the profile")
        axes.set_ylabel("distortion (nats of KL)")
        arrow = {"arrowstyle": "->", "color": INK}
        axes.annotate("better", (0.03, 0.04), (0.12, 0.16), "axes fraction", arrowprops=arrow)
        axes.grid()
        axes.legend(title="hollow: a wrong answer", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def insight(found: Insight, path: Path) -> None:
    """The three observations side by side."""
    with _figure(path, (11.5, 3.9)) as figure:
        locality, sensitivity, entropy = figure.subplots(1, 3)
        for name, deltas in found.deltas.items():
            for ratios, dash in ((deltas.to_anchor, "-"), (deltas.to_previous, ":")):
                ordered = np.sort(ratios)
                share = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
                locality.plot(ordered, share, dash, color=COLOURS[name])
            locality.plot([], [], color=COLOURS[name], label=name)
        for dash, label in (("-", "to the anchor of ten tokens"), (":", "to the previous token")):
            locality.plot([], [], dash, color=INK, label=label)
        locality.axvline(1, color=INK, linewidth=0.8)
        locality.set_xscale("log", base=2)
        locality.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        locality.set_xlabel("variance of originals / of deltas")
        locality.set_ylabel("channels (%)")
        locality.set_title("1: deltas pay off right of the line", loc="left")
        locality.legend(fontsize="x-small", loc="lower right")

        layers = np.arange(len(found.sensitivity))
        keys, values = np.array(found.sensitivity).T
        for offset, kl, name in ((-0.2, keys, "keys"), (0.2, values, "values")):
            sensitivity.bar(layers + offset, kl, 0.4, color=COLOURS[name], label=name)
        sensitivity.set_yscale("log")
        sensitivity.xaxis.get_major_locator().set_params(integer=True)
        sensitivity.set_xlabel("layer")
        sensitivity.set_ylabel("KL of rounding one layer (nats)")
        sensitivity.set_title("2: layers differ in sensitivity", loc="left")
        sensitivity.legend(fontsize="small")

        names = list(found.entropy)
        at = np.arange(len(names))
        for offset, side, kind in ((-0.2, 0, "keys"), (0.2, 1, "values")):
            bits = [found.entropy[name][side] for name in names]
            bars = entropy.barh(at + offset, bits, 0.4, color=COLOURS[kind])
            entropy.bar_label(bars, fmt="%.2f", padding=2, fontsize="x-small")
        entropy.set_yticks(at, names)
        entropy.invert_yaxis()
        entropy.set_xlim(0, 1.15 * max(max(pair) for pair in found.entropy.values()))
        entropy.set_xlabel("entropy (bit per element)")
        entropy.set_title("3: entropy by grouping", loc="left")


@contextmanager
def _figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure to draw on, written to `path` afterwards. Raises SpecError, MachineError without seaborn."""
    from kvstream.testbed.report.figures import theme

    check_path(path)
    try:
        with theme():
            from matplotlib import pyplot

            figure = pyplot.figure(figsize=size)
            yield figure
            figure.savefig(path, dpi=160)
            pyplot.close(figure)
    except ModuleNotFoundError as error:
        raise MachineError(f"figures need {error.name}; install it with: {install(error.name)}") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot write this figure ({error.strerror or error})") from None
