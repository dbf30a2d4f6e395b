"""Pensieve's cooked traces (Mao et al., SIGCOMM 2017): `seconds<TAB>Mbit/s`.

A row's rate holds for the interval that ends at its time, so the first row only says where time begins; files may begin
anywhere (180.0 is common). (Park, which reads the same files, takes the interval that starts there: another link.)
The rates were measured as application bytes: they are achieved, and converted to layer-2 capacity. Comments (`#`) and
one line of names are passed over.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from kvstream.traces.errors import TraceError
from kvstream.traces.formats import numbers, pairs
from kvstream.traces.formats.base import Format, Options, refuse, rising, trace_of
from kvstream.traces.formats.text import Text
from kvstream.traces.trace import Trace


def read(text: Text, options: Options) -> Trace:
    times, rates = numbers.timed(text, 1e6, "rate in Mbit/s")
    if len(times) < 2:
        raise TraceError(f"{text.source}: one row; a cooked trace needs two, as the first only says where time begins")
    times, (rates,), notes = rising(times, [rates], options.repair, partial(numbers.complaint, text))
    return trace_of(text, "pensieve", np.diff(times), rates[1:].copy(), kind="achieved", goodput=True, notes=notes)


def write(trace: Trace) -> str:
    refuse(trace, "pensieve")
    goodput = trace.as_goodput().rates_bps / 1e6
    times = np.concatenate(([0.0], np.cumsum(trace.durations_s)))
    rates = np.concatenate((goodput[:1], goodput))
    return "".join(f"{time}\t{rate}\n" for time, rate in zip(times.tolist(), rates.tolist(), strict=True))


FORMAT = Format(
    name="pensieve",
    unit="Mbit/s of application bytes",
    edge="the interval that ends at the row's time (s); the first row's rate is not used",
    kind="achieved",
    fits=pairs.is_pensieve,
    read=read,
    write=write,
    takes=("repair",),
)
