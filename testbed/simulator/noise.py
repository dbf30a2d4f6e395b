"""What compute takes in the simulator: its estimates times random factors, as in real sessions.

On a real machine the same step takes now more, now less, and a session whose first steps were slow has slow ones to
come. So a step's factor is exp(shared * z + own * e): z is drawn once for a session, e for each step
(`kvstream.testbed.session.costs.Spread`). Both follow a Gumbel distribution, which has the long upper tail of measured
times, scaled to standard deviation 1 and with median 0, since estimates are medians. `benchmarks/compute_noise.py` fits
the spreads to a run over emulated links and compares the quantiles.

A chunk has one factor for decoding, whatever its level, and one for recomputing, so schemes that meet on a unit meet
the same machine.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstream.testbed.session.costs import IN_SESSIONS, Costs, Spread, Spreads

Floats = NDArray[np.float64]

_SCALE: Final = math.sqrt(6.0) / math.pi
"""Scale of a Gumbel distribution of standard deviation 1."""
_MEDIAN: Final = -math.log(math.log(2.0))


@dataclass(frozen=True, eq=False)
class ComputeFactors:
    """How many times its estimate each step takes. With a leading axis: of many sessions."""

    decode: Floats
    """[..., chunk]."""
    recompute: Floats
    """[..., chunk]."""
    prefill: Floats
    """[...]."""

    def on(self, costs: Costs) -> Costs:
        """What the steps of one session take, from what they are estimated to."""
        decode, recompute = self.decode.tolist(), self.recompute.tolist()
        recompute_s = costs.recompute_s
        return replace(
            costs,
            decode_s=tuple(tuple(by * s for s in row) for by, row in zip(decode, costs.decode_s, strict=True)),
            recompute_s=recompute_s and tuple(by * s for by, s in zip(recompute, recompute_s, strict=True)),
            prefill_s=float(self.prefill) * costs.prefill_s,
        )


def seed_of(unit_id: str) -> int:
    """The seed of a unit: all schemes meet the same machine on it."""
    return zlib.crc32(unit_id.encode())


def draw(seeds: Floats | NDArray[np.uint64] | int, n_chunks: int, spreads: Spreads = IN_SESSIONS) -> ComputeFactors:
    """The factors of a session of `n_chunks`, or of one for each seed; the same for the same seed."""
    noise = _gumbel(np.asarray(seeds, dtype=np.uint64), 2 * n_chunks + 2)
    shared = noise[..., :1]

    def factors(spread: Spread, own: Floats) -> Floats:
        found: Floats = np.exp(spread.shared * shared + spread.own * own)
        return found

    return ComputeFactors(
        factors(spreads.decode, noise[..., 2 : 2 + n_chunks]),
        factors(spreads.recompute, noise[..., 2 + n_chunks :]),
        factors(spreads.prefill, noise[..., 1:2])[..., 0],
    )


def _gumbel(seeds: NDArray[np.uint64], count: int) -> Floats:
    """[..., count]: numbers that depend on seed and place alone, however many are drawn at once."""
    places = np.arange(1, count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = _mixed(np.add(_mixed(seeds)[..., None], places, dtype=np.uint64))
    uniform = ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    found: Floats = (-np.log(-np.log(uniform)) - _MEDIAN) * _SCALE
    return found


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    value = value * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
