"""A policy's sessions over the six teaching links, beside a peer's and the oracle's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvstream.policies import registry
from kvstream.policies.api import Policy
from kvstream.policies.optimum import Plan
from kvstream.testbed.lab import submission
from kvstream.testbed.lab.situation import Situation, teaching_traces
from kvstream.testbed.session.record import SessionRecord
from kvstream.traces.trace import Trace

PEER = "buffer-based"
"""The policy that a student's is compared with."""


@dataclass(frozen=True)
class Tried:
    """One link: the student's session, the peer's, and the oracle's. `plan` is the bound that no session can beat."""

    trace: Trace
    mine: SessionRecord | None
    peer: SessionRecord | None
    plan: Plan | None
    oracle: SessionRecord | None
    watch: submission.Watch

    @property
    def met(self) -> bool:
        return self.mine is not None and self.mine.met


def try_all(make: Callable[[], Policy], situation: Situation) -> list[Tried]:
    """Sessions over every teaching link, each with a fresh policy."""
    tried = []
    for trace in teaching_traces():
        watch = submission.Watch()
        plan = situation.best(trace)
        tried.append(
            Tried(
                trace=trace,
                mine=situation.run(make(), trace, ask=watch),
                peer=situation.run(registry.make(PEER), trace),
                plan=plan,
                oracle=None if plan is None else situation.run(registry.make("oracle", {"margin": 0.0}), trace),
                watch=watch,
            )
        )
    return tried
