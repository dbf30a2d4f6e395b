"""Exercise 5: the rule of exercise 4 with bits over time, from the first byte on, and with the chunk in flight."""

from __future__ import annotations

from dataclasses import dataclass

from kvstream import Choice, Observation


@dataclass
class MyPolicy:
    first: int = 2
    half_s: float = 0.2  # after so much time of the link, what it carried counts half
    careful: float = 0.8
    reserve_s: float = 0.2

    def choose(self, obs: Observation) -> Choice:
        estimate_bps = self.estimate(obs)
        if estimate_bps is None:
            return Choice(self.first)
        rate_bps = self.careful * estimate_bps
        under_way = sum(flight.bytes - flight.received_bytes for flight in obs.in_flight)

        def ends_s(level: int, rest: int) -> float:
            """When all is done, from now: this chunk at one level, the rest at another."""
            left = under_way + obs.sizes_bytes[0][level] + sum(sizes[rest] for sizes in obs.sizes_bytes[1:])
            return left * 8 / rate_bps + obs.decode_s[-1][rest] + obs.prefill_s

        fitting = [level for level in range(obs.n_levels) if ends_s(level, level) + self.reserve_s <= obs.left_s]
        least = 1 if ends_s(1, 0) <= obs.left_s else 0
        return Choice(max([least, *fitting]), reason={"rate_bps": rate_bps})

    def estimate(self, obs: Observation) -> float | None:
        """Bits over the time that the link spent on them: before the first byte, a chunk waits for its request."""
        samples, free_s = [], 0.0
        for done in obs.transfers:
            samples.append((8 * done.bytes, done.end_s - max(done.first_byte_s, free_s)))
            free_s = done.end_s
        for flight in obs.in_flight[:1]:
            if flight.first_byte_s is not None and obs.now_s - flight.first_byte_s >= 0.01:  # before, it may be a burst
                begin_s = max(flight.burst_end_s, flight.first_byte_s, free_s)
                samples.append((8 * (flight.received_bytes - flight.burst_bytes), obs.now_s - begin_s))
        bits = seconds = 0.0
        for some_bits, some_s in samples:
            fade = 0.5 ** (some_s / self.half_s)
            bits, seconds = bits * fade + some_bits, seconds * fade + max(some_s, 0.003)
        return bits / seconds if seconds else None
