"""Looks at the link: the best level at which all remaining chunks fit at the last chunk's rate."""

from dataclasses import dataclass

from kvstream import Choice, Observation


@dataclass
class MyPolicy:
    first: int = 1  # before anything is known of the link
    careful: float = 0.8

    def choose(self, obs: Observation) -> Choice:
        if not obs.transfers:
            return Choice(self.first)
        rate_bps = self.careful * obs.transfers[-1].goodput_bps
        waiting = sum(flight.bytes - flight.received_bytes for flight in obs.in_flight)
        for level in reversed(range(obs.n_levels)):
            left = waiting + sum(sizes[level] for sizes in obs.sizes_bytes)
            expected_s = left * 8 / rate_bps + obs.decode_s[-1][level] + obs.prefill_s
            if expected_s <= obs.left_s:
                return Choice(level, reason={"rate_bps": rate_bps, "expected_s": expected_s})
        return Choice(0, reason={"rate_bps": rate_bps})
