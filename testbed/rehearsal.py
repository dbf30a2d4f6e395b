"""What a step of compute takes within a session, from what it takes alone and from what sessions have shown.

Measured alone (`testbed.compute.measure_costs`), a step finds its data in the processor's caches and a core to itself.
In a session it shares both with what receives, sends and shapes: on two hardware threads of one core, decoding takes
up to twice as long; and a virtual machine's speed drifts with its neighbours. Policies, the oracle and the bound plan
with these times, so before any session that counts some are held, and the ratio of what the steps of the last sessions
took to what they take alone corrects the costs of the next.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from policies.api import TEXT, Choice, Observation
from testbed.session import Costs, SessionRecord

REHEARSALS: Final = 3
"""At least so many for each codec."""
TEXT_CHUNKS: Final = 2
RECENT: Final = 8
"""Sessions that are remembered: some ten seconds of the machine's past."""


@dataclass(frozen=True)
class Rehearsal:
    """A policy: some text first, then every level in turn."""

    def choose(self, obs: Observation) -> Choice:
        if obs.recompute_s is not None and obs.chunk < min(TEXT_CHUNKS, obs.n_chunks - 1):
            return Choice(TEXT)
        return Choice(obs.chunk % obs.n_levels)


@dataclass(frozen=True, slots=True)
class Strain:
    """How many times as long as alone the steps of a session take."""

    decode: float = 1.0
    recompute: float = 1.0
    prefill: float = 1.0

    def on(self, costs: Costs) -> Costs:
        """Costs under this strain."""
        recompute_s = costs.recompute_s
        return Costs(
            decode_s=tuple(tuple(self.decode * level_s for level_s in row) for row in costs.decode_s),
            recompute_s=None if recompute_s is None else tuple(self.recompute * chunk_s for chunk_s in recompute_s),
            prefill_s=self.prefill * costs.prefill_s,
        )


def _recent() -> deque[float]:
    return deque(maxlen=RECENT)


@dataclass(frozen=True)
class Experience:
    """What the last sessions showed: the median ratio of each one's steps. Decoding is kept by codec."""

    decode: dict[str, deque[float]] = field(default_factory=dict)
    recompute: deque[float] = field(default_factory=_recent)
    prefill: deque[float] = field(default_factory=_recent)

    def learn(self, codec: str, alone: Costs, record: SessionRecord, prefill_s: float) -> None:
        """Take a session in, given what its steps take alone and what its prefill took."""
        decode, recompute = [], []
        for chunk in record.chunks:
            assert chunk.decode_start_s is not None
            assert chunk.decode_end_s is not None
            took_s = chunk.decode_end_s - chunk.decode_start_s
            if isinstance(chunk.level, int):
                decode.append(took_s / alone.decode_s[chunk.chunk][chunk.level])
            elif alone.recompute_s is not None:
                recompute.append(took_s / alone.recompute_s[chunk.chunk])
        for ratios, kept in ((decode, self.decode.setdefault(codec, _recent())), (recompute, self.recompute)):
            if ratios:
                kept.append(median(ratios))
        self.prefill.append(prefill_s / alone.prefill_s)

    def strain(self, codec: str) -> Strain:
        """What to reckon with; 1 for what was never seen."""
        kept = self.decode.get(codec), self.recompute, self.prefill
        return Strain(*(median(ratios) if ratios else 1.0 for ratios in kept))
