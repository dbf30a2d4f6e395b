"""Purdue's ABR lab (CS 50863): `seconds bit/s`, each rate from that time on.

Synthetic links, so capacity. The last rate stays (`end=hold`). Pairs of whole numbers could be anything, so this format
is never recognised, only named.
"""

from __future__ import annotations

from functools import partial

from kvstream.traces.formats import numbers
from kvstream.traces.formats.base import Format, Options, rising, trace_of, until_next
from kvstream.traces.formats.text import Text
from kvstream.traces.trace import Trace


def read(text: Text, options: Options) -> Trace:
    times, rates = numbers.timed(text, 1.0, "rate in bit/s", low=0.0)
    times, (rates,), notes = rising(times, [rates], options.repair, partial(numbers.complaint, text))
    return trace_of(text, "purdue", until_next(times), rates, end="hold", notes=notes)


FORMAT = Format(
    name="purdue",
    unit="bit/s",
    edge="from the row's time (s) until the next row's; the last stays",
    kind="capacity",
    fits=lambda text: False,
    read=read,
    takes=("repair",),
)
