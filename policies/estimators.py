"""Throughput estimators: pure functions of samples, oldest first.

`rates` are bits per second, at least one; each function returns an estimate in bits per second. All of them return a
constant unchanged and scale with their samples. A transfer of a KV cache has few chunks, so windows count chunks and
half-lives count chunks or bytes, never seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstream.policies.api import TEXT, Observation, Transfer
from kvstream.policies.errors import PolicyError

BURST_S = 0.003
"""After a pause of the link, what comes within this time says nothing of its rate: a token bucket has filled (2 ms of
the rate in our emulator), or a queue has formed."""
SAMPLE_S = 0.01
"""The rate of a chunk in flight is known after this time, burst included."""
SAMPLE_BYTES = 8_192
"""And after this many bytes beyond the burst."""
MIN_BYTES = 4_096
"""A smaller chunk measures latency, not a rate."""


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
    """The estimator of this name. Raises PolicyError listing the valid ones."""
    if name not in ESTIMATORS:
        raise PolicyError(f"unknown estimator {name!r}; choose from {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def goodputs(obs: Observation) -> list[float]:
    """Goodput of every encoded chunk that arrived; else of the one in flight; else the prior, if any; else nothing.

    A chunk that took less than SAMPLE_S counts together with the one before it: a receiver that was held up sees the
    end of one chunk and all of the next at once.
    """
    rates: list[float] = []
    bits = seconds = 0.0
    for done in obs.transfers:
        if done.level != TEXT:
            before, bits = bits, done.bytes * 8.0
            before_s, seconds = seconds, bits / max(done.goodput_bps, 1e-9)
            is_short = seconds < SAMPLE_S and before_s > 0.0
            rates.append((before + bits) / (before_s + seconds) if is_short else done.goodput_bps)
    if rates:
        return rates
    flying = flight_sample(obs)
    if flying is not None:
        return [flying[0] / flying[1]]
    return [] if obs.prior_bps is None else [obs.prior_bps]


def link_samples(obs: Observation) -> list[tuple[float, float]]:
    """(bits, seconds) that the link spent on each chunk, without the wait for its first byte, oldest first.

    What came at once after a pause is left out; of a chunk shorter than SAMPLE_S, which may be nothing but that, all
    counts, as if the burst had taken its longest. Shorter ones back to back count together. The chunk in flight counts
    with what has come of it: the newest information there is. Text and the smallest chunks are left out, unless there
    is nothing else. The prior is left to the caller.
    """
    most = max([done.bytes for done in obs.transfers if done.level != TEXT], default=0)
    least = MIN_BYTES if most >= MIN_BYTES else 0
    samples: list[tuple[float, float]] = []
    free_s = 0.0
    for done in obs.transfers:
        begin_s, pause_s, free_s = max(done.first_byte_s, free_s), done.first_byte_s - free_s, done.end_s
        seconds, bits = done.end_s - begin_s, done.bytes * 8.0
        if done.level == TEXT or done.bytes < least:
            continue
        if pause_s > BURST_S:
            if seconds < SAMPLE_S:
                seconds += BURST_S
            else:
                bits -= done.burst_bytes * 8.0
                seconds = done.end_s - max(begin_s, done.burst_end_s)
        elif samples and (seconds < BURST_S or max(seconds, samples[-1][1]) < SAMPLE_S):
            before = samples.pop()
            bits, seconds = before[0] + bits, before[1] + seconds
        if seconds > 0.0:
            samples.append((bits, seconds))
    flying = flight_sample(obs)
    if flying is not None:
        samples.append(flying)
    return samples


def flight_sample(obs: Observation) -> tuple[float, float] | None:
    """(bits, seconds) of what has come of the oldest chunk in flight; None until that is enough to know a rate."""
    if not obs.in_flight or obs.in_flight[0].level == TEXT:
        return None
    flight = obs.in_flight[0]
    free_s = obs.transfers[-1].end_s if obs.transfers else 0.0
    first_s = flight.since_s + (obs.rtt_s or 0.0) if flight.first_byte_s is None else flight.first_byte_s
    begin_s = max(first_s, free_s)
    size = flight.received_bytes - flight.burst_bytes
    if obs.now_s - begin_s < SAMPLE_S - 1e-9 or size < SAMPLE_BYTES:
        return None
    return size * 8.0, obs.now_s - max(begin_s, flight.burst_end_s)


def errors(transfers: Sequence[Transfer], estimate: Callable[[Sequence[float]], float]) -> list[float]:
    """Actual over estimated goodput, for every chunk but the first: below 1, the estimate was optimistic."""
    rates = [done.goodput_bps for done in transfers]
    return [rates[i] / max(estimate(rates[:i]), 1e-9) for i in range(1, len(rates))]
