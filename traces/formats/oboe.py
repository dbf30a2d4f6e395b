"""Oboe's traces (Akhtar et al., SIGCOMM 2018): `milliseconds kbit/s` in pairs, the start and the end of a download.

Between a pair's two rows the rate is constant; in the gap to the next pair it goes linearly from one to the other, here
in steps of at most 100 ms, each with the exact mean of its span. Time begins with the first row. The rates are those of
video downloads: achieved, application bytes.
"""

from __future__ import annotations

import math
from itertools import pairwise

from traces.errors import TraceError
from traces.formats.base import HEAD_LINES, Format, Text, table
from traces.trace import MAX_ROWS, Trace

STEP_MS = 100.0


def read(text: Text, part: int | None) -> Trace:
    points = [
        (line, text.number(line, time, "time in ms", 0.0), text.rate(line, rate, "rate in kbit/s", 1e3))
        for line, (time, rate) in text.numbers(2)
    ]
    if len(points) % 2:
        raise text.error(points[-1][0], f"{len(points)} rows; Oboe's come in pairs (start, end)")
    durations: list[float] = []
    rates: list[float] = []
    for i, ((_, sooner, before), (line, later, after)) in enumerate(pairwise(points)):
        if later < sooner or (i % 2 == 0 and later == sooner):
            raise text.error(line, f"time goes from {sooner:g} to {later:g} ms; it must rise")
        if i % 2 == 0 and before != after:
            raise text.error(line, "the two rows of a pair have different rates; a download has one")
        span = later - sooner
        steps = 1 if before == after else math.ceil(span / STEP_MS)
        if len(rates) + steps > MAX_ROWS:
            raise text.error(line, f"a gap of {span:g} ms makes more than {MAX_ROWS} rows")
        if span == 0.0:
            continue
        durations += [span / steps / 1000.0] * steps
        rates += [before + (after - before) * (k + 0.5) / steps for k in range(steps)]
    if not rates:
        raise TraceError(f"{text.source}: no rows")
    return text.trace("oboe", durations, rates, kind="achieved", goodput=True, notes=("gaps in steps of <= 100 ms",))


def fits(text: Text) -> bool:
    rows = table(text, 2)
    whole = len(text.lines) <= HEAD_LINES
    if rows is None or len(rows) < 2 or (whole and len(rows) % 2):
        return False
    return all(start[1] == end[1] for start, end in zip(rows[::2], rows[1::2], strict=False))


FORMAT = Format(
    name="oboe",
    unit="kbit/s of application bytes",
    edge="pairs of (start ms, end ms); gaps between pairs are linear",
    kind="achieved",
    fits=fits,
    read=read,
)
