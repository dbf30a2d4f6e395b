"""Statistics against published or hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from testbed.stats import (
    Mean,
    clustered_mean,
    mcnemar,
    paired_difference,
    regret,
    times,
    ttft_quantiles,
    verdict,
    wilson,
)


def test_wilson_has_the_textbook_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 0) == (None, None)


def test_mcnemar_is_the_sign_test_of_the_pairs_that_differ() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 2**5)
    assert mcnemar(8, 2) == pytest.approx(2 * sum(math.comb(10, k) for k in range(3)) / 2**10)
    assert mcnemar(3, 7) == mcnemar(7, 3)


def test_a_mean_weighs_units_and_not_traces() -> None:
    mean = clustered_mean([1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"])
    assert mean.value == 2.0
    assert (mean.n, mean.clusters) == (4, 2)
    assert mean.low == 1.0
    assert mean.high == 5.0


def test_what_cannot_be_said_is_none() -> None:
    assert clustered_mean([], []) == Mean(None, None, None, 0, 0)
    alone = clustered_mean([1.0, 3.0], ["a", "a"])
    assert (alone.value, alone.low, alone.high) == (2.0, None, None)
    assert not alone.is_apart_from_0


def test_equal_traces_have_an_interval_of_no_width() -> None:
    assert clustered_mean([0.5] * 6, list("aabbcc")) == Mean(0.5, 0.5, 0.5, 6, 3)


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(60):
        level = rng.normal(0.0, 1.0, 25).repeat(4)
        values = (level + rng.normal(0.0, 0.3, 100)).tolist()
        mean = clustered_mean(values, [str(i // 4) for i in range(100)])
        assert mean.low is not None
        assert mean.high is not None
        hits += mean.low <= 0.0 <= mean.high
    assert 50 <= hits <= 60  # 57 expected; without clustering about 40


def test_clusters_widen_the_interval() -> None:
    values = np.random.default_rng(1).normal(0.0, 1.0, 10).repeat(10).tolist()
    by_trace = clustered_mean(values, [str(i // 10) for i in range(100)])
    by_unit = clustered_mean(values, [str(i) for i in range(100)])
    assert by_trace.high - by_trace.low > 2.0 * (by_unit.high - by_unit.low)  # type: ignore[operator]


def test_a_paired_difference_sees_what_unpaired_noise_hides() -> None:
    unit = np.random.default_rng(2).normal(0.0, 5.0, 40)
    mean = paired_difference((unit - 0.1).tolist(), unit.tolist(), [str(i // 2) for i in range(40)])
    assert mean.value == pytest.approx(-0.1)
    assert mean.is_apart_from_0


def test_quantiles_and_failed_sessions() -> None:
    found = ttft_quantiles([float(i) for i in range(101)])
    assert found == {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
    assert ttft_quantiles([1.0, 2.0])["p50"] == 1.5
    failed = ttft_quantiles([1.0, 2.0, math.inf])
    assert (failed["p50"], failed["p90"]) == (2.0, math.inf)
    assert ttft_quantiles([])["p50"] is None


def test_regret_counts_only_units_that_both_met() -> None:
    mean = regret([0.3, 0.9, 0.2, None], [True, False, True, True], [0.1, 0.1, None, 0.1], ["a", "a", "b", "b"])
    assert mean.value == pytest.approx(0.2)
    assert mean.n == 1


def test_the_verdict_says_how_often_and_whether_chance_explains_it() -> None:
    less = Mean(-0.02, -0.03, -0.01, 20, 10)
    assert verdict("ours", "cachegen", [True] * 18 + [False] * 2, [True] * 9 + [False] * 11, less) == (
        "ours meets the deadline 2x as often as cachegen (18 against 9 of 20 units, p = 0.0039), "
        "with 0.02 nats less distortion."
    )
    unclear = Mean(-0.02, -0.05, 0.01, 20, 10)
    close = verdict("ours", "cachegen", [True] * 10 + [False] * 10, [True] * 9 + [False] * 11, unclear)
    assert "about as often" in close
    assert "not clearly different" in close
    never = verdict("text", "ours", [False] * 20, [True] * 20, Mean(None, None, None, 0, 0))
    assert "never, unlike ours" in never
    assert "nothing can be compared" in verdict("a", "b", [], [], less)


@pytest.mark.parametrize(("ratio", "words"), [(1.83, "1.8x"), (13.2, "13x"), (99.7, "100x"), (112.1, "112x")])
def test_ratios_are_words(ratio: float, words: str) -> None:
    assert times(ratio) == words
