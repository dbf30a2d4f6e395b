"""A random level for every chunk: the baseline any policy must beat."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from kvstream.policies.api import TEXT, Choice, Observation


@dataclass
class Random:
    """Every level equally likely, drawn from the session's seed."""

    text: bool = False
    """Also draw text, where the receiver can recompute."""
    _source: random.Random | None = field(default=None, init=False, repr=False, compare=False)

    def choose(self, obs: Observation) -> Choice:
        if self._source is None:
            self._source = random.Random(obs.seed)
        options = obs.n_levels + (self.text and obs.recompute_s is not None)
        drawn = self._source.randrange(options)
        return Choice(TEXT if drawn == obs.n_levels else drawn)
