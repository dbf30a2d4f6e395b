"""Statistics of paired sessions, as pure functions of numbers. SciPy does the arithmetic.

Every scheme runs on every unit, so schemes are compared unit by unit; units on one trace are not independent, so
intervals of means come from resampling whole traces. All intervals are 95 % unless asked otherwise. What cannot be
said (no unit, a single trace) is None, never a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95
RESAMPLES = 9_999


@dataclass(frozen=True)
class Mean:
    """A mean over `n` units on `clusters` traces and its interval; None where nothing can be said."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int

    @property
    def is_apart_from_0(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0.0 or self.high < 0.0)


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float | None, float | None]:
    """Wilson's interval of a rate (Wilson 1927); (None, None) without observations."""
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


def clustered_mean(
    values: Sequence[float], clusters: Sequence[str], confidence: float = CONFIDENCE, seed: int = 1
) -> Mean:
    """Mean of `values` with the percentile interval of a bootstrap that resamples whole clusters.

    `clusters` names the trace of each value. With fewer than two clusters there is no interval.
    """
    import numpy as np
    from scipy.stats import bootstrap

    names = sorted(set(clusters))
    if not values:
        return Mean(None, None, None, 0, 0)
    value = math.fsum(values) / len(values)
    if len(names) < 2:
        return Mean(value, None, None, len(values), len(names))
    index = {name: i for i, name in enumerate(names)}
    where = np.array([index[name] for name in clusters])
    sums, counts = np.bincount(where, values), np.bincount(where).astype(float)
    if np.ptp(sums / counts) == 0.0:
        return Mean(value, value, value, len(values), len(names))

    def mean(sums: Any, counts: Any, axis: int) -> Any:
        return sums.sum(axis=axis) / counts.sum(axis=axis)

    interval = bootstrap(
        (sums, counts),
        mean,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=500,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Mean(value, float(interval.low), float(interval.high), len(values), len(names))


def paired_difference(ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[str], seed: int = 1) -> Mean:
    """Mean of ours minus theirs over units, with the clustered interval."""
    return clustered_mean([a - b for a, b in zip(ours, theirs, strict=True)], clusters, seed=seed)


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
    """One line: who meets the deadline how much more often, at which distortion, and whether chance explains it.

    `met` and `base_met` run over the same units; `distortion` is the paired difference (ours minus baseline).
    """
    n, ours, base = len(met), sum(met), sum(base_met)
    if n == 0:
        return f"{name} and {baseline} have no unit in common: nothing can be compared."
    p = mcnemar(
        gained=sum(a and not b for a, b in zip(met, base_met, strict=True)),
        lost=sum(b and not a for a, b in zip(met, base_met, strict=True)),
    )
    if ours == base:
        often = f"meets the deadline as often as {baseline}"
    elif p >= 1.0 - CONFIDENCE:
        often = f"meets the deadline about as often as {baseline}"
    elif min(ours, base) == 0:
        often = f"meets the deadline {'sometimes and ' + baseline + ' never' if ours else 'never, unlike ' + baseline}"
    elif ours > base:
        often = f"meets the deadline {times(ours / base)} as often as {baseline}"
    else:
        often = f"misses the deadline {times((n - ours) / max(n - base, 1))} as often as {baseline}"
    often += f" ({ours} against {base} of {n} units, p = {p:.2g})"
    if distortion.value is None:
        return f"{name} {often}."
    if not distortion.is_apart_from_0:
        return f"{name} {often}, at a distortion that is not clearly different."
    word = "less" if distortion.value < 0.0 else "more"
    return f"{name} {often}, with {abs(distortion.value):.3g} nats {word} distortion."
