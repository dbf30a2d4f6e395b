"""The prefetch timeout of SGLang's HiCache: fetch until base + n * t, then recompute what is missing.

HiCache loads a prefix from storage until a timeout of a base plus a time per 1,024 tokens, stops, and prefills the rest
(its prefetch policy `timeout`, formula in sgl-project/sglang pull request 10512). The defaults are those since pull
request 23309 (April 2026): 2 s, 0.1 s per 1,024 tokens, at most 30 s; before, 1 s, 0.25 s and no bound. Mapping to a
deadline: the timeout is at most `share` of it. Every fetched chunk takes `level`. At the timeout the chunk in flight is
given up as well: `progress` replaces it by its text, and what had arrived of it is wasted. A receiver without a model
keeps fetching.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstream.policies.api import KEEP, TEXT, Choice, Observation, Progress, Replace
from kvstream.policies.measures import named_level


@dataclass
class HiCache:
    """One level until a timeout, text after it."""

    level: int | str = "highest"
    """Of the fetched chunks: lowest, medium, highest or a number."""
    base_s: float = 2.0
    """Timeout of an empty context."""
    per_ki_token_s: float = 0.1
    """Added per 1,024 tokens."""
    max_s: float = 30.0
    """Upper bound on the timeout."""
    share: float = 0.5
    """Upper bound as a fraction of the deadline."""
    _timeout_s: float = field(default=-1.0, init=False, repr=False, compare=False)

    def choose(self, obs: Observation) -> Choice:
        if self._timeout_s < 0.0:
            asked_s = self.base_s + self.per_ki_token_s * sum(obs.tokens) / 1024.0
            self._timeout_s = min(asked_s, self.max_s, self.share * obs.deadline_s)
        reason = {"timeout_s": self._timeout_s}
        if obs.recompute_s is not None and obs.now_s >= self._timeout_s:
            return Choice(TEXT, reason=reason)
        return Choice(named_level(self.level, obs.n_levels), reason=reason)

    def progress(self, obs: Observation) -> Progress:
        expired = obs.recompute_s is not None and obs.now_s >= self._timeout_s
        return Replace(TEXT) if expired and obs.in_flight[0].level != TEXT else KEEP
