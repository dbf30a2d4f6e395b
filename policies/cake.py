"""Cake (Jin et al., arXiv 2410.03065): load from one end, recompute from the other, until they meet.

The receiver recomputes chunks from the front, where attention is cheapest, while encoded chunks are loaded from the
back; compute and link are both busy and the two meet where they are equally fast. There are no levels and no deadline
in Cake: every loaded chunk takes `level`. Text is requested whenever the receiver would otherwise run out of work
before the next encoded chunk could arrive; the last chunk goes whichever way ends sooner. A receiver without a
model loads everything.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstream.policies.api import TEXT, Choice, Observation
from kvstream.policies.measures import bytes_in_flight, last_bps, named_level


@dataclass
class Cake:
    """Text from the front, one level from the back."""

    level: int | str = "highest"
    """Of the loaded chunks: lowest, medium, highest or a number."""

    def choose(self, obs: Observation) -> Choice:
        level = named_level(self.level, obs.n_levels)
        front, back = obs.remaining[0], obs.remaining[-1]
        if obs.recompute_s is None:
            return Choice(level)
        rate_bps = last_bps(obs)
        if rate_bps is None:  # the link is unknown: give the receiver work first, then try the link
            idle = obs.compute_backlog_s <= (obs.rtt_s or 0.0)
            return Choice(TEXT, chunk=front) if idle else Choice(level, chunk=back)
        size = obs.sizes_bytes[-1][level] + bytes_in_flight(obs)
        load_s = (obs.rtt_s or 0.0) + size * 8.0 / max(rate_bps, 1e-9)
        reason = {"load_s": load_s, "backlog_s": obs.compute_backlog_s}
        if front == back:
            recompute_s = obs.compute_backlog_s + obs.recompute_s[0]
            load_s = max(load_s, obs.compute_backlog_s) + obs.decode_s[0][level]
            return Choice(TEXT if recompute_s < load_s else level, reason=reason)
        if obs.compute_backlog_s < load_s:
            return Choice(TEXT, chunk=front, reason=reason)
        return Choice(level, chunk=back, reason=reason)
