"""The clairvoyant optimum, replayed: the plan of least distortion on the true link (`kvstream.policies.optimum`).

It plans before the session's clock runs, or, in the simulator, at the first choice, from what the observation says of
the present and the forecast of the future, and follows the plan while it holds. Where reality drifts from the plan (a
real link, decode times that were estimates), it plans again from the actual state. When no plan meets the deadline it
takes the plan with the earliest first token.

Its plans request a chunk as soon as the first frame of the one before is here, which is what the bound of a unit
(`kvstream.testbed.simulator.oracle_bound`) allows, too. Other policies choose later, so as to know more; a clairvoyant
one gains nothing by that, so a session asks it then. In the simulator, which tells it what compute will take as well,
nothing is left to chance: it replays the bound, and meets every deadline that any plan meets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from kvstream.policies import compiled
from kvstream.policies.api import TEXT, Choice, Forecast, Observation, TrueCompute
from kvstream.policies.errors import PolicyError
from kvstream.policies.future import flights
from kvstream.policies.optimum import BEAM, WIDER, Line, Plan, least_distortion, least_ttft

WIDEST = BEAM * WIDER
"""A choice has little time: the search stops at this many states, feasible and nearly always optimal."""

TOLERANCE_S = 1e-6

ROUNDING_S = 1e-4
"""Of what is in flight, an observation counts whole bytes: at a megabit per second, one is 8 us."""


def line_ahead(forecast: Forecast, obs: Observation) -> Line:
    """The rest of the transfer as the flow line that `kvstream.policies.optimum` solves; text is the last option.

    Where the forecast does not know what computing takes, each step is taken to be slow by its spread.
    """
    under_way = flights(forecast, obs)
    decode_s: tuple[tuple[float, ...], ...] = obs.decode_s
    recompute_s, prefill_s = obs.recompute_s, obs.prefill_s
    if forecast.compute is None:
        free_s = _free_s(obs, under_way)
        slow = math.exp(obs.decode_spread)
        decode_s = tuple([tuple([slow * level_s for level_s in row]) for row in decode_s])
        prefill_s *= math.exp(obs.prefill_spread)
        if recompute_s is not None:
            recompute_s = tuple([math.exp(obs.recompute_spread) * chunk_s for chunk_s in recompute_s])
    else:
        free_s = _true_free_s(forecast.compute, obs, under_way)
        decode_s = tuple([forecast.compute.decode_s[i] for i in obs.remaining])
        prefill_s = forecast.compute.prefill_s
        if forecast.compute.recompute_s is not None:
            recompute_s = tuple([forecast.compute.recompute_s[i] for i in obs.remaining])
    sizes: list[tuple[float, ...]] = [tuple(map(float, row)) for row in obs.sizes_bytes]
    compute: list[tuple[float, ...]] = list(decode_s)
    total = sum(obs.tokens)
    loss = [
        tuple([tokens / total * nats for nats in row]) for tokens, row in zip(obs.tokens, obs.distortion, strict=True)
    ]
    if recompute_s is not None:
        sizes = [(*row, float(size)) for row, size in zip(sizes, obs.text_bytes, strict=True)]
        compute = [(*row, cost) for row, cost in zip(compute, recompute_s, strict=True)]
        loss = [(*row, 0.0) for row in loss]
    return Line(
        goodput=forecast.goodput,
        rtt_s=forecast.rtt_s,
        depth=forecast.depth,
        start_s=max(obs.now_s + forecast.rtt_s, under_way[-1][2] if under_way else 0.0),
        compute_free_s=free_s,
        prefill_s=prefill_s,
        sizes_bytes=tuple(sizes),
        compute_s=tuple(compute),
        distortion=tuple(loss),
        first_chunk=obs.chunk,
    )


def _free_s(obs: Observation, under_way: list[tuple[int, float, float]]) -> float:
    """When the receiver can begin to compute the next chunk, by its estimates."""
    free_s = obs.now_s + obs.compute_backlog_s
    if under_way:
        last = obs.in_flight[-1]
        if last.level == TEXT:
            cost_s = obs.recompute_s[0] if obs.recompute_s else 0.0
        else:
            cost_s = obs.decode_s[0][last.level]
        free_s = max(free_s - cost_s, under_way[-1][2]) + cost_s
    return free_s


def _true_free_s(compute: TrueCompute, obs: Observation, under_way: list[tuple[int, float, float]]) -> float:
    """The same for chunks sent in order, when every step's time is known."""
    arrivals = [(done.chunk, done.level, done.end_s) for done in obs.transfers]
    arrivals += [
        (flying.chunk, flying.level, end_s) for flying, (_, _, end_s) in zip(obs.in_flight, under_way, strict=True)
    ]
    free_s = 0.0
    for chunk, level, end_s in arrivals:
        if isinstance(level, int):
            cost_s = compute.decode_s[chunk][level]
        else:
            cost_s = compute.recompute_s[chunk] if compute.recompute_s else 0.0
        free_s = max(free_s, end_s) + cost_s
    return free_s


@dataclass
class Oracle:
    """Least distortion under the deadline; clairvoyant: sees the future trace."""

    margin: float = 0.01
    """Fraction of the deadline kept free for what the forecast does not know; in the simulator it knows everything."""

    clairvoyant: ClassVar[bool] = True
    _forecast: Forecast | None = field(default=None, init=False, repr=False, compare=False)
    _plan: Plan | None = field(default=None, init=False, repr=False, compare=False)
    _hopeless: bool = field(default=False, init=False, repr=False, compare=False)
    """Whether the plan is the soonest there was, and late."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.margin < 1.0:
            raise PolicyError(f"oracle: margin={self.margin}; give a fraction of the deadline from 0 to below 1")

    def foresee(self, forecast: Forecast) -> None:
        self._forecast, self._plan, self._hopeless = forecast, None, False
        if forecast.first is not None:
            compiled.load()
            self._plan = self._search(line_ahead(forecast, forecast.first), forecast.first, WIDEST)

    def choose(self, obs: Observation) -> Choice:
        if self._forecast is None:
            raise PolicyError("oracle has no forecast; call foresee(forecast) before choose")
        line = line_ahead(self._forecast, obs)
        # where the clock is real, the link stands idle while a plan is sought
        width = WIDEST if self._forecast.first is None else BEAM
        plan = self._still_good(line, obs) or self._search(line, obs, width)
        option = plan.options[0]
        self._plan = Plan(plan.options[1:], plan.distortion, plan.ttft_s)
        reason = {"planned_ttft_s": plan.ttft_s}
        return Choice(TEXT if option == obs.n_levels else option, reason=reason)

    def _reserve_s(self, obs: Observation) -> float:
        """Kept free at the deadline."""
        knows_all = self._forecast is not None and self._forecast.compute is not None
        return 0.0 if knows_all else self.margin * obs.deadline_s

    def _search(self, line: Line, obs: Observation, width: int) -> Plan:
        reserve_s = self._reserve_s(obs)
        plan = (
            least_distortion(line, obs.deadline_s - reserve_s, widest=width)
            or least_distortion(line, obs.deadline_s, widest=width)
            or self._soonest(line)
        )
        self._hopeless = plan.ttft_s > obs.deadline_s
        return plan

    def _still_good(self, line: Line, obs: Observation) -> Plan | None:
        """The rest of the plan, if it still meets the deadline and no time was gained that another plan could use."""
        reserve_s = self._reserve_s(obs)
        ttft_s = self._planned_s(line)
        if self._plan is None or ttft_s == math.inf:
            return None
        late = ttft_s > obs.deadline_s - reserve_s / 2.0 + TOLERANCE_S
        if late and self._hopeless:
            return self._plan  # another search would cost time, and find no more than the last one did
        early = ttft_s < self._plan.ttft_s - reserve_s - TOLERANCE_S
        return None if late or early else self._plan

    def _planned_s(self, line: Line) -> float:
        """When the first token comes if the rest of the plan is followed; inf without a plan for it."""
        if self._plan is None or len(self._plan.options) != len(line.sizes_bytes):
            return math.inf
        return line.ttft_s(self._plan.options)

    def _soonest(self, line: Line) -> Plan:
        """The plan with the earliest first token, or what is left of the present one if that is about as early."""
        soonest = least_ttft(line)
        if self._plan is not None and self._planned_s(line) <= soonest.ttft_s + ROUNDING_S:
            return self._plan
        return soonest
