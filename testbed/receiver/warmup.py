"""What compute takes within a session, from what it takes alone and what earlier sessions took.

Measured alone (`kvstream.testbed.engine.measure.measure_costs`), a step finds its data in the processor's caches and
has a core to itself. In a session it shares both with receiving, sending and shaping: on two hardware threads of one
core, decoding takes up to twice as long; and a virtual machine's speed drifts with its neighbours. Policies, the
oracle and the bound plan with these times. So warm-up sessions come before any that counts, and the costs of the next
session are corrected by how much longer than alone the steps of the last sessions took.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from kvstream.policies.api import TEXT, Choice, Observation
from kvstream.policies.estimators import quantile
from kvstream.testbed.session.costs import Costs, Slowdown
from kvstream.testbed.session.record import SessionRecord

WARM_UPS: Final = 3
"""At least this many for each codec."""
TEXT_CHUNKS: Final = 2
RECENT: Final = 8
"""Sessions that are remembered: the machine's last ten seconds or so."""


@dataclass(frozen=True)
class WarmUp:
    """A policy: some text first, then every level in turn."""

    def choose(self, obs: Observation) -> Choice:
        if obs.recompute_s is not None and obs.chunk < min(TEXT_CHUNKS, obs.n_chunks - 1):
            return Choice(TEXT)
        return Choice(obs.chunk % obs.n_levels)


def round_trip_s(record: SessionRecord) -> float:
    """From a request to its first byte, in a session over a warm connection: what neither the link's queue nor a chunk
    before it has lengthened, so the lower quartile."""
    waits_s = [
        chunk.first_byte_s - chunk.request_s
        for chunk in record.chunks
        if chunk.request_s is not None and chunk.first_byte_s is not None
    ]
    return quantile(waits_s, 0.25)


def _recent() -> deque[float]:
    return deque(maxlen=RECENT)


@dataclass(frozen=True)
class _Ratios:
    """How many times as long as alone a kind of step took in each recent session."""

    decode: deque[float] = field(default_factory=_recent)
    recompute: deque[float] = field(default_factory=_recent)
    prefill: deque[float] = field(default_factory=_recent)


@dataclass(frozen=True)
class Experience:
    """The median slowdown of each recent session's steps, by codec: recomputing, too, takes 1.7 times as long while
    the larger encodings of `cachegen` arrive."""

    seen: dict[str, _Ratios] = field(default_factory=dict)

    def learn(self, codec: str, alone: Costs, record: SessionRecord, prefill_s: float) -> None:
        """Learn from a session, given what its steps take alone and what its prefill took."""
        decode, recompute = [], []
        for chunk in record.chunks:
            took_s = chunk.computing_s
            assert took_s is not None
            if isinstance(chunk.level, int):
                decode.append(took_s / alone.decode_s[chunk.chunk][chunk.level])
            elif alone.recompute_s is not None:
                recompute.append(took_s / alone.recompute_s[chunk.chunk])
        seen = self.seen.setdefault(codec, _Ratios())
        for ratios, kept in ((decode, seen.decode), (recompute, seen.recompute)):
            if ratios:
                kept.append(median(ratios))
        seen.prefill.append(prefill_s / alone.prefill_s)

    def slowdown(self, codec: str) -> Slowdown:
        """What to expect of the next session; 1 for steps that were never seen."""
        seen = self.seen.get(codec, _Ratios())
        return Slowdown(*(median(kept) if kept else 1.0 for kept in (seen.decode, seen.recompute, seen.prefill)))
