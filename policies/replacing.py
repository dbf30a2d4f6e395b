"""`kvstream` that also gives up a chunk in flight for its lowest level where the link has become too slow for it.

A level is chosen for the link as it was. With few long chunks, or where the rate falls and stays low, what a chunk in
flight still has to bring can be all that the link carries until the deadline. So the chance of being in time is
reckoned with all that is left of it, and with its lowest level in its place, after a round trip in which the link is
wasted; the others come at their lowest level, or as text where that is better. Keeping the chunk must have GIVE_UP
times the chance of replacing it.

Not part of `kvstream`, because a session asks every few milliseconds, and because requests that share a link are
simulated without giving up transfers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstream.policies.api import KEEP, TEXT, Choice, Observation, Progress, Replace
from kvstream.policies.kvstream import KVStream, in_time, lowest

GIVE_UP = 0.9
"""Chosen on the `tune` halves of the trace families, as the settings of `kvstream`."""


@dataclass
class Replacing(KVStream):
    """As `kvstream`; a chunk in flight may be replaced by its lowest level."""

    _offered: dict[int, tuple[int, tuple[float, ...]]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    """[chunk in flight]: bytes at its lowest level, and seconds of decoding at each."""

    def choose(self, obs: Observation) -> Choice:
        choice = super().choose(obs)
        assert choice.chunk is not None
        at = obs.remaining.index(choice.chunk)
        self._offered[choice.chunk] = obs.sizes_bytes[at][0], obs.decode_s[at]
        return choice

    def progress(self, obs: Observation) -> Progress:
        flight = obs.in_flight[0]
        if flight.level in (0, TEXT) or len(obs.in_flight) > 1:
            return KEEP
        belief = self._belief(obs)
        if belief is None:
            return KEEP
        size, decode_s = self._offered[flight.chunk]
        left = flight.bytes - flight.received_bytes
        instead = size + int(belief[0] * (obs.rtt_s or 0.0) / 8.0)
        if left <= instead:
            return KEEP
        cases = self._cases(obs)
        sooner_s = decode_s[0] - decode_s[int(flight.level)]
        kept = replaced = 0.0
        for texts in {0, *[case.texts for case in cases]}:
            plan = lowest(obs, texts)
            other = plan._replace(nbytes=plan.nbytes - left + instead, compute_s=plan.compute_s + sooner_s)
            kept = max(kept, in_time(plan, belief, cases, obs, texts))
            replaced = max(replaced, in_time(other, belief, cases, obs, texts))
        return Replace(0) if kept < GIVE_UP * replaced else KEEP
