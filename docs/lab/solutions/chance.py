"""Exercise 9: least expected distortion, among levels that let the deadline still be met but for a share epsilon."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from kvstream import TEXT, Choice, Observation

Z = [NormalDist().inv_cdf((i + 0.5) / 9) for i in range(9)]  # nine equally likely rates


@dataclass
class MyPolicy:
    epsilon: float = 0.2
    spread: float = 0.5  # of log(rate to come / estimate), on the practice links
    first: int = 2
    margin: float = 0.04  # of the deadline, for compute that takes longer

    def choose(self, obs: Observation) -> Choice:
        recompute_s = obs.recompute_s[0] * 1.15 if obs.recompute_s else math.inf
        left_s = obs.left_s - obs.prefill_s - self.margin * obs.deadline_s
        if obs.compute_backlog_s < 0.08 and recompute_s + sum(row[0] for row in obs.decode_s[1:]) < left_s:
            return Choice(TEXT, chunk=obs.remaining[0])  # from the front, encoded chunks from the back
        estimate_bps, at = self.estimate(obs), len(obs.remaining) - 1
        if estimate_bps is None:
            return Choice(self.first, chunk=obs.remaining[at])
        left_s -= obs.decode_s[at][-1] + (0 if obs.in_flight else obs.rtt_s or 0)
        under_way = sum(flight.bytes - flight.received_bytes for flight in obs.in_flight)
        sizes, loss = obs.sizes_bytes[at], obs.distortion[at]
        rest = [sum(row[level] for row in obs.sizes_bytes[:at]) for level in range(obs.n_levels)]

        def room(z: float) -> float:
            return estimate_bps * math.exp(z * self.spread) / 8 * left_s - under_way

        def cost(level: int, room: float) -> float:
            best = self.least(rest, loss, room - sizes[level])
            return loss[0] * (at + 1) if best is None else loss[level] + at * best

        sure = room(NormalDist().inv_cdf(self.epsilon)) - rest[0]
        costs = {k: sum(cost(k, room(z)) for z in Z) for k in range(obs.n_levels) if k == 0 or sizes[k] <= sure}
        level = min(costs, key=costs.__getitem__)
        return Choice(level, chunk=obs.remaining[at], reason={"rate_bps": estimate_bps, "sure_bytes": sure})

    def least(self, sizes: list[int], loss: tuple[float, ...], room: float) -> float | None:
        """Least distortion of the rest in so many bytes, mixing two levels; None if nothing fits."""
        low = max((level for level, size in enumerate(sizes) if size <= room), default=-1)
        if low in (-1, len(sizes) - 1):
            return None if low < 0 else loss[low]
        return loss[low] + (room - sizes[low]) / (sizes[low + 1] - sizes[low]) * (loss[low + 1] - loss[low])

    def estimate(self, obs: Observation) -> float | None:
        bits = seconds = free_s = 0.0
        for done in obs.transfers:
            some_s, free_s = done.end_s - max(done.first_byte_s, free_s), done.end_s
            if done.level != TEXT:
                fade = 0.5 ** (some_s / (0.6 * obs.deadline_s))
                bits, seconds = bits * fade + 8 * done.bytes, seconds * fade + max(some_s, 0.003)
        return bits / seconds if seconds else None
