"""Exercise 4: the rule of exercise 2 with bits over time of the last moments, latency left out."""

from __future__ import annotations

from dataclasses import dataclass

from kvstream import Choice, Observation


@dataclass
class MyPolicy:
    window_s: float = 0.5  # how far back a byte still counts
    careful: float = 0.6

    def choose(self, obs: Observation) -> Choice:
        if not obs.transfers:
            return Choice(0)
        # bits over time from the first byte on: before it, a small chunk waits for its request, not for the link
        recent = [done for done in obs.transfers if done.end_s >= obs.now_s - self.window_s] or obs.transfers[-1:]
        bits = sum(8 * done.bytes for done in recent)
        rate_bps = self.careful * bits / sum(max(done.end_s - done.first_byte_s, 1e-3) for done in recent)
        under_way = sum(flight.bytes - flight.received_bytes for flight in obs.in_flight)
        for level in reversed(range(obs.n_levels)):
            left_bytes = under_way + sum(sizes[level] for sizes in obs.sizes_bytes)
            expected_s = left_bytes * 8 / rate_bps + obs.decode_s[-1][level] + obs.prefill_s
            if expected_s <= obs.left_s:
                return Choice(level, reason={"expected_s": expected_s, "rate_bps": rate_bps})
        return Choice(0, reason={"rate_bps": rate_bps})
