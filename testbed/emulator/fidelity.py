"""Whether a link did what its trace says: the verdict that stands beside every number.

The rule is about bytes: over intervals in which the queue was never empty, the link must have delivered what the trace
carries. An interval between two samples counts when its backlog at the start was enough to last to its end, whatever
arrived. Windows are runs of such intervals of at least `window_s`. Everything is judged against the trace, never
against what the shaper meant to set; only for traces with one rate a chunk the steps that were made are the truth.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from testbed.emulator.record import LinkRecord
from traces.trace import Trace


@dataclass(frozen=True)
class Limits:
    """What a session may deviate before it is repeated, then invalid. Fractions are of the bytes the trace carries.

    The defaults suit sessions of 0.5 s and more at 2 Mbit/s and more.
    """

    window_s: float = 0.1
    median_error: float = 0.03
    """Median over windows of |delivered - trace| / trace."""
    p95_error: float = 0.15
    """Counts from 5 windows on."""
    total_error: float = 0.03
    lateness_p99_s: float = 0.005
    gap_s: float = 0.05
    """Longest time between two samples: a shaper that did not get a processor."""
    starved: float = 0.1
    """Seconds a second that the run's threads waited for a processor that other programs had."""


@dataclass(frozen=True)
class Fidelity:
    """The verdict on one session. Errors are None when the link was never backlogged for long enough to judge."""

    ok: bool
    reasons: tuple[str, ...]
    median_error: float | None
    p95_error: float | None
    total_error: float | None
    windows: int
    backlogged_s: float
    lateness_p99_s: float
    gap_s: float
    starved: float
    drops: int
    delivered_bytes: int
    impairments: Mapping[str, Any] | None = None
    """What delayed and lost packets did during the session (`impairments.handled`)."""

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"reasons": list(self.reasons)}


@dataclass(frozen=True)
class Window:
    """A stretch of time in which the queue was never empty."""

    start_s: float
    end_s: float
    delivered_bytes: float
    expected_bytes: float

    @property
    def error(self) -> float:
        """Signed, as a fraction of what was expected."""
        return (self.delivered_bytes - self.expected_bytes) / self.expected_bytes


def judge(record: LinkRecord, trace: Trace | None, limits: Limits | None = None) -> Fidelity:
    """Compare a record with its trace. `trace` may be None, or have one rate a chunk: then the steps count as true."""
    limits = limits or Limits()
    expected = expected_bytes(record, trace)
    found = windows(record, expected, limits.window_s)
    errors = np.abs([window.error for window in found])
    delivered = sum(window.delivered_bytes for window in found)
    carried = sum(window.expected_bytes for window in found)
    median = float(np.median(errors)) if found else None
    p95 = float(np.percentile(errors, 95)) if found else None
    total = abs(delivered / carried - 1.0) if carried > 0.0 else None
    lateness = float(np.percentile(record.lateness_s, 99)) if record.changes else 0.0
    times = [0.0, *(sample.t_s for sample in record.samples), record.length_s]
    gap = max(later - earlier for earlier, later in itertools.pairwise(times))
    starved = starvation(record)
    reasons = list(record.faults[:3])
    if median is not None and median > limits.median_error:
        reasons.append(f"median error of bytes per window {median:.1%} > {limits.median_error:.1%}")
    if p95 is not None and len(found) >= 5 and p95 > limits.p95_error:
        reasons.append(f"95th percentile of it {p95:.1%} > {limits.p95_error:.1%}")
    if total is not None and total > limits.total_error:
        reasons.append(f"error of all bytes {total:.1%} > {limits.total_error:.1%}")
    if lateness > limits.lateness_p99_s:
        reasons.append(f"rate changes late by {lateness * 1e3:.1f} ms > {limits.lateness_p99_s * 1e3:.1f} ms")
    if gap > limits.gap_s:
        reasons.append(f"no sample for {gap * 1e3:.0f} ms > {limits.gap_s * 1e3:.0f} ms: the shaper had no processor")
    if starved > limits.starved:
        reasons.append(f"waited {starved:.2f} s a second for processors that others had > {limits.starved:.2f} s")
    if lost := (record.impairments or {}).get("lost_by_kernel"):
        reasons.append(f"the kernel dropped {lost} packets on their way to the element that delays and loses them")
    return Fidelity(
        ok=not reasons,
        reasons=tuple(reasons),
        median_error=median,
        p95_error=p95,
        total_error=total,
        windows=len(found),
        backlogged_s=sum(window.end_s - window.start_s for window in found),
        lateness_p99_s=lateness,
        gap_s=gap,
        starved=starved,
        drops=record.drops,
        delivered_bytes=record.delivered_bytes,
        impairments=record.impairments,
    )


def expected_bytes(record: LinkRecord, trace: Trace | None) -> Callable[[float], float]:
    """Bytes that the link carries from the session's start to a time, as a function of that time in seconds."""
    if trace is not None and trace.per == "time":
        return lambda t_s: trace.bits_by(max(t_s, 0.0)) / 8.0
    times, rates, sums = [0.0], [0.0], [0.0]
    for change in record.changes:
        sums.append(sums[-1] + rates[-1] * (change.actual_s - times[-1]) / 8.0)
        times.append(change.actual_s)
        rates.append(change.rate_bps)

    def carried(t_s: float) -> float:
        row = max(bisect_right(times, t_s) - 1, 0)
        return sums[row] + rates[row] * (t_s - times[row]) / 8.0

    return carried


def windows(record: LinkRecord, expected: Callable[[float], float], window_s: float) -> list[Window]:
    """The windows of a record: runs of backlogged intervals, cut as soon as they are (within 5 %) `window_s` long.

    A rest shorter than half a window is left out. So is one that should carry less than ten packets: there the grain
    of a packet, not the link, decides (an outage, for instance; what leaks through one still counts in `delivered`).
    """
    found: list[Window] = []
    start = None

    def close(end: int) -> None:
        nonlocal start
        if start is not None:
            first, last = record.samples[start], record.samples[end]
            carried = expected(last.t_s) - expected(first.t_s)
            if last.t_s - first.t_s >= window_s / 2.0 and carried >= 10 * record.packet_bytes:
                found.append(Window(first.t_s, last.t_s, last.delivered_bytes - first.delivered_bytes, carried))
        start = None

    for i in range(len(record.samples) - 1):
        here, there = record.samples[i], record.samples[i + 1]
        needed = expected(there.t_s) - expected(here.t_s)
        if here.t_s < 0.0 or here.backlog_bytes < max(needed, 1) or there.backlog_bytes == 0:
            close(i)
            continue
        if start is None:
            start = i
        if there.t_s - record.samples[start].t_s >= 0.95 * window_s:
            close(i + 1)
    if record.samples:
        close(len(record.samples) - 1)
    return found


def starvation(record: LinkRecord) -> float:
    """Seconds a second that the run's threads waited for a processor because others had it.

    A thread that waits on the run's own threads is part of the experiment; so what was waited in a stretch of time
    counts by the share of the busy time that was foreign.
    """
    starved = 0.0
    for sample in record.cpu:
        busy = sample.own_s + sample.foreign_s
        starved += sample.waited_s * (sample.foreign_s / busy if busy > 0.0 else 0.0)
    return starved / record.length_s if record.length_s > 0.0 else 0.0
