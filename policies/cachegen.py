"""CacheGen's Algorithm 1 (SIGCOMM 2024, appendix C.1): text if it fits, else the best level at which everything fits.

For each chunk: if recomputing everything that is left fits into the time left, send text; else the best level at which
all remaining chunks fit at the throughput of the previous chunk. The deadline is the paper's SLO on TTFT; decoding,
prefill and round trips are not in the rule, as published. With the paper's depth, 1, that is `cachegen`.

The rule plans its last byte for the deadline, and the first token comes a decoding and a prefill later. So it misses
tight deadlines by that much, however well it adapts; `cachegen+compute` is the same rule told of both, and of a margin.
Compare with this one, too: what wins only against the other wins by knowing the prefill.

Where the paper is silent: before the first chunk the prior throughput counts as measured; without one the
first chunk takes `first`. Text is too small to measure a link with, so the last encoded chunk counts. When no level
fits, the smallest level or text, whichever is expected to end sooner. With N_c concurrent requests (section 5.3) every
expected delay is multiplied by N_c.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstream.policies.api import TEXT, Choice, Observation
from kvstream.policies.errors import PolicyError
from kvstream.policies.measures import bytes_in_flight, bytes_left, last_bps, named_level, recompute_left_s, tail_s


@dataclass
class CacheGen:
    """Algorithm 1."""

    first: int | str = "medium"
    """Level of the first chunk when no throughput is known: lowest, medium, highest or a number."""
    reserve_s: float = 0.0
    """Seconds of the deadline kept free for what the rule omits; 0 is the rule as published."""

    def choose(self, obs: Observation) -> Choice:
        left_s = obs.left_s - self._free_s(obs)
        text_s = recompute_left_s(obs)
        if text_s is not None:
            text_s = obs.concurrent * text_s + self._text_tail_s(obs)
            if text_s <= left_s:
                return Choice(TEXT, reason={"left_s": left_s, "text_s": text_s})
        rate_bps = last_bps(obs)
        if rate_bps is None:
            return Choice(named_level(self.first, obs.n_levels), reason={"left_s": left_s})
        seconds_per_byte = 8.0 * obs.concurrent / max(rate_bps, 1e-9)
        expected_s = 0.0
        for level in range(obs.n_levels - 1, -1, -1):
            expected_s = (bytes_left(obs, level) + self._waiting_bytes(obs)) * seconds_per_byte
            expected_s += self._tail_s(obs, level)
            if expected_s <= left_s:
                return Choice(level, reason={"left_s": left_s, "expected_s": expected_s, "rate_bps": rate_bps})
        reason = {"left_s": left_s, "expected_s": expected_s, "rate_bps": rate_bps}
        if text_s is not None and text_s < expected_s:
            return Choice(TEXT, reason=reason)
        return Choice(0, reason=reason)

    def _free_s(self, obs: Observation) -> float:
        """Seconds of the deadline that the plan does not use."""
        return self.reserve_s

    def _waiting_bytes(self, obs: Observation) -> int:
        """Bytes that the link carries before the next chunk; at the paper's depth there are none."""
        return 0

    def _tail_s(self, obs: Observation, level: int) -> float:
        """Seconds from the last byte to the first token."""
        return 0.0

    def _text_tail_s(self, obs: Observation) -> float:
        """Seconds to the first token besides recomputing all that is left."""
        return 0.0


@dataclass
class CacheGenCompute(CacheGen):
    """Algorithm 1, told what decoding and prefill take, with a margin."""

    margin: float = 0.05
    """Fraction of the deadline kept free."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.margin < 1.0:
            raise PolicyError(f"cachegen+compute: margin={self.margin}; give a fraction of the deadline, 0 to below 1")

    def _free_s(self, obs: Observation) -> float:
        return self.reserve_s + self.margin * obs.deadline_s

    def _waiting_bytes(self, obs: Observation) -> int:
        return bytes_in_flight(obs)

    def _tail_s(self, obs: Observation, level: int) -> float:
        return tail_s(obs, level)

    def _text_tail_s(self, obs: Observation) -> float:
        return obs.compute_backlog_s + obs.prefill_s
