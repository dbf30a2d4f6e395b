"""SLO attainment against the rate of requests, and goodput: the highest rate at which enough requests are in time.

Goodput as DistServe defines it (OSDI 2024, section 1): "the maximum request rate that can be served adhering to the SLO
attainment goal (say, 90%)", here of the SLO on TTFT; divided by the receivers it is its goodput per GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from kvstream.testbed.results import stats

FINE: Final = 1.05
"""Rates around a target are searched until they differ by this factor at most."""
STEPS_DOWN: Final = 8
STEPS_UP: Final = 20
"""Halvings and doublings of the first rate."""
LITTLE: Final = 0.5
"""Attainment below which higher rates are of no interest."""


class Attainment(Protocol):
    """A point of the curve."""

    @property
    def rate(self) -> float: ...
    @property
    def met_rate(self) -> float: ...
    @property
    def met_rates(self) -> Sequence[float]:
        """Of each repetition, in their order."""


@dataclass(frozen=True)
class Goodput:
    """The highest rate at which `target` of the requests meet the deadline, and its interval; requests per second.

    None: not even at the lowest rate that was tried. `is_open`: at the highest one still, so that it is a bound. No
    interval where a repetition has no rate, or where there are fewer than `stats.MIN_TRACES` of them.
    """

    target: float
    rate: float | None
    low: float | None
    high: float | None
    is_open: bool


def attainment(met_rates: Sequence[float]) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of the share of requests in time, with its 95 % interval over independent repetitions."""
    value, *ends = _interval(met_rates)
    low, high = (None if end is None else min(max(end, 0.0), 1.0) for end in ends)
    return value, low, high


def goodput(points: Sequence[Attainment], target: float) -> Goodput:
    """Between the last rate that reaches the target and the first that does not, straight lines."""
    ordered = sorted(points, key=lambda point: point.rate)
    rate, is_open = _crossing([(one.rate, one.met_rate) for one in ordered], target)
    each = [
        _crossing([(one.rate, one.met_rates[repetition]) for one in ordered], target)[0]
        for repetition in range(len(ordered[0].met_rates))
    ]
    known = [one for one in each if one is not None]
    if len(known) < len(each):
        return Goodput(target, rate, None, None, is_open)
    _, low, high = _interval(known)
    return Goodput(target, rate, low, high, is_open)


def _interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """(mean, low, high) over independent repetitions."""
    found = stats.clustered_mean(values, [str(number) for number in range(len(values))])
    assert found.value is not None
    return found.value, found.low, found.high


def _crossing(curve: Sequence[tuple[float, float]], target: float) -> tuple[float | None, bool]:
    before: tuple[float, float] | None = None
    for rate, share in curve:
        if share < target:
            if before is None:
                return None, False
            return before[0] + (rate - before[0]) * (before[1] - target) / (before[1] - share), False
        before = rate, share
    return (before[0], True) if before else (None, False)


def search(measure: Callable[[float], Attainment], targets: Sequence[float], first: float = 1.0) -> list[float]:
    """Rates to measure so that every target's goodput is known to FINE, those measured; ascending.

    `measure` is called once for each. First doubled and halved from `first` on, then bisected.
    """
    met: dict[float, float] = {}

    def at(rate: float) -> float:
        if rate not in met:
            met[rate] = measure(rate).met_rate
        return met[rate]

    top = first
    for _ in range(STEPS_UP):
        if at(top) < LITTLE:
            break
        top *= 2.0
    bottom = first
    for _ in range(STEPS_DOWN):
        if at(bottom) >= max(targets):
            break
        bottom /= 2.0
    for target in targets:
        while True:
            rates = sorted(met)
            failing = next((i for i, rate in enumerate(rates) if met[rate] < target), 0)
            if failing == 0 or rates[failing] / rates[failing - 1] <= FINE:
                break
            at((rates[failing] * rates[failing - 1]) ** 0.5)
    return sorted(met)
