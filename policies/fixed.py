"""Baselines that never look: one level for every chunk, or the text of every chunk."""

from __future__ import annotations

from dataclasses import dataclass

from policies.api import TEXT, Choice, Observation
from policies.measures import named_level


@dataclass
class Fixed:
    """The same level for every chunk."""

    level: int | str = "medium"
    """lowest, medium, highest or a number."""

    def choose(self, obs: Observation) -> Choice:
        return Choice(named_level(self.level, obs.n_levels))


@dataclass
class Lowest:
    """The smallest level always: the fastest of the encoded ones."""

    def choose(self, obs: Observation) -> Choice:
        return Choice(0)


@dataclass
class Highest:
    """The best level always."""

    def choose(self, obs: Observation) -> Choice:
        return Choice(obs.n_levels - 1)


@dataclass
class Text:
    """Every chunk as text, all of it recomputed: what a receiver does that has no cache to fetch.

    A receiver without a model to recompute with gets the smallest level instead.
    """

    def choose(self, obs: Observation) -> Choice:
        return Choice(0 if obs.recompute_s is None else TEXT)
