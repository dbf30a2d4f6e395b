"""The fluid link against times worked out by hand, and against the trace's own integral."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstream.traces.errors import TraceError
from kvstream.traces.fluid import FluidLink
from kvstream.traces.trace import Trace


def constant(rate_bps: float) -> Trace:
    return Trace("constant", np.array([1.0]), np.array([rate_bps]))


def test_a_request_waits_a_round_trip_and_then_takes_bits_over_rate() -> None:
    link = FluidLink(constant(8e6), rtt_s=0.1)
    first_s, last_s = link.transfer(0.5, 500_000)
    assert first_s == pytest.approx(0.6 + 1e-6)
    assert last_s == pytest.approx(1.1)
    assert link.free_at_s == last_s


def test_answers_come_strictly_in_order() -> None:
    link = FluidLink(constant(8e6), rtt_s=0.1)
    link.transfer(0.0, 1_000_000)
    first_s, last_s = link.transfer(0.2, 1_000_000)
    assert first_s == pytest.approx(1.1, abs=1e-5)
    assert last_s == pytest.approx(2.1)


def test_an_outage_is_waited_for_and_delays_the_first_byte() -> None:
    trace = Trace("outage", np.array([1.0, 2.0, 10.0]), np.array([8e6, 0.0, 8e6]), end="hold")
    link = FluidLink(trace)
    assert link.transfer(0.5, 1_000_000)[1] == pytest.approx(3.5)
    fresh = FluidLink(trace)
    assert fresh.transfer(1.5, 1_000_000)[0] == pytest.approx(3.0, abs=1e-5)


def test_a_dead_link_never_delivers() -> None:
    link = FluidLink(Trace("short", np.array([1.0]), np.array([8e6]), end="stop"))
    assert link.transfer(0.0, 2_000_000)[1] == math.inf
    assert link.transfer(5.0, 1) == (math.inf, math.inf)


def test_one_rate_a_chunk_follows_the_chunk_and_not_the_clock() -> None:
    link = FluidLink(Trace("per chunk", np.array([]), np.array([8e6, 4e6]), per="chunk"), rtt_s=0.1)
    assert link.transfer(0.0, 1_000_000, 0)[1] == pytest.approx(1.1)
    assert link.transfer(0.0, 1_000_000, 1)[1] == pytest.approx(3.1)


def test_slow_start_doubles_a_window_every_round_trip() -> None:
    link = FluidLink(constant(8e9), rtt_s=0.1, initial_window_bytes=10_000)
    _, last_s = link.transfer(0.0, 70_000)  # 10 + 20 + 40 kB: three rounds, the last one 40 us long
    assert last_s == pytest.approx(0.1 + 0.2 + 40e-6, abs=1e-6)
    _, again_s = link.transfer(last_s, 80_000)  # the window has grown to 80 kB, which goes out in one round
    assert again_s == pytest.approx(last_s + 0.1 + 80e-6, abs=1e-6)


def test_slow_start_ends_where_the_link_is_the_limit() -> None:
    slow = FluidLink(constant(8e6), rtt_s=0.1, initial_window_bytes=100_000)
    assert slow.transfer(0.0, 3_000_000)[1] == pytest.approx(3.1)
    assert slow.transfer(3.1, 1_000_000)[1] == pytest.approx(4.2)


def test_a_copy_is_independent() -> None:
    link = FluidLink(constant(8e6), rtt_s=0.1, initial_window_bytes=1_000)
    link.transfer(0.0, 5_000)
    twin = link.copy()
    assert link.transfer(1.0, 9_000) == twin.transfer(1.0, 9_000)
    link.transfer(2.0, 1_000_000)
    assert twin.free_at_s < 2.0


def test_a_cut_frees_the_link_early_but_never_late() -> None:
    link = FluidLink(constant(8e6))
    link.transfer(0.0, 1_000_000)
    link.cut(0.25)
    assert link.free_at_s == 0.25
    link.cut(9.0)
    assert link.free_at_s == 0.25


@pytest.mark.parametrize(("rtt_s", "window"), [(-1.0, None), (math.inf, None), (0.1, 0)])
def test_impossible_links_are_refused(rtt_s: float, window: int | None) -> None:
    with pytest.raises(TraceError):
        FluidLink(constant(1e6), rtt_s, window)


rates = st.lists(st.one_of(st.just(0.0), st.floats(1e5, 1e9)), min_size=1, max_size=8).filter(any)


@given(rates, st.lists(st.tuples(st.floats(0, 3), st.integers(1, 10**7)), min_size=1, max_size=6), st.floats(0, 0.2))
def test_bytes_are_conserved_and_ordered(rows: list[float], requests: list[tuple[float, int]], rtt_s: float) -> None:
    trace = Trace("random", np.full(len(rows), 0.3), np.array(rows))
    link, free_s = FluidLink(trace, rtt_s), 0.0
    for request_s, size in requests:
        first_s, last_s = link.transfer(request_s, size)
        begin_s = max(request_s + rtt_s, free_s)
        assert begin_s <= first_s <= last_s
        assert link.bytes_between(begin_s, last_s) == pytest.approx(size, rel=1e-6, abs=1.0)
        free_s = last_s


@given(rates, st.integers(1, 10**7), st.floats(0.001, 0.2), st.integers(1000, 100_000))
def test_slow_start_only_delays(rows: list[float], size: int, rtt_s: float, window: int) -> None:
    trace = Trace("random", np.full(len(rows), 0.3), np.array(rows))
    warm = FluidLink(trace, rtt_s).transfer(0.0, size)[1]
    assert FluidLink(trace, rtt_s, window).transfer(0.0, size)[1] >= warm - 1e-9


def test_the_next_change_is_found_across_the_end_of_a_loop() -> None:
    link = FluidLink(Trace("steps", np.array([1.0, 2.0]), np.array([1e6, 2e6])))
    assert [link.next_change_s(t) for t in (0.0, 1.0, 2.5, 3.0, 3.5)] == pytest.approx([1.0, 3.0, 3.0, 4.0, 4.0])
    held = FluidLink(Trace("held", np.array([1.0, 2.0]), np.array([1e6, 2e6]), end="hold"))
    assert held.next_change_s(5.0) == math.inf
