"""The shaper's process: it sets one interface's rate at absolute times and reads the class's counters every 10 ms.

`python -m testbed.emulator.replay INTERFACE` in the router's network namespace, spoken to in JSON lines on its standard
streams by `testbed.emulator.shaper`. A process of its own, so that neither a busy interpreter nor a garbage
collection of the controller can delay a rate change. Only light modules are imported: it starts in 40 ms.

    {"do": "make", "queue_s": .., "queue_bytes": .. | null, "packet_bytes": .., "idle_bps": ..}     put it in place
    {"do": "arm", "t0_s": .., "changes": [[s, bit/s], ..], "chunks_bps": [..]}      a session starts at t0_s
    {"do": "rate", "rate_bps": ..}                                                  step now
    {"do": "finish", "t_end_s": ..}                                                 end it then; answers its record

Each is answered with one line, `{"ok": ..}` or `{"error": ..}`; end of input ends the process. A trace with one rate a
chunk has its rates in `chunks_bps`. The step to a chunk's is made when a datagram `{"chunk": .., "at_s": ..}` on the
socket `steps_path(INTERFACE)` says that its first byte has left the link.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from testbed.emulator.clock import CpuMeter, be_punctual, spent_s
from testbed.emulator.requests import Requests
from testbed.emulator.tc import BURST_S, MIN_BPS, Interface, KernelRefused

SAMPLE_S: Final = 0.01
CPU_SAMPLE_S: Final = 0.1
CPU_SAMPLE_TAKES_S: Final = 0.004
QUEUE_CHECK_S: Final = 1.0
"""The queue's limit and valve are read back this often, and at a session's end."""
SPIN_S: Final = 0.0002
"""A timer wakes this much early for a rate change; the rest is spent looking at the clock."""
RATE_TOLERANCE: Final = 1e-6


def steps_path(interface: str) -> Path:
    """Where a shaper is told of chunks. /run is the sandbox's own, so it vanishes with it however that ends."""
    return Path(f"/run/kvstream-{interface}.steps")


@contextlib.contextmanager
def teller(path: str | None) -> Iterator[Callable[[int], object] | None]:
    """What tells the shaper behind a socket of a chunk's first byte; None where nobody is to be told."""
    if path is None:
        yield None
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.connect(path)
        yield lambda chunk: line.send(json.dumps({"chunk": chunk, "at_s": time.monotonic()}).encode())


class Replay:
    """The state of the process: one interface, and at most one session."""

    def __init__(self, interface: str) -> None:
        self.tc = Interface(interface)
        self.told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        steps_path(interface).unlink(missing_ok=True)
        self.told.bind(str(steps_path(interface)))
        self.punctual = be_punctual(light=True)
        self.rate_bps = self.idle_bps = 0.0
        self.closed = False
        self.queue_s = 0.05
        self.queue_bytes: int | None = None
        self.packet_bytes = 0
        self.armed = False
        self.settings: dict[str, Any] = {}

    # ---- requests ---------------------------------------------------------------------------------------------

    def make(self, queue_s: float, queue_bytes: int | None, packet_bytes: int, idle_bps: float) -> dict[str, Any]:
        """Create the class and the queue, and check both against the kernel's word; between sessions idle_bps holds."""
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
            "scheduling": self.punctual,
        }
        return self.settings

    def arm(self, t0_s: float, changes: list[list[float]], chunks_bps: list[float]) -> None:
        """Begin a session; its times count from `t0_s`. The first chunk's rate is in force from then on."""
        self.t0_s = t0_s
        self.chunks_bps = chunks_bps
        changes = changes or [[0.0, rate] for rate in chunks_bps[:1]]
        self.pending = deque((t0_s + at_s, rate) for at_s, rate in changes)
        self.samples: list[tuple[float, float, int, int, int]] = []
        self.changes: list[tuple[float, float, float]] = []
        self.cpu: list[tuple[float, ...]] = []
        self.faults: list[str] = []
        self.spent_s = spent_s()
        self.next_sample_s = t0_s
        self.next_cpu_s = t0_s + CPU_SAMPLE_S / 2.0
        self.next_queue_s = t0_s + QUEUE_CHECK_S
        self.base: tuple[int, int] | None = None
        self.meter = CpuMeter()
        self.armed = True
        gc.collect()
        gc.disable()  # a collection takes milliseconds, and a session's garbage is a few thousand tuples

    def rate(self, rate_bps: float) -> dict[str, Any]:
        now = time.monotonic()
        self._step(now, rate_bps)
        return {"lateness_s": time.monotonic() - now}

    def finish(self, t_end_s: float) -> dict[str, Any]:
        """Go on until `t_end_s`, then end the session and return its record."""
        self._until(t_end_s, control=False)
        self.next_queue_s = 0.0
        self._sample()
        self._sample_cpu(time.monotonic())
        self.armed = False
        spent = spent_s() - self.spent_s
        try:
            self._apply(self.idle_bps)
        except KernelRefused as error:
            self._fault(time.monotonic() - self.t0_s, f"the rate could not be changed: {error.strerror}")
        gc.enable()
        return {
            "t0_s": self.t0_s,
            "length_s": t_end_s - self.t0_s,
            "samples": self.samples,
            "changes": self.changes,
            "cpu": self.cpu,
            "cores": self.meter.cores,
            "packet_bytes": self.packet_bytes,
            "faults": self.faults,
            "settings": {**self.settings, "shaper_cpu_s": spent},
        }

    # ---- keeping time -----------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Answer requests until the input ends."""
        requests = Requests()
        while self._until(None, control=True):
            asked = requests.read()
            if asked is None:
                return
            for request in asked:
                try:
                    answer = {"ok": getattr(self, request.pop("do"))(**request)}
                except OSError as error:
                    answer = {"error": error.strerror or str(error)}
                os.write(1, json.dumps(answer).encode() + b"\n")

    def _until(self, end_s: float | None, *, control: bool) -> bool:
        """Step and sample on time until `end_s`, or (`control`) until there is a request to read."""
        while True:
            due = [] if end_s is None else [end_s]
            if self.armed:
                due.append(self.next_sample_s)
                if self.pending:
                    due.append(self.pending[0][0] - SPIN_S)
            wait = max(min(due) - time.monotonic(), 0.0) if due else None
            told = self.told.fileno()
            readable = select.select([told, 0] if control else [told], [], [], wait)[0]
            if told in readable:
                self._heed()
            if 0 in readable:
                return True
            now = time.monotonic()
            if self.armed:
                if self.pending and self.pending[0][0] - SPIN_S <= now:
                    due_s, rate_bps = self.pending.popleft()
                    while now < due_s:
                        now = time.monotonic()
                    self._step(due_s, rate_bps)
                if self.next_sample_s <= now:
                    self._sample()
                    # After a stall the grid goes on; the gap stays visible in the record.
                    self.next_sample_s = max(self.next_sample_s + SAMPLE_S, now)
                # This one takes a millisecond or more, so it keeps off the changes.
                if self.next_cpu_s <= now and not (self.pending and self.pending[0][0] - now < CPU_SAMPLE_TAKES_S):
                    self._sample_cpu(now)
            if end_s is not None and now >= end_s:
                return False

    def _heed(self) -> None:
        """A chunk's first byte has left the link: its rate is in force."""
        news = json.loads(self.told.recv(4096))
        if self.armed and news["chunk"] < len(self.chunks_bps) and news["at_s"] >= self.t0_s:
            rate_bps = self.chunks_bps[news["chunk"]]
            if rate_bps != (0.0 if self.closed else self.rate_bps):
                self._step(news["at_s"], rate_bps)

    def _step(self, due_s: float, rate_bps: float) -> None:
        try:
            self._apply(rate_bps)
        except KernelRefused as error:
            self._fault(due_s - self.t0_s, f"the rate could not be changed: {error.strerror}")
        self.changes.append((due_s - self.t0_s, time.monotonic() - self.t0_s, rate_bps))

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
        wanted = self.queue_bytes if self.queue_bytes is not None else self.queue_s * rate_bps / 8.0
        return int(max(wanted, 2 * self.packet_bytes))

    def _sample(self) -> None:
        before = time.monotonic()
        try:
            state = self.tc.state()
            if self.next_queue_s <= before:
                self._check_queue(before - self.t0_s)
                self.next_queue_s = before + QUEUE_CHECK_S
        except KernelRefused as error:
            self._fault(before - self.t0_s, f"the class is gone: {error.strerror}")
            return
        t_s = (before + time.monotonic()) / 2.0 - self.t0_s
        if abs(state.rate_bps - self.rate_bps) > RATE_TOLERANCE * self.rate_bps + MIN_BPS:
            self._fault(t_s, f"the rate is {state.rate_bps:.0f} bit/s, not the {self.rate_bps:.0f} that was set")
        if self.base is None:
            self.base = (state.sent_bytes, state.drops)
        rate = 0.0 if self.closed else state.rate_bps
        sent, drops = state.sent_bytes - self.base[0], state.drops - self.base[1]
        if sent < 0:
            self._fault(t_s, "the class's counters went back: it was replaced by another")
        self.samples.append((t_s, rate, sent, state.backlog_bytes, drops))

    def _check_queue(self, t_s: float) -> None:
        (limit, is_open), wanted = self.tc.queue_state(), self._limit(self.rate_bps)
        if (limit, is_open) != (wanted, not self.closed):
            state = "open" if is_open else "closed"
            self._fault(t_s, f"the queue is {state} with {limit} bytes, not the {wanted} that were set")

    def _sample_cpu(self, now_s: float) -> None:
        self.cpu.append((now_s - self.t0_s, *self.meter.read()))
        self.next_cpu_s = now_s + CPU_SAMPLE_S

    def _fault(self, t_s: float, what: str) -> None:
        if len(self.faults) < 20:
            self.faults.append(f"{t_s:.3f} s: {what}")


if __name__ == "__main__":
    Replay(sys.argv[1]).serve()
