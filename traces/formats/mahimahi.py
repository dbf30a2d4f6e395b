"""mahimahi (Netravali et al., ATC 2015): one line per packet delivery opportunity, in whole milliseconds.

A line `t` carries one MTU-sized packet at `t` ms; equal lines carry several; the last line is the period. A packet of
1500 IP bytes is 1514 bytes at layer 2. An opportunity at `t` belongs to the interval that ends there, one at 0 to the
end of the period, where it falls when the file repeats. Opportunities are counted in bins of 50 ms, the shortest step
that a shaper replays well, or of `bin=` (1 ms is the file's own grain). Packets and milliseconds are whole: a trace
that is too short for that is written several times over, which is the same link.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvstream.traces.errors import TraceError
from kvstream.traces.formats import numbers
from kvstream.traces.formats.base import Format, Options, refuse, trace_of
from kvstream.traces.formats.text import Text
from kvstream.traces.trace import MAX_ROWS, Trace

BIN_MS = 50
PACKET_BITS = 1514 * 8
MAX_LINES = 10_000_000
MAX_MS = 1e15
MEAN_ERROR = 0.001
"""A trace is written with a mean rate that is at most this far off."""
MAX_TIMES = 100_000


def read(text: Text, options: Options) -> Trace:
    bin_ms = BIN_MS if options.bin_s is None else round(options.bin_s * 1000.0)
    if options.bin_s is not None and (bin_ms < 1 or not math.isclose(bin_ms, options.bin_s * 1000.0)):
        raise TraceError(f"{text.source}: bin={options.bin_s:g}s; give whole milliseconds, as in bin=1ms")
    packets = np.zeros(1024, np.int64)
    first = last = 0
    for stamps in _stamps(text):
        last = int(stamps[-1])
        if last / bin_ms > MAX_ROWS:
            raise TraceError(
                f"{text.source}: {last} ms are more than {MAX_ROWS} rows of {bin_ms} ms; set a longer bin=, or cut it"
            )
        first += int(np.count_nonzero(stamps == 0))
        found = np.bincount((stamps[stamps > 0] - 1) // bin_ms)
        if len(found) > len(packets):
            packets.resize(max(2 * len(packets), len(found)), refcheck=False)
        packets[: len(found)] += found
    if last == 0:
        raise TraceError(f"{text.source}: the last time is 0 ms; it is the period and must be above 0")
    bins = math.ceil(last / bin_ms)
    packets[bins - 1] += first
    durations = np.full(bins, bin_ms / 1000.0)
    durations[-1] = (last - bin_ms * (bins - 1)) / 1000.0
    notes = (f"packets of 1514 bytes counted in bins of {bin_ms} ms",)
    return trace_of(text, "mahimahi", durations, packets[:bins] * PACKET_BITS / durations, notes=notes)


def _stamps(text: Text) -> Iterator[NDArray[np.int64]]:
    """The times, block by block. Raises TraceError for what is no whole number, or falls."""
    before, rows_before = 0.0, 0
    for rows in numbers.blocks(text, 1):
        stamps = rows.values[:, 0]
        if not rows.whole[0] or not (stamps < MAX_MS).all():
            raise _no_stamp(text, rows.line)
        falls = np.flatnonzero(np.diff(stamps, prepend=before) < 0.0)
        if len(falls):
            at = int(falls[0])
            line, fields = numbers.row_of(text, rows_before + at)
            sooner = stamps[at - 1] if at else before
            went = f"time goes back from {sooner:.0f} to {fields[0][:40]} ms; times must not fall"
            raise text.error(line, f"{went} (a column of rates is read with unit= and step=)")
        before, rows_before = float(stamps[-1]), rows_before + len(stamps)
        yield stamps.astype(np.int64)


def _no_stamp(text: Text, start: int) -> TraceError:
    """Of the first line from there on that is no whole number of milliseconds."""
    names = numbers.header(text)
    rows = (pair for pair in text.rows(start) if pair != names)
    line, row = next(pair for pair in rows if not pair[1].isdigit() or float(pair[1]) >= MAX_MS)
    text.number(line, row, "time in ms", 0.0, MAX_MS)
    return text.error(line, f"{row[:40]!r}; mahimahi has one whole number of milliseconds per line")


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
        raise TraceError(f"trace {trace.name!r} needs {n} lines in mahimahi, one per packet; write format kvstream")
    goal = np.minimum(bits[-1] * np.arange(1, n + 1) / n, bits[-1])
    row = np.searchsorted(bits, goal, side="left") - 1
    when_s = edges[row] + (goal - bits[row]) / rates[row]
    stamps = np.clip(np.ceil(when_s * 1000.0 - 1e-6), 0, period_ms).astype(np.int64)
    stamps[-1] = period_ms  # the last line is the period
    return "\n".join(map(str, stamps.tolist())) + "\n"


def _times(trace: Trace) -> int:
    """How often the trace is written after itself, so that whole packets and milliseconds keep its mean."""
    most = min(MAX_ROWS // len(trace), MAX_TIMES)
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
    """Whole numbers that do not fall: a column of rates that happens to look so is only known by unit= and step=."""
    if numbers.width(text) != 1 or text.is_json:
        return False
    before, whole = 0.0, True
    for rows in numbers.blocks(text, 1):
        times = rows.values[:, 0]
        whole = whole and rows.whole[0] and bool(times[0] >= before and (times[1:] >= times[:-1]).all())
        if not whole:
            return False
        before = float(rows.values[-1, 0])
    return before > 0.0


FORMAT = Format(
    name="mahimahi",
    unit="milliseconds, one line per packet of 1514 layer-2 bytes",
    edge="the interval that ends at the line's time",
    kind="capacity",
    fits=fits,
    read=read,
    write=write,
    takes=("bin",),
)
