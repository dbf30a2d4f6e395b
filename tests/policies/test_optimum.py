"""The exact optimum against trying every plan, and against what must hold of any optimum."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvstream.policies import optimum
from kvstream.policies.errors import PolicyError
from kvstream.policies.optimum import BEAM, TOLERANCE_S, WIDER, Line, Plan, least_distortion, least_ttft
from kvstream.traces.fluid import FluidLink, frame_bytes
from kvstream.traces.trace import Trace


def random_line(seed: int, max_chunks: int = 4, max_options: int = 3) -> Line:
    """Any mixture of rates and outages, depths, round trips, decode and recompute times."""
    rng = np.random.default_rng(seed)
    n, m = int(rng.integers(1, max_chunks + 1)), int(rng.integers(1, max_options + 1))
    rows = int(rng.integers(1, 8))
    rates = rng.uniform(1e6, 5e7, rows) * (rng.random(rows) > 0.2)
    if not rates.any():
        rates[0] = 1e7
    if rng.random() < 0.25:
        end: Literal["loop", "hold"] = "loop" if rng.random() < 0.5 else "hold"
        trace = Trace("chunks", np.array([]), np.maximum(rates, 1e5), per="chunk", end=end)
    else:
        rates[-1] = max(rates[-1], 1e6)
        trace = Trace("random", rng.uniform(0.02, 0.3, rows), rates, end="loop" if rng.random() < 0.7 else "hold")
    sizes = np.sort(rng.uniform(1e4, 4e5, (n, m)), axis=1)
    compute = rng.uniform(0.0, 0.02, (n, m))
    loss = -np.sort(-rng.uniform(0.0, 1.0, (n, m)), axis=1)
    if m > 1 and rng.random() < 0.7:  # the last option is text: small, slow to recompute, lossless
        sizes[:, -1], compute[:, -1], loss[:, -1] = 1e3, rng.uniform(0.02, 0.2, n), 0.0
    return Line(
        goodput=trace,
        rtt_s=float(rng.choice([0.0, rng.uniform(0.001, 0.1)])),
        depth=int(rng.integers(1, 3)),
        start_s=float(rng.uniform(0.0, 0.2)),
        compute_free_s=float(rng.uniform(0.0, 0.3)),
        prefill_s=float(rng.uniform(0.0, 0.05)),
        sizes_bytes=tuple(map(tuple, sizes.tolist())),
        compute_s=tuple(map(tuple, compute.tolist())),
        distortion=tuple(map(tuple, loss.tolist())),
        first_chunk=int(rng.integers(0, 3)),
    )


def ttft_by_hand(line: Line, options: tuple[int, ...]) -> float:
    """The flow line on the fluid link itself, chunk by chunk."""
    link = FluidLink(line.goodput, 0.0)
    begin_s, free_s = line.start_s, line.compute_free_s
    for k, option in enumerate(options):
        size = line.sizes_bytes[k][option]
        _, end_s = link.transfer(begin_s, size, line.first_chunk + k)
        free_s = max(end_s, free_s) + line.compute_s[k][option]
        news_s = begin_s + _seconds(line, begin_s, min(size, frame_bytes(int(size))), k)
        begin_s = end_s + line.rtt_s if line.depth == 1 else max(end_s, news_s + line.rtt_s)
    return free_s + line.prefill_s


def _seconds(line: Line, begin_s: float, size: float, k: int) -> float:
    """What so many bytes take from a moment on, on a link of their own."""
    return FluidLink(line.goodput, 0.0).transfer(begin_s, size, line.first_chunk + k)[1] - begin_s


def every_plan(line: Line) -> list[Plan]:
    plans = itertools.product(range(len(line.sizes_bytes[0])), repeat=len(line.sizes_bytes))
    return [
        Plan(options, sum(line.distortion[k][o] for k, o in enumerate(options)), ttft_by_hand(line, options))
        for options in plans
    ]


@pytest.mark.parametrize("part", range(4))
def test_it_is_what_trying_every_plan_finds(part: int) -> None:
    """1,000 instances in all; deadlines between hopeless and idle, among them exactly the least feasible one."""
    compared = hopeless = 0
    for seed in range(part * 250, (part + 1) * 250):
        line = random_line(seed)
        plans = every_plan(line)
        soonest = min(plan.ttft_s for plan in plans)
        assert least_ttft(line).ttft_s == pytest.approx(soonest, rel=1e-9), seed
        if soonest == math.inf:
            continue
        latest = max(plan.ttft_s for plan in plans if plan.ttft_s < math.inf)
        share = np.random.default_rng(seed + 10_000).choice([-0.1, 1e-9, 0.3, 0.6, 1.0])
        deadline_s = soonest + share * max(latest - soonest, 0.01)
        found = least_distortion(line, deadline_s)
        fitting = [plan.distortion for plan in plans if plan.ttft_s <= deadline_s + TOLERANCE_S]
        if not fitting:
            assert found is None, seed
            hopeless += 1
            continue
        assert found is not None, seed
        assert found.distortion == pytest.approx(min(fitting), rel=1e-9, abs=1e-9), seed
        assert found.ttft_s <= deadline_s + 2 * TOLERANCE_S
        assert ttft_by_hand(line, found.options) == pytest.approx(found.ttft_s, rel=1e-9)
        assert line.ttft_s(found.options) == pytest.approx(found.ttft_s, rel=1e-9)
        compared += 1
    assert compared > 150
    assert hopeless > 25


lines = st.integers(0, 2**32 - 1).map(lambda seed: random_line(seed, max_chunks=9, max_options=4))


@settings(max_examples=40, deadline=None)
@given(lines, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_more_time_never_costs_distortion(line: Line, one: float, other: float) -> None:
    soonest = least_ttft(line).ttft_s
    assume(soonest < math.inf)
    tight, loose = sorted((soonest * (1.0 + one), soonest * (1.0 + other)))
    strict, easy = least_distortion(line, tight + 1e-9), least_distortion(line, loose + 1e-9)
    assert strict is not None
    assert easy is not None
    assert easy.distortion <= strict.distortion + 1e-9


@settings(max_examples=40, deadline=None)
@given(lines, st.integers(0, 2**32 - 1))
def test_no_random_plan_beats_it(line: Line, seed: int) -> None:
    """Any plan is feasible by its own TTFT, so the optimum for that deadline is at least as good."""
    options = tuple(np.random.default_rng(seed).integers(0, len(line.sizes_bytes[0]), len(line.sizes_bytes)).tolist())
    deadline_s = line.ttft_s(options)
    assume(deadline_s < math.inf)
    best = least_distortion(line, deadline_s)
    assert best is not None
    assert best.distortion <= sum(line.distortion[k][o] for k, o in enumerate(options)) + 1e-9


@settings(max_examples=40, deadline=None)
@given(lines, st.floats(0.0, 1.0))
def test_a_narrow_search_is_feasible_and_never_better(line: Line, share: float) -> None:
    soonest = least_ttft(line).ttft_s
    assume(soonest < math.inf)
    deadline_s = soonest * (1.0 + share) + 1e-9
    exact, quick = least_distortion(line, deadline_s), least_distortion(line, deadline_s, widest=BEAM)
    assert exact is not None
    assert quick is not None
    assert exact.distortion <= quick.distortion + 1e-9
    assert line.ttft_s(quick.options) <= deadline_s + 1e-9


def test_a_link_that_dies_has_no_plan() -> None:
    trace = Trace("short", np.array([0.1]), np.array([1e6]), end="stop")
    line = Line(trace, 0.0, 2, 0.0, 0.0, 0.0, ((1e6, 2e6),) * 2, ((0.0, 0.0),) * 2, ((1.0, 0.0),) * 2)
    assert least_ttft(line).ttft_s == math.inf
    assert least_distortion(line, 100.0) is None


def test_text_is_taken_where_compute_has_time_and_the_link_has_not() -> None:
    trace = Trace("slow", np.array([1.0]), np.array([8e6]))
    sizes, compute, loss = (100_000.0, 400_000.0, 1_000.0), (0.0, 0.0, 0.4), (0.5, 0.1, 0.0)
    line = Line(trace, 0.0, 2, 0.0, 0.0, 0.0, (sizes,) * 3, (compute,) * 3, (loss,) * 3)
    plan = least_distortion(line, 0.9)
    assert plan is not None
    # two chunks are recomputed while the third takes 0.4 s to load; all three recomputed take 1.2 s
    assert sorted(plan.options) == [1, 2, 2]
    assert plan.distortion == pytest.approx(0.1)
    every = least_distortion(line, 1.21)
    assert every is not None
    assert every.options == (2, 2, 2)


def test_tables_of_different_shapes_are_refused() -> None:
    trace = Trace("any", np.array([1.0]), np.array([8e6]))
    with pytest.raises(PolicyError, match="one shape"):
        Line(trace, 0.0, 2, 0.0, 0.0, 0.0, ((1.0, 2.0),), ((0.0,),), ((1.0, 0.0),))


def test_the_same_question_is_answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle of a unit asks what its bound asks, from a line of its own."""
    searched = []
    run = optimum._Search.run
    monkeypatch.setattr(optimum._Search, "run", lambda *given: searched.append(given) or run(*given))
    optimum._best.cache_clear()
    soonest_s = least_ttft(random_line(3)).ttft_s
    plans = [least_distortion(random_line(3), 1.2 * soonest_s, widest=widest) for widest in (WIDER * BEAM, None)]
    assert plans[0] == plans[1]
    assert len(searched) == 1
