"""Throughput estimators: pure functions of samples, oldest first.

`rates` are bits per second, at least one; each function returns an estimate in bits per second. All of them give a
constant back, and scale with their samples. A transfer of a KV cache has few chunks, so windows count chunks and
half-lives count chunks or bytes, never seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from policies.api import TEXT, Observation, Transfer
from policies.errors import PolicyError

SAMPLE_BYTES = 16_384
"""A chunk of fewer bytes shows no rate: most of it arrives with its first packets."""


def last(rates: Sequence[float]) -> float:
    """The newest sample (CacheGen)."""
    return rates[-1]


def arithmetic(rates: Sequence[float], window: int = 5) -> float:
    """Mean of the newest `window` samples."""
    recent = rates[-window:]
    return sum(recent) / len(recent)


def harmonic(rates: Sequence[float], window: int = 5) -> float:
    """Harmonic mean of the newest `window` samples (FESTIVE, CoNEXT 2012, section 4; MPC, SIGCOMM 2015).

    For chunks of equal size it is bits over time, so one slow chunk weighs what it cost.
    """
    recent = rates[-window:]
    if min(recent) <= 0.0:
        return 0.0
    return len(recent) / sum([1.0 / rate for rate in recent])


def weighted(rates: Sequence[float], weights: Sequence[float]) -> float:
    """Weighted harmonic mean: with bytes as weights, all bytes over all the time they took."""
    if min(rates) <= 0.0:
        return 0.0
    return sum(weights) / sum([weight / rate for rate, weight in zip(rates, weights, strict=True)])


def ewma(rates: Sequence[float], half_life: float = 2.0, weights: Sequence[float] | None = None) -> float:
    """Exponentially weighted mean, corrected for its start at zero (as in dash.js and hls.js).

    A sample counts half after `half_life` more of weight: chunks, or bytes when `weights` are each chunk's bytes.
    """
    estimate = total = 0.0
    for index, rate in enumerate(rates):
        weight = 1.0 if weights is None else weights[index]
        keep = 0.5 ** (weight / half_life)
        estimate = keep * estimate + (1.0 - keep) * rate
        total += weight
    return estimate / (1.0 - 0.5 ** (total / half_life))


def dual_ewma(
    rates: Sequence[float], fast: float = 1.0, slow: float = 4.0, weights: Sequence[float] | None = None
) -> float:
    """The smaller of a fast and a slow EWMA: quick to fall, slow to rise (hls.js)."""
    return min(ewma(rates, fast, weights), ewma(rates, slow, weights))


def sliding_min(rates: Sequence[float], window: int = 3) -> float:
    """The smallest of the newest `window` samples."""
    return min(rates[-window:])


def robust(rates: Sequence[float], window: int = 5) -> float:
    """RobustMPC's discount (SIGCOMM 2015, section 5.2): the harmonic mean over 1 + the largest recent relative error.

    The errors are those that the harmonic mean made on each of the newest `window` samples.
    """
    worst = 0.0
    for index in range(max(1, len(rates) - window), len(rates)):
        if rates[index] <= 0.0:
            return 0.0
        worst = max(worst, abs(harmonic(rates[:index], window) - rates[index]) / rates[index])
    return harmonic(rates, window) / (1.0 + worst)


def quantile(rates: Sequence[float], share: float = 0.25) -> float:
    """The rate that a `share` of the samples stay below, linear between order statistics."""
    ordered = sorted(rates)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


ESTIMATORS: dict[str, Callable[[Sequence[float]], float]] = {
    "last": last,
    "arithmetic": arithmetic,
    "harmonic": harmonic,
    "ewma": ewma,
    "dual-ewma": dual_ewma,
    "sliding-min": sliding_min,
    "robust": robust,
    "quantile": quantile,
}
"""By name, for policies with an `estimator` setting."""


def by_name(name: str) -> Callable[[Sequence[float]], float]:
    """Raises PolicyError naming the known ones."""
    if name not in ESTIMATORS:
        raise PolicyError(f"no estimator is called {name!r}; known are {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def goodputs(obs: Observation) -> list[float]:
    """Goodput of every encoded chunk that arrived; else the prior, if any; else nothing."""
    rates = [done.goodput_bps for done in obs.transfers if done.level != TEXT]
    return rates or ([] if obs.prior_bps is None else [obs.prior_bps])


def link_samples(obs: Observation) -> list[tuple[float, float]]:
    """(bits, seconds) that the link spent on each chunk, without the wait for its first byte, oldest first.

    The chunk in flight counts with what has come of it: that is the newest there is to know. Small chunks, text above
    all, say nothing. The prior is left to the caller.
    """
    samples: list[tuple[float, float]] = []
    free_s = 0.0
    for done in obs.transfers:
        seconds = done.end_s - max(done.first_byte_s, free_s)
        free_s = done.end_s
        if done.bytes >= SAMPLE_BYTES and seconds > 0.0:
            samples.append((done.bytes * 8.0, seconds))
    if obs.in_flight and obs.in_flight[0].received_bytes >= SAMPLE_BYTES:
        flight = obs.in_flight[0]
        seconds = obs.now_s - max(flight.since_s + (obs.rtt_s or 0.0), free_s)
        if seconds > 0.0:
            samples.append((flight.received_bytes * 8.0, seconds))
    return samples


def errors(transfers: Sequence[Transfer], estimate: Callable[[Sequence[float]], float]) -> list[float]:
    """What came over what was estimated, for every chunk but the first: 1 is right, below 1 too hopeful."""
    rates = [done.goodput_bps for done in transfers]
    return [rates[i] / max(estimate(rates[:i]), 1e-9) for i in range(1, len(rates))]
