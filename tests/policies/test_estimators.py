"""Estimators: what each must do with any samples, and hand-computed values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstream.policies import estimators
from kvstream.policies.api import TEXT, InFlight, Transfer
from kvstream.policies.errors import PolicyError
from kvstream.policies.estimators import ESTIMATORS
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


def test_an_unknown_name_is_an_error_that_lists_the_valid_ones() -> None:
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


def test_what_comes_at_once_after_a_pause_measures_nothing() -> None:
    burst = Transfer(0, 0, 100_000, 0.1, 0.2, 0.25, 0.0, burst_bytes=40_000, burst_end_s=0.202)
    flight = InFlight(1, 0, 500_000, 90_000, 0.25, 0.3, 50_000, 0.303)
    obs = observation(now_s=0.35, transfers=(burst,), in_flight=(flight,), rtt_s=0.05)
    bits, seconds = zip(*estimators.link_samples(obs), strict=True)
    assert bits == pytest.approx((480_000, 320_000))
    assert seconds == pytest.approx((0.048, 0.047))


def test_a_chunk_that_may_be_nothing_but_a_burst_counts_as_if_that_had_taken_its_longest() -> None:
    quick = done(0, 30_000, 0.1, 0.2, 0.2003)
    assert estimators.link_samples(observation(now_s=0.3, transfers=(quick,))) == [
        (240_000, pytest.approx(0.0003 + estimators.BURST_S))
    ]


def test_short_chunks_back_to_back_count_together() -> None:
    chunks = tuple(done(i, 10_000, 0.5 * i, 0.1 + 0.006 * i, 0.106 + 0.006 * i) for i in range(5))
    samples = estimators.link_samples(observation(now_s=0.2, transfers=chunks))
    assert [bits for bits, _ in samples] == [160_000, 160_000, 80_000]
    assert [seconds for _, seconds in samples] == pytest.approx([0.015, 0.012, 0.006])


def test_what_a_receiver_that_was_held_up_sees_at_once_is_no_rate() -> None:
    """The end of a chunk and all of the next, after a stall: 1.2 Gbit/s on a link of 12 Mbit/s."""
    slow = Transfer(0, 0, 150_000, 0.1, 0.11, 0.31, 150_000 * 8 / 0.21)
    sudden = Transfer(1, 0, 150_000, 0.2, 0.31, 0.311, 150_000 * 8 / 0.001)
    obs = observation(now_s=0.4, transfers=(slow, sudden), rtt_s=0.01)
    assert estimators.goodputs(obs) == pytest.approx([150_000 * 8 / 0.21, 300_000 * 8 / 0.211])
    [(bits, seconds)] = estimators.link_samples(obs)
    assert (bits, seconds) == pytest.approx((300_000 * 8, 0.201))


def test_the_smallest_chunks_count_where_there_is_nothing_else() -> None:
    tiny, text = done(0, 900, 0.1, 0.2, 0.21), Transfer(1, TEXT, 300, 0.21, 0.3, 0.3, 1e3)
    assert len(estimators.link_samples(observation(now_s=0.4, transfers=(tiny, text)))) == 1
    assert estimators.link_samples(observation(now_s=0.4, transfers=(text,))) == []


@pytest.mark.parametrize(
    ("now_s", "received", "known"), [(0.32, 60_000, True), (0.309, 60_000, False), (0.32, 6_000, False)]
)
def test_the_chunk_in_flight_is_the_first_measurement_when_enough_of_it_is_here(
    now_s: float, received: int, known: bool
) -> None:
    flight = InFlight(0, 0, 500_000, received, 0.25, 0.3)
    obs = observation(now_s=now_s, in_flight=(flight,), prior_bps=7.0)
    rate = received * 8 / (now_s - 0.3)
    assert estimators.goodputs(obs) == [pytest.approx(rate) if known else 7.0]
    assert estimators.link_samples(obs) == ([(received * 8, pytest.approx(now_s - 0.3))] if known else [])


def test_errors_are_what_came_over_what_was_estimated() -> None:
    transfers = [done(i, 100_000, i, i + 0.5, i + 1 / rate) for i, rate in enumerate((1.0, 2.0, 1.0))]
    assert estimators.errors(transfers, estimators.last) == pytest.approx([2.0, 0.5])
