"""When a chunk's rate is known, and what a burst does to it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstream.policies.estimators import BURST_S, SAMPLE_BYTES, SAMPLE_S
from kvstream.testbed.session.arrival_rate import ArrivalRate

SIZE, RATE = 200_000, 1e6  # bytes, bytes per second
AHEAD_S = 0.05
PACKET = 1448


def arriving(
    rate: ArrivalRate, until_s: float, *, burst: int = 0, bytes_per_s: float = RATE, pause: bool = True
) -> int:
    """The chunk's first byte at 0, a burst within a millisecond, then packets at a steady pace."""
    rate.begin(SIZE, 0.0, 0, after_pause=pause)
    rate.add(0.0005, burst)
    count = int((until_s - 0.0005) * bytes_per_s / PACKET + 1e-9)
    for i in range(1, count + 1):
        rate.add(0.0005 + i * PACKET / bytes_per_s, burst + i * PACKET)
    return burst + count * PACKET


def test_nothing_is_known_before_the_first_byte() -> None:
    rate = ArrivalRate(AHEAD_S)
    assert rate.ready_s() is None
    assert rate.wake_s() is None
    assert rate.burst == (0.0, 0)


@pytest.mark.parametrize("burst", [0, 25_000, 100_000])
def test_a_burst_after_a_pause_is_no_rate(burst: int) -> None:
    rate = ArrivalRate(AHEAD_S)
    received = arriving(rate, 0.03, burst=burst)
    ready_s = rate.ready_s()
    assert ready_s == pytest.approx(0.03 + (SIZE - received) / RATE - AHEAD_S, abs=0.003)
    at_s, size = rate.burst
    assert at_s <= BURST_S
    assert burst <= size <= burst + RATE * BURST_S


def test_without_a_pause_all_counts() -> None:
    rate = ArrivalRate(AHEAD_S)
    arriving(rate, 0.03, pause=False)
    assert rate.burst == (0.0, 0)


@settings(max_examples=60, deadline=None)
@given(st.floats(2e5, 3e6), st.integers(0, 60_000), st.floats(0.004, 0.06))
def test_a_rate_is_known_only_after_enough_time_and_bytes_beyond_the_burst(
    bytes_per_s: float, burst: int, until_s: float
) -> None:
    rate = ArrivalRate(AHEAD_S)
    received = arriving(rate, until_s, burst=burst, bytes_per_s=bytes_per_s)
    beyond = received - rate.burst[1]
    enough = until_s - PACKET / bytes_per_s >= SAMPLE_S and beyond >= SAMPLE_BYTES
    short = until_s < SAMPLE_S or beyond < SAMPLE_BYTES
    ready_s = rate.ready_s()
    assert not enough or ready_s is not None
    assert not short or ready_s is None
    if ready_s is not None:  # the burst and the packets' spacing are all that can be wrong
        left_s = (SIZE - received) / bytes_per_s
        assert ready_s == pytest.approx(until_s + left_s - AHEAD_S, abs=0.2 * left_s + 2 * PACKET / bytes_per_s)


def test_it_says_when_to_look_again() -> None:
    rate = ArrivalRate(AHEAD_S)
    arriving(rate, 0.005)
    assert rate.ready_s() is None
    assert rate.wake_s() == pytest.approx(0.011, abs=0.002)  # 8 KiB beyond what came within 3 ms
    rate.begin(SIZE, 1.0, 0, after_pause=True)
    assert rate.wake_s() == pytest.approx(1.0 + SAMPLE_S)  # nothing arrives: look all the same


def test_what_was_known_before_counts_until_the_chunk_shows_its_own_rate() -> None:
    rate = ArrivalRate(AHEAD_S, prior_bps=8 * RATE)
    rate.begin(SIZE, 0.0, 0, after_pause=True)
    assert rate.ready_s() == pytest.approx(SIZE / RATE - AHEAD_S)
    assert rate.wake_s() == pytest.approx(SAMPLE_S)
    rate.end(0.005, 4 * RATE)  # too soon for a rate of its own: the goodput is all that is known
    rate.clear()
    rate.begin(SIZE, 0.3, 0, after_pause=True)
    assert rate.ready_s() == pytest.approx(0.3 + 2 * SIZE / RATE - AHEAD_S)


def test_the_next_chunk_is_not_chosen_before_the_first_frame_is_here() -> None:
    rate = ArrivalRate(10.0, prior_bps=8 * RATE)
    rate.begin(SIZE, 0.0, 0, after_pause=True)
    assert rate.ready_s() == pytest.approx(SIZE / 8 / RATE)
    rate.begin(4_000, 0.0, 0, after_pause=True)
    assert rate.ready_s() is None
