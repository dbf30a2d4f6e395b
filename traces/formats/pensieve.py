"""Pensieve's cooked traces (Mao et al., SIGCOMM 2017): `seconds<TAB>Mbit/s`.

A row's rate holds for the interval that ends at its time, so the first row only says where time begins; files may begin
anywhere (180.0 is common). (Park, which reads the same files, takes the interval that starts there: another link.)
The rates were measured as application bytes: they are achieved, and converted to layer-2 capacity.
"""

from __future__ import annotations

import numpy as np

from traces.errors import TraceError
from traces.formats.base import Format, Text, refuse, table, until_next
from traces.trace import Trace

MOST_MBPS = 20_000.0


def read(text: Text, part: int | None) -> Trace:
    lines, times, rates = [], [], []
    for line, (time, rate) in text.numbers(2):
        lines.append(line)
        times.append(text.number(line, time, "time in s"))
        rates.append(text.rate(line, rate, "rate in Mbit/s", 1e6))
    if len(times) < 2:
        raise TraceError(f"{text.source}: one row; a cooked trace needs two, as the first only says where time begins")
    return text.trace("pensieve", until_next(text, lines, times)[:-1], rates[1:], kind="achieved", goodput=True)


def write(trace: Trace) -> str:
    refuse(trace, "pensieve")
    goodput = trace.as_goodput().rates_bps / 1e6
    times = np.concatenate(([0.0], np.cumsum(trace.durations_s)))
    rates = np.concatenate((goodput[:1], goodput))
    return "".join(f"{time}\t{rate}\n" for time, rate in zip(times.tolist(), rates.tolist(), strict=True))


def fits(text: Text) -> bool:
    rows = table(text, 2)
    return rows is not None and len(rows) >= 2 and max(rate for _, rate in rows) <= MOST_MBPS


FORMAT = Format(
    name="pensieve",
    unit="Mbit/s of application bytes",
    edge="the interval that ends at the row's time (s); the first row's rate is not used",
    kind="achieved",
    fits=fits,
    read=read,
    write=write,
)
