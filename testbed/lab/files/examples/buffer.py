"""Looks at the clock: the further ahead of schedule, the better the level. It never estimates a rate."""

from dataclasses import dataclass

from kvstream import Choice, Observation


@dataclass
class MyPolicy:
    full_s: float = 0.25  # a lead of this many seconds earns the best level

    def choose(self, obs: Observation) -> Choice:
        share = len(obs.transfers) / obs.n_chunks
        lead_s = share * (obs.deadline_s - obs.prefill_s) - obs.now_s
        level = int(obs.n_levels * lead_s / self.full_s)
        return Choice(min(max(level, 0), obs.n_levels - 1), reason={"lead_s": lead_s})
