"""Parts of a run, for many processes or machines: `--shard 2/8` runs every eighth unit, from the second on.

Shards share a run's folder, or have one each that `kvstream merge` joins. Units are dealt out in turn, so that every
shard has its part of each link, deadline and context.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from kvstream.testbed.config.experiment import Experiment, Scheme, Unit
from kvstream.testbed.errors import SpecError
from kvstream.testbed.results.folder import SIMULATED, Run


@dataclass(frozen=True)
class Shard:
    """Number `index` of `count`, from 1 on."""

    index: int = 1
    count: int = 1

    @property
    def is_whole(self) -> bool:
        return self.count == 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def words(self) -> str:
        """What follows the size of a run; empty if the shard is all of it."""
        return "" if self.is_whole else f", shard {self} of them"

    def has(self, unit: Unit) -> bool:
        return unit.index % self.count == self.index - 1

    def sessions(self, experiment: Experiment) -> list[tuple[Unit, Scheme]]:
        """The experiment's sessions that are this shard's, unit by unit."""
        return [(unit, scheme) for unit, scheme in experiment.sessions() if self.has(unit)]


WHOLE: Final = Shard()


def left(experiment: Experiment, run: Run) -> int:
    """Sessions of an experiment that are neither done nor have failed, those in the simulator beside it included."""
    count = sum(not run.tried(unit.unit_id, scheme.name) for unit, scheme in experiment.sessions())
    beside = Run(run.path / SIMULATED)
    return count + (left(experiment.simulated(), beside) if beside.exists() else 0)


def parse(text: str) -> Shard:
    """`2/8` to a Shard. Raises SpecError."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None:
        raise SpecError(f"--shard {text!r}: write I/N, as in 2/8")
    index, count = int(match[1]), int(match[2])
    if not 1 <= index <= count:
        raise SpecError(f"--shard {text}: shards are numbered from 1 to {max(count, 1)}")
    return Shard(index, count)
