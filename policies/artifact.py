"""The rule of CacheGen's public code: an equal slice of the SLO for every chunk, nothing carried over.

Per chunk the best level whose transfer takes less than SLO / number of chunks, else text. The published script
evaluates it offline with the true bandwidth of the very chunk being chosen (`ArtifactOracle`); `Artifact` is the same
rule with what a receiver can know, the goodput of the last chunk. Without a model to recompute with, the smallest
level stands in for text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from kvstream.policies.api import TEXT, Choice, Forecast, LevelOrText, Observation
from kvstream.policies.errors import PolicyError
from kvstream.policies.future import begin_s, transfer_s
from kvstream.policies.measures import last_bps, named_level


def _fallback(obs: Observation) -> LevelOrText:
    return 0 if obs.recompute_s is None else TEXT


@dataclass
class Artifact:
    """Equal slices at the last measured rate."""

    first: int | str = "medium"
    """Level of the first chunk when no throughput is known: lowest, medium, highest or a number."""

    def choose(self, obs: Observation) -> Choice:
        slice_s = obs.deadline_s / obs.n_chunks
        rate_bps = last_bps(obs)
        if rate_bps is None:
            return Choice(named_level(self.first, obs.n_levels), reason={"slice_s": slice_s})
        for level in range(obs.n_levels - 1, -1, -1):
            expected_s = obs.sizes_bytes[0][level] * 8.0 / max(rate_bps, 1e-9)
            if expected_s < slice_s:
                return Choice(level, reason={"slice_s": slice_s, "expected_s": expected_s, "rate_bps": rate_bps})
        return Choice(_fallback(obs), reason={"slice_s": slice_s, "rate_bps": rate_bps})


@dataclass
class ArtifactOracle:
    """Equal slices at the true rate of the chunk being chosen, as published."""

    clairvoyant: ClassVar[bool] = True
    _forecast: Forecast | None = field(default=None, init=False, repr=False, compare=False)

    def foresee(self, forecast: Forecast) -> None:
        self._forecast = forecast

    def choose(self, obs: Observation) -> Choice:
        if self._forecast is None:
            raise PolicyError("artifact-oracle has no forecast; call foresee(forecast) before choose")
        slice_s = obs.deadline_s / obs.n_chunks
        start_s = begin_s(self._forecast, obs)
        for level in range(obs.n_levels - 1, -1, -1):
            true_s = transfer_s(self._forecast, start_s, obs.sizes_bytes[0][level], obs.chunk)
            if true_s < slice_s:
                return Choice(level, reason={"slice_s": slice_s, "true_s": true_s})
        return Choice(_fallback(obs), reason={"slice_s": slice_s})
