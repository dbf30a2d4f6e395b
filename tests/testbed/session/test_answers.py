"""Whatever a policy answers: integers of any kind are taken, the rest is a counted fault, nothing destroys a report."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from kvstream.policies.api import Choice, Observation
from kvstream.testbed.session.ask import MAX_REASONS, as_level, check_reason
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.simulator.simulator import simulate
from tests.testbed.made import constant, costs, even


class Rude:
    """An object that answers every question with an exception."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __float__(self) -> float:
        raise RuntimeError("no")

    def __index__(self) -> int:
        raise RuntimeError("no")


@pytest.mark.parametrize("level", [1, np.int64(1), np.uint8(1), np.array(1)])
def test_any_integer_is_a_level(level: Any) -> None:
    assert as_level(level, 3) == 1
    assert type(as_level(level, 3)) is int


@pytest.mark.parametrize("level", [True, 1.0, "1", None, -1, 3, np.float64(1), np.array([1, 2]), Rude(), 10**400])
def test_anything_else_is_none(level: Any) -> None:
    assert as_level(level, 3) is None


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, "text", None, "1.5", [1], Rude(), np.array([1.0, 2.0]), 10**400, {}]
)
def test_a_reason_that_is_no_number_is_dropped_and_said(value: Any) -> None:
    taken, fault = check_reason({"good": np.float32(0.5), "bad": value})
    assert taken == {"good": 0.5}
    assert fault is not None
    assert "bad" in fault
    assert len(fault) < 200
    json.dumps(taken, allow_nan=False)


@pytest.mark.parametrize("reason", [None, "text", 3, [("a", 1.0)], Rude()])
def test_a_reason_that_is_no_mapping(reason: Any) -> None:
    taken, fault = check_reason(reason)
    assert taken == {}
    assert fault is not None


def test_reasons_are_bounded() -> None:
    taken, fault = check_reason({f"r{i}": i for i in range(100_000)})
    assert len(taken) == MAX_REASONS
    assert "100000 entries" in str(fault)
    assert check_reason({"x" * 10_000: 1.0})[0] == {}


def test_a_session_goes_on_whatever_the_reason_is() -> None:
    class Odd:
        def choose(self, obs: Observation) -> Choice:
            return Choice(np.int64(obs.n_levels - 1), np.int64(obs.chunk), {"a": math.nan, "b": np.int32(2)})  # type: ignore[arg-type]

    of = even(3)
    settings = SessionSettings(deadline_s=1.0)
    record = simulate(of, Odd(), constant(16e6), settings, costs=costs(of), manifest_bytes=0, rtt_s=0.05)
    assert all(type(level) is int for level in record.levels)
    assert set(record.levels) == {record.levels[0]} != {0}
    assert all("not a number" in str(chunk.fault) for chunk in record.chunks)
    assert all(chunk.reason == {"b": 2.0} for chunk in record.chunks)
    json.dumps([chunk.reason for chunk in record.chunks], allow_nan=False)
