"""Exercise 4: one budget for all that is left: the best level at which everything fits, with a reserve."""

from __future__ import annotations

from dataclasses import dataclass

from kvstream import Choice, Observation


@dataclass
class MyPolicy:
    first: int = 2
    careful: float = 0.95
    reserve_s: float = 0.1

    def choose(self, obs: Observation) -> Choice:
        if not obs.transfers:
            return Choice(self.first)
        rate_bps = self.careful * obs.transfers[-1].goodput_bps
        under_way = sum(flight.bytes - flight.received_bytes for flight in obs.in_flight)

        def ends_s(level: int, rest: int) -> float:
            """When all is done, from now: this chunk at one level, the rest at another."""
            left = under_way + obs.sizes_bytes[0][level] + sum(sizes[rest] for sizes in obs.sizes_bytes[1:])
            return left * 8 / rate_bps + obs.decode_s[-1][rest] + obs.prefill_s

        fitting = [level for level in range(obs.n_levels) if ends_s(level, level) + self.reserve_s <= obs.left_s]
        # level 0 is six times as bad as level 1: only if nothing else is possible
        least = 1 if ends_s(1, 0) <= obs.left_s else 0
        return Choice(max([least, *fitting]), reason={"expected_s": ends_s(least, 0), "rate_bps": rate_bps})
