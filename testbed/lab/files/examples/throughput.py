"""Looks at the link: the best level at which everything left fits at the last chunk's rate."""

from dataclasses import dataclass

from kvstream import Choice, Observation


@dataclass
class MyPolicy:
    careful: float = 0.8

    def choose(self, obs: Observation) -> Choice:
        if not obs.transfers:
            return Choice(1)
        rate_bps = self.careful * obs.transfers[-1].goodput_bps
        waiting = sum(flight.bytes - flight.received_bytes for flight in obs.in_flight)
        for level in reversed(range(obs.n_levels)):
            left = waiting + sum(sizes[level] for sizes in obs.sizes_bytes)
            expected_s = left * 8 / rate_bps + obs.decode_s[-1][level] + obs.prefill_s
            if expected_s <= obs.left_s:
                return Choice(level, reason={"rate_bps": rate_bps, "expected_s": expected_s})
        return Choice(0, reason={"rate_bps": rate_bps})
