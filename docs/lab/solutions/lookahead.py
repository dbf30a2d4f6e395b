"""Exercise 6: plan all that is left, take the first step, plan again; trust the estimate as far as it was right."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstream import TEXT, Choice, Observation


@dataclass
class MyPolicy:
    memory: int = 4  # past errors that discount the estimate
    least: float = 0.8  # the least discount
    _guesses: list[float] = field(default_factory=list, init=False)

    def choose(self, obs: Observation) -> Choice:
        if not obs.transfers:
            return Choice(0)
        # from the first byte on: before it, a small chunk waits for its request, not for the link
        rates = [8 * d.bytes / max(d.end_s - d.first_byte_s, 1e-3) for d in obs.transfers if d.level != TEXT]
        estimate_bps = len(rates[-3:]) / sum(1 / rate for rate in rates[-3:])
        errors = [guess / rate - 1 for guess, rate in zip(self._guesses, rates[1:], strict=False)][-self.memory :]
        self._guesses = (self._guesses + [estimate_bps] * len(rates))[: len(rates)]
        rate_bps = estimate_bps / (1 + max([self.least, *errors]))
        # text travels in no time and is computed while bytes travel: take it while the decoder has nothing to do
        if obs.recompute_s is not None and obs.recompute_s[0] + obs.compute_backlog_s < 0.2 * obs.left_s:
            return Choice(TEXT, reason={"rate_bps": rate_bps})
        under_way = sum(flight.bytes - flight.received_bytes for flight in obs.in_flight)
        budget = (obs.left_s - obs.prefill_s - obs.decode_s[-1][0]) * rate_bps / 8 - under_way
        return Choice(self._first_of_plan(obs, budget), reason={"rate_bps": rate_bps, "budget_bytes": budget})

    def _first_of_plan(self, obs: Observation, budget: float) -> int:
        """Start at the smallest level everywhere; again and again buy the step with the most quality a byte."""
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
