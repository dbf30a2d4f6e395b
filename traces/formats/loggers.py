"""Two phone loggers of one layout: Norway's HSDPA commutes and Ghent's 4G commutes.

Both have six columns: a wall clock, milliseconds since some start, latitude, longitude, bytes received since the last
row and milliseconds since the last row. Norway's clock (Riiser et al., MMSys 2013) counts seconds, Ghent's (van der
Hooft et al., 2016) milliseconds; that is what tells them apart. The interval is explicit: the sixth column, ending at
the row. The bytes are what an application received, so the rates are achieved.
"""

from __future__ import annotations

from traces.formats.base import Format, Text, table
from traces.trace import Trace

CLOCK_SPLIT = 1e11
"""Unix seconds stay below this, unix milliseconds above, for any date from 1973 to 5138."""


def _read(text: Text, name: str) -> Trace:
    durations, rates = [], []
    previous = None
    for line, fields in text.numbers(6):
        clock = text.number(line, fields[1], "milliseconds since the start", 0.0)
        if previous is not None and clock <= previous:
            raise text.error(line, f"the clock goes from {previous:.0f} to {clock:.0f} ms; it must rise")
        previous = clock
        size = text.number(line, fields[4], "bytes", 0.0, 1e12)
        span = text.number(line, fields[5], "milliseconds since the last row", 0.0, 1e9)
        if span == 0.0:
            raise text.error(line, "0 ms since the last row; an interval must last")
        durations.append(span / 1000.0)
        rates.append(size * 8.0 / (span / 1000.0))
    return text.trace(name, durations, rates, kind="achieved", goodput=True)


def _clocks(text: Text) -> list[float]:
    return [row[0] for row in table(text, 6) or []]


def read_norway(text: Text, part: int | None) -> Trace:
    return _read(text, "norway-hsdpa")


def read_ghent(text: Text, part: int | None) -> Trace:
    return _read(text, "ghent-4g")


def fits_norway(text: Text) -> bool:
    clocks = _clocks(text)
    return bool(clocks) and max(clocks) < CLOCK_SPLIT


def fits_ghent(text: Text) -> bool:
    clocks = _clocks(text)
    return bool(clocks) and min(clocks) >= CLOCK_SPLIT


_UNIT = "application bytes and milliseconds since the last row"
_EDGE = "the interval that ends at the row, as long as its last column says"

NORWAY = Format("norway-hsdpa", _UNIT, _EDGE, "achieved", fits_norway, read_norway)
GHENT = Format("ghent-4g", _UNIT, _EDGE, "achieved", fits_ghent, read_ghent)
