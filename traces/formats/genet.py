"""Genet's and Aurora's JSON (Xia et al., SIGCOMM 2022): `{"timestamps": [s], "bandwidths": [Mbit/s], "delays": [ms]}`.

A bandwidth holds from its timestamp until the next one's, the last as long as the one before; it is what the simulated
link carries, so capacity. `delays` (one way) are a list of as many, or of one; `loss` is a fraction of packets.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from kvstream.traces.columns import Floats
from kvstream.traces.errors import TraceError
from kvstream.traces.formats.base import Format, Options, rising, trace_of, until_next
from kvstream.traces.formats.numbers import TOO_MANY
from kvstream.traces.formats.sabre import json_of, number_in
from kvstream.traces.formats.text import Text
from kvstream.traces.trace import MAX_RATE_BPS, MAX_ROWS, Trace

KEYS = ("timestamps", "bandwidths")


def read(text: Text, options: Options) -> Trace:
    content = json_of(text)
    if not isinstance(content, dict) or any(not isinstance(content.get(key), list) for key in KEYS):
        raise TraceError(f"{text.source}: Genet's JSON is an object with lists of {' and '.join(KEYS)}")
    times, rates = (_column(text, key, content[key], -np.inf if key == KEYS[0] else 0.0) for key in KEYS)
    n = len(times)
    if not n or len(rates) != n:
        raise TraceError(f"{text.source}: {n} timestamps and {len(rates)} bandwidths; they go in pairs")
    delays, loss = (_optional(text, key, content.get(key), n) for key in ("delays", "loss"))
    others = [one for one in (delays, loss) if one is not None]
    times, (rates, *others), notes = rising(times, [rates, *others], options.repair, partial(_complaint, text))
    delays, loss = (None if one is None else others.pop(0) for one in (delays, loss))
    if queue := content.get("queue"):
        notes.append(f"queue of {queue} packets not taken over: set it with the link's queue_bytes"[:120])
    return trace_of(
        text,
        "genet",
        until_next(times),
        rates * 1e6,
        notes=notes,
        delay_s=None if delays is None else delays / 1e3,
        loss=loss,
    )


def _column(text: Text, key: str, values: list[object], low: float) -> Floats:
    if len(values) > MAX_ROWS:
        raise TraceError(f"{text.source}: more than {MAX_ROWS} {key}; {TOO_MANY}")
    high = {"bandwidths": MAX_RATE_BPS / 2e6, "loss": 1.0}.get(key, 1e12)
    return np.array([number_in(text, f"{key}[{i}]", value, max(low, -1e12), high) for i, value in enumerate(values)])


def _optional(text: Text, key: str, value: object, n: int) -> Floats | None:
    """Delays or losses, one for each row; None where there are none, or all are 0."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    column = _column(text, key, values, 0.0)
    if len(column) not in (0, 1, n):
        raise TraceError(f"{text.source}: {len(column)} {key} for {n} timestamps; give as many, or one")
    return np.broadcast_to(column, n).copy() if column.any() else None


def _complaint(text: Text, row: int, problem: str) -> TraceError:
    return TraceError(f"{text.source}: timestamps[{row}]: {problem}")


def fits(text: Text) -> bool:
    if not text.first[1].startswith("{") or '"bw"' in text.first[1][:40]:
        return False
    content = json_of(text)
    return isinstance(content, dict) and set(KEYS) <= set(content)


FORMAT = Format(
    name="genet",
    unit="Mbit/s",
    edge="from its timestamp (s) until the next one's",
    kind="capacity",
    fits=fits,
    read=read,
    takes=("repair",),
)
