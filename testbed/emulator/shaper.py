"""Replays a trace on one interface of a network: the controller's handle on the process of `emulator.replay`."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final, Literal

from kvstream.testbed.emulator.record import LinkRecord
from kvstream.testbed.emulator.replay import steps_path
from kvstream.testbed.emulator.topology import Network
from kvstream.testbed.errors import MachineError
from kvstream.traces.trace import Trace

MAX_IDLE_BPS: Final = 10e9
ANSWER_S: Final = 10.0
"""A process that has not answered within this is taken for dead."""


class Shaper:
    """One shaped direction of a network; use it as a context manager, one session at a time.

    `direction` is `down` (sender to receivers, the default) or `up`. Between sessions the rate is the highest of the
    network's traces (10 Gbit/s without traces), so that the queue drains and control traffic does not wait.
    Every setting is read back from the kernel; MachineError where it differs.
    """

    def __init__(self, network: Network, direction: Literal["down", "up"] = "down") -> None:
        self.network = network
        self.interface = network.bottleneck if direction == "down" else network.upstream
        self.settings: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Shaper:
        self._process = self.network.popen(
            self.network.router,
            [sys.executable, "-m", "kvstream.testbed.emulator.replay", self.interface],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        link, traces = self.network.link, self.network.traces
        idle_bps = max((trace.peak_bps for trace in traces), default=0.0) or MAX_IDLE_BPS
        try:
            self.settings = self._ask(
                "make",
                queue_s=link.queue_s,
                queue_bytes=link.queue_bytes,
                packet_bytes=self.network.packet_bytes,
                idle_bps=min(idle_bps, MAX_IDLE_BPS),
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):  # it died with a request unread
                        stream.close()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def steps(self) -> Path:
        """The socket on which a receiver reports a chunk's first byte: see `emulator.replay`."""
        return steps_path(self.interface)

    def arm(self, trace: Trace | None, t0_s: float, length_s: float, *, chunks: int = 0) -> None:
        """Begin a session at `t0_s` (CLOCK_MONOTONIC, like time.monotonic()): from then on the interface follows the
        rates of the trace, for `length_s` seconds at most; the last rate stays until `finish`.

        A trace with one rate per chunk is not scheduled: the link takes the rate of each of `chunks` chunks when
        `steps` reports that its first byte has left the link; chunk 0's rate holds from the start. Without chunks, or
        without a trace, call `set_rate`.
        Give a `t0_s` some milliseconds ahead: a change that is already due is made at once and counts as late.
        """
        schedule: list[tuple[float, float]] = []
        rates: list[float] = []
        if trace is not None and trace.per == "chunk":
            rates = [trace.chunk_rate(chunk) for chunk in range(chunks)]
        elif trace is not None:
            schedule = trace.changes(0.0, length_s)
        packet_bytes = self.network.packet_bytes
        self._ask("arm", t0_s=t0_s, schedule=schedule, chunk_rates_bps=rates, packet_bytes=packet_bytes)

    def set_rate(self, rate_bps: float) -> None:
        """Step to a rate now (0: an outage); part of the session's record."""
        self._ask("rate", rate_bps=rate_bps)

    def finish(self, t_end_s: float | None = None) -> LinkRecord:
        """End the session at `t_end_s` (CLOCK_MONOTONIC; default now) and return what the link did."""
        end_s = time.monotonic() if t_end_s is None else t_end_s
        patience_s = max(end_s - time.monotonic(), 0.0)
        return LinkRecord.from_json(self._ask("finish", t_end_s=end_s, patience_s=patience_s))

    def _ask(self, what: str, *, patience_s: float = 0.0, **arguments: Any) -> Any:
        if self._process is None or self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the shaper is not running; use it in a with statement")
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        except BrokenPipeError:
            raise MachineError(f"the shaper of {self.interface} died") from None
        if not select.select([self._process.stdout], [], [], ANSWER_S + patience_s)[0]:
            raise MachineError(f"the shaper of {self.interface} does not answer")
        line = self._process.stdout.readline()
        if not line:
            raise MachineError(f"the shaper of {self.interface} died")
        answer = json.loads(line)
        if "error" in answer:
            raise MachineError(
                f"cannot shape {self.interface} ({what}): {answer['error']}; `kvstream doctor` shows what is missing"
            )
        return answer["ok"]
