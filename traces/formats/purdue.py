"""Purdue's ABR lab (CS 50863): `seconds bit/s`, each rate from that time on.

Synthetic links, so capacity. The last rate stays (`end=hold`).
"""

from __future__ import annotations

from traces.formats.base import Format, Text, table, until_next
from traces.trace import Trace

LEAST_BPS = 20_000.0


def read(text: Text, part: int | None) -> Trace:
    lines, times, rates = [], [], []
    for line, (time, rate) in text.numbers(2):
        lines.append(line)
        times.append(text.number(line, time, "time in s", 0.0))
        rates.append(text.rate(line, rate, "rate in bit/s", 1.0))
    return text.trace("purdue", until_next(text, lines, times), rates, end="hold")


def fits(text: Text) -> bool:
    rows = table(text, 2)
    if rows is None or not all(value.is_integer() for row in rows for value in row):
        return False
    return all(rate >= LEAST_BPS or rate <= 0.0 for _, rate in rows) and any(rate > 0.0 for _, rate in rows)


FORMAT = Format(
    name="purdue",
    unit="bit/s",
    edge="from the row's time (s) until the next row's; the last stays",
    kind="capacity",
    fits=fits,
    read=read,
)
