"""The lab's setting for every policy: one context, one deadline, six links with a story.

The context's sizes, distortions and compute times are those of a real encoded context, as shipped for the simulator, so
a policy sees here what it sees on the emulated link.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from kvstream.policies.api import TEXT, LevelOrText, Observation, Policy
from kvstream.policies.optimum import Line, Plan
from kvstream.testbed.errors import SpecError
from kvstream.testbed.session.ask import ASK_DIRECTLY, Ask
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.session.record import SessionFailed, SessionRecord
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.simulator.oracle_bound import line_of, oracle_plan
from kvstream.testbed.simulator.simulator import simulate
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.workloads import precomputed
from kvstream.traces import library
from kvstream.traces.trace import Trace

DEADLINE_S: Final = 1.0
RTT_S: Final = 0.02
DEPTH: Final = 2
CONTEXT: Final = "docs"
CODEC: Final = "kvstream"


@dataclass(frozen=True)
class Situation:
    """A context, its compute costs, and the settings of a session."""

    manifest: Manifest
    costs: Costs
    deadline_s: float = DEADLINE_S
    rtt_s: float = RTT_S
    depth: int = DEPTH

    @cached_property
    def manifest_bytes(self) -> int:
        return len(json.dumps(self.manifest.to_json()))

    @property
    def n_levels(self) -> int:
        return len(self.manifest.levels)

    def run(self, policy: Policy, capacity: Trace, seed: int = 0, ask: Ask = ASK_DIRECTLY) -> SessionRecord | None:
        """One simulated session over a link of this capacity (layer 2); None if the transfer never ends."""
        try:
            return simulate(
                self.manifest,
                policy,
                capacity.as_goodput(),
                SessionSettings(self.deadline_s, self.depth, seed=seed),
                costs=self.costs,
                rtt_s=self.rtt_s,
                manifest_bytes=self.manifest_bytes,
                ask=ask,
            )
        except SessionFailed:
            return None

    def line(self, capacity: Trace) -> Line:
        return line_of(
            self.manifest,
            capacity.as_goodput(),
            costs=self.costs,
            depth=self.depth,
            rtt_s=self.rtt_s,
            manifest_bytes=self.manifest_bytes,
        )

    def best(self, capacity: Trace) -> Plan | None:
        """The oracle's plan: the least distortion that meets the deadline; None if nothing meets it."""
        return oracle_plan(self.line(capacity), self.deadline_s)

    def option(self, number: int) -> LevelOrText:
        """A plan's option as a level; the one after the levels is text."""
        return TEXT if number == self.n_levels else number

    @property
    def worst(self) -> float:
        """Distortion with every chunk at the smallest level."""
        return self.manifest.levels[0].distortion


def load(context: str = CONTEXT, codec: str = CODEC) -> Situation:
    """The lab's situation. Raises SpecError without precomputed data for (context, codec)."""
    found = precomputed.load(context, codec)
    if found is None:
        raise SpecError(f"no precomputed data for {context} under codec {codec}; the lab uses {CONTEXT} and {CODEC}")
    return Situation(found.manifest, found.costs)


def teaching_traces() -> list[Trace]:
    """The six links with a story, in the order of the exercises."""
    return [library.load(name) for name in library.TEACHING]


def short_name(trace: Trace) -> str:
    """`cliff` for `lab-cliff`."""
    return trace.name.removeprefix("lab-")


@dataclass(frozen=True)
class Asked:
    """One call of a policy and its answer."""

    observation: Observation
    level: LevelOrText
    reason: Mapping[str, float]
    seconds: float
