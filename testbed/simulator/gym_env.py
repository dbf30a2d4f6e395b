"""`KVStream-v0`: the transfer of one context as a Gymnasium environment, over the simulator's own sessions.

    import gymnasium
    env = gymnasium.make("kvstream.testbed.simulator.gym_env:KVStream-v0")

An episode is a session. A step chooses one chunk: action l below the number of levels takes that level, the last
action is `text`. The observation is `kvstream.policies.features`, what a policy sees as numbers without units. The
rewards of an episode sum to minus its distortion, in distortions of the smallest level, less `miss` if the
deadline is missed.

The simulator calls its policy, whereas an agent calls the environment. So a step runs the session again from its start
with the actions so far, which the simulator repeats exactly, up to the next choice. Seven chunks take seven sessions,
some milliseconds in all, and no part of a session is implemented twice.

Needs the extra [gym].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from kvstream.policies import features
from kvstream.policies.api import TEXT, Choice, LevelOrText, Observation
from kvstream.testbed.errors import SpecError
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.session.record import SessionFailed
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.simulator.simulator import simulate
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.workloads import precomputed
from kvstream.traces import library
from kvstream.traces.framing import goodput_per_capacity
from kvstream.traces.resolve import open_trace
from kvstream.traces.trace import Trace

Floats = NDArray[np.float32]
OFFSET_S = 10.0
"""A session begins at most this far into its trace."""


def tuning_traces() -> tuple[str, ...]:
    """The halves of the trace families that policies may be tuned on, at rates at which the shipped levels differ.

    The other halves are for reporting.
    """
    names = [name for family in library.families("tune") for name in library.family_names(family, "tune")]
    return tuple(f"{name},scale={precomputed.FAMILY_RATES}" for name in names)


class KVStreamEnv(gymnasium.Env[Floats, np.int64]):
    """One context under one codec; trace, start, deadline and round trip are drawn for each episode."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        context: str = "docs",
        codec: str = "kvstream",
        *,
        traces: Sequence[str] | None = None,
        deadlines_s: Sequence[float] = (0.7, 1.0, 1.5),
        rtts_s: Sequence[float] = (0.0, 0.04),
        depth: int = 2,
        miss: float = 6.0,
        offer: tuple[Manifest, Costs] | None = None,
    ) -> None:
        """`traces` are trace specs, by default `tuning_traces`. `offer` replaces the shipped context."""
        if offer is None:
            found = precomputed.load(context, codec)
            if found is None:
                raise SpecError(f"context {context!r} is not shipped under codec {codec!r}; give an offer")
            offer = found.manifest, found.costs
        self.manifest, self.costs = offer
        self.n_levels = len(self.manifest.levels)
        self.action_space = spaces.Discrete(self.n_levels + 1)
        self.observation_space = spaces.Box(-1.0, 1.0, (features.length(self.n_levels),), np.float32)
        self._names = tuple(traces or tuning_traces())
        self._deadlines_s, self._rtts_s = tuple(deadlines_s), tuple(rtts_s)
        self._depth, self._miss = depth, miss
        self._goodputs: dict[str, Trace] = {}
        self._actions: list[LevelOrText] = []
        self._unit: dict[str, Any] = {}

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Floats, dict[str, Any]]:
        """A new session. `options` may fix `trace`, `offset_s`, `deadline_s` and `rtt_s`; otherwise they are drawn."""
        super().reset(seed=seed)
        drawn: dict[str, Any] = {
            "trace": self._names[self.np_random.integers(len(self._names))],
            "offset_s": float(self.np_random.uniform(0.0, OFFSET_S)),
            "deadline_s": self._deadlines_s[self.np_random.integers(len(self._deadlines_s))],
            "rtt_s": self._rtts_s[self.np_random.integers(len(self._rtts_s))],
        }
        self._unit = drawn | dict(options or {})
        self._goodput = self._link(self._unit["trace"], self._unit["offset_s"])
        self._actions = []
        obs, _ = self._ask()
        if obs is None:
            raise SpecError(f"the link of {self._unit['trace']} never carries the manifest")
        return features.features(obs), dict(self._unit)

    def step(self, action: np.int64) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """Choose for the next chunk. Text where nothing can be recomputed counts as the smallest level."""
        level: LevelOrText = TEXT if int(action) == self.n_levels else int(action)
        if level == TEXT and self.costs.recompute_s is None:
            level = 0
        chunk = self.manifest.chunks[len(self._actions)]
        ladder = self.manifest.levels
        reward = 0.0
        if level != TEXT:
            reward = -chunk.tokens / self.manifest.tokens * ladder[int(level)].distortion / ladder[0].distortion
        self._actions.append(level)
        obs, info = self._ask()
        if obs is not None:
            return features.features(obs), reward, False, False, info
        if not info["met"]:
            reward -= self._miss
        return np.zeros(self.observation_space.shape, np.float32), reward, True, False, info  # type: ignore[arg-type]

    def _ask(self) -> tuple[Observation | None, dict[str, Any]]:
        """The next observation after the actions so far; None, and the outcome, when the session is over."""
        unit = self._unit
        try:
            record = simulate(
                self.manifest,
                _Script(self._actions),
                self._goodput,
                SessionSettings(unit["deadline_s"], depth=self._depth),
                costs=self.costs,
                rtt_s=unit["rtt_s"],
            )
        except _AskedError as question:
            return question.obs, {}
        except SessionFailed:
            return None, {"met": False, "ttft_s": None, "distortion": None}
        return None, {"met": record.met, "ttft_s": record.ttft_s, "distortion": record.distortion}

    def _link(self, name: str, offset_s: float) -> Trace:
        """A trace's goodput from the session's start."""
        if name not in self._goodputs:
            self._goodputs[name] = open_trace(name).scaled(goodput_per_capacity())
        trace = self._goodputs[name]
        return trace.shifted(offset_s) if offset_s and trace.per == "time" else trace


class _AskedError(BaseException):
    """The script has no more answers. Not an Exception, because a session survives those of its policy."""

    def __init__(self, obs: Observation) -> None:
        self.obs = obs


class _Script:
    """A policy that repeats the actions so far."""

    def __init__(self, actions: Sequence[LevelOrText]) -> None:
        self._actions = iter(tuple(actions))

    def choose(self, obs: Observation) -> Choice:
        level = next(self._actions, None)
        if level is None:
            raise _AskedError(obs)
        return Choice(level)


def register() -> None:
    """Register the id with Gymnasium."""
    if "KVStream-v0" not in gymnasium.registry:
        gymnasium.register("KVStream-v0", entry_point="kvstream.testbed.simulator.gym_env:KVStreamEnv")


register()
