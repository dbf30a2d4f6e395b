"""Rate and distortion of every codec's levels, with a label at each point, beside what is known of larger models."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from kvstream.testbed.report.axes import distortion_axis, label_points, legend, line, new, point, time_axis
from kvstream.testbed.report.material import Material
from kvstream.testbed.report.style import INK, codec_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KNOWN: Final = "known_levels.json"
"""Beside this file: levels on a real model, as `scripts/codec_results.py` takes them from the kept results."""
PAPER_BITS: Final = 2.26
"""Per element: CacheGen on Mistral-7B and LongChat, 176 MB where 8 bits take 622 MB (SIGCOMM 2024, Table 1)."""
ROOM: Final = 1.8
"""Above the highest and below the lowest point, for their labels."""
SAME: Final = 1.02
"""A context has so many elements whatever its codec, but for rounding."""


def ladders(material: Material) -> Figure | None:
    """One line per codec, one point per level."""
    found = {codec: levels for codec, levels in material.levels.items() if levels}
    if not found:
        return None
    figure, axes = new()
    every = [level for levels in found.values() for level in levels]
    sized = all(level.get("bytes") for level in every)
    names: list[tuple[str, float, float, str]] = []
    for codec, levels in found.items():
        style = codec_style(codec)
        ordered = sorted(levels, key=lambda level: level["bits_per_element"])
        points = [(level["bytes"] / 1e6 if sized else level["bits_per_element"], level["distortion"])
                  for level in ordered]  # fmt: skip
        axes.plot(*zip(*points, strict=True), label=codec, **line(style) | point(style, 6))
        names += [(level["name"], *at, style.colour) for level, at in zip(ordered, points, strict=True)]
    sizes, losses = [size for _, size, _, _ in names], [loss for _, _, loss, _ in names]
    a_bit = _a_bit([level["bytes"] / 1e6 / level["bits_per_element"] for level in every]) if sized else 1.0
    if a_bit is not None:
        known = json.loads(files(__package__).joinpath(KNOWN).read_text(encoding="utf-8"))
        sizes += [bits * a_bit for levels in known["levels"].values() for bits, _ in levels]
        losses += [loss for levels in known["levels"].values() for _, loss in levels]
        _beside(axes, known, a_bit)
    distortion_axis(axes, [*losses, min(losses) / ROOM, max(losses) * ROOM])
    if sized:
        time_axis(axes, min(sizes) / 1.3, max(sizes) * 1.3)
        axes.set_xlabel("size of a context's KV cache (MB)")
    else:
        axes.set_xlim(0, 1.1 * max(sizes))
        axes.set_xlabel("bits per element of the KV cache")
    if sized and a_bit is not None:

        def to_bits(size: Any) -> Any:
            return size / a_bit

        def to_size(bits: Any) -> Any:
            return bits * a_bit

        above = axes.secondary_xaxis("top", functions=(to_bits, to_size))
        above.xaxis.set_major_formatter(lambda bits, _: f"{bits:g}")
        above.set_xlabel("bits per element")
    axes.grid()
    legend(axes)
    label_points(axes, names)
    return figure


def _a_bit(found: list[float]) -> float | None:
    """MB that a bit per element takes in a context; None where codecs and contexts differ too much for one scale."""
    return sum(found) / len(found) if max(found) <= SAME * min(found) else None


def _beside(axes: Axes, known: Any, a_bit: float) -> None:
    """Thin lines of the levels on a real model, and the rate of the paper's own codec, whose loss is in other units."""
    model = known["model"].partition("-")[0]
    for codec, levels in known["levels"].items():
        look = line(codec_style(codec)) | {"linewidth": 1.0, "alpha": 0.55, "zorder": 1}
        points = [(bits * a_bit, loss) for bits, loss in levels]
        axes.plot(*zip(*points, strict=True), marker=".", label=f"{codec} on {model}", **look)
    axes.axvline(PAPER_BITS * a_bit, color=INK, linewidth=1.0, linestyle=(0, (1, 2)), label="CacheGen's paper")
