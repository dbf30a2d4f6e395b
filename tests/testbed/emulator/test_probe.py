"""What the probe makes of the moments at which a train arrived."""

from __future__ import annotations

import struct
import time

import pytest

from kvstream.testbed.emulator import probe

GROUP = 44
"""Packets that the kernel cuts out of one group: they have one stamp."""


class Line:
    """A socket that answers with packets of 1500 bytes over a link of one rate, after 10 ms."""

    def __init__(self, rate_bps: float) -> None:
        self.packet_s = 1514 * 8.0 / rate_bps
        self.stamps: list[float] = []

    def sendto(self, request: bytes, address: object) -> None:
        (length,) = struct.unpack("!I", request)
        group = 1 if length <= probe.SINGLE_TRAIN else GROUP
        ends = [(i // group + 1) * group for i in range(length // group * group)]
        first_s = time.time() + 0.01
        self.stamps = [first_s + (end - group) * self.packet_s for end in ends]


@pytest.mark.parametrize("rate_bps", [5e6, 80e6, 1e9, 5e9])
def test_the_rate_is_found_however_packets_are_grouped(rate_bps, monkeypatch):
    monkeypatch.setattr(probe, "_arrivals", lambda line: line.stamps)
    found = probe._look(Line(rate_bps), "10.1.0.1", 1500)  # type: ignore[arg-type]
    assert found["capacity_bps"] == pytest.approx(rate_bps, rel=0.002)
    assert found["rtt_s"] == pytest.approx(0.01, abs=0.003)
