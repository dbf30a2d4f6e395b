"""Exercise 8: plan for the middle of what the link may do, and keep a way out for all but epsilon of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstream import TEXT, Choice, Observation

PRIOR = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.0, 1.1, 1.2, 1.4)  # rate to come over estimate, on practice links


@dataclass
class MyPolicy:
    epsilon: float = 0.1
    middle: float = 0.3
    _guesses: list[float] = field(default_factory=list, init=False)

    def choose(self, obs: Observation) -> Choice:
        if not obs.transfers:
            return Choice(0)
        rates = [8 * d.bytes / max(d.end_s - d.first_byte_s, 1e-3) for d in obs.transfers if d.level != TEXT]
        seen = [rate / guess for guess, rate in zip(self._guesses, rates[1:], strict=False)]
        estimate_bps = len(rates[-4:]) / sum(1 / rate for rate in rates[-4:])
        self._guesses = (self._guesses + [estimate_bps] * len(rates))[: len(rates)]
        chances = sorted([*PRIOR, *seen])

        def budget_bytes(quantile: float) -> float:
            rate_bps = estimate_bps * chances[int(quantile * (len(chances) - 1))]
            under_way = sum(flight.bytes - flight.received_bytes for flight in obs.in_flight)
            return (obs.left_s - obs.prefill_s - obs.decode_s[-1][0]) * rate_bps / 8 - under_way

        reason = {"estimate_bps": estimate_bps, "middle_bytes": budget_bytes(self.middle)}
        # text costs the decoder time and the link nothing: early, while the decoder idles, it is a gift
        if obs.recompute_s is not None and obs.compute_backlog_s + obs.recompute_s[0] < 0.2 * obs.left_s:
            return Choice(TEXT, reason=reason)
        fitting = [
            level
            for level in range(obs.n_levels)
            if sum(sizes[level] for sizes in obs.sizes_bytes) <= budget_bytes(self.middle)
            and obs.sizes_bytes[0][level] + sum(sizes[0] for sizes in obs.sizes_bytes[1:]) <= budget_bytes(self.epsilon)
        ]
        return Choice(max(fitting, default=0), reason={**reason, "sure_bytes": budget_bytes(self.epsilon)})
