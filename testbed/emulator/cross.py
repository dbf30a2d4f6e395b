"""Cross traffic through the bottleneck: TCP flows that never end, and datagrams at the rates of a trace."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Final

from kvstream.testbed.emulator import traffic
from kvstream.testbed.emulator.topology import CROSS_RECEIVER, CROSS_SENDER, Network
from kvstream.testbed.errors import MachineError
from kvstream.traces.resolve import open_trace

TCP_PORT: Final = 5101
UDP_PORT: Final = 5102
FOREVER_S: Final = 1e6


class CrossTraffic:
    """What `cross_flows` and `cross_trace` ask for, between two hosts of their own. Lives as long as its network."""

    def __init__(self, network: Network) -> None:
        link = network.link
        self.trace = open_trace(link.cross_trace) if link.cross_trace else None
        self._pourer: subprocess.Popen[str] | None = None
        source, sink = network.hosts[CROSS_SENDER], network.hosts[CROSS_RECEIVER]
        source_ip, sink_ip = network.cross_ips
        if link.cross_flows:
            traffic.start_server(network, source, source_ip, TCP_PORT)
            for _ in range(link.cross_flows):
                traffic.start_pull(network, sink, source_ip, TCP_PORT, seconds=FOREVER_S)
        if self.trace is not None:
            drain = [sys.executable, "-m", "kvstream.testbed.emulator.traffic", "drain", str(UDP_PORT)]
            drainer = network.popen(sink, drain, stdout=subprocess.PIPE, text=True)
            assert drainer.stdout is not None
            drainer.stdout.readline()
            words: list[Any] = [
                sys.executable,
                "-m",
                "kvstream.testbed.emulator.traffic",
                "pour",
                sink_ip,
                UDP_PORT,
                link.mtu,
            ]
            self._pourer = network.popen(source, list(map(str, words)), stdin=subprocess.PIPE, text=True)

    def begin(self, t0_s: float, length_s: float) -> None:
        """A session starts at `t0_s` (CLOCK_MONOTONIC), and the cross trace with it."""
        if self.trace is not None:
            self._tell([[t0_s + at_s, rate] for at_s, rate in self.trace.changes(0.0, length_s)])

    def end(self) -> None:
        """The session is over: datagrams stop; TCP flows go on."""
        if self.trace is not None:
            self._tell([])

    def _tell(self, steps: list[list[float]]) -> None:
        assert self._pourer is not None
        assert self._pourer.stdin is not None
        try:
            self._pourer.stdin.write(json.dumps(steps) + "\n")
            self._pourer.stdin.flush()
        except BrokenPipeError:
            raise MachineError("the source of cross traffic died") from None
