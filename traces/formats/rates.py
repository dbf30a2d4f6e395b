"""A column of rates, or a line of them, each for the same time: `FILE,unit=Mbps,step=1s`.

Neither unit nor step stands in such a file, so both must be given, and it is never recognised without them. Rates are
layer-2 capacity. A line of names and comments (`#`) are passed over.
"""

from __future__ import annotations

import numpy as np

from kvstream.traces.errors import TraceError
from kvstream.traces.formats import numbers
from kvstream.traces.formats.base import Format, Options, trace_of, unit_bps
from kvstream.traces.formats.text import Text
from kvstream.traces.trace import MAX_RATE_BPS, Trace


def read(text: Text, options: Options) -> Trace:
    if not options.unit or options.step_s is None:
        raise TraceError(f"{text.source}: a column of rates needs unit= and step=, as in unit=Mbps,step=1s")
    factor = unit_bps(options.unit)
    table = numbers.table(text, max(numbers.width(text), 1))
    if len(table.columns) > 1 and len(table) > 1:
        raise TraceError(f"{text.source}: {len(table.columns)} columns; say which are which with columns=")
    high = MAX_RATE_BPS / 2 / factor
    for place, column in enumerate(table.columns):
        numbers.checked(text, column, place, f"rate in {options.unit}", 0.0, high)
    rates = np.concatenate(table.columns) * factor
    return trace_of(text, "rates", np.full(len(rates), options.step_s), rates)


FORMAT = Format(
    name="rates",
    unit="as unit= says",
    edge="as long as step= says, each after the other",
    kind="capacity",
    fits=lambda text: False,
    read=read,
    takes=("unit", "step"),
)
