"""Goodput of curves that are known."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest

from kvstream.testbed.requests.goodput import FINE, attainment, goodput, search


@dataclass(frozen=True)
class At:
    rate: float
    met_rates: tuple[float, ...]

    @property
    def met_rate(self) -> float:
        return sum(self.met_rates) / len(self.met_rates)


def curve(capacity: float) -> list[At]:
    """Everything is in time up to the capacity, then the share falls as its ratio to the rate."""
    return [At(rate, (min(1.0, capacity / rate),) * 4) for rate in (1.0, 2.0, 4.0, 8.0)]


def test_goodput_lies_between_the_rates_around_the_target():
    found = goodput(curve(3.0), 0.9)
    assert found.rate == pytest.approx(2.0 + 2.0 * 0.1 / 0.25)
    assert (found.low, found.high) == pytest.approx((found.rate, found.rate))
    assert not found.is_open


def test_goodput_without_a_crossing():
    assert goodput(curve(0.5), 0.9).rate is None
    found = goodput(curve(100.0), 0.9)
    assert (found.rate, found.is_open) == (8.0, True)


def test_intervals_are_over_repetitions():
    points = [At(1.0, (1.0, 1.0, 1.0, 0.98)), At(2.0, (0.8, 0.7, 0.6, 0.7))]
    found = goodput(points, 0.9)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.rate < found.high
    assert goodput([At(1.0, (1.0, 0.8)), At(2.0, (0.1, 0.1))], 0.9).low is None, "one repetition never reaches it"
    share, low, high = attainment((1.0, 1.0, 1.0, 0.9))
    assert low < share < high == 1.0
    assert attainment((0.5, 0.6)) == (0.55, None, None)


@pytest.mark.parametrize("capacity", [0.3, 1.0, 7.7, 300.0])
def test_the_search_encloses_every_target(capacity):
    asked: list[float] = []

    def measure(rate: float) -> At:
        asked.append(rate)
        return At(rate, (min(1.0, capacity / rate),))

    rates = search(measure, [0.9, 0.99])
    assert sorted(asked) == rates
    assert len(set(asked)) == len(asked) < 40
    for target in (0.9, 0.99):
        true = capacity / target
        assert any(low <= true <= high <= FINE * low * 1.0001 for low, high in pairwise(rates))


def test_the_search_ends_where_nothing_is_ever_in_time():
    assert len(search(lambda rate: At(rate, (0.0,)), [0.9])) < 20
    assert len(search(lambda rate: At(rate, (1.0,)), [0.9])) < 30
