"""Whether a link followed its trace: the verdict that stands beside every number.

The rule is about bytes. Over stretches in which the queue was never empty, the link must have delivered what the trace
carries; elsewhere, it must not have delivered more. An interval between two samples belongs to a stretch when its
backlog at the start was enough to last to its end, whatever arrived. All stretches together, however short, are judged
by their total, and pieces of them, the windows, by their median and 95th percentile; windows widen until they hold
enough packets, so that the grain of a packet decides nothing. The grain of a total grows as the root of the number of
stretches, since one's does not depend on another's; long stretches are judged by themselves, too, to two packets. A
step up takes effect when the packet that waits has gone at the old rate (HTB reckons its time once), so a window is
forgiven what its steps cost by that. Everything is judged against the trace, never against what the shaper meant to
set; only for traces with one rate per chunk do the steps that were made count as true.

What is too short or has too few packets is not judged. A session of which too little was judged is `unjudged`, which is
not valid.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from kvstream.testbed.emulator.record import LinkRecord
from kvstream.testbed.emulator.tc import BURST_S
from kvstream.testbed.host.clock import REAL_TIME
from kvstream.traces.trace import Trace

State = Literal["valid", "invalid", "unjudged"]

WINDOW_PACKETS: Final = 30
"""A window holds at least so many: a packet more or less is then 1 % in the median, within every limit."""
GRAIN_PACKETS: Final = 2
"""The bytes of a stretch are known to one packet at either end."""
JUDGED_GRAINS: Final = 5
"""With fewer grains than that in a session's stretches, their total says nothing."""


@dataclass(frozen=True)
class Limits:
    """What a session may deviate before it is repeated, then invalid. Fractions are of the bytes the trace carries.

    The defaults suit sessions of 0.5 s and more.
    """

    window_s: float = 0.1
    """Windows are at least so long, and longer at low rates."""
    median_error: float = 0.03
    """Median over windows of |delivered - trace| / trace."""
    p95_error: float = 0.15
    """The same, of 95 of 100 windows. Counts from 5 windows on."""
    total_error: float = 0.03
    """Of the total over all stretches; their grain is always allowed."""
    lateness_p99_s: float = 0.005
    """How late 99 of 100 rate changes may be."""
    gap_s: float = 0.05
    """Longest time between two samples: beyond it the shaper had no CPU."""
    starved: float = 0.1
    """CPU contention: seconds per second that the run's threads waited for a CPU that other programs used."""
    crowded: float = 0.25
    """CPU contention: processors that other programs used, on average, while none was idle."""
    coverage: float = 0.5
    """Least part of a session in which the link was judged: all but the time with a queue too short to judge."""


@dataclass(frozen=True)
class Fidelity:
    """The verdict on one session. Errors are None when the link was never backlogged for long enough to judge."""

    ok: bool
    """Valid: judged, and within all limits."""
    reasons: tuple[str, ...]
    """Each limit that was exceeded, and by how much; for an unjudged session, why it is."""
    median_error: float | None
    p95_error: float | None
    total_error: float | None
    windows: int
    backlogged_s: float
    """Length of the stretches that were judged."""
    lateness_p99_s: float
    gap_s: float
    starved: float
    drops: int
    delivered_bytes: int
    impairments: Mapping[str, Any] | None = None
    """What delayed and lost packets did during the session (`impairments.handled`)."""
    state: State = "valid"
    coverage: float = 1.0
    """Part of the session that was judged: in stretches, or while the link carried all it was given."""
    full_s: float = 0.0
    """How long the queue held data."""
    crowded: float = 0.0
    packet_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"reasons": list(self.reasons)}


@dataclass(frozen=True)
class Window:
    """A stretch of time in which the queue was never empty, or a piece of one."""

    start_s: float
    end_s: float
    delivered_bytes: float
    expected_bytes: float
    held_bytes: float = 0.0
    """What packets that waited at its steps up may have cost it."""

    @property
    def missing_bytes(self) -> float:
        """Signed: fewer than expected are positive, as far as the steps up do not explain them."""
        missing = self.expected_bytes - self.delivered_bytes
        return missing if missing < 0.0 else max(missing - self.held_bytes, 0.0)

    @property
    def error(self) -> float:
        """Signed, as a fraction of what was expected."""
        return -self.missing_bytes / self.expected_bytes


def judge(record: LinkRecord, trace: Trace | None, limits: Limits | None = None) -> Fidelity:
    """Compare a record with its trace. With None, or one rate per chunk, the steps that were made count as true."""
    limits = limits or Limits()
    expected = expected_bytes(record, trace)
    pieces = windows(record, expected, limits.window_s)
    found = stretches(record, expected)
    judged = _judged(found, record.packet_bytes, limits.window_s)
    errors = np.abs([window.error for window in pieces])
    together = _total(judged)
    delivered, carried = together.delivered_bytes, together.expected_bytes
    grain = _grain(judged, record.packet_bytes)
    enough = carried >= JUDGED_GRAINS * grain or delivered > carried + grain
    backlogged_s = sum(stretch.end_s - stretch.start_s for stretch in judged)
    full_s = sum(stretch.end_s - stretch.start_s for stretch in found)
    median = float(np.median(errors)) if pieces else None
    p95 = float(np.percentile(errors, 95)) if pieces else None
    total = abs(together.error) if enough and carried > 0.0 else None
    allowed = max(limits.total_error, grain / carried) if carried > 0.0 else 0.0
    lateness = float(np.percentile(record.lateness_s, 99)) if record.changes else 0.0
    times = [0.0, *(sample.t_s for sample in record.samples), record.length_s]
    gap = max(later - earlier for earlier, later in itertools.pairwise(times))
    starved, crowd = starvation(record), crowding(record)
    reasons = list(record.faults[:3])
    if median is not None and median > limits.median_error:
        reasons.append(f"bytes per window: median error {median:.1%} (limit {limits.median_error:.1%})")
    if p95 is not None and len(pieces) >= 5 and p95 > limits.p95_error:
        reasons.append(f"bytes per window: 95th percentile of the error {p95:.1%} (limit {limits.p95_error:.1%})")
    if total is not None and total > allowed:
        reasons.append(f"total bytes: error {total:.1%} (limit {allowed:.1%})")
    elif off := _long_error(found, record.packet_bytes, limits):
        which = f"pieces of {limits.window_s / 2.0 * 1e3:g} ms and more"
        reasons.append(f"total bytes in {which}: error {off[0]:.1%} (limit {off[1]:.1%})")
    if carried == 0.0 and delivered > grain:
        reasons.append(f"{delivered:.0f} bytes passed while the trace carries nothing (limit {grain:.0f})")
    if (excess := _excess(record, expected, limits)) > 0.0:
        reasons.append(f"{excess:.0f} bytes more than the trace carries passed a queue that was not full")
    if lateness > limits.lateness_p99_s:
        reasons.append(f"rate changes late by {lateness * 1e3:.1f} ms (limit {limits.lateness_p99_s * 1e3:.1f} ms)")
    if gap > limits.gap_s:
        reasons.append(f"no sample for {gap * 1e3:.0f} ms (limit {limits.gap_s * 1e3:.0f} ms): the shaper had no CPU")
    if starved > limits.starved:
        reasons.append(f"CPU contention {starved:.2f} s/s (limit {limits.starved:.2f})")
    if crowd > limits.crowded:
        which = f"other programs used {crowd:.2f} processors while none was idle (limit {limits.crowded:.2f})"
        reasons.append(f"CPU contention: {which}")
    if lost := (record.impairments or {}).get("lost_by_kernel"):
        reasons.append(f"the kernel dropped {lost} packets before they reached the element that delays and loses them")
    judged_s = backlogged_s if enough else 0.0
    unjudged = max(full_s - judged_s, 0.0) / record.length_s if record.length_s > 0.0 else 0.0
    coverage = max(1.0 - unjudged, 0.0)
    state: State = "invalid" if reasons else "valid"
    if not reasons and coverage < limits.coverage:
        state = "unjudged"
        reasons.append(_why_unjudged(coverage, limits, judged, record.packet_bytes))
    return Fidelity(
        ok=state == "valid",
        reasons=tuple(reasons),
        median_error=median,
        p95_error=p95,
        total_error=total,
        windows=len(pieces),
        backlogged_s=judged_s,
        lateness_p99_s=lateness,
        gap_s=gap,
        starved=starved,
        drops=record.drops,
        delivered_bytes=record.delivered_bytes,
        impairments=record.impairments,
        state=state,
        coverage=coverage,
        full_s=full_s,
        crowded=crowd,
        packet_bytes=record.packet_bytes,
    )


def _judged(found: list[Window], packet_bytes: int, window_s: float) -> list[Window]:
    """All stretches; those of at least half a window where too many short ones hide what these show."""
    for some in (found, _long(found, window_s)):
        if sum(stretch.expected_bytes for stretch in some) >= JUDGED_GRAINS * _grain(some, packet_bytes) > 0.0:
            return some
    return found


def _total(found: list[Window]) -> Window:
    """All stretches as one."""
    names = ("delivered_bytes", "expected_bytes", "held_bytes")
    return Window(0.0, 0.0, *(sum(getattr(stretch, name) for stretch in found) for name in names))


def _long(found: list[Window], window_s: float) -> list[Window]:
    return [stretch for stretch in found if stretch.end_s - stretch.start_s >= window_s / 2.0]


def _long_error(found: list[Window], packet_bytes: int, limits: Limits) -> tuple[float, float] | None:
    """(error, limit) of the total over the long stretches alone, where it is too large: by short ones it is not hidden,
    and two packets are all that is allowed."""
    total = _total(_long(found, limits.window_s))
    carried, grain = total.expected_bytes, GRAIN_PACKETS * packet_bytes
    if carried <= 0.0 or (carried < JUDGED_GRAINS * grain and total.delivered_bytes <= carried + grain):
        return None
    error, allowed = abs(total.error), max(limits.total_error, grain / carried)
    return (error, allowed) if error > allowed else None


def _grain(found: list[Window], packet_bytes: int) -> float:
    """To how many bytes the total of stretches is known."""
    return GRAIN_PACKETS * packet_bytes * math.sqrt(len(found))


def _why_unjudged(coverage: float, limits: Limits, judged: list[Window], packet_bytes: int) -> str:
    carried = sum(stretch.expected_bytes for stretch in judged) / packet_bytes
    needed = JUDGED_GRAINS * _grain(judged, packet_bytes) / packet_bytes
    pieces = f" in {len(judged)} pieces" if len(judged) > 1 else ""
    why = f"the queue held data for {carried:.0f} packets{pieces}, and {needed:.0f} are needed"
    return f"unjudged: {coverage:.0%} of the session could be judged (at least {limits.coverage:.0%}): {why}"


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
    """Pieces of the stretches, cut as soon as they are (within 5 %) `window_s` long and hold WINDOW_PACKETS.

    A rest that is shorter than half a window, or holds fewer packets, is left out, and an outage ends a piece: what
    leaks through one counts in the total.
    """
    found: list[Window] = []
    for run in _backlogged(record, expected):
        start = run.start
        for i in range(run.start, run.stop):
            here, there = (_expected_at(record, expected, at) for at in (i, i + 1))
            if there == here:
                _close(found, record, expected, start, i, window_s)
                start = i + 1
                continue
            long_enough = record.samples[i + 1].t_s - record.samples[start].t_s >= 0.95 * window_s
            if long_enough and there - _expected_at(record, expected, start) >= WINDOW_PACKETS * record.packet_bytes:
                _close(found, record, expected, start, i + 1, window_s)
                start = i + 1
        _close(found, record, expected, start, run.stop, window_s)
    return found


def stretches(record: LinkRecord, expected: Callable[[float], float]) -> list[Window]:
    """The stretches, outages within them included."""
    return [_piece(record, expected, run.start, run.stop) for run in _backlogged(record, expected)]


def _close(
    found: list[Window],
    record: LinkRecord,
    expected: Callable[[float], float],
    start: int,
    end: int,
    window_s: float,
) -> None:
    piece = _piece(record, expected, start, end)
    if piece.end_s - piece.start_s >= window_s / 2.0 and piece.expected_bytes >= WINDOW_PACKETS * record.packet_bytes:
        found.append(piece)


def _piece(record: LinkRecord, expected: Callable[[float], float], start: int, end: int) -> Window:
    first, last = record.samples[start], record.samples[end]
    carried = expected(last.t_s) - expected(first.t_s)
    delivered = last.delivered_bytes - first.delivered_bytes
    return Window(first.t_s, last.t_s, delivered, carried, _held_bytes(record, first.t_s, last.t_s))


def _held_bytes(record: LinkRecord, start_s: float, end_s: float) -> float:
    """What the link carried less, at most, because a packet waited at an old rate when a higher one began."""
    held, before_bps = 0.0, 0.0
    for change in record.changes:
        if start_s <= change.actual_s < end_s and 0.0 < before_bps < change.rate_bps:
            waits_s = record.packet_bytes * 8.0 / before_bps
            held += min(waits_s, end_s - change.actual_s) * (change.rate_bps - before_bps) / 8.0
        before_bps = change.rate_bps
    return held


def _expected_at(record: LinkRecord, expected: Callable[[float], float], i: int) -> float:
    return expected(record.samples[i].t_s)


def _backlogged(record: LinkRecord, expected: Callable[[float], float]) -> list[range]:
    """Runs of samples, first to last, between which the queue was never empty."""
    runs: list[range] = []
    start: int | None = None
    for i, (here, there) in enumerate(itertools.pairwise(record.samples)):
        needed = expected(there.t_s) - expected(here.t_s)
        lasts = here.t_s >= 0.0 and here.backlog_bytes >= max(needed, 1) and there.backlog_bytes > 0
        if lasts and start is None:
            start = i
        if not lasts and start is not None:
            runs.append(range(start, i))
            start = None
    if start is not None:
        runs.append(range(start, len(record.samples) - 1))
    return runs


def _excess(record: LinkRecord, expected: Callable[[float], float], limits: Limits) -> float:
    """Bytes above what the trace carries, its burst and its grain, in the worst time between stretches."""
    bounds = [0, *itertools.chain.from_iterable((run.start, run.stop) for run in _backlogged(record, expected))]
    bounds.append(len(record.samples) - 1)
    worst = 0.0
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        if end <= start:
            continue
        piece = _piece(record, expected, start, end)
        peak_bps = max(sample.rate_bps for sample in record.samples[start : end + 1])
        slack = GRAIN_PACKETS * record.packet_bytes + (BURST_S + limits.lateness_p99_s) * peak_bps / 8.0
        worst = max(worst, piece.delivered_bytes - piece.expected_bytes * (1.0 + limits.total_error) - slack)
    return worst


def starvation(record: LinkRecord) -> float:
    """CPU contention: seconds per second that the run's threads waited for a CPU that other programs used.

    A thread that waits on the run's own threads is part of the experiment; so what was waited in a stretch of time
    counts by the share of the busy time that was foreign.
    """
    starved = 0.0
    for sample in record.cpu:
        busy = sample.own_s + sample.foreign_s
        starved += sample.waited_s * (sample.foreign_s / busy if busy > 0.0 else 0.0)
    return starved / record.length_s if record.length_s > 0.0 else 0.0


def crowding(record: LinkRecord) -> float:
    """CPU contention: processors that other programs used, on average, while hardly any was idle.

    Threads that sleep most of the time wait little, and yet late, where every processor is taken: this sees it. A run
    with real-time priority waits for no other program, and only what other virtual machines take counts.
    """
    first = str(record.settings.get("scheduling", "")).startswith(REAL_TIME)
    taken_s = sum(
        sample.stolen_s if first else sample.foreign_s
        for sample in record.cpu
        if sample.idle_s <= IDLE * _busy_s(sample)
    )
    sampled_s = sum(map(_busy_s, record.cpu)) / record.cores  # which begins before the session does
    return taken_s / sampled_s if sampled_s > 0.0 else 0.0


IDLE: Final = 0.05
"""Of a sample's processor time."""


def _busy_s(sample: Sequence[float]) -> float:
    """Processor time of a sample: idle, own and foreign."""
    return sum(sample[1:4])
