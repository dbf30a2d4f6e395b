"""BOLA (Spiteri, Urgaonkar, Sitaraman, INFOCOM 2016, equation 10) for a transfer with one deadline.

BOLA takes the level with the largest (V (u + g) - Q) / S: utility u and size S of a level, buffer Q. Here Q is the
pace lead (`policies.measures.Pace`), the lead over a straight line from the request to the deadline, so no bandwidth
estimate is needed; u is the distortion saved against the lowest level. V and g follow from where the ladder is to be
climbed, as in Puffer: the lowest level up to a lead of `low`, the highest from `high` on, both fractions of the
deadline. BOLA pauses when the buffer is full; a transfer with a deadline never does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstream.policies.api import Choice, Observation
from kvstream.policies.errors import PolicyError
from kvstream.policies.measures import Pace


@dataclass
class Bola:
    """BOLA with the pace lead as buffer."""

    low: float = 0.02
    """Fraction of the deadline: up to this lead the lowest level is best."""
    high: float = 0.2
    """Fraction of the deadline: from this lead on the highest level is best."""
    _pace: Pace = field(default_factory=Pace, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise PolicyError(f"bola: low={self.low}, high={self.high}; low must be below high")

    def choose(self, obs: Observation) -> Choice:
        lead_s = self._pace.lead_s(obs)
        sizes, distortion = obs.sizes_bytes[0], obs.distortion[0]
        useful = [0]
        for level in range(1, len(sizes)):  # a larger level that saves nothing is never worth it
            if sizes[level] > sizes[useful[-1]] and distortion[level] < distortion[useful[-1]]:
                useful.append(level)
        if len(useful) == 1:
            return Choice(0, reason={"buffer_s": lead_s})
        size = [sizes[level] / sizes[useful[-1]] for level in useful]
        utility = [distortion[0] - distortion[level] for level in useful]
        v, g = self._control(size, utility, obs.deadline_s)
        scores = [(v * (u + g) - lead_s) / s for u, s in zip(utility, size, strict=True)]
        return Choice(useful[scores.index(max(scores))], reason={"buffer_s": lead_s, "score": max(scores)})

    def _control(self, size: list[float], utility: list[float], deadline_s: float) -> tuple[float, float]:
        """V and g: levels a < b score alike at Q = V (g - climb), climb = (u_b S_a - u_a S_b) / (S_b - S_a)."""
        climbs = [
            (utility[b] * size[b - 1] - utility[b - 1] * size[b]) / (size[b] - size[b - 1]) for b in range(1, len(size))
        ]
        first, last = climbs[0], climbs[-1]
        if len(climbs) == 1 or first - last <= 0.0:  # one step, or a ladder that is not concave: climb at the middle
            v = (self.high - self.low) * deadline_s / max(utility[-1], 1e-12)
            return v, (self.low + self.high) / 2.0 * deadline_s / v + first
        v = (self.high - self.low) * deadline_s / (first - last)
        return v, self.low * deadline_s / v + first
