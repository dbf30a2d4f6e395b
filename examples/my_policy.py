"""A policy in one file: the highest level that a careful estimate of the link still allows.

kvstream policy check ./my_policy.py:MyPolicy
kvstream simulate compare.toml
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstream import TEXT, Choice, Observation


@dataclass
class MyPolicy:
    """Assumes that the link is as fast as the slowest of the last few chunks."""

    window: int = 3
    """Recent chunks to take the minimum over."""
    reserve_s: float = 0.03
    """Seconds kept free before the deadline."""

    def choose(self, obs: Observation) -> Choice:
        """The best level at which all that is left, its decoding and the prefill fit into the time left."""
        rates_bps = [done.goodput_bps for done in obs.transfers[-self.window :]]
        if not rates_bps:  # nothing has been measured yet
            return Choice(0)
        rate_bps = min(rates_bps)
        in_flight = sum(flight.bytes - flight.received_bytes for flight in obs.in_flight)
        for level in reversed(range(obs.n_levels)):
            left_bytes = in_flight + sum(sizes[level] for sizes in obs.sizes_bytes)
            expected_s = 8 * left_bytes / rate_bps + obs.decode_s[-1][level] + obs.prefill_s
            if expected_s + self.reserve_s <= obs.left_s:
                return Choice(level, reason={"rate_bps": rate_bps, "expected_s": expected_s})
        if obs.recompute_s is not None and sum(obs.recompute_s) + obs.prefill_s < obs.left_s:
            return Choice(TEXT, reason={"rate_bps": rate_bps})
        return Choice(0, reason={"rate_bps": rate_bps})
