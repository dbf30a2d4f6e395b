"""How fast the oldest chunk in flight arrives, and when it is near enough to its end for the next one to be chosen.

After a pause, the first bytes come at once however slow the link is: a token bucket has filled, a queue has formed. A
rate is therefore counted from the end of that burst, and is known when enough time has passed and bytes have come;
until then, what the link carried before is all that is known.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from kvstream.policies.estimators import BURST_S, SAMPLE_BYTES, SAMPLE_S
from kvstream.traces.fluid import frame_bytes

RATE_WINDOW_S: Final = 0.05
"""A rate is that of this last stretch of time."""


class ArrivalRate:
    """A sliding window over (time, bytes of the chunk received by then). Times are seconds since the request."""

    def __init__(self, lookahead_s: float, prior_bps: float | None = None) -> None:
        """The next chunk is due when the rest of this one takes `lookahead_s`."""
        self._lookahead_s = lookahead_s
        self._known_bps = prior_bps
        self._points: deque[tuple[float, int]] = deque()
        self._size = self._frame = 0
        self._first_s = self._burst_until_s = 0.0
        self._burst = (0.0, 0)
        self._ready_s: float | None = None
        self._wake_s: float | None = None
        self._is_new = False
        """Something was reported since these two were found."""

    @property
    def burst(self) -> tuple[float, int]:
        """When the burst after a pause had come, and its bytes; zeros where there is none."""
        return self._burst

    def clear(self) -> None:
        """No chunk in flight has shown its first byte."""
        self._points.clear()
        self._burst = (0.0, 0)
        self._ready_s = self._wake_s = None
        self._is_new = False

    def begin(self, size: int, now_s: float, received: int, *, after_pause: bool) -> None:
        """A chunk of `size` bytes begins to arrive; `after_pause` if the link carried nothing just before."""
        self.clear()
        self._size, self._frame, self._first_s = size, frame_bytes(size), now_s
        self._burst_until_s = now_s + BURST_S if after_pause else 0.0
        self._points.append((now_s, received))
        self._is_new = True

    def add(self, now_s: float, received: int) -> None:
        """`received` bytes of the chunk are here in all."""
        points = self._points
        if now_s <= self._burst_until_s:
            points.clear()
            self._burst = (now_s, received)
        points.append((now_s, received))
        while len(points) > 2 and points[1][0] <= now_s - RATE_WINDOW_S:
            points.popleft()
        self._is_new = True

    def end(self, now_s: float, goodput_bps: float) -> None:
        """All of the chunk is here; it came with a goodput of this from its request on."""
        if self._points:
            self.add(now_s, self._size)
        rate = self._rate() if self._is_known() else None
        self._known_bps = goodput_bps if rate is None else 8.0 * rate
        self._is_new = True

    def ready_s(self) -> float | None:
        """When the rest of the chunk takes the lookahead, but not before its first frame is here. None while that is
        unknown: nobody could choose well."""
        if self._is_new:
            self._find()
        return self._ready_s

    def wake_s(self) -> float | None:
        """When to look again even if nothing is reported; None: not needed."""
        if self._is_new:
            self._find()
        return self._wake_s

    def _find(self) -> None:
        """`ready_s` and `wake_s`, which are asked several times between two reports."""
        self._is_new, self._ready_s, self._wake_s = False, None, None
        if not self._points:
            return
        last_s, received = self._points[-1]
        window_rate, is_known = self._rate(), self._is_known()
        rate = window_rate if is_known else None
        if rate is None and self._known_bps is not None:
            rate = self._known_bps / 8.0
        if rate and self._frame < self._size:
            rest_s, frame_s = (self._size - received) / rate, (self._frame - received) / rate
            self._ready_s = last_s + max(rest_s - self._lookahead_s, frame_s)
        self._wake_s = self._ready_s
        if not is_known:
            missing = self._burst[1] + SAMPLE_BYTES - received
            known_s = last_s + (0.0 if missing <= 0 else missing / window_rate if window_rate else SAMPLE_S)
            known_s = max(known_s, self._first_s + SAMPLE_S)
            self._wake_s = known_s if self._ready_s is None else min(self._ready_s, known_s)

    def _rate(self) -> float | None:
        """Bytes per second in the window, however little that rests on."""
        if len(self._points) < 2:
            return None
        (t0, b0), (t1, b1) = self._points[0], self._points[-1]
        return (b1 - b0) / (t1 - t0) if b1 > b0 and t1 > t0 else None

    def _is_known(self) -> bool:
        """Whether the window's rate rests on enough time and bytes."""
        if not self._points:
            return False
        last_s, received = self._points[-1]
        return last_s - self._first_s >= SAMPLE_S - 1e-9 and received - self._burst[1] >= SAMPLE_BYTES
