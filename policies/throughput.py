"""Rate-based adaptation with the whole remaining budget (the throughput rule of dash.js and FESTIVE's harmonic mean).

The largest common level at which everything in flight and all remaining chunks arrive before the deadline at a
discounted estimate of the goodput, with decoding of the last chunk and prefill kept free. Unlike CacheGen's
Algorithm 1 it counts bytes already requested and compute, averages several chunks (harmonic mean, Jiang et al.,
CoNEXT 2012, section 4) and keeps a safety factor (dash.js uses 0.9). Text is taken only where even the smallest level
is late and recomputing ends sooner.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstream.policies.api import TEXT, Choice, Observation
from kvstream.policies.estimators import by_name, goodputs
from kvstream.policies.measures import bytes_in_flight, bytes_left, named_level, recompute_left_s, tail_s


@dataclass
class Throughput:
    """Largest level that fits at a discounted estimate."""

    estimator: str = "harmonic"
    """last, arithmetic, harmonic, ewma, dual-ewma, sliding-min, robust or quantile."""
    window: int = 3
    """Chunks the estimate is made from."""
    safety: float = 0.9
    """Fraction of the estimate that plans rely on."""
    first: int | str = "medium"
    """Level of the first chunk when no throughput is known: lowest, medium, highest or a number."""

    def __post_init__(self) -> None:
        by_name(self.estimator)

    def choose(self, obs: Observation) -> Choice:
        rates = goodputs(obs)
        if not rates:
            return Choice(named_level(self.first, obs.n_levels))
        estimate_bps = by_name(self.estimator)(rates[-self.window :])
        seconds_per_byte = 8.0 / max(self.safety * estimate_bps, 1e-9)
        reason = {"estimate_bps": estimate_bps}
        waiting_bytes = bytes_in_flight(obs)
        ends_s = 0.0
        for level in range(obs.n_levels - 1, -1, -1):
            ends_s = (waiting_bytes + bytes_left(obs, level)) * seconds_per_byte + tail_s(obs, level)
            if ends_s <= obs.left_s:
                return Choice(level, reason={**reason, "expected_s": ends_s})
        text_s = recompute_left_s(obs)
        if text_s is not None and obs.compute_backlog_s + text_s + obs.prefill_s < ends_s:
            return Choice(TEXT, reason=reason)
        return Choice(0, reason={**reason, "expected_s": ends_s})
