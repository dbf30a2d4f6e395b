"""What compute is expected to take, and how far it varies about that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Spread:
    """How far a step's seconds lie from its estimate: standard deviations of log(actual / estimated)."""

    shared: float = 0.0
    """Of what all steps of a session have in common: the machine is faster or slower than it was."""
    own: float = 0.0
    """Of what is each step's own."""

    def scaled(self, by: float) -> Spread:
        return Spread(by * self.shared, by * self.own)


@dataclass(frozen=True, slots=True)
class Spreads:
    """The spread of each kind of step."""

    decode: Spread = Spread()
    recompute: Spread = Spread()
    prefill: Spread = Spread()

    def scaled(self, by: float) -> Spreads:
        """So many times as wide."""
        return Spreads(self.decode.scaled(by), self.recompute.scaled(by), self.prefill.scaled(by))


EXACT: Final = Spreads()
"""Steps take what they are estimated to."""

IN_SESSIONS: Final = Spreads(Spread(0.19, 0.18), Spread(0.1, 0.09), Spread(0.13, 0.08))
"""In real sessions on a CPU: `benchmarks/compute_noise.py` fits it to a run."""


@dataclass(frozen=True)
class Costs:
    """Seconds of compute: estimates for observations and, in the simulator, the truth."""

    decode_s: tuple[tuple[float, ...], ...]
    """[chunk][level]."""
    recompute_s: tuple[float, ...] | None
    """[chunk]; None where the receiver has no model to recompute with."""
    prefill_s: float
    spreads: Spreads = EXACT

    def varying(self, spreads: Spreads) -> Costs:
        """The same estimates with these spreads."""
        return replace(self, spreads=spreads)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Costs:
        recompute_s = value["recompute_s"]
        return cls(
            decode_s=tuple(tuple(row) for row in value["decode_s"]),
            recompute_s=None if recompute_s is None else tuple(recompute_s),
            prefill_s=float(value["prefill_s"]),
        )


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Factors by which the steps of a session take longer than alone."""

    decode: float = 1.0
    recompute: float = 1.0
    prefill: float = 1.0

    def on(self, costs: Costs) -> Costs:
        """Costs under this slowdown."""
        recompute_s = costs.recompute_s
        return replace(
            costs,
            decode_s=tuple(tuple(self.decode * level_s for level_s in row) for row in costs.decode_s),
            recompute_s=None if recompute_s is None else tuple(self.recompute * chunk_s for chunk_s in recompute_s),
            prefill_s=self.prefill * costs.prefill_s,
        )


def never_falling(seconds: Iterable[float]) -> tuple[float, ...]:
    """Decode times by level: a higher level never takes less, whatever the noise of measuring says.

    The averages over neighbours that come closest in the sum of squares (pool adjacent violators, Ayer et al. 1955).
    """
    pools: list[tuple[float, int]] = []
    for value in seconds:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, n = pools.pop()
            mean, count = (before * n + mean * count) / (n + count), n + count
        pools.append((mean, count))
    return tuple(accumulate([mean for mean, count in pools for _ in range(count)], max))
