"""Least distortion with a bounded chance of missing the deadline.

The chance-constrained form of MPC: choose the plan of least distortion such that P(TTFT > deadline) <= `risk`. The
throughput of what is left is log-normal around an EWMA estimate; its spread is the estimator's own error so far in this
session, log(actual / estimated), on top of a prior worth `prior_weight` chunks. Over k remaining chunks
errors average out in part: the spread falls as k to the power -`averaging` (0: one error for all that is left, 0.5:
chunks err independently). Fugu (NSDI 2020) also plans on a distribution, a learned one of transfer times. If nothing
fits: the smallest level, or text if that ends sooner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from kvstream.policies.api import TEXT, Choice, Observation
from kvstream.policies.errors import PolicyError
from kvstream.policies.estimators import ewma, goodputs
from kvstream.policies.measures import bytes_in_flight, bytes_left, named_level, recompute_left_s, spend, tail_s


@dataclass
class Chance:
    """Plans at the `risk` quantile of the throughput."""

    risk: float = 0.05
    """Accepted P(TTFT > deadline)."""
    half_life: float = 2.0
    """Of the throughput estimate, in chunks."""
    prior_spread: float = 0.5
    """Spread of log(actual / estimated) before any error has been observed."""
    prior_weight: float = 2.0
    """Weight of the prior, in chunks."""
    averaging: float = 0.3
    """How errors average out over what is left, 0 to 0.5."""
    first: int | str = "medium"
    """Level of the first chunk when no throughput is known: lowest, medium, highest or a number."""

    def __post_init__(self) -> None:
        if not 0.0 < self.risk < 1.0:
            raise PolicyError(f"chance: risk={self.risk}; give a probability between 0 and 1")

    def choose(self, obs: Observation) -> Choice:
        rates = goodputs(obs)
        if not rates:
            return Choice(named_level(self.first, obs.n_levels))
        estimate_bps = ewma(rates, self.half_life)
        spread = self._spread(rates) / len(obs.remaining) ** self.averaging
        rate_bps = estimate_bps * math.exp(NormalDist().inv_cdf(self.risk) * spread)
        budget = (obs.left_s - tail_s(obs, obs.n_levels - 1)) * rate_bps / 8.0 - bytes_in_flight(obs)
        reason = {"estimate_bps": estimate_bps, "spread": spread, "budget_bytes": budget}
        weighted = [[tokens * nats for nats in row] for tokens, row in zip(obs.tokens, obs.distortion, strict=True)]
        levels = spend(obs.sizes_bytes, weighted, budget)
        if levels is not None:
            return Choice(levels[0], reason=reason)
        text_s = recompute_left_s(obs)
        expected_s = (bytes_in_flight(obs) + bytes_left(obs, 0)) * 8.0 / max(rate_bps, 1e-9)
        if text_s is not None and obs.compute_backlog_s + text_s < expected_s:
            return Choice(TEXT, reason=reason)
        return Choice(0, reason=reason)

    def _spread(self, rates: list[float]) -> float:
        squares = [
            math.log(max(rates[i], 1e-9) / max(ewma(rates[:i], self.half_life), 1e-9)) ** 2
            for i in range(1, len(rates))
        ]
        weight = self.prior_weight + len(squares)
        return math.sqrt((self.prior_weight * self.prior_spread**2 + sum(squares)) / max(weight, 1e-9))
