"""Exercise 7: plan all remaining chunks, take the first step, replan; text while the decoder is idle."""

from __future__ import annotations

from dataclasses import dataclass

from kvstream import TEXT, Choice, Observation


@dataclass
class MyPolicy:
    first: int = 2
    half_s: float = 0.2
    careful: float = 0.75
    reserve_s: float = 0.1
    idle: float = 0.4  # a recomputation that ends within this part of the time left delays nothing

    def choose(self, obs: Observation) -> Choice:
        if obs.recompute_s is not None and obs.compute_backlog_s + obs.recompute_s[0] < self.idle * obs.left_s:
            return Choice(TEXT)
        estimate_bps = self.estimate(obs)
        if estimate_bps is None:
            return Choice(self.first)
        rate_bps = self.careful * estimate_bps
        under_way = sum(flight.bytes - flight.received_bytes for flight in obs.in_flight)
        time_s = obs.left_s - obs.prefill_s - obs.decode_s[-1][0]
        least = obs.sizes_bytes[0][1] + sum(sizes[0] for sizes in obs.sizes_bytes[1:])
        level = self.first_of_plan(obs, (time_s - self.reserve_s) * rate_bps / 8 - under_way)
        if level == 0 and least <= time_s * rate_bps / 8 - under_way:
            level = 1
        return Choice(level, reason={"rate_bps": rate_bps})

    def first_of_plan(self, obs: Observation, budget: float) -> int:
        """Start at the smallest level everywhere; repeatedly buy the step with the most quality per byte."""
        levels = [0] * len(obs.remaining)
        budget -= sum(sizes[0] for sizes in obs.sizes_bytes)
        while True:
            steps = [
                ((obs.distortion[i][k] - obs.distortion[i][k + 1]) / cost, -i, i, cost)
                for i, k in enumerate(levels)
                if k + 1 < obs.n_levels and (cost := obs.sizes_bytes[i][k + 1] - obs.sizes_bytes[i][k]) <= budget
            ]
            if not steps:
                return levels[0]
            _, _, i, cost = max(steps)
            levels[i], budget = levels[i] + 1, budget - cost

    def estimate(self, obs: Observation) -> float | None:
        """As in exercise 5; text is too small to measure a link."""
        bits = seconds = free_s = 0.0
        for done in obs.transfers:
            some_s, free_s = done.end_s - max(done.first_byte_s, free_s), done.end_s
            if done.level != TEXT:
                fade = 0.5 ** (some_s / self.half_s)
                bits, seconds = bits * fade + 8 * done.bytes, seconds * fade + max(some_s, 0.003)
        return bits / seconds if seconds else None
