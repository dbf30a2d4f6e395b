"""Model predictive control (Yin et al., SIGCOMM 2015) for a transfer with one deadline.

Every choice plans the next `horizon` chunks at the predicted throughput and carries out the first step. The paper
weighs quality, quality changes and rebuffering; here quality is distortion, a change of level costs nothing, and
rebuffering is a missed deadline, so the plan is: least distortion such that everything arrives, is decoded and
prefilled in time. Chunks beyond the horizon get their share of the remaining bytes, by their size at the highest level.
With one deadline only the sum of bytes matters, so the plan is a knapsack (`policies.measures.spend`), not an
enumeration. Throughput is the harmonic mean of the last five chunks, as in the paper; `robust-mpc` divides it by one
plus the largest recent error (section 5.2). If nothing fits: the smallest level, or text if that ends sooner.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstream.policies.api import TEXT, Choice, Observation
from kvstream.policies.errors import PolicyError
from kvstream.policies.estimators import goodputs, harmonic, robust
from kvstream.policies.measures import bytes_in_flight, bytes_left, named_level, recompute_left_s, spend, tail_s


@dataclass
class MPC:
    """Plans a few chunks ahead at the harmonic mean of the last five goodputs."""

    horizon: int = 5
    """Chunks planned individually."""
    first: int | str = "medium"
    """Level of the first chunk when no throughput is known: lowest, medium, highest or a number."""

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise PolicyError(f"mpc: horizon={self.horizon}; give at least 1 chunk")

    def predict_bps(self, rates: list[float]) -> float:
        return harmonic(rates)

    def choose(self, obs: Observation) -> Choice:
        rates = goodputs(obs)
        if not rates:
            return Choice(named_level(self.first, obs.n_levels))
        rate_bps = self.predict_bps(rates)
        budget = (obs.left_s - tail_s(obs, obs.n_levels - 1)) * rate_bps / 8.0 - bytes_in_flight(obs)
        reason = {"estimate_bps": rate_bps, "budget_bytes": budget}
        near = obs.sizes_bytes[: self.horizon]
        share = sum([sizes[-1] for sizes in near]) / bytes_left(obs, obs.n_levels - 1)
        weighted = [
            [tokens * nats for nats in row]
            for tokens, row in zip(obs.tokens[: self.horizon], obs.distortion, strict=False)
        ]
        levels = spend(near, weighted, budget * share)
        if levels is not None:
            return Choice(levels[0], reason=reason)
        text_s = recompute_left_s(obs)
        expected_s = (bytes_in_flight(obs) + bytes_left(obs, 0)) * 8.0 / max(rate_bps, 1e-9)
        if text_s is not None and obs.compute_backlog_s + text_s < expected_s:
            return Choice(TEXT, reason=reason)
        return Choice(0, reason=reason)


@dataclass
class RobustMPC(MPC):
    """MPC at a throughput discounted by the largest recent error."""

    def predict_bps(self, rates: list[float]) -> float:
        return robust(rates)
