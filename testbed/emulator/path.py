"""A whole emulated path: hosts and links, delay and loss, cross traffic, and a shaper for each limited direction.

    with open_path(link, traces) as path:
        path.arm(trace, t0_s, length_s)  # every part starts at t0_s
        ...
        record = path.finish(end_s)  # one record of what they all did

Must run inside a sandbox (`kvstream.testbed.emulator.sandbox`). One session at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from kvstream.testbed.emulator import fidelity
from kvstream.testbed.emulator.cross import CrossTraffic
from kvstream.testbed.emulator.impairments import Impairments
from kvstream.testbed.emulator.link import LinkSettings, varies
from kvstream.testbed.emulator.record import LinkRecord
from kvstream.testbed.emulator.shaper import Shaper
from kvstream.testbed.emulator.topology import Network
from kvstream.testbed.errors import SpecError
from kvstream.traces.resolve import open_trace
from kvstream.traces.trace import Trace


@dataclass(frozen=True)
class PathRecord:
    """One session on a path: what the link toward the receivers did and, where a trace limits it, the reverse one."""

    down: LinkRecord
    up: LinkRecord | None = None
    up_trace: Trace | None = None

    def judge(self, trace: Trace, limits: fidelity.Limits | None = None) -> fidelity.Fidelity:
        """The verdict on the link toward the receivers, with the reasons against the reverse path among its own."""
        verdict = fidelity.judge(self.down, trace, limits)
        if self.up is None:
            return verdict
        reverse = fidelity.judge(self.up, self.up_trace, limits)
        if reverse.state != "invalid":  # acknowledgements alone are too few bytes to judge
            return verdict
        own = verdict.reasons if verdict.state == "invalid" else ()
        reasons = (*own, *(f"reverse path: {reason}" for reason in reverse.reasons))
        return replace(verdict, ok=False, state="invalid", reasons=reasons)


@dataclass(frozen=True)
class LinkPath:
    """The parts of a running path, made by `open_path`. Those that the link does not ask for are None."""

    network: Network
    down: Shaper
    """The bottleneck, toward the receivers."""
    up: Shaper | None = None
    """The reverse path, where a trace limits it."""
    up_trace: Trace | None = None
    impairments: Impairments | None = None
    cross: CrossTraffic | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that was pinned, as read back: for a run's manifest."""
        impairments = {} if self.impairments is None else {"impairments": self.impairments.settings}
        return self.network.settings | impairments | {"shaper": self.down.settings}

    def arm(self, trace: Trace, t0_s: float, length_s: float, *, chunks: int = 0) -> None:
        """Begin a session at `t0_s` (CLOCK_MONOTONIC, like time.monotonic()): from then on the path does what its
        traces say, for `length_s` seconds at most; the last rate stays until `finish`.

        See `Shaper.arm` for `chunks`. Raises SpecError for a trace with delays or losses that the path was not
        opened with.
        """
        self.size_packets(trace)
        if varies(trace) and self.impairments is None:
            raise SpecError(f"trace {trace.name!r} has delays or losses: open the path with it")
        self._begin(trace, t0_s, length_s, chunks)
        if self.up is not None:
            self.up.arm(self.up_trace, t0_s, length_s)

    def size_packets(self, trace: Trace) -> None:
        """Size packets to a session's traces. `arm` does it; earlier, it takes no time from the session's lead."""
        self.network.size_packets([trace, *([] if self.up_trace is None else [self.up_trace])])

    def finish(self, end_s: float | None = None) -> PathRecord:
        """End the session at `end_s` (CLOCK_MONOTONIC; default now) and return what the path did."""
        end_s = time.monotonic() if end_s is None else end_s
        down = self._end(end_s)
        return PathRecord(down, None if self.up is None else self.up.finish(end_s), self.up_trace)

    @contextmanager
    def held(self, rate_bps: float, longest_s: float) -> Iterator[None]:
        """Hold the bottleneck at one rate, beside delay, loss and cross traffic: for a look at the link before a
        session. The reverse path is not limited meanwhile."""
        self._begin(None, time.monotonic(), longest_s)
        self.down.set_rate(rate_bps)
        try:
            yield
        finally:
            self._end(time.monotonic())

    def _begin(self, trace: Trace | None, t0_s: float, length_s: float, chunks: int = 0) -> None:
        self.down.arm(trace, t0_s, length_s, chunks=chunks)
        if self.impairments is not None:
            self.impairments.begin(trace, t0_s, length_s)
        if self.cross is not None:
            self.cross.begin(t0_s, length_s)

    def _end(self, end_s: float) -> LinkRecord:
        record = self.down.finish(end_s)
        if self.impairments is not None:
            record = replace(record, impairments=self.impairments.end())
        if self.cross is not None:
            self.cross.end()
        return record


@contextmanager
def open_path(
    link: LinkSettings, traces: Sequence[Trace] = (), *, receivers: int = 1, senders: int = 1
) -> Iterator[LinkPath]:
    """Build a path, ready to be armed; leaving the context ends its programs and frees every interface.

    `traces` are those that will be replayed toward the receivers: packets are sized to their rates. The reverse path's
    is `link.up_trace`. Raises MachineError outside a sandbox, or for what the machine lacks or the kernel refuses.
    """
    up_trace = open_trace(link.up_trace) if link.up_trace else None
    every = [*traces, *([] if up_trace is None else [up_trace])]
    with ExitStack() as stack:
        network = stack.enter_context(Network(link, receivers, every, senders))
        yield LinkPath(
            network,
            impairments=Impairments(network) if link.impaired(every) else None,
            cross=CrossTraffic(network) if link.crossed else None,
            down=stack.enter_context(Shaper(network)),
            up=None if up_trace is None else stack.enter_context(Shaper(network, "up")),
            up_trace=up_trace,
        )
