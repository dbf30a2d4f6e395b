"""Ignores the link: the same level for every chunk."""

from dataclasses import dataclass

from kvstream import Choice, Observation


@dataclass
class MyPolicy:
    level: int = 1

    def choose(self, obs: Observation) -> Choice:
        return Choice(self.level)
