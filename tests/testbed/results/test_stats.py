"""Statistics against published or hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t as student

from kvstream.testbed.results.stats import (
    MIN_TRACES,
    Mean,
    clustered_mean,
    mcnemar,
    paired_difference,
    rate,
    rate_difference,
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


def test_the_interval_of_equal_traces_is_student_s() -> None:
    mean = clustered_mean([1.0, 3.0, 2.0, 4.0, 5.0, 7.0, 3.0, 3.0], list("aabbccdd"))
    means = [2.0, 3.0, 6.0, 3.0]
    low, high = student.interval(0.95, 3, np.mean(means), np.std(means, ddof=1) / 2)
    assert (mean.value, mean.low, mean.high) == (3.5, pytest.approx(low), pytest.approx(high))


def test_too_few_data_give_none() -> None:
    assert clustered_mean([], []) == rate([], []) == rate_difference([], [], []) == Mean(None, None, None, 0, 0)
    alone = clustered_mean([1.0, 3.0], ["a", "a"])
    assert (alone.value, alone.low, alone.high) == (2.0, None, None)
    assert not alone.excludes_0


@pytest.mark.parametrize("traces", [1, 2, 3, 4])
def test_fewer_than_four_traces_have_no_interval_however_many_units(traces: int) -> None:
    units = [k % 3 != 0 for k in range(120)]
    names = [str(k % traces) for k in range(120)]
    found = (
        clustered_mean([float(unit) for unit in units], names),
        rate(units, names),
        rate_difference(units, [True] * 120, names),
    )
    assert MIN_TRACES == 4
    assert all((mean.low is None, mean.high is None) == (traces < 4, traces < 4) for mean in found)


def test_equal_traces_have_an_interval_of_no_width() -> None:
    assert clustered_mean([0.5] * 8, list("aabbccdd")) == Mean(0.5, 0.5, 0.5, 8, 4)


@pytest.mark.parametrize("met", [0, 7, 20])
def test_the_rate_of_independent_units_has_wilsons_interval(met: int) -> None:
    mean = rate([k < met for k in range(20)], [str(k) for k in range(20)])
    assert (mean.low, mean.high) == pytest.approx(wilson(met, 20), abs=1e-12)


def test_a_rate_of_0_or_100_percent_is_as_certain_as_its_traces() -> None:
    """What all sessions of a trace do alike is one observation; a width of 0 would leave nothing to learn."""
    names = [str(k % 8) for k in range(24)]
    assert (rate([True] * 24, names).low, rate([True] * 24, names).high) == pytest.approx(wilson(8, 8))
    assert rate([False] * 24, names).high == pytest.approx(wilson(0, 8)[1])
    same = rate_difference([True] * 24, [True] * 24, names)
    assert same.value == 0.0
    assert same.low == -same.high  # type: ignore[operator]
    assert 0.15 < same.high < 0.25  # type: ignore[operator]


@pytest.mark.parametrize("traces", [4, 5, 6, 7, 8])
def test_intervals_of_few_traces_cover_as_often_as_they_say(traces: int) -> None:
    """92 to 97 % of 1,500 runs each, of traces that differ, with 3, 6 or 12 sessions on each."""
    rng = np.random.default_rng(traces)
    runs, hits = 1500, {"mean": 0, "rate": 0, "difference": 0}

    def count(name: str, mean: Mean, true: float) -> None:
        assert mean.low is not None
        assert mean.high is not None
        hits[name] += mean.low <= true <= mean.high

    for _ in range(runs):
        each = int(rng.choice([3, 6, 12]))
        n, names = traces * each, [str(k // each) for k in range(traces * each)]
        values = rng.normal(0.0, 1.0, traces).repeat(each) + rng.exponential(1.0, n) - 1.0
        count("mean", clustered_mean(values.tolist(), names), 0.0)
        share, alike = rng.uniform(0.5, 0.95), rng.uniform(1.5, 20.0)
        by_trace = rng.beta(share * alike, (1 - share) * alike, traces).repeat(each)
        count("rate", rate((rng.random(n) < by_trace).tolist(), names), share)
        kinds = rng.dirichlet((2.0, 1.0, 4.0))  # only ours met, only theirs, both or neither
        bounds = np.cumsum(rng.dirichlet(kinds * rng.uniform(2.0, 20.0), traces), axis=1).repeat(each, axis=0)
        draw, both = rng.random(n), rng.random(n) < 0.5
        ours, theirs = draw < bounds[:, 0], (bounds[:, 0] <= draw) & (draw < bounds[:, 1])
        moves = rate_difference((ours | both & ~theirs).tolist(), (theirs | both & ~ours).tolist(), names)
        count("difference", moves, kinds[0] - kinds[1])
    assert all(0.92 <= hit / runs <= 0.97 for hit in hits.values()), hits


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
    assert mean.excludes_0


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


def test_the_verdict_says_how_often_and_how_significant() -> None:
    less = Mean(-0.02, -0.03, -0.01, 20, 10)
    assert verdict("ours", "cachegen", [True] * 18 + [False] * 2, [True] * 9 + [False] * 11, less) == (
        "ours meets the deadline 2x as often as cachegen (18 vs 9 of 20 units, p = 0.0039), "
        "with 0.02 nats lower distortion."
    )
    unclear = Mean(-0.02, -0.05, 0.01, 20, 10)
    close = verdict("ours", "cachegen", [True] * 10 + [False] * 10, [True] * 9 + [False] * 11, unclear)
    assert "about as often" in close
    assert "no significant difference" in close
    never = verdict("text", "ours", [False] * 20, [True] * 20, Mean(None, None, None, 0, 0))
    assert "never, unlike ours" in never
    assert "nothing to compare" in verdict("a", "b", [], [], less)


def test_a_scheme_that_never_misses_is_no_divisor() -> None:
    unclear = Mean(0.0, -0.01, 0.01, 20, 10)
    words = verdict("bold", "safe", [True] * 10 + [False] * 10, [True] * 20, unclear)
    assert words.startswith("bold misses the deadline, which safe never does (10 vs 20 of 20 units")
    some = verdict("bold", "safe", [True] * 8 + [False] * 12, [True] * 18 + [False] * 2, unclear)
    assert some.startswith("bold misses the deadline 6x as often as safe")


@pytest.mark.parametrize(("ratio", "words"), [(1.83, "1.8x"), (13.2, "13x"), (99.7, "100x"), (112.1, "112x")])
def test_ratios_are_words(ratio: float, words: str) -> None:
    assert times(ratio) == words
