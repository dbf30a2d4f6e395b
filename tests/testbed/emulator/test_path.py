"""The parts of a path start and end together; the shaper's kernel is made up, the rest is in tests/emulation."""

from __future__ import annotations

from typing import Any

import pytest

from kvstream.testbed.errors import SpecError
from kvstream.traces.trace import Trace
from tests.testbed.emulator.made_path import MadeShaper, made_path

STEADY, REVERSE = Trace("steady", [1.0], [20e6]), Trace("reverse", [1.0], [5e6])
VARYING = Trace("varying", [1.0], [20e6], delay_s=[0.01])


class Part:
    """Delay and loss, or cross traffic, as far as being started and ended goes."""

    def __init__(self) -> None:
        self.settings = {"backend": "made"}
        self.calls: list[tuple[Any, ...]] = []

    def begin(self, *arguments: Any) -> None:
        self.calls.append(("begin", *arguments))

    def end(self) -> dict[str, Any]:
        self.calls.append(("end",))
        return {"dropped": 7}


def test_every_part_starts_at_time_zero_and_one_record_tells_of_all():
    down, up, impairments, cross = MadeShaper(), MadeShaper(), Part(), Part()
    path = made_path(down, up, REVERSE, impairments=impairments, cross=cross)
    path.arm(VARYING, 100.0, 60.0, chunks=3)
    assert down.calls == [("arm", VARYING, 100.0, 3)]
    assert up.calls == [("arm", REVERSE, 100.0, 0)]
    assert impairments.calls == [("begin", VARYING, 100.0, 60.0)]
    assert cross.calls == [("begin", 100.0, 60.0)]
    record = path.finish(101.0)
    assert down.named("finish") == up.named("finish") == [("finish", 101.0)]
    assert impairments.calls[1:] == cross.calls[1:] == [("end",)]
    assert record.down.impairments == {"dropped": 7}
    assert record.up is not None
    assert record.judge(VARYING).ok


def test_a_reverse_path_that_deviates_makes_the_session_invalid():
    path = made_path(MadeShaper(), MadeShaper(0.5), REVERSE)
    path.arm(STEADY, 100.0, 60.0)
    verdict = path.finish(101.0).judge(STEADY)
    assert not verdict.ok
    assert verdict.reasons[0].startswith("reverse path: bytes per window: median error 50.0% (limit 3.0%)")
    assert verdict.median_error == pytest.approx(0.0, abs=1e-3)


def test_both_directions_give_their_reasons():
    path = made_path(MadeShaper(0.8), MadeShaper(0.5), REVERSE)
    path.arm(STEADY, 100.0, 60.0)
    reasons = path.finish(101.0).judge(STEADY).reasons
    assert {reason.startswith("reverse path: ") for reason in reasons} == {True, False}


def test_a_trace_with_delays_is_refused_by_a_path_that_cannot_delay():
    down = MadeShaper()
    with pytest.raises(SpecError, match="'varying' has delays or losses: open the path with it"):
        made_path(down).arm(VARYING, 100.0, 60.0)
    assert down.calls == []


def test_a_held_rate_ends_whatever_happens():
    down, up, cross = MadeShaper(), MadeShaper(), Part()
    path = made_path(down, up, REVERSE, cross=cross)
    with pytest.raises(OSError, match="meanwhile"), path.held(30e6, 60.0):
        raise OSError("meanwhile")
    assert [call[0] for call in down.calls] == ["arm", "rate", "finish"]
    assert down.named("rate") == [("rate", 30e6)]
    assert [call[0] for call in cross.calls] == ["begin", "end"]
    assert up.calls == []


def test_the_settings_of_all_parts_go_into_the_manifest():
    plain = {"kernel": "6.12", "shaper": {"interface": "made"}}
    assert made_path(MadeShaper()).settings == plain
    assert made_path(MadeShaper(), impairments=Part()).settings == plain | {"impairments": {"backend": "made"}}
