"""Oboe's traces (Akhtar et al., SIGCOMM 2018): `milliseconds kbit/s` in pairs, the start and the end of a download.

Between a pair's two rows the rate is constant; in the gap to the next pair it goes linearly from one to the other, here
in steps of at most 100 ms, each with the exact mean of its span. Time begins with the first row. The rates are those of
video downloads: achieved, application bytes.
"""

from __future__ import annotations

import math
from array import array
from itertools import pairwise

import numpy as np

from kvstream.traces.errors import TraceError
from kvstream.traces.formats import numbers, pairs
from kvstream.traces.formats.base import Format, Options, trace_of
from kvstream.traces.formats.text import Text
from kvstream.traces.trace import MAX_ROWS, Trace

STEP_MS = 100.0


def read(text: Text, options: Options) -> Trace:
    times, rates_bps = (column.tolist() for column in numbers.timed(text, 1e3, "rate in kbit/s", low=0.0))

    def error(row: int, problem: str) -> TraceError:
        return numbers.complaint(text, row, problem)

    if len(times) % 2:
        raise error(len(times) - 1, f"{len(times)} rows; Oboe's come in pairs (start, end)")
    durations, rates = array("d"), array("d")
    points = zip(times, rates_bps, strict=True)
    for i, ((sooner, before), (later, after)) in enumerate(pairwise(points)):
        if later < sooner or (i % 2 == 0 and later == sooner):
            raise error(i + 1, f"time goes from {sooner:g} to {later:g} ms; it must rise")
        if i % 2 == 0 and before != after:
            raise error(i + 1, "the two rows of a pair have different rates; a download has one")
        span = later - sooner
        steps = 1 if before == after else math.ceil(span / STEP_MS)
        if len(rates) + steps > MAX_ROWS:
            raise error(i + 1, f"a gap of {span:g} ms makes more than {MAX_ROWS} rows; {numbers.TOO_MANY}")
        if span == 0.0:
            continue
        durations.extend([span / steps / 1000.0] * steps)
        rates.extend(before + (after - before) * (k + 0.5) / steps for k in range(steps))
    if not rates:
        raise TraceError(f"{text.source}: no rows")
    notes = ("gaps in steps of <= 100 ms",)
    return trace_of(text, "oboe", np.array(durations), np.array(rates), kind="achieved", goodput=True, notes=notes)


FORMAT = Format(
    name="oboe",
    unit="kbit/s of application bytes",
    edge="pairs of (start ms, end ms); gaps between pairs are linear",
    kind="achieved",
    fits=pairs.is_oboe,
    read=read,
)
