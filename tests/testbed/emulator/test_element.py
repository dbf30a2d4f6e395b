"""The element's bookkeeping, without a kernel queue; what it does to packets is in tests/emulation."""

from __future__ import annotations

from typing import Any

from kvstream.testbed.emulator.element import LATE_BINS_S, Lane
from kvstream.testbed.emulator.impairments import handled

SETTINGS = {
    "delay_s": 0.0,
    "jitter_s": 0.0,
    "ordered": True,
    "lossy": False,
    "reorder": 0.0,
    "duplicate": 0.0,
    "seed": 1,
}


class Queue:
    """Takes verdicts."""

    def accept_up_to(self, packet_id: int) -> None:
        self.last = packet_id

    def lost(self) -> int:
        return 0


def report(lane: Lane) -> dict[str, Any]:
    return {"backend": "nfqueue", "lanes": [lane.report() | {"late": list(lane.late)}]}


def test_packets_that_are_let_go_together_are_each_counted_as_late_as_the_first(monkeypatch):
    lane = Lane(Queue(), SETTINGS, forward=True)  # type: ignore[arg-type]
    before = report(lane)
    lane.counts["packets"] = 99
    lane.held.extend((0.001 * i, i) for i in range(99))
    monkeypatch.setattr("kvstream.testbed.emulator.element.time.monotonic", lambda: 0.0985)
    lane.release(0.0)
    assert lane.queue.last == 98  # type: ignore[attr-defined]
    assert sum(lane.late) == 99
    assert handled(before, report(lane))["late_p99_s"] == LATE_BINS_S[-1]
