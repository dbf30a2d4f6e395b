"""A fluid link: when the bytes of a request arrive, exactly, over a goodput trace.

The bottleneck stands next to the receiver; all delay lies before it. A request made at `t` therefore shows its first
byte at `t + rtt` at the earliest, and a byte that has passed the bottleneck has arrived. One connection carries all
answers, strictly in the order of the requests, so a request waits for the one before it. Simulator and oracle share
this model.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import lru_cache
from typing import Final

from kvstream.traces.errors import TraceError
from kvstream.traces.trace import Trace

FRAME_BYTES: Final = 65_536
MIN_FRAME_BYTES: Final = 4_096
FRAMES_PER_ANSWER: Final = 8
LARGE_FRAME_BYTES: Final = 524_288
FRAMES_PER_LARGE_ANSWER: Final = 32


@lru_cache(maxsize=4096)  # both ends of a simulated session ask
def frame_bytes(total_bytes: int) -> int:
    """Size of the frames in which a receiver learns of an answer's bytes: an eighth of it, within 4 to 64 KiB, and of
    more than 2 MiB a thirty-second, up to 512 KiB.

    A frame counts once it is complete, so a slow link needs small ones for a rate to be known before the chunk ends. On
    a fast link each frame costs both ends time, so large answers have large frames.
    """
    small = min(FRAME_BYTES, max(MIN_FRAME_BYTES, total_bytes // FRAMES_PER_ANSWER))
    return max(small, min(LARGE_FRAME_BYTES, total_bytes // FRAMES_PER_LARGE_ANSWER))


class FluidLink:
    """The state of one connection: when it is free, and how far slow start has come.

    `goodput` holds application bits per second from the session's start (time 0). `rtt_s` is the round trip.
    `initial_window_bytes` starts TCP slow start (RFC 5681 section 3.1: the window grows by what was acknowledged, so it
    doubles every round trip) until the link is the limit; None is a warm connection. Copies are cheap and independent.
    """

    __slots__ = ("_ends", "_from", "_round_end_s", "_round_sent", "_window", "free_at_s", "goodput", "rtt_s")

    def __init__(self, goodput: Trace, rtt_s: float = 0.0, initial_window_bytes: int | None = None) -> None:
        if not 0.0 <= rtt_s < math.inf:
            raise TraceError(f"round trip of {rtt_s} s; give a finite time of at least 0")
        if initial_window_bytes is not None and initial_window_bytes < 1:
            raise TraceError(
                f"initial window of {initial_window_bytes} bytes; give at least 1, or none for a warm connection"
            )
        self.goodput = goodput
        self.rtt_s = rtt_s
        self.free_at_s = 0.0
        """When the last answer so far has passed the bottleneck."""
        self._window = math.inf if initial_window_bytes is None or rtt_s == 0.0 else float(initial_window_bytes)
        self._round_end_s = -math.inf
        self._round_sent = 0.0
        self._from = (-1.0, 0.0)
        self._ends: list[float] | None = None

    def copy(self) -> FluidLink:
        other = FluidLink.__new__(FluidLink)
        other.goodput, other.rtt_s, other.free_at_s = self.goodput, self.rtt_s, self.free_at_s
        other._window = self._window
        other._round_end_s, other._round_sent = self._round_end_s, self._round_sent
        other._from, other._ends = self._from, self._ends
        return other

    def transfer(self, request_s: float, size_bytes: float, chunk: int = 0) -> tuple[float, float]:
        """First and last byte (seconds) of an answer of `size_bytes` requested at `request_s`; inf if it never comes.

        Takes the link: the next request is served after it. `chunk` picks the rate of a trace with one rate per chunk.
        """
        first_s, _, last_s = self.answer(request_s, size_bytes, size_bytes, chunk)
        return first_s, last_s

    def answer(self, request_s: float, size_bytes: float, frame: float, chunk: int = 0) -> tuple[float, float, float]:
        """As `transfer`, with the end of the first `frame` bytes between: (first, frame, last), seconds."""
        start_s = request_s + self.rtt_s
        if start_s < self.free_at_s:
            start_s = self.free_at_s
        if start_s == math.inf:
            return math.inf, math.inf, math.inf
        if self._window < math.inf:
            first_s, last_s = self._slow_start(start_s, float(size_bytes), chunk)
            frame_s = first_s + self._serve(frame * 8.0, first_s, chunk) if frame < size_bytes else last_s
        elif self.goodput.per == "chunk" or size_bytes < 1:
            first_s, frame_s, last_s = (
                start_s + self._serve(bytes_ * 8.0, start_s, chunk) for bytes_ in (1.0, frame, size_bytes)
            )
        else:
            first, some, whole = self.goodput.times_for((8.0, frame * 8.0, size_bytes * 8.0), start_s)
            first_s, frame_s, last_s = start_s + first, start_s + some, start_s + whole
        self.free_at_s = last_s
        return min(first_s, last_s), min(frame_s, last_s), last_s

    def cut(self, at_s: float) -> None:
        """The newest answer was cancelled: the link is free at `at_s` unless it is free before."""
        self.free_at_s = min(self.free_at_s, at_s)

    def bytes_between(self, start_s: float, end_s: float, chunk: int = 0) -> float:
        """Bytes that a warm connection carries from `start_s` to `end_s`."""
        if self.goodput.per == "chunk":
            return self.goodput.chunk_rate(chunk) * (end_s - start_s) / 8.0
        if start_s != self._from[0]:  # asked repeatedly about one transfer
            self._from = (start_s, self.goodput.bits_by(start_s))
        return (self.goodput.bits_by(end_s) - self._from[1]) / 8.0

    def is_dead(self, after_s: float) -> bool:
        """Whether an answer that never ends, though it began, gets no byte more: it waits for a change of the rate that
        does not come, or, where the trace repeats itself, for a first bit of it."""
        return self.goodput.end == "loop" or self.next_change_s(after_s) == math.inf

    def next_change_s(self, after_s: float) -> float:
        """When the rate changes next, seconds; inf if it never does again."""
        if self.goodput.per == "chunk":
            return math.inf
        if self._ends is None:
            self._ends = _edges(self.goodput)
        edges = self._ends
        if self.goodput.end != "loop":
            at = bisect_right(edges, after_s)
            return edges[at] if at < len(edges) else math.inf
        passes, within_s = divmod(after_s, edges[-1])
        return passes * edges[-1] + edges[bisect_right(edges, within_s) % len(edges)]

    def _serve(self, bits: float, start_s: float, chunk: int) -> float:
        """Seconds the bottleneck takes for `bits` from `start_s`."""
        if self.goodput.per == "time":
            return self.goodput.time_for(bits, start_s)
        rate = self.goodput.chunk_rate(chunk)
        return bits / rate if rate > 0.0 else math.inf if bits > 0.0 else 0.0

    def _slow_start(self, start_s: float, left_bytes: float, chunk: int) -> tuple[float, float]:
        """Send window after window, one a round trip, until a window takes longer than that."""
        now_s, first_s = start_s, math.inf
        while left_bytes > 0.0:
            if now_s >= self._round_end_s:
                self._window += self._round_sent
                self._round_sent, self._round_end_s = 0.0, now_s + self.rtt_s
            room = self._window - self._round_sent
            if room <= 0.0:
                now_s = self._round_end_s
                continue
            if first_s == math.inf:
                first_s = now_s + self._serve(8.0, now_s, chunk)
            burst = min(room, left_bytes)
            end_s = now_s + self._serve(burst * 8.0, now_s, chunk)
            if end_s >= self._round_end_s:  # acknowledgements now come as fast as the link serves: it is the limit
                self._window = math.inf
                return first_s, now_s + self._serve(left_bytes * 8.0, now_s, chunk)
            self._round_sent += burst
            left_bytes -= burst
            now_s = end_s
        return min(first_s, now_s), now_s


@lru_cache(maxsize=256)
def _edges(trace: Trace) -> list[float]:
    """Ends of the rows, seconds."""
    total, edges = 0.0, []
    for duration in trace.durations_s.tolist():
        total += duration
        edges.append(total)
    return edges
