"""CacheGen's Algorithm 1 (SIGCOMM 2024, appendix C.1): text if it fits, else the best level at which all fits.

For each chunk: if recomputing everything that is left fits into the time left, send text; else the best level at which
all remaining chunks fit at the throughput of the previous chunk. The deadline is the paper's SLO on TTFT; decoding,
prefill and round trips are not in the rule, as published.

What the paper leaves open is filled so: before the first chunk the prior throughput counts as measured; without one the
first chunk takes `first`. Text is too small to measure a link with, so the last encoded chunk counts. When no level
fits, the smallest level or text, whichever is expected to end sooner. With N_c concurrent requests (section 5.3) every
expected delay is multiplied by N_c.
"""

from __future__ import annotations

from dataclasses import dataclass

from policies.api import TEXT, Choice, Observation
from policies.measures import bytes_left, last_bps, named_level, recompute_left_s


@dataclass
class CacheGen:
    """Algorithm 1."""

    first: int | str = "medium"
    """Level of the first chunk when no throughput is known: lowest, medium, highest or a number."""
    reserve_s: float = 0.0
    """Seconds of the deadline kept free for what the rule leaves out; 0 is the rule as published."""

    def choose(self, obs: Observation) -> Choice:
        left_s = obs.deadline_s - self.reserve_s - obs.now_s
        text_s = recompute_left_s(obs)
        if text_s is not None and obs.concurrent * text_s <= left_s:
            return Choice(TEXT, reason={"left_s": left_s, "text_s": text_s})
        rate_bps = last_bps(obs)
        if rate_bps is None:
            return Choice(named_level(self.first, obs.n_levels), reason={"left_s": left_s})
        seconds_a_byte = 8.0 * obs.concurrent / max(rate_bps, 1e-9)
        expected_s = 0.0
        for level in range(obs.n_levels - 1, -1, -1):
            expected_s = bytes_left(obs, level) * seconds_a_byte
            if expected_s <= left_s:
                return Choice(level, reason={"left_s": left_s, "expected_s": expected_s, "rate_bps": rate_bps})
        reason = {"left_s": left_s, "expected_s": expected_s, "rate_bps": rate_bps}
        if text_s is not None and obs.concurrent * text_s < expected_s:
            return Choice(TEXT, reason=reason)
        return Choice(0, reason=reason)
