"""Two phone loggers of one layout: Norway's HSDPA commutes and Ghent's 4G commutes.

Both have six columns: a wall clock, milliseconds since some start, latitude, longitude, bytes received since the last
row and milliseconds since the last row. Norway's clock (Riiser et al., MMSys 2013) counts seconds, Ghent's (van der
Hooft et al., 2016) milliseconds; that is what tells them apart. The interval is explicit: the sixth column, ending at
the row. The bytes are what an application received, so the rates are achieved.
"""

from __future__ import annotations

from functools import partial

from kvstream.traces.formats import numbers
from kvstream.traces.formats.base import Format, Options, rising, trace_of
from kvstream.traces.formats.text import Text
from kvstream.traces.trace import Trace

CLOCK_SPLIT = 1e11
"""Unix seconds stay below this, unix milliseconds above, for any date from 1973 to 5138."""


def _read(name: str, text: Text, options: Options) -> Trace:
    _, clock, _, _, size, span = numbers.table(text, 6).columns
    numbers.checked(text, clock, 1, "milliseconds since the start", 0.0)
    numbers.checked(text, size, 4, "bytes", 0.0, 1e12)
    numbers.checked(text, span, 5, "milliseconds since the last row", 1e-3, 1e9)
    _, (size, span), notes = rising(clock, [size, span], options.repair, partial(numbers.complaint, text))
    seconds = span / 1000.0
    return trace_of(text, name, seconds, size * 8.0 / seconds, kind="achieved", goodput=True, notes=notes)


def _fits(late: bool, text: Text) -> bool:
    if numbers.width(text) != 6 or text.is_json:
        return False
    if "clock" not in text.known:
        clock = numbers.table(text, 6).columns[0]
        text.known["clock"] = (float(clock.min()), float(clock.max()))
    low, high = text.known["clock"]
    return bool(low >= CLOCK_SPLIT) if late else bool(high < CLOCK_SPLIT)


_UNIT = "application bytes and milliseconds since the last row"
_EDGE = "the interval that ends at the row, as long as its last column says"


def _format(name: str, late: bool) -> Format:
    return Format(name, _UNIT, _EDGE, "achieved", partial(_fits, late), partial(_read, name), takes=("repair",))


NORWAY = _format("norway-hsdpa", late=False)
GHENT = _format("ghent-4g", late=True)
