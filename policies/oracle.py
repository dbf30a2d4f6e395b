"""The clairvoyant optimum, replayed: the plan of least distortion on the true link (`policies.optimum`).

It plans at the first choice, from what the observation says of the present and the forecast of the future, and
follows the plan while it holds. Where reality drifts from the plan (a real link, decode times that were estimates), it
plans again from the actual state. A unit's bound (`testbed.bounds`) needs no replay; this policy shows how much of
it a receiver can have. When nothing meets the deadline it takes the plan with the earliest first token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from policies.api import TEXT, Choice, Forecast, Observation
from policies.errors import PolicyError
from policies.future import flights
from policies.optimum import BEAM, Line, Plan, least_distortion, least_ttft

WIDEST = BEAM * 8
"""A choice has little time: the search stops here, feasible and nearly always optimal."""

TOLERANCE_S = 1e-6


def line_ahead(forecast: Forecast, obs: Observation) -> Line:
    """What is left of the transfer, as the flow line that `policies.optimum` solves; text is the last option."""
    under_way = flights(forecast, obs)
    free_s = obs.now_s + obs.compute_backlog_s
    if under_way:
        last = obs.in_flight[-1]
        if last.level == TEXT:
            cost_s = obs.recompute_s[0] if obs.recompute_s else 0.0
        else:
            cost_s = obs.decode_s[0][last.level]
        free_s = max(free_s - cost_s, under_way[-1][2]) + cost_s
    sizes: list[tuple[float, ...]] = [tuple(map(float, row)) for row in obs.sizes_bytes]
    compute: list[tuple[float, ...]] = list(obs.decode_s)
    total = sum(obs.tokens)
    loss = [
        tuple([tokens / total * nats for nats in row]) for tokens, row in zip(obs.tokens, obs.distortion, strict=True)
    ]
    if obs.recompute_s is not None:
        sizes = [(*row, float(size)) for row, size in zip(sizes, obs.text_bytes, strict=True)]
        compute = [(*row, cost) for row, cost in zip(compute, obs.recompute_s, strict=True)]
        loss = [(*row, 0.0) for row in loss]
    return Line(
        goodput=forecast.goodput,
        rtt_s=forecast.rtt_s,
        depth=forecast.depth,
        start_s=max(obs.now_s + forecast.rtt_s, under_way[-1][2] if under_way else 0.0),
        compute_free_s=free_s,
        prefill_s=obs.prefill_s,
        sizes_bytes=tuple(sizes),
        compute_s=tuple(compute),
        distortion=tuple(loss),
        first_chunk=obs.chunk,
    )


@dataclass
class Oracle:
    """Least distortion under the deadline, told the future of the link."""

    margin: float = 0.01
    """Fraction of the deadline kept free for what the forecast does not know (0 in a noiseless simulation)."""

    clairvoyant: ClassVar[bool] = True
    _forecast: Forecast | None = field(default=None, init=False, repr=False, compare=False)
    _plan: Plan | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.margin < 1.0:
            raise PolicyError(f"oracle: margin={self.margin}; give a fraction of the deadline from 0 to below 1")

    def foresee(self, forecast: Forecast) -> None:
        self._forecast = forecast

    def choose(self, obs: Observation) -> Choice:
        if self._forecast is None:
            raise PolicyError("oracle was not told the future: call foresee(forecast) before choose")
        line = line_ahead(self._forecast, obs)
        plan = self._still_good(line, obs)
        if plan is None:
            reserve_s = self.margin * obs.deadline_s
            plan = (
                least_distortion(line, obs.deadline_s - reserve_s, widest=WIDEST)
                or least_distortion(line, obs.deadline_s, widest=WIDEST)
                or least_ttft(line)
            )
        option = plan.options[0]
        self._plan = Plan(plan.options[1:], plan.distortion, plan.ttft_s)
        reason = {"planned_ttft_s": plan.ttft_s}
        return Choice(TEXT if option == obs.n_levels else option, reason=reason)

    def _still_good(self, line: Line, obs: Observation) -> Plan | None:
        """The rest of the plan, if it still meets the deadline and time was not gained either."""
        if self._plan is None or len(self._plan.options) != len(line.sizes_bytes):
            return None
        ttft_s, reserve_s = line.ttft_s(self._plan.options), self.margin * obs.deadline_s
        late = ttft_s > obs.deadline_s - reserve_s / 2.0 + TOLERANCE_S
        early = ttft_s < self._plan.ttft_s - reserve_s - TOLERANCE_S
        return None if late or early else Plan(self._plan.options, self._plan.distortion, self._plan.ttft_s)
