"""Quantities with units, to SI and back: `100Mbps`, `10Gbit/s`, `20ms`, `0.1%`, `64KiB`.

Everything inside is SI: bit/s, seconds, bytes, fractions. Where a rate, a time or a size is meant, a number without a
unit is refused (0 needs none). Decimal prefixes are powers of 1000, `Ki`, `Mi`, `Gi` powers of 1024. `b` is a bit and
`B` a byte: `MB/s` and `MBps` are eight times `Mb/s`.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from kvstream.traces.errors import TraceError

Dimension = Literal["rate", "time", "size", "fraction", "number"]

Rate = Annotated[float, "rate"]
"""bit/s, as the type of a generator's setting."""
Time = Annotated[float, "time"]
"""Seconds, as the type of a generator's setting."""
Fraction = Annotated[float, "fraction"]
"""0 to 1, as the type of a generator's setting."""
Number = Annotated[float, "number"]
"""A plain number, as the type of a setting."""

_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}
_TIMES = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_UNIT_FOR: dict[str, str] = {"rate": "{0}Mbps, {0}kbps or {0}bps", "time": "{0}s or {0}ms", "size": "{0}B or {0}KiB"}
"""What to write instead of a number without a unit."""
_EXAMPLES: dict[Dimension, str] = {
    "rate": "100Mbps",
    "time": "20ms",
    "size": "64KiB",
    "fraction": "0.1%",
    "number": "3",
}


def _units() -> dict[str, tuple[Dimension, float]]:
    table: dict[str, tuple[Dimension, float]] = {"": ("number", 1.0), "%": ("fraction", 0.01)}
    table |= {unit: ("time", seconds) for unit, seconds in _TIMES.items()}
    for prefix, factor in _PREFIXES.items():
        table |= {prefix + unit: ("rate", factor) for unit in ("bps", "bit", "bit/s", "b/s")}
        table |= {prefix + unit: ("rate", factor * 8.0) for unit in ("B/s", "Bps", "byte/s")}
        table |= {prefix + unit: ("size", factor) for unit in ("B", "byte", "bytes")}
    # `mbps` and `gbit` are common and cannot mean milli: there is no thousandth of a bit.
    for prefix, factor in (("m", 1e6), ("g", 1e9)):
        table |= {prefix + unit: ("rate", factor) for unit in ("bps", "bit", "bit/s")}
    return table


_UNITS = _units()
_QUANTITY = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-zµμ%/]*)\s*", re.ASCII)


def parse_quantity(text: str, dimension: Dimension | None = None, *, bare: bool = False) -> float:
    """The SI value of `text`: bit/s, seconds, bytes, a fraction, or the number itself.

    With a dimension given, another one is refused, and so is a number without a unit where it would need one, unless
    it is 0 or `bare` says that the unit stands elsewhere (in the name `delay_s`). Raises TraceError.
    """
    example = _EXAMPLES[dimension] if dimension else "100Mbps, 20ms, 64KiB, 0.1%"
    match = _QUANTITY.fullmatch(text) if len(text) <= 100 else None
    if match is None:
        raise TraceError(f"{text[:100]!r} is not a quantity; give a number and a unit, such as {example}")
    number, unit = match.groups()
    if unit not in _UNITS:
        raise TraceError(f"{text!r}: unknown unit {unit!r}; give for example {example}")
    found, factor = _UNITS[unit]
    if dimension is not None and found not in (dimension, "number"):
        raise TraceError(f"{text!r} is a {found}; expected a {dimension}, such as {example}")
    value = float(number) * factor
    if found == "number" and value != 0.0 and not bare and dimension in _UNIT_FOR:
        raise TraceError(f"{text.strip()!r} has no unit; write {_UNIT_FOR[dimension].format(text.strip())}")
    if not math.isfinite(value):
        raise TraceError(f"{text!r} is too large to be a quantity")
    return value


def parse_rate(text: str) -> float:
    """`100Mbps`, `10Gbit/s`, `3MB/s` to bit/s (>= 0). Raises TraceError."""
    return _not_negative(text, parse_quantity(text, "rate"))


def parse_time(text: str) -> float:
    """`20ms`, `0.2s`, `5min` to seconds (>= 0). Raises TraceError."""
    return _not_negative(text, parse_quantity(text, "time"))


def parse_size(text: str) -> int:
    """`64KiB`, `1.5MB`, `4096B` to whole bytes (>= 0). Raises TraceError."""
    return round(_not_negative(text, parse_quantity(text, "size")))


def parse_fraction(text: str) -> float:
    """`0.1%` or `0.001` to a fraction from 0 to 1. Raises TraceError."""
    value = _not_negative(text, parse_quantity(text, "fraction"))
    if value > 1.0:
        raise TraceError(f"{text!r} is more than 100%; a fraction lies between 0 and 1")
    return value


def _not_negative(text: str, value: float) -> float:
    if value < 0.0:
        raise TraceError(f"{text!r} is negative; give zero or more")
    return value


def format_rate(bps: float) -> str:
    """`3.5 Mbit/s`: three digits and the prefix that fits."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if bps >= 0.9995 * factor:
            return f"{bps / factor:.3g} {prefix}bit/s"
    return f"{bps:.3g} bit/s"


def format_time(seconds: float) -> str:
    """`20 ms`, `1.5 s`: three digits and the unit that fits."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= 0.9995 * factor:
            return f"{seconds / factor:.4g} {unit}" if factor == 1.0 else f"{seconds / factor:.3g} {unit}"
    return f"{seconds:.3g} s"
