"""Drives a Session in virtual time over a fluid link: no sleeping, no network, no model.

It feeds the session what a receiver would see: the first byte of an answer, bytes at the moments at which a receiver
would decide something, the last byte, and the end of every compute step. The link is `kvstream.traces.fluid`;
decoding and recomputing are a second machine in line whose times are the given costs.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

from kvstream.policies.api import Forecast, Policy, TrueCompute
from kvstream.testbed.session.arrival_rate import RATE_WINDOW_S
from kvstream.testbed.session.ask import ASK_DIRECTLY, Ask, give_forecast
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.session.record import SessionFailed, SessionRecord
from kvstream.testbed.session.session import PROGRESS_S, Session
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.session.work import PREFILL, Cancel, Decode, Fetch, Prefill, Recompute
from kvstream.testbed.store.manifest import Manifest
from kvstream.traces.fluid import MIN_FRAME_BYTES, FluidLink, frame_bytes
from kvstream.traces.trace import Trace

EPSILON_S: Final = 1e-6
"""Time advances by at least this between two reports about one chunk."""


def simulate(
    manifest: Manifest,
    policy: Policy,
    goodput: Trace,
    settings: SessionSettings,
    *,
    costs: Costs,
    actual: Costs | None = None,
    rtt_s: float = 0.0,
    manifest_bytes: int | None = None,
    initial_window_bytes: int | None = None,
    ask: Ask = ASK_DIRECTLY,
) -> SessionRecord:
    """One session under one policy.

    `goodput` holds application bits per second from the session's start. The policy is shown `costs`; steps take
    `actual` (`kvstream.testbed.simulator.noise`), by default just that. The manifest's transfer (a round trip and
    `manifest_bytes`, by default its size on the wire) comes before the first choice. Without `initial_window_bytes` the
    connection is warm. Raises SessionFailed when the link carries nothing more.
    """
    true = costs if actual is None else actual
    compute = TrueCompute(true.decode_s, true.recompute_s, true.prefill_s)
    give_forecast(policy, Forecast(goodput, rtt_s, settings.depth, initial_window_bytes, compute))
    session = Session(manifest, policy, settings, costs, rtt_s=rtt_s, ask=ask)
    link = FluidLink(goodput, rtt_s, initial_window_bytes)
    size = len(manifest.wire) if manifest_bytes is None else manifest_bytes
    _, now_s = link.transfer(0.0, size) if size else (0.0, rtt_s)
    tick_s = PROGRESS_S if session.has_progress else math.inf
    fine = settings.depth > 1 or session.has_progress
    _Driver(session, link, true, fine=fine, tick_s=tick_s).run(now_s)
    return session.record()


class _Driver:
    """The event loop: the next of {event of the link, end of a compute step}, again and again.

    Only the answer at the head of the line is on the link; the ones behind it are placed when it ends, so that a
    cancelled answer frees the link for them.
    """

    __slots__ = (
        "_change_s",
        "_chunk",
        "_compute_end_s",
        "_compute_start_s",
        "_computing",
        "_costs",
        "_event_s",
        "_fine",
        "_first_s",
        "_last_s",
        "_line",
        "_link",
        "_reported_bytes",
        "_seen",
        "_session",
        "_size",
        "_tick_s",
    )

    def __init__(self, session: Session, link: FluidLink, costs: Costs, *, fine: bool, tick_s: float) -> None:
        self._session, self._link, self._costs = session, link, costs
        self._fine, self._tick_s = fine, tick_s
        self._line: deque[tuple[int, int, float]] = deque()
        self._chunk: int | None = None
        """The chunk on the link; the four times below are its own."""
        self._size = 0
        self._seen = False
        self._reported_bytes = 0
        self._first_s = self._last_s = self._event_s = self._change_s = math.inf
        self._computing: int = PREFILL
        self._compute_start_s, self._compute_end_s = 0.0, math.inf

    def run(self, now_s: float) -> None:
        session = self._session
        while True:
            for work in session.poll(now_s):
                if isinstance(work, Fetch):
                    self._line.append((work.chunk, work.bytes, now_s))
                elif isinstance(work, Cancel):
                    self._cancel(work.chunk, now_s)
                else:
                    self._begin_compute(work, now_s)
            if self._chunk is None:
                if self._line:
                    self._place()
            elif self._fine and self._event_s <= now_s:
                self._event_s = self._next_event_s(now_s)
            if self._compute_end_s == self._event_s == math.inf:
                raise SessionFailed("the link carries nothing more: the transfer never ends")
            # of two events at one moment the link's comes first: one that is not reported is lost
            if self._compute_end_s < self._event_s:
                now_s = self._compute_end_s
                self._compute_end_s = math.inf
                session.on_computed(self._computing, self._compute_start_s, now_s)
                if self._computing == PREFILL:
                    return
            else:
                now_s = self._event_s
                self._report(now_s)

    def _begin_compute(self, work: Decode | Recompute | Prefill, now_s: float) -> None:
        if isinstance(work, Decode):
            self._computing, cost_s = work.chunk, self._costs.decode_s[work.chunk][work.level]
        elif isinstance(work, Recompute):
            assert self._costs.recompute_s is not None
            self._computing, cost_s = work.chunk, self._costs.recompute_s[work.chunk]
        else:
            self._computing, cost_s = PREFILL, self._costs.prefill_s
        self._compute_start_s, self._compute_end_s = now_s, now_s + cost_s

    def _place(self) -> None:
        """Put the oldest waiting answer on the link; a receiver sees it when its first frame is complete."""
        self._chunk, self._size, request_s = self._line.popleft()
        fine = self._fine and self._size > MIN_FRAME_BYTES
        frame = frame_bytes(self._size) if fine else self._size
        self._first_s, self._event_s, self._last_s = self._link.answer(request_s, self._size, frame, self._chunk)
        self._seen, self._reported_bytes = False, 0
        if fine:
            self._change_s = self._link.next_change_s(self._first_s)

    def _report(self, now_s: float) -> None:
        """Report to the session what a receiver has seen by now."""
        session, chunk = self._session, self._chunk
        assert chunk is not None
        if not self._seen:
            session.on_first_byte(chunk, self._first_s)
            self._seen = True
        if now_s >= self._last_s:
            session.on_last_byte(chunk, self._last_s)
            self._chunk, self._event_s = None, math.inf
            return
        received = int(self._link.bytes_between(self._first_s, now_s, chunk))
        self._reported_bytes = min(received, self._size - 1)
        session.on_bytes(chunk, self._reported_bytes, now_s)

    def _next_event_s(self, now_s: float) -> float:
        """When a receiver would next have something to decide about the chunk on the link, whose first frame is here.

        While the session waits to choose the next chunk, that is its `wake_s`, and, after a change of the link's rate,
        a few moments while the session's rate window forgets the old rate.
        """
        if self._last_s == math.inf and self._link.is_dead(now_s):
            return math.inf  # nothing more arrives: waiting for it would not end
        event_s = min(self._last_s, now_s + self._tick_s)
        wake_s = self._session.wake_s()
        if wake_s is None:
            return event_s
        wake_s = max(wake_s, now_s + EPSILON_S)
        if self._change_s <= now_s - RATE_WINDOW_S:
            self._change_s = self._link.next_change_s(now_s - RATE_WINDOW_S)
        settled_s = max(self._change_s - RATE_WINDOW_S, now_s) + RATE_WINDOW_S / 4
        return min(event_s, wake_s, settled_s)

    def _cancel(self, chunk: int, now_s: float) -> None:
        """The sender stops when the cancellation arrives; what it has sent by then still passes and is wasted."""
        if chunk != self._chunk:
            self._line = deque(entry for entry in self._line if entry[0] != chunk)
            return
        cut_s = max(now_s + self._link.rtt_s, self._first_s)
        passed = self._link.bytes_between(self._first_s, cut_s, chunk) if cut_s < self._last_s else self._size
        self._session.on_waste(max(int(passed) - self._reported_bytes, 0))
        self._link.cut(cut_s)
        self._chunk, self._event_s = None, math.inf
