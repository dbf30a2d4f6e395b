"""An observation as a fixed number of numbers without units, for learned policies.

Every number lies in [-1, 1]. Times are relative to the time left or to the deadline and bytes are counted in the time
that the estimated link needs for them, so that what is learned on one link, model or deadline means the same on
another. Only the number of levels is fixed.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvstream.policies.api import Observation
from kvstream.policies.estimators import harmonic, link_samples
from kvstream.policies.measures import bytes_in_flight, bytes_left

RECENT = 3
"""Chunks whose goodput is given individually."""
OTHERS = 7 + RECENT
"""Features besides the two of each level."""


def length(n_levels: int) -> int:
    """Number of features for this many levels."""
    return 2 * n_levels + OTHERS


def features(obs: Observation) -> NDArray[np.float32]:
    """Shape `[length(obs.n_levels)]`, float32."""
    left_s = max(obs.left_s - obs.prefill_s, 1e-6)
    rates = [bits / seconds for bits, seconds in link_samples(obs)] or ([obs.prior_bps] if obs.prior_bps else [])
    rate_bps = harmonic(rates) if rates else 0.0
    recent = [*([rate_bps] * RECENT), *rates][-RECENT:]
    found = [
        len(obs.remaining) / obs.n_chunks,
        min(max(obs.left_s / obs.deadline_s, -1.0), 1.0),
        float(bool(rates)),
        _squashed(obs.compute_backlog_s, left_s),
        _squashed(bytes_in_flight(obs) * 8.0, rate_bps * left_s),
        -1.0 if obs.recompute_s is None else _squashed(sum(obs.recompute_s), left_s),
        -1.0 if obs.recompute_s is None else _squashed(obs.recompute_s[0], left_s),
        *(_log_ratio(rate, rate_bps) for rate in recent),
    ]
    for level in range(obs.n_levels):
        found.append(_squashed(bytes_left(obs, level) * 8.0, rate_bps * left_s))
        found.append(_squashed(obs.sizes_bytes[0][level] * 8.0, rate_bps * left_s))
    return np.array(found, dtype=np.float32)


def _squashed(part: float, whole: float) -> float:
    """part / whole, from 0 to infinity, mapped to [0, 1]: 0.5 where they are equal."""
    return part / (part + whole) if part + whole > 0.0 else 0.0


def _log_ratio(a: float, b: float) -> float:
    """How many times larger, as a logarithm: 1 is ten times or more."""
    return min(max(math.log10(a / b), -1.0), 1.0) if a > 0.0 and b > 0.0 else 0.0
