"""Lumos5G's processed logs, as in the SIGCOMM 2021 5G artifact: `seconds Mbit/s`, a row a second.

4G files separate by a space and 5G files by a tab; both are read. The loggers repeat and skip seconds, while the
artifact replays a row each second whatever its time says; so does this: times may repeat, but not go back. The rates
are those of a bulk download, in application bytes: achieved, and converted to layer-2 capacity.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from kvstream.traces.errors import TraceError
from kvstream.traces.formats import numbers, pairs
from kvstream.traces.formats.base import Format, Options, rising, trace_of
from kvstream.traces.formats.text import Text
from kvstream.traces.trace import Trace

ROW_S = 1.0


def read(text: Text, options: Options) -> Trace:
    times, rates = numbers.timed(text, 1e6, "rate in Mbit/s")
    steps = np.diff(times)
    if len(steps) and np.median(steps) != ROW_S:
        raise TraceError(
            f"{text.source}: rows every {np.median(steps):g} s; Lumos5G logs once a second: set another format"
        )
    notes = [f"{odd} rows not 1 s after the one before, each held 1 s"] if (odd := int((steps != ROW_S).sum())) else []
    if (steps < 0.0).any():
        times, (rates,), said = rising(times, [rates], options.repair, partial(numbers.complaint, text))
        notes += said
    durations = np.full(len(rates), ROW_S)
    return trace_of(text, "lumos5g", durations, rates, kind="achieved", goodput=True, notes=notes)


FORMAT = Format(
    name="lumos5g",
    unit="Mbit/s of application bytes",
    edge="one second, from the row's time on",
    kind="achieved",
    fits=pairs.is_lumos5g,
    read=read,
    takes=("repair",),
)
