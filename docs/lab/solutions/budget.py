"""Exercise 2, second half: the best level at which everything that is left fits into the time that is left."""

from __future__ import annotations

from dataclasses import dataclass

from kvstream import Choice, Observation


@dataclass
class MyPolicy:
    careful: float = 0.9

    def choose(self, obs: Observation) -> Choice:
        if not obs.transfers:
            return Choice(0)
        rate_bps = self.careful * obs.transfers[-1].goodput_bps
        under_way = sum(flight.bytes - flight.received_bytes for flight in obs.in_flight)
        for level in reversed(range(obs.n_levels)):
            left_bytes = under_way + sum(sizes[level] for sizes in obs.sizes_bytes)
            expected_s = left_bytes * 8 / rate_bps + obs.decode_s[-1][level] + obs.prefill_s
            if expected_s <= obs.left_s:
                return Choice(level, reason={"expected_s": expected_s, "rate_bps": rate_bps})
        return Choice(0, reason={"rate_bps": rate_bps})
