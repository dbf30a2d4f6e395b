"""Estimators: what each must do with any samples, and hand-computed values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import estimators
from policies.api import InFlight, Transfer
from policies.errors import PolicyError
from policies.estimators import ESTIMATORS
from tests.policies.observations import observation

Estimator = Callable[[Sequence[float]], float]
everyone = pytest.mark.parametrize("estimate", ESTIMATORS.values(), ids=ESTIMATORS)
samples = st.lists(st.floats(1e3, 1e11), min_size=1, max_size=12)


@everyone
@given(rate=st.floats(1.0, 1e12), n=st.integers(1, 12))
def test_a_constant_comes_back(estimate: Estimator, rate: float, n: int) -> None:
    assert estimate([rate] * n) == pytest.approx(rate, rel=1e-9)


@everyone
@given(rates=samples, factor=st.floats(1e-3, 1e3))
def test_it_scales(estimate: Estimator, rates: list[float], factor: float) -> None:
    assert estimate([rate * factor for rate in rates]) == pytest.approx(estimate(rates) * factor, rel=1e-6)


@everyone
@given(rates=samples)
def test_it_is_never_above_the_largest_sample(estimate: Estimator, rates: list[float]) -> None:
    assert estimate(rates) <= max(rates) * (1 + 1e-9)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "robust"])
@given(rates=samples)
def test_only_the_robust_one_goes_below_the_smallest_sample(name: str, rates: list[float]) -> None:
    assert ESTIMATORS[name](rates) >= min(rates) * (1 - 1e-9)


@everyone
@given(rates=samples)
def test_samples_are_not_changed(estimate: Estimator, rates: list[float]) -> None:
    before = list(rates)
    estimate(rates)
    assert rates == before


@everyone
def test_a_link_at_zero_gives_no_more_than_the_other_samples(estimate: Estimator) -> None:
    assert 0.0 <= estimate([8.0, 0.0]) <= 8.0


@given(rates=samples)
def test_cautious_ones_are_below_their_plain_ones(rates: list[float]) -> None:
    assert estimators.robust(rates) <= estimators.harmonic(rates) * (1 + 1e-12)
    assert estimators.harmonic(rates) <= estimators.arithmetic(rates) * (1 + 1e-12)
    assert estimators.dual_ewma(rates) <= estimators.ewma(rates, 1.0) * (1 + 1e-12)


def test_values_by_hand() -> None:
    rates = [2.0, 4.0, 8.0]
    assert estimators.last(rates) == 8.0
    assert estimators.arithmetic(rates, 2) == 6.0
    assert estimators.harmonic(rates, 2) == pytest.approx(16 / 3)
    assert estimators.weighted([2.0, 8.0], [3.0, 1.0]) == pytest.approx(4 / 1.625)
    # half-life of one chunk: ((2/2 + 4)/2 + 8)/2 over 1 - 1/8
    assert estimators.ewma(rates, 1.0) == pytest.approx(5.25 / 0.875)
    assert estimators.sliding_min(rates, 2) == 4.0
    # the errors were |2-4|/4 and |8/3-8|/8; the harmonic mean of all three is 24/7
    assert estimators.robust(rates) == pytest.approx(24 / 7 / (1 + 2 / 3))
    assert estimators.quantile(rates, 0.25) == 3.0


def test_a_half_life_in_bytes_ignores_small_chunks() -> None:
    rates, sizes = [10.0, 1.0], [1_000_000.0, 1_000.0]
    assert estimators.ewma(rates, 500_000.0, sizes) > 9.9
    assert estimators.ewma(rates, 1.0) < 5.0


def test_an_unknown_name_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(PolicyError, match="harmonic"):
        estimators.by_name("median")


def done(chunk: int, size: int, request_s: float, first_s: float, end_s: float) -> Transfer:
    return Transfer(chunk, 0, size, request_s, first_s, end_s, size * 8 / (end_s - request_s))


def test_link_samples_leave_out_waiting_and_text_and_take_in_what_is_in_flight() -> None:
    transfers = (done(0, 500_000, 0.1, 0.2, 0.6), done(1, 1_000, 0.6, 0.7, 0.7), done(2, 500_000, 0.7, 0.75, 1.0))
    flight = (InFlight(3, 0, 500_000, 250_000, 0.9),)
    obs = observation(now_s=1.2, transfers=transfers, in_flight=flight, rtt_s=0.05)
    bits, seconds = zip(*estimators.link_samples(obs), strict=True)
    assert bits == (4e6, 4e6, 2e6)
    assert seconds == pytest.approx((0.4, 0.25, 0.2))


def test_errors_are_what_came_over_what_was_estimated() -> None:
    transfers = [done(i, 100_000, i, i + 0.5, i + 1 / rate) for i, rate in enumerate((1.0, 2.0, 1.0))]
    assert estimators.errors(transfers, estimators.last) == pytest.approx([2.0, 0.5])
