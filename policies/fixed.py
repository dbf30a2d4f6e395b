"""Baselines that ignore the link: one level for every chunk, or every chunk as text."""

from __future__ import annotations

from dataclasses import dataclass

from kvstream.policies.api import TEXT, Choice, Observation
from kvstream.policies.measures import named_level


@dataclass
class Fixed:
    """The same level for every chunk."""

    level: int | str = "medium"
    """lowest, medium, highest or a number."""

    def choose(self, obs: Observation) -> Choice:
        return Choice(named_level(self.level, obs.n_levels))


@dataclass
class Lowest:
    """Always the smallest level."""

    def choose(self, obs: Observation) -> Choice:
        return Choice(0)


@dataclass
class Highest:
    """Always the highest level."""

    def choose(self, obs: Observation) -> Choice:
        return Choice(obs.n_levels - 1)


@dataclass
class Text:
    """Every chunk as text, recomputed: what a receiver without a cache to fetch does.

    A receiver that cannot recompute gets the smallest level instead.
    """

    def choose(self, obs: Observation) -> Choice:
        return Choice(0 if obs.recompute_s is None else TEXT)
