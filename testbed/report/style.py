"""One fixed look for every scheme, codec and level: in figures, in the report, in the dashboard, in every run.

A scheme's colour stands for its policy, its dash for its codec, its marker for both; hollow and thin is depth 1. All
depend on names, never on the order in a run. Colours come from the Okabe-Ito palette, shifted where needed so that each
has a contrast of at least 3:1 on white and on the dark background. Colour is never the only cue: policies on
one codec differ in marker, but for a few that are seldom compared, and levels show their number.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

INK: Final = "#262626"
"""The colour of text and axes; pages replace it by their own text colour."""

TEXT_COLOUR: Final = "#d0579b"
"""Chunks sent as text: not a level, so not on the ramp."""

_RAMP: Final = ("#6a55b5", "#3a74b0", "#238a8d", "#27a070", "#5f9c1c", "#a58a00")

Marker: TypeAlias = str | tuple[int, int, int]
Dash: TypeAlias = str | tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class Style:
    """How a scheme or a codec is drawn; `marker` and `dash` in matplotlib's notation."""

    colour: str
    marker: Marker
    dash: Dash = "-"
    hollow: bool = False
    width: float = 1.8
    """Of lines, points."""


_POLICIES: Final[Mapping[str, tuple[str, str]]] = {
    "cachegen": ("#0b7abf", "o"),
    "cachegen+compute": ("#3f86d6", "v"),
    "buffer-based": ("#c97a00", "s"),
    "oracle": (INK, "*"),
    "artifact": ("#7b6fd6", "p"),
    "artifact-oracle": ("#9a5fd0", "X"),
    "throughput": ("#0f9b76", "^"),
    "mpc": ("#b8599f", "H"),
    "robust-mpc": ("#b0486a", "d"),
    "bola": ("#a9713a", "p"),
    "kvstream": ("#d9480f", "D"),
    "chance": ("#2a8fa8", "P"),
    "cake": ("#5a9e2f", ">"),
    "hicache": ("#8f8a00", "<"),
    "random": ("#8b8478", "d"),
    "text": (TEXT_COLOUR, "X"),
    "fixed": ("#7a7a7a", "d"),
    "lowest": ("#5f7d95", "v"),
    "highest": ("#a06a6a", "^"),
}
_SPARE: Final = ("#a34a5e", "#6b5bbd", "#2e8540", "#7d6608", "#3b6fb6", "#2a7f6f", "#cc4b37", "#5b7fa6")
"""For policies of other authors."""
_MARKERS: Final = "o^sXpvDPH<d>"
"""In the order in which other codecs or settings advance them; stars are for the oracle."""
_STARS: Final[tuple[Marker, ...]] = ("*", (4, 1, 0), (6, 1, 0), (7, 1, 0), (8, 1, 0), (3, 1, 0))

_CODECS: Final[Mapping[str, Style]] = {
    "kvstream": Style("#00838a", "o", "-"),
    "cachegen": Style("#8c6a00", "s", (0, (5.0, 1.8))),
    "uniform": Style("#4a68c8", "^", (0, (5.0, 1.5, 1.0, 1.5))),
    "artifact": Style("#8a5a9e", "D", (0, (1.0, 1.8))),
    "raw": Style("#947a45", "v", (0, (8.0, 1.5, 1.0, 1.5, 1.0, 1.5))),
    "fp8": Style("#b5453c", "p", (0, (2.5, 1.5))),
}
"""A codec's own look, where codecs and not policies are drawn; its place here is how far it turns a policy's marker."""


def scheme_style(row: Mapping[str, Any]) -> Style:
    """The look of a row's scheme (its `scheme`, `policy`, `codec`, `depth` and `overlap`).

    Settings of a policy turn its marker and change its dash, unless the scheme goes by the policy's plain name.
    """
    name, _, settings = row["policy"].partition(",")
    level = settings.removeprefix("level=")
    if name == "fixed" and level in ("lowest", "highest"):
        name, settings = level, ""
    label = row["scheme"].removesuffix("-no-overlap").removesuffix("-depth1")
    turn, dash = _of_codec(row.get("codec", "kvstream"))
    if settings and label != name:
        number = sum(settings.encode())  # no hash: neighbouring values, as people try them, never look the same
        turn += 1 + number % (len(_MARKERS) - 1)
        dash = (0, (1.5 + number % 7, 1.0, 5.0 + turn % 4, 1.0))
    colour, marker = _POLICIES.get(name) or _unknown(name)
    turned = _STARS[turn % len(_STARS)] if marker == "*" else _MARKERS[(_MARKERS.index(marker) + turn) % len(_MARKERS)]
    style = Style(colour, turned, dash)
    if not row.get("overlap", True):
        return replace(style, hollow=True, width=1.0, dash=":")
    return replace(style, hollow=True, width=1.0) if row.get("depth", 2) == 1 else style


def codec_style(codec: str) -> Style:
    """The look of a codec (a name, settings may follow) among codecs: other colours than policies have."""
    name = codec.partition(",")[0]
    style = _CODECS.get(name) or Style("#6d6d6d", _unknown(name)[1], _of_codec(name)[1])
    return style if name == codec else replace(style, hollow=True)


def _of_codec(codec: str) -> tuple[int, Dash]:
    """How far a codec turns a policy's marker, and its dash; settings turn further."""
    name, _, settings = codec.partition(",")
    number = zlib.crc32(name.encode())
    turn = list(_CODECS).index(name) if name in _CODECS else len(_CODECS) + number % 3
    dash = _CODECS[name].dash if name in _CODECS else (0, (3.0, 1.0 + number % 4))
    return turn + (zlib.crc32(settings.encode()) % 5 + 1 if settings else 0), dash


def _unknown(name: str) -> tuple[str, str]:
    """Colour and marker by a hash of the name, so that they stay from run to run."""
    number = zlib.crc32(name.encode())
    return _SPARE[number % len(_SPARE)], _MARKERS[number // 8 % len(_MARKERS)]


def level_colours(n_levels: int) -> list[str]:
    """One colour per level, smallest first, from violet to gold."""
    if n_levels == 1:
        return [_RAMP[2]]
    return [_between(index * (len(_RAMP) - 1) / (n_levels - 1)) for index in range(n_levels)]


def ink_on(colour: str) -> str:
    """Black or white, whichever has the higher contrast on a colour: at least 4.5:1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#ffffff"


def _between(position: float) -> str:
    at = min(int(position), len(_RAMP) - 2)
    share = position - at
    low, high = (tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in (_RAMP[at], _RAMP[at + 1]))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))
