"""mahimahi (Netravali et al., ATC 2015): one line for each chance to deliver a packet, in whole milliseconds.

A line `t` carries one MTU-sized packet at `t` ms; equal lines carry several; the last line is the period. A packet of
1500 IP bytes is 1514 bytes at layer 2. A chance at `t` belongs to the interval that ends there, and one at 0 to the end
of the period, where it falls when the file repeats. Chances are counted in bins of 50 ms, the shortest step that a
shaper replays well. Packets and milliseconds are whole: a trace that is too short for that is written several times
after itself, which is the same link.
"""

from __future__ import annotations

import math

import numpy as np

from traces.errors import TraceError
from traces.formats.base import Format, Text, refuse, table
from traces.trace import MAX_ROWS, Trace

BIN_MS = 50
PACKET_BITS = 1514 * 8
MAX_LINES = 10_000_000
MEAN_ERROR = 0.001
"""A trace is written with a mean rate that is at most this far off."""
MOST_TIMES = 100_000


def read(text: Text, part: int | None) -> Trace:
    stamps = np.zeros(len(text.lines), dtype=np.int64)
    count, last = 0, 0
    for line, row in text.rows():
        if not row.isascii() or not row.isdigit():
            text.number(line, row, "time in ms", 0.0)
            raise text.error(line, f"{row[:40]!r}; mahimahi has one whole number of milliseconds a line")
        stamp = int(row) if len(row) < 16 else -1
        if stamp < last:
            raise text.error(line, f"time goes back from {last} to {row[:40]} ms; times must not fall")
        stamps[count] = last = stamp
        count += 1
    if last == 0:
        raise TraceError(f"{text.source}: the last time is 0 ms; it is the period and must be above 0")
    bins = math.ceil(last / BIN_MS)
    if bins > MAX_ROWS:
        raise TraceError(f"{text.source}: {last} ms are more than {MAX_ROWS} rows of {BIN_MS} ms; cut the file")
    due = np.where(stamps[:count] == 0, last, stamps[:count])
    packets = np.bincount((due - 1) // BIN_MS, minlength=bins)
    durations = np.full(bins, BIN_MS / 1000.0)
    durations[-1] = (last - BIN_MS * (bins - 1)) / 1000.0
    notes = (f"packets of 1514 bytes counted in bins of {BIN_MS} ms",)
    return text.trace("mahimahi", durations, packets * PACKET_BITS / durations, notes=notes)


def write(trace: Trace) -> str:
    """The k-th of n packets leaves when k/n of the bits have; n is the nearest whole number of packets."""
    refuse(trace, "mahimahi")
    if not trace.peak_bps:
        raise TraceError(f"trace {trace.name!r} carries no packet: mahimahi cannot hold it")
    times = _times(trace)
    durations, rates = np.tile(trace.durations_s, times), np.tile(trace.rates_bps, times)
    edges = np.concatenate(([0.0], np.cumsum(durations)))
    bits = np.concatenate(([0.0], np.cumsum(durations * rates)))
    period_ms, n = round(edges[-1] * 1000.0), round(bits[-1] / PACKET_BITS)
    if n > MAX_LINES:
        raise TraceError(f"trace {trace.name!r} needs {n} lines in mahimahi, one a packet; write format kvstream")
    goal = np.minimum(bits[-1] * np.arange(1, n + 1) / n, bits[-1])
    row = np.searchsorted(bits, goal, side="left") - 1
    when_s = edges[row] + (goal - bits[row]) / rates[row]
    stamps = np.clip(np.ceil(when_s * 1000.0 - 1e-6), 0, period_ms).astype(np.int64)
    stamps[-1] = period_ms  # the last line is the period
    return "\n".join(map(str, stamps.tolist())) + "\n"


def _times(trace: Trace) -> int:
    """How often the trace is written after itself, so that whole packets and milliseconds keep its mean."""
    most = min(MAX_ROWS // len(trace), MOST_TIMES)
    times = np.arange(1, most + 1)
    packets = np.maximum(np.round(times * (trace.mean_bps * trace.duration_s / PACKET_BITS)), 1e-9)
    period_s = np.maximum(np.round(times * trace.duration_s * 1000.0), 1e-9) / 1000.0
    good = np.abs(packets * PACKET_BITS / period_s / trace.mean_bps - 1.0) <= MEAN_ERROR
    if not good.any():
        raise TraceError(
            f"trace {trace.name!r} is too slow or too short for whole packets and milliseconds; write format kvstream"
        )
    return int(times[np.argmax(good)])


def fits(text: Text) -> bool:
    rows = table(text, 1)
    return rows is not None and all(value.is_integer() for (value,) in rows)


FORMAT = Format(
    name="mahimahi",
    unit="milliseconds, one line a packet of 1514 layer-2 bytes",
    edge="the interval that ends at the line's time",
    kind="capacity",
    fits=fits,
    read=read,
    write=write,
)
