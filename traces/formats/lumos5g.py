"""Lumos5G's processed logs, as in the SIGCOMM 2021 5G artifact: `seconds Mbit/s`, once a second.

4G files separate by a space and 5G files by a tab; both are read. A row holds from its time until the next row's.
The rates are those of a bulk download, in application bytes: achieved, and converted to layer-2 capacity.
"""

from __future__ import annotations

from itertools import pairwise

from traces.formats.base import Format, Text, table, until_next
from traces.formats.pensieve import MOST_MBPS
from traces.trace import Trace


def read(text: Text, part: int | None) -> Trace:
    lines, times, rates = [], [], []
    for line, (time, rate) in text.numbers(2):
        lines.append(line)
        times.append(text.number(line, time, "time in s"))
        rates.append(text.rate(line, rate, "rate in Mbit/s", 1e6))
    return text.trace("lumos5g", until_next(text, lines, times), rates, kind="achieved", goodput=True)


def fits(text: Text) -> bool:
    rows = table(text, 2)
    if rows is None or max(rate for _, rate in rows) > MOST_MBPS:
        return False
    return all(later[0] - sooner[0] == 1.0 for sooner, later in pairwise(rows))


FORMAT = Format(
    name="lumos5g",
    unit="Mbit/s of application bytes",
    edge="from the row's time (s) until the next row's",
    kind="achieved",
    fits=fits,
    read=read,
)
