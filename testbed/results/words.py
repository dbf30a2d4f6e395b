"""Numbers in words, as tables, verdicts and reports print them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from kvstream.testbed.terminal import many as many

ROUNDING: Final = 1e-9
"""Nats: smaller differences come from the order in which numbers were added up."""
SYNTHETIC: Final = "Synthetic caches, timing only. "
CLAIRVOYANT: Final = "clairvoyant: sees the future trace"
REFERENCE: Final = "reference line: on a few units only, compared with nothing"


def or_inf(value: float | None) -> float:
    """The value, infinite if unknown: a sort key that puts unknown values last."""
    return math.inf if value is None else value


def percent(rate: float) -> str:
    """`0.894` as `89 %`; what is not quite none or all never reads like it."""
    if 0.0 < rate < 0.005:
        return "<1 %"
    return ">99 %" if 0.995 <= rate < 1.0 else f"{rate * 100:.0f} %"


def interval(entry: Mapping[str, Any]) -> str:
    """The interval of a scheme's share of deadlines met, in per cent: `70–100`; empty without one."""
    if entry["met_low"] is None:
        return ""
    return f"{entry['met_low'] * 100:.0f}–{entry['met_high'] * 100:.0f}"


def seconds(value: float | None) -> str:
    """A time without its unit: `1.23`, `0.46`; `-` if unknown."""
    return "-" if value is None else f"{value:.3g}" if value >= 1 else f"{value:.2f}"


def nats(value: float | None, sign: str = "") -> str:
    """A distortion or a difference of two, without its unit; rounding residue is printed as 0."""
    if value is None:
        return "-"
    return "0" if abs(value) < ROUNDING else f"{value:{sign}.2g}" if abs(value) >= 1e-4 else f"{value:{sign}.0e}"


def bytes_words(value: float | None) -> str:
    """A size: `2.98 MB`."""
    if value is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * size:  # what three digits would round up to a thousand of the smaller unit
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"
