"""Exercise 2, first half: every chunk gets an equal slice of the deadline, and what a chunk does not use is lost."""

from __future__ import annotations

from dataclasses import dataclass

from kvstream import Choice, Observation


@dataclass
class MyPolicy:
    careful: float = 0.9

    def choose(self, obs: Observation) -> Choice:
        if not obs.transfers:
            return Choice(0)
        rate_bps = self.careful * obs.transfers[-1].goodput_bps
        slice_s = (obs.deadline_s - obs.prefill_s) / obs.n_chunks
        fitting = [level for level, size in enumerate(obs.sizes_bytes[0]) if size * 8 / rate_bps <= slice_s]
        return Choice(max(fitting, default=0), reason={"slice_s": slice_s, "rate_bps": rate_bps})
