"""Exercise 3: no estimate at all. The lead over an even pace at the smallest level is spent, a share at a time."""

from __future__ import annotations

from dataclasses import dataclass

from kvstream import Choice, Observation


@dataclass
class MyPolicy:
    keep: float = 0.02  # of the deadline, held back for bad times
    spend: float = 0.7  # of the lead beyond that, on one chunk

    def choose(self, obs: Observation) -> Choice:
        share = (obs.chunk - len(obs.in_flight)) / obs.n_chunks
        even_s = share * (obs.deadline_s - obs.prefill_s)
        lead_s = even_s - obs.now_s - self.keep * obs.deadline_s * (1 - share)
        if not obs.transfers or lead_s <= 0:
            return Choice(0, reason={"lead_s": lead_s})
        so_far_bps = 8 * sum(done.bytes for done in obs.transfers) / obs.now_s
        extra_bytes = self.spend * lead_s * so_far_bps / 8
        sizes = obs.sizes_bytes[0]
        fitting = [level for level, size in enumerate(sizes) if size - sizes[0] <= extra_bytes]
        return Choice(max(fitting), reason={"lead_s": lead_s, "extra_bytes": extra_bytes})
