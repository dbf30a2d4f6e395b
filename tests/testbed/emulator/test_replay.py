"""The shaper's process on an interface that is made up; real ones are in tests/emulation."""

from __future__ import annotations

import gc
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstream.testbed.emulator import replay
from kvstream.testbed.emulator.record import LinkRecord
from kvstream.testbed.emulator.tc import BURST_S, ClassState, KernelRefused

IDLE_BPS = 80e6


class Interface:
    """Keeps what it was told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rate_bps, self.limit, self.open, self.sent, self.woken = 0.0, 0, True, 1000, 0
        self.refuses = ""

    def create(self, rate_bps: float, limit_bytes: int, packet_bytes: int) -> None:
        self.rate_bps, self.limit = rate_bps, limit_bytes

    def set_rate(self, rate_bps: float) -> None:
        if self.refuses:
            raise KernelRefused(1, self.refuses)
        self.rate_bps = rate_bps

    def set_queue(self, limit_bytes: int, packet_bytes: int, *, open: bool = True) -> None:
        self.limit, self.open = limit_bytes, open

    def wake(self) -> None:
        self.woken += 1

    def state(self) -> ClassState:
        self.sent += 500
        return ClassState(self.rate_bps, BURST_S, self.sent, 1, 3000, 0)

    def queue_state(self) -> tuple[int, bool]:
        return self.limit, self.open


@pytest.fixture
def shaper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(replay, "Interface", Interface)
    monkeypatch.setattr(replay, "steps_path", lambda interface: tmp_path / f"{interface}.steps")
    monkeypatch.setattr(replay, "be_punctual", lambda _: "made")
    monkeypatch.setattr(gc, "collect", lambda: 0)  # of this process's heap it takes longer than these sessions
    made = replay.Replay("router-right")
    assert "ok" in made._answer(
        {"do": "make", "queue_s": 0.05, "queue_bytes": None, "packet_bytes": 1514, "idle_bps": IDLE_BPS}
    )
    yield made
    made.chunk_starts.close()
    gc.enable()


def ask(shaper: Any, what: str, **arguments: Any) -> Any:
    return shaper._answer({"do": what, **arguments})


def record_of(answer: dict[str, Any]) -> LinkRecord:
    return LinkRecord.from_json(json.loads(json.dumps(answer["ok"])))


def test_the_schedule_is_followed_and_what_was_done_is_recorded(shaper):
    t0_s = time.monotonic() + 0.02
    schedule = [[0.0, 20e6], [0.03, 0.0], [0.06, 40e6]]
    assert ask(shaper, "arm", t0_s=t0_s, schedule=schedule, chunk_rates_bps=[]) == {"ok": None}
    record = record_of(ask(shaper, "finish", t_end_s=t0_s + 0.3))
    assert [[change.scheduled_s, change.rate_bps] for change in record.changes] == [
        [pytest.approx(at_s), rate_bps] for at_s, rate_bps in schedule
    ]
    assert all(late_s >= 0.0 for late_s in record.lateness_s)
    assert record.samples[0].delivered_bytes == 0, "counters start with the session"
    assert record.delivered_bytes == 500 * (len(record.samples) - 1)
    assert {sample.rate_bps for sample in record.samples} >= {0.0, 40e6}
    assert record.faults == ()
    assert record.settings["interface"] == "router-right"
    assert shaper.tc.woken == 1, "the valve opened once"
    assert shaper.tc.rate_bps == IDLE_BPS, "between sessions the rate is the idle one"


def test_a_second_session_knows_nothing_of_the_first(shaper):
    for rate_bps in (20e6, 30e6):
        t0_s = time.monotonic()
        ask(shaper, "arm", t0_s=t0_s, schedule=[[0.0, rate_bps]], chunk_rates_bps=[])
        record = record_of(ask(shaper, "finish", t_end_s=time.monotonic() + 0.05))
        assert [change.rate_bps for change in record.changes] == [rate_bps]
        assert record.samples[0].delivered_bytes == 0


def test_a_chunk_s_rate_is_in_force_once_its_first_byte_is_reported(shaper):
    t0_s = time.monotonic()
    ask(shaper, "arm", t0_s=t0_s, schedule=[], chunk_rates_bps=[10e6, 40e6, 40e6])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.connect(shaper.chunk_starts.getsockname())
        for chunk, at_s in ((1, t0_s - 1.0), (1, t0_s + 0.001), (2, t0_s + 0.002), (7, t0_s + 0.003)):
            receiver.send(json.dumps({"chunk": chunk, "at_s": at_s}).encode())
        record = record_of(ask(shaper, "finish", t_end_s=time.monotonic() + 0.3))
    # Too early is of the session before; chunk 2's rate is in force already; there is no chunk 7.
    changes = sorted((change.rate_bps, change.scheduled_s) for change in record.changes)
    assert changes == [(10e6, 0.0), (40e6, pytest.approx(0.001))]


def test_what_the_kernel_refuses_is_a_fault_of_the_session(shaper):
    t0_s = time.monotonic()
    ask(shaper, "arm", t0_s=t0_s, schedule=[], chunk_rates_bps=[])
    shaper.tc.refuses = "Operation not permitted"
    assert "lateness_s" in ask(shaper, "rate", rate_bps=5e6)["ok"]
    record = record_of(ask(shaper, "finish", t_end_s=t0_s + 0.01))
    assert all("the rate could not be changed: Operation not permitted" in fault for fault in record.faults)
    assert len(record.faults) == 2, "at the step, and on returning to the idle rate"


@pytest.mark.parametrize("what", ["serve", "_step", "__init__", "nothing"])
def test_only_requests_in_the_table_are_carried_out(shaper, what):
    assert ask(shaper, what) == {"error": f"unknown request {what!r}"}


@pytest.mark.parametrize(("what", "arguments"), [("rate", {"rate_bps": 1e6}), ("finish", {"t_end_s": 0.0})])
def test_without_a_session_there_is_nothing_to_step_or_finish(shaper, what, arguments):
    assert ask(shaper, what, **arguments) == {"error": "no session was begun"}
