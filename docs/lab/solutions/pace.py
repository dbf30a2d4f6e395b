"""Exercise 3: no estimate of the link. A chunk may take its even share of the time, and a part of the lead over it."""

from __future__ import annotations

from dataclasses import dataclass

from kvstream import Choice, Observation


@dataclass
class MyPolicy:
    first: int = 2
    spend: float = 0.15  # of the lead, on one chunk

    def choose(self, obs: Observation) -> Choice:
        if not obs.transfers:
            return Choice(self.first)
        even_s = (obs.deadline_s - obs.prefill_s) / obs.n_chunks
        lead_s = even_s * len(obs.transfers) - obs.now_s
        so_far_bps = 8 * sum(done.bytes for done in obs.transfers) / obs.now_s
        budget_bytes = (even_s + self.spend * lead_s) * so_far_bps / 8
        fitting = [level for level, size in enumerate(obs.sizes_bytes[0]) if size <= budget_bytes]
        return Choice(max(fitting, default=0), reason={"lead_s": lead_s, "budget_bytes": budget_bytes})
