"""One fixed look for every scheme and level: in figures, in the report, in the dashboard, in every run.

Colours come from the Okabe-Ito palette, shifted where needed so that each has a contrast of at least 3:1 on white and
on the dark background. Colour never speaks alone: schemes also differ in marker and dash, levels carry their number.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

INK: Final = "#262626"
"""The colour of text and axes; pages replace it by their own text colour."""

TEXT_COLOUR: Final = "#d0579b"
"""Chunks sent as text: not a level, so not on the ramp."""

_RAMP: Final = ("#6a55b5", "#3a74b0", "#238a8d", "#27a070", "#5f9c1c", "#a58a00")


@dataclass(frozen=True)
class Style:
    """How a scheme is drawn; `marker` and `dash` in matplotlib's notation."""

    colour: str
    marker: str
    dash: str | tuple[int, tuple[int, ...]] = "-"
    hollow: bool = False


_KNOWN: Final[Mapping[str, Style]] = {
    "cachegen": Style("#0b7abf", "o"),
    "buffer-based": Style("#c97a00", "s"),
    "oracle": Style(INK, "*"),
    "artifact": Style("#7b6fd6", "p"),
    "artifact-oracle": Style(INK, "X", ":"),
    "throughput": Style("#0f9b76", "^"),
    "mpc": Style("#b8599f", "H"),
    "robust-mpc": Style("#b8599f", "d", "--"),
    "bola": Style("#a9713a", "h"),
    "kvstream": Style("#d9480f", "D"),
    "chance": Style("#2a8fa8", "P"),
    "cake": Style("#5a9e2f", ">"),
    "hicache": Style("#8f8a00", "<"),
    "random": Style("#7f8a99", "."),
    "text": Style(TEXT_COLOUR, "X"),
    "fixed": Style("#7a7a7a", "d"),
    "fixed-lowest": Style("#7a7a7a", "v"),
    "fixed-highest": Style("#7a7a7a", "^", "--"),
    "lowest": Style("#7a7a7a", "v"),
    "highest": Style("#7a7a7a", "^", "--"),
    "8-bit": Style("#a06a6a", "P", "--"),
}
_SPARE: Final = ("#d9480f", "#0f9b76", "#7b6fd6", "#a9713a", "#5a9e2f", "#b8599f", "#2a8fa8", "#c2456a")
_SPARE_MARKERS: Final = "o^sDvPp<>h"


def scheme_style(row: Mapping[str, Any]) -> Style:
    """The look of a row's scheme: by its label or its policy where known, else from a hash of the label.

    Another label than the policy's own name (another codec, other settings) has its colour and a form of its own.
    """
    label = row["scheme"]
    policy = row["policy"].partition(",")[0]
    number = zlib.crc32(label.encode())
    if label in _KNOWN:
        style = _KNOWN[label]
    elif policy in _KNOWN:
        style = _KNOWN[policy]
        if label.removesuffix("-no-overlap").removesuffix("-depth1") != policy:
            forms = [marker for marker in _SPARE_MARKERS if marker != style.marker]
            style = Style(style.colour, forms[number % len(forms)], "-.", hollow=True)
    else:
        style = Style(_SPARE[number % len(_SPARE)], _SPARE_MARKERS[number // 8 % len(_SPARE_MARKERS)])
    if not row.get("overlap", True):
        return replace(style, dash=":", hollow=True)
    return replace(style, dash="--", hollow=True) if row.get("depth", 2) == 1 else style


def level_colours(n_levels: int) -> list[str]:
    """A colour a level, smallest first, from violet to gold."""
    if n_levels == 1:
        return [_RAMP[2]]
    return [_between(index * (len(_RAMP) - 1) / (n_levels - 1)) for index in range(n_levels)]


def _between(position: float) -> str:
    at = min(int(position), len(_RAMP) - 2)
    share = position - at
    low, high = (tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in (_RAMP[at], _RAMP[at + 1]))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))
