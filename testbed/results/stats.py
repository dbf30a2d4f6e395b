"""Statistics of paired sessions, as pure functions of numbers. SciPy does the arithmetic.

Every scheme runs on every unit, so schemes are compared unit by unit; units on one trace are not independent, so
intervals treat whole traces as the sample. All intervals are 95 % unless asked otherwise. Where there are too few data
(no unit, fewer than MIN_TRACES traces) the result is None, never a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

CONFIDENCE: Final = 0.95
NORMAL: Final = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2.0)
"""The normal distribution's quantile of an interval."""
MIN_TRACES: Final = 4
"""With fewer traces how much they differ is anyone's guess, and no interval keeps what it promises."""
ROUNDING: Final = 1e-12
"""A smaller variance of a share comes from the order in which numbers were added up."""


@dataclass(frozen=True)
class Mean:
    """A mean over `n` units on `clusters` traces and its interval; None where there are too few data."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int

    @property
    def excludes_0(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0.0 or self.high < 0.0)


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float | None, float | None]:
    """Wilson's interval of a rate over independent units (Wilson 1927); (None, None) without observations."""
    if n == 0:
        return None, None
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p of McNemar's exact test: of the pairs that differ, are as many better as worse?"""
    if gained + lost == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue)


def clustered_mean(values: Sequence[float], clusters: Sequence[str], confidence: float = CONFIDENCE) -> Mean:
    """Mean of `values` with the t interval of a mean over whole clusters (Cochran, Sampling Techniques, section 6.3).

    `clusters` names the trace of each value. With fewer than MIN_TRACES of them there is no interval.
    """
    sums, counts = _by_cluster(values, clusters)
    value = math.fsum(values) / len(values) if values else None
    if value is None or len(sums) < MIN_TRACES:
        return Mean(value, None, None, len(values), len(sums))
    half = _quantile(confidence, len(sums) - 1) * math.sqrt(_variance(sums, counts, value))
    return Mean(value, value - half, value + half, len(values), len(sums))


def paired_difference(ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[str]) -> Mean:
    """Mean of ours minus theirs over units, with the clustered interval."""
    return clustered_mean([a - b for a, b in zip(ours, theirs, strict=True)], clusters)


def rate(successes: Sequence[bool], clusters: Sequence[str], confidence: float = CONFIDENCE) -> Mean:
    """Share of successes: Wilson's interval, of as many independent units as the clusters are worth.

    Independent units, each on a trace of its own, are worth their number. Others are worth n / deff, where the design
    effect compares the variance over clusters with that of independent units; its estimate widens the interval from the
    normal's quantile to Student's (after Korn and Graubard, Survey Methodology 24, 1998). Where every session has the
    same outcome nothing tells how alike the sessions of a trace are, and each trace counts as one unit.
    """
    sums, counts = _by_cluster(successes, clusters)
    n = len(successes)
    value = sum(successes) / n if n else None
    if value is None or len(sums) < MIN_TRACES:
        return Mean(value, None, None, n, len(sums))
    worth, quantile = _worth(sums, counts, value, value * (1.0 - value), confidence)
    squared = quantile * quantile / worth
    centre = (value + squared / 2.0) / (1.0 + squared)
    half = math.sqrt(squared * (value * (1.0 - value) + squared / 4.0)) / (1.0 + squared)
    return Mean(value, max(centre - half, 0.0), min(centre + half, 1.0), n, len(sums))


def rate_difference(
    ours: Sequence[bool], theirs: Sequence[bool], clusters: Sequence[str], confidence: float = CONFIDENCE
) -> Mean:
    """Our share of successes minus theirs over the same units.

    The interval adds half a pair of each kind (Agresti and Min, Statistics in Medicine 24, 2005), so that schemes
    without a differing pair among few are not taken for equal; clusters count as in `rate`.
    """
    moves = [int(a) - int(b) for a, b in zip(ours, theirs, strict=True)]
    sums, counts = _by_cluster(moves, clusters)
    n = len(moves)
    value = sum(moves) / n if n else None
    if value is None or len(sums) < MIN_TRACES:
        return Mean(value, None, None, n, len(sums))
    gained, lost = moves.count(1) / n, moves.count(-1) / n
    worth, quantile = _worth(sums, counts, value, gained + lost - value * value, confidence)
    more, fewer = ((worth * share + 0.5) / (worth + 2.0) for share in (gained, lost))
    middle = more - fewer
    half = quantile * math.sqrt((more + fewer - middle * middle) / (worth + 2.0))
    return Mean(value, max(middle - half, -1.0), min(middle + half, 1.0), n, len(sums))


def _by_cluster(values: Sequence[float], clusters: Sequence[str]) -> tuple[list[float], list[int]]:
    """Sum and number of the values of each cluster."""
    found: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        found.setdefault(cluster, []).append(float(value))
    return [math.fsum(part) for part in found.values()], [len(part) for part in found.values()]


def _variance(sums: Sequence[float], counts: Sequence[int], mean: float) -> float:
    """Variance of a mean over clusters of different sizes: that of a ratio, linearised."""
    spread = math.fsum((total - mean * count) ** 2 for total, count in zip(sums, counts, strict=True))
    return len(sums) / (len(sums) - 1) * spread / sum(counts) ** 2


def _worth(
    sums: Sequence[float], counts: Sequence[int], mean: float, unit_variance: float, confidence: float
) -> tuple[float, float]:
    """How many independent units the clusters are worth, and the quantile that goes with it."""
    n, normal = sum(counts), _quantile(confidence, math.inf)
    if len(counts) == n:
        return n, normal
    if unit_variance < ROUNDING:
        return len(counts), normal
    effect = _variance(sums, counts, mean) * n / unit_variance
    return (n, normal) if effect <= 1.0 else (n / effect, _quantile(confidence, len(sums) - 1))


def _quantile(confidence: float, freedom: float) -> float:
    """Student's quantile for a two-sided interval; of the normal distribution for infinite degrees of freedom."""
    from scipy.special import ndtri, stdtrit

    share = 0.5 + confidence / 2.0
    return float(ndtri(share) if freedom == math.inf else stdtrit(freedom, share))


def ttft_quantiles(ttft_s: Sequence[float]) -> dict[str, float | None]:
    """p50, p90, p95 and p99 of TTFT, linear between order statistics; a failed session counts as infinite."""
    import numpy as np

    names = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}
    if not len(ttft_s):
        return dict.fromkeys(names)
    ordered = np.sort(np.asarray(ttft_s, dtype=float))
    found: dict[str, float | None] = {}
    for name, share in names.items():
        at = share * (len(ordered) - 1)
        low, high = float(ordered[math.floor(at)]), float(ordered[math.ceil(at)])
        found[name] = low if low == high else low + (high - low) * (at % 1.0) if high < math.inf else math.inf
    return found


def regret(
    distortion: Sequence[float | None],
    met: Sequence[bool],
    oracle_distortion: Sequence[float | None],
    clusters: Sequence[str],
) -> Mean:
    """Distortion minus the oracle's over the units that both met; missed deadlines are counted elsewhere.

    `oracle_distortion` is None for a unit in which no plan meets the deadline.
    """
    both = [
        (ours - best, cluster)
        for ours, ok, best, cluster in zip(distortion, met, oracle_distortion, clusters, strict=True)
        if ok and ours is not None and best is not None
    ]
    return clustered_mean([gap for gap, _ in both], [cluster for _, cluster in both])


def times(ratio: float) -> str:
    """A ratio in words: `1.8x`, `110x`."""
    return f"{ratio:.2g}x" if ratio < 99.5 else f"{ratio:.0f}x"


def verdict(
    name: str,
    baseline: str,
    met: Sequence[bool],
    base_met: Sequence[bool],
    distortion: Mean,
) -> str:
    """One line: how often each meets the deadline, the p-value, and the difference in distortion.

    `met` and `base_met` run over the same units; `distortion` is the paired difference (ours minus baseline).
    """
    n, ours, base = len(met), sum(met), sum(base_met)
    if n == 0:
        return f"{name} and {baseline} have no unit in common: nothing to compare."
    p = mcnemar(
        gained=sum(a and not b for a, b in zip(met, base_met, strict=True)),
        lost=sum(b and not a for a, b in zip(met, base_met, strict=True)),
    )
    if ours == base:
        often = f"meets the deadline as often as {baseline}"
    elif p >= 1.0 - CONFIDENCE:
        often = f"meets the deadline about as often as {baseline}"
    elif ours == 0 or base == 0:
        often = f"meets the deadline {'sometimes, ' + baseline + ' never' if ours else 'never, unlike ' + baseline}"
    elif ours > base:
        often = f"meets the deadline {times(ours / base)} as often as {baseline}"
    elif base == n:
        often = f"misses the deadline, which {baseline} never does"
    else:
        often = f"misses the deadline {times((n - ours) / (n - base))} as often as {baseline}"
    often += f" ({ours} vs {base} of {n} units, p = {p:.2g})"
    if distortion.value is None:
        return f"{name} {often}."
    if not distortion.excludes_0:
        return f"{name} {often}, with no significant difference in distortion."
    word = "lower" if distortion.value < 0.0 else "higher"
    return f"{name} {often}, with {abs(distortion.value):.3g} nats {word} distortion."
