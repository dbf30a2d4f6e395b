"""The shaper's process: it sets one interface's rate at absolute times and reads the class's counters every 10 ms.

`python -m kvstream.testbed.emulator.replay INTERFACE` in the router's network namespace; it exchanges lines of JSON on
its standard streams with `kvstream.testbed.emulator.shaper`. A process of its own, so that neither a busy interpreter
nor a garbage collection of the controller can delay a rate change. It imports only light modules and starts in 40 ms.

    {"do": "make", "queue_s": .., "queue_bytes": .. | null, "packet_bytes": .., "idle_bps": ..}     put it in place
    {"do": "arm", "t0_s": .., "schedule": [[s, bit/s], ..], "chunk_rates_bps": [..],
     "packet_bytes": ..}                                                                a session starts at t0_s
    {"do": "rate", "rate_bps": ..}                                                      step now
    {"do": "finish", "t_end_s": ..}                                                     end it then; answers its record

Each is answered with one line, `{"ok": ..}` or `{"error": ..}`; end of input ends the process. A trace with one rate
per chunk has its rates in `chunk_rates_bps`. The step to a chunk's rate is made when a datagram `{"chunk": .., "at_s":
..}` on the socket `steps_path(INTERFACE)` reports that its first byte has left the link.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from kvstream.testbed.emulator.tc import BURST_S, MIN_BPS, Interface, KernelRefused
from kvstream.testbed.host.clock import CpuMeter, Urgency, be_punctual, spent_s
from kvstream.testbed.host.json_lines import Requests

SAMPLE_S: Final = 0.01
CPU_SAMPLE_S: Final = 0.1
CPU_SAMPLE_TAKES_S: Final = 0.004
QUEUE_CHECK_S: Final = 1.0
"""The queue's limit and valve are read back this often, and at a session's end."""
SPIN_S: Final = 0.0002
"""A timer wakes this much early for a rate change; the rest is spent looking at the clock."""
RATE_TOLERANCE: Final = 1e-6
MAX_FAULTS: Final = 20


def steps_path(interface: str) -> Path:
    """Where a shaper is told of chunks. /run is the sandbox's own, so it vanishes with it however that ends."""
    return Path(f"/run/kvstream-{interface}.steps")


@contextlib.contextmanager
def notify_shaper(path: str | None) -> Iterator[Callable[[int], object] | None]:
    """Gives the call that notifies the shaper behind a socket of a chunk's first byte; None without a socket."""
    if path is None:
        yield None
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.connect(path)
        yield lambda chunk: line.send(json.dumps({"chunk": chunk, "at_s": time.monotonic()}).encode())


class Session:
    """One session: what is still to be done, and the record of what was. Recorded times count from `t0_s`."""

    def __init__(self, t0_s: float, schedule: Sequence[Sequence[float]], chunk_rates_bps: Sequence[float]) -> None:
        self.t0_s = t0_s
        self.chunk_rates_bps = chunk_rates_bps
        self.pending = deque((t0_s + at_s, rate_bps) for at_s, rate_bps in schedule)
        """[CLOCK_MONOTONIC, bit/s] of the changes to come."""
        self.next_sample_s = t0_s
        self.next_cpu_s = t0_s + CPU_SAMPLE_S / 2.0
        self.next_queue_s = t0_s + QUEUE_CHECK_S
        self.changes: list[tuple[float, float, float]] = []
        """[scheduled, made, bit/s]: `record.Change`."""
        self.samples: list[tuple[float, float, int, int, int]] = []
        """`record.Sample`."""
        self.cpu: list[tuple[float, ...]] = []
        """`record.CpuSample`."""
        self.faults: list[str] = []
        self.base: tuple[int, int] | None = None
        """The class's counters of bytes and drops at the first sample."""
        self.meter = CpuMeter()
        self.spent_before_s = spent_s()

    def sample_cpu(self, now_s: float) -> None:
        self.cpu.append((now_s - self.t0_s, *self.meter.read()))
        self.next_cpu_s = now_s + CPU_SAMPLE_S

    def fault(self, at_s: float, what: str) -> None:
        """Record a fault of the link, found at a moment of CLOCK_MONOTONIC."""
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(f"{at_s - self.t0_s:.3f} s: {what}")

    def record(self, t_end_s: float) -> dict[str, Any]:
        """What `record.LinkRecord` is made of, but for what the shaper knows."""
        return {
            "t0_s": self.t0_s,
            "length_s": t_end_s - self.t0_s,
            "samples": self.samples,
            "changes": self.changes,
            "cpu": self.cpu,
            "cores": self.meter.cores,
            "faults": self.faults,
        }


class Replay:
    """The state of the process: one interface, and at most one session."""

    def __init__(self, interface: str) -> None:
        self.tc = Interface(interface)
        self.chunk_starts = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        steps_path(interface).unlink(missing_ok=True)
        self.chunk_starts.bind(str(steps_path(interface)))
        self.scheduling = be_punctual(Urgency.LINK)
        self.rate_bps = self.idle_bps = 0.0
        self.closed = False
        self.queue_s = 0.05
        self.queue_bytes: int | None = None
        self.packet_bytes = 0
        self.settings: dict[str, Any] = {}
        self.session: Session | None = None

    # ---- requests ---------------------------------------------------------------------------------------------

    def make(self, queue_s: float, queue_bytes: int | None, packet_bytes: int, idle_bps: float) -> dict[str, Any]:
        """Create class and queue, and read both back from the kernel; between sessions the rate is `idle_bps`."""
        self.queue_s, self.queue_bytes, self.packet_bytes = queue_s, queue_bytes, packet_bytes
        self.rate_bps = self.idle_bps = max(round(idle_bps / 8.0), 1) * 8.0
        self.tc.create(self.idle_bps, self._limit(self.idle_bps), packet_bytes)
        state, (limit, is_open) = self.tc.state(), self.tc.queue_state()
        wanted = (self.idle_bps, self._limit(self.idle_bps), True)
        if (state.rate_bps, limit, is_open) != wanted or abs(state.burst_s - BURST_S) > 1e-6:
            raise KernelRefused(0, f"asked for {wanted}, burst {BURST_S} s; the kernel has {state}, {limit} bytes")
        self.settings = {
            "interface": self.tc.name,
            "qdisc": "htb > tbf (valve) > bfifo",
            "burst_s": state.burst_s,
            "idle_bps": state.rate_bps,
            "queue_s": queue_s,
            "queue_bytes": queue_bytes,
            "scheduling": self.scheduling,
        }
        return self.settings

    def arm(
        self, t0_s: float, schedule: list[list[float]], chunk_rates_bps: list[float], packet_bytes: int | None = None
    ) -> None:
        """Begin a session at `t0_s`. Without a schedule the first chunk's rate, if any, is in force from then on.
        `packet_bytes` replaces what it was made with."""
        if packet_bytes is not None and packet_bytes != self.packet_bytes:
            self.packet_bytes = packet_bytes
            self.tc.set_queue(self._limit(self.rate_bps), packet_bytes, open=not self.closed)
        self.session = Session(t0_s, schedule or [[0.0, rate] for rate in chunk_rates_bps[:1]], chunk_rates_bps)
        gc.collect()
        gc.disable()  # a collection takes milliseconds, and a session's garbage is a few thousand tuples

    def rate(self, rate_bps: float) -> dict[str, Any]:
        """Step to a rate now."""
        now = time.monotonic()
        self._step(self._armed(), now, rate_bps)
        return {"lateness_s": time.monotonic() - now}

    def finish(self, t_end_s: float) -> dict[str, Any]:
        """Go on until `t_end_s`, then end the session and return its record."""
        session = self._armed()
        self._until(t_end_s, control=False)
        session.next_queue_s = 0.0
        self._sample(session)
        session.sample_cpu(time.monotonic())
        self.session = None
        cpu_s = spent_s() - session.spent_before_s
        try:
            self._apply(self.idle_bps)
        except KernelRefused as error:
            session.fault(time.monotonic(), f"the rate could not be changed: {error.strerror}")
        gc.enable()
        return session.record(t_end_s) | {
            "packet_bytes": self.packet_bytes,
            "settings": {**self.settings, "shaper_cpu_s": cpu_s},
        }

    def _armed(self) -> Session:
        if self.session is None:
            raise OSError(0, "no session was begun")
        return self.session

    # ---- keeping time -----------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Answer requests until the input ends."""
        requests = Requests()
        while self._until(None, control=True):
            received = requests.read()
            if received is None:
                return
            for request in received:
                os.write(1, json.dumps(self._answer(request)).encode() + b"\n")

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        what = request.pop("do")
        if what not in REQUESTS:
            return {"error": f"unknown request {what!r}"}
        try:
            return {"ok": REQUESTS[what](self, **request)}
        except OSError as error:
            return {"error": error.strerror or str(error)}

    def _until(self, end_s: float | None, *, control: bool) -> bool:
        """Step and sample on time until `end_s`, or (`control`) until there is a request to read."""
        session = self.session
        while True:
            due = [] if end_s is None else [end_s]
            if session is not None:
                due.append(session.next_sample_s)
                if session.pending:
                    due.append(session.pending[0][0] - SPIN_S)
            wait = max(min(due) - time.monotonic(), 0.0) if due else None
            starts = self.chunk_starts.fileno()
            readable = select.select([starts, 0] if control else [starts], [], [], wait)[0]
            if starts in readable:
                self._on_chunk_start()
            if 0 in readable:
                return True
            now = time.monotonic()
            if session is not None:
                if session.pending and session.pending[0][0] - SPIN_S <= now:
                    due_s, rate_bps = session.pending.popleft()
                    while now < due_s:
                        now = time.monotonic()
                    self._step(session, due_s, rate_bps)
                if session.next_sample_s <= now:
                    self._sample(session)
                    # After a stall the grid goes on; the gap stays visible in the record.
                    session.next_sample_s = max(session.next_sample_s + SAMPLE_S, now)
                # This one takes a millisecond or more, so it keeps clear of the changes.
                clear = not (session.pending and session.pending[0][0] - now < CPU_SAMPLE_TAKES_S)
                if session.next_cpu_s <= now and clear:
                    session.sample_cpu(now)
            if end_s is not None and now >= end_s:
                return False

    def _on_chunk_start(self) -> None:
        """A chunk's first byte has left the link: its rate is in force."""
        report, session = json.loads(self.chunk_starts.recv(4096)), self.session
        if session is None or report["chunk"] >= len(session.chunk_rates_bps) or report["at_s"] < session.t0_s:
            return
        rate_bps = session.chunk_rates_bps[report["chunk"]]
        if rate_bps != (0.0 if self.closed else self.rate_bps):
            self._step(session, report["at_s"], rate_bps)

    def _step(self, session: Session, due_s: float, rate_bps: float) -> None:
        try:
            self._apply(rate_bps)
        except KernelRefused as error:
            session.fault(due_s, f"the rate could not be changed: {error.strerror}")
        session.changes.append((due_s - session.t0_s, time.monotonic() - session.t0_s, rate_bps))

    def _apply(self, rate_bps: float) -> None:
        """Set the class's rate and the queue's limit; a rate of 0 closes the valve instead."""
        if rate_bps < MIN_BPS:
            self.tc.set_queue(self._limit(self.rate_bps), self.packet_bytes, open=False)
            self.closed = True
            return
        self.tc.set_rate(rate_bps)
        self.tc.set_queue(self._limit(rate_bps), self.packet_bytes)
        if self.closed:
            self.tc.wake()
        self.rate_bps, self.closed = rate_bps, False

    def _limit(self, rate_bps: float) -> int:
        """Bytes that the queue may hold at a rate."""
        wanted = self.queue_bytes if self.queue_bytes is not None else self.queue_s * rate_bps / 8.0
        return int(max(wanted, 2 * self.packet_bytes))

    def _sample(self, session: Session) -> None:
        before = time.monotonic()
        try:
            state = self.tc.state()
            if session.next_queue_s <= before:
                self._check_queue(session, before)
                session.next_queue_s = before + QUEUE_CHECK_S
        except KernelRefused as error:
            session.fault(before, f"the class is gone: {error.strerror}")
            return
        at_s = (before + time.monotonic()) / 2.0
        if abs(state.rate_bps - self.rate_bps) > RATE_TOLERANCE * self.rate_bps + MIN_BPS:
            session.fault(at_s, f"the rate is {state.rate_bps:.0f} bit/s, not the {self.rate_bps:.0f} that was set")
        if session.base is None:
            session.base = (state.sent_bytes, state.drops)
        sent, drops = state.sent_bytes - session.base[0], state.drops - session.base[1]
        if sent < 0:
            session.fault(at_s, "the class's counters went back: it was replaced by another")
        rate_bps = 0.0 if self.closed else state.rate_bps
        session.samples.append((at_s - session.t0_s, rate_bps, sent, state.backlog_bytes, drops))

    def _check_queue(self, session: Session, at_s: float) -> None:
        (limit, is_open), wanted = self.tc.queue_state(), self._limit(self.rate_bps)
        if (limit, is_open) != (wanted, not self.closed):
            state = "open" if is_open else "closed"
            session.fault(at_s, f"the queue is {state} with {limit} bytes, not the {wanted} that were set")


REQUESTS: Final[Mapping[str, Callable[..., Any]]] = {
    "make": Replay.make,
    "arm": Replay.arm,
    "rate": Replay.rate,
    "finish": Replay.finish,
}


if __name__ == "__main__":
    Replay(sys.argv[1]).serve()
