"""The compiled loops of the optimum against the arrays that they mirror, and when a process loads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvstream.policies import compiled, optimum
from kvstream.policies.optimum import BEAM, Line, Plan, least_distortion, least_ttft
from kvstream.traces.trace import Trace
from tests.policies.brute_force import instance
from tests.policies.test_optimum import random_line

numba = pytest.importorskip("numba", reason="the extra [run] is not installed")


@pytest.fixture(scope="module")
def kernel() -> Any:
    from kvstream.policies import _kernel

    return _kernel


def forget() -> None:
    optimum._best.cache_clear()
    optimum._search.cache_clear()


def both(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, line: Line, shares: tuple[float, ...], widest: int | None = None
) -> tuple[list[Plan | None], list[Plan | None]]:
    """Plans between the earliest first token and the latest of a fixed option, in arrays and compiled."""
    found: list[list[Plan | None]] = []
    monkeypatch.setattr(compiled, "count_line", lambda: None)
    for loops in (None, kernel):
        monkeypatch.setattr(compiled, "_kernel", loops)
        forget()
        soonest = least_ttft(line)
        latest_s = max(line.ttft_s((option,) * len(line.bits)) for option in range(line.bits.shape[1]))
        spans = [share * min(latest_s - soonest.ttft_s, 100.0) for share in shares] if soonest.ttft_s < np.inf else []
        found.append([soonest, *(least_distortion(line, soonest.ttft_s + span, widest=widest) for span in spans)])
    return found[0], found[1]


@pytest.mark.parametrize("part", range(2))
def test_plans_are_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch, kernel: Any, part: int) -> None:
    for seed in range(part * 40, (part + 1) * 40):
        for line in (random_line(seed), random_line(seed, 9, 4), instance(seed)):
            arrays, loops = both(monkeypatch, kernel, line, (-0.1, 1e-9, 0.1, 0.4))
            assert arrays == loops, seed


@pytest.mark.parametrize("widest", [None, BEAM])
def test_plans_are_the_same_where_states_are_many_and_many_are_equal(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, widest: int | None
) -> None:
    """Chunks of one size and one ladder: plans with the same levels in another order cost the same."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        sizes = np.tile(np.sort(rng.uniform(5e4, 4e5, 6)), (20, 1)) * rng.choice([1.0, 1.1], (20, 1))
        text = seed % 2 == 1
        line = Line(
            goodput=Trace("line", rng.uniform(0.1, 0.3, 100), rng.uniform(1e7, 1e8, 100)),
            rtt_s=0.02 * (seed % 3),
            depth=1 + seed // 3,
            start_s=0.03,
            compute_free_s=0.0,
            prefill_s=0.02,
            sizes_bytes=tuple((*row, 1e3) if text else tuple(row) for row in sizes.tolist()),
            compute_s=((*[0.01] * 6, 0.2) if text else (0.01,) * 6,) * 20,
            distortion=((0.1, 0.06, 0.03, 0.02, 0.01, 0.005, *[0.0] * text),) * 20,
        )
        arrays, loops = both(monkeypatch, kernel, line, (0.05, 0.3, 0.6), widest)
        assert arrays == loops, seed


def test_equal_bounds_are_cut_in_the_same_order(kernel: Any) -> None:
    rng = np.random.default_rng(1)
    for width in (1, 5, 30):
        values = rng.integers(0, 8, 60).astype(float)
        expected = np.sort(np.argsort(values, kind="stable")[:width])
        assert kernel._lowest(values, width).tolist() == expected.tolist()


def test_states_are_sorted_as_lexsort_does(kernel: Any) -> None:
    rng = np.random.default_rng(1)
    for n in (0, 1, 2, 7, 200):
        start_s, free_s, loss = rng.integers(0, 4, (3, n)).astype(float)
        option = rng.integers(0, 3, n)
        found = kernel._sorted((start_s, start_s, free_s, loss, option, option), 3)
        assert found.tolist() == np.lexsort((loss, free_s, start_s)).tolist()
