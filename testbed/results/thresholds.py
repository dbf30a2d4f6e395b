"""Thresholds for CI: `--fail-if 'cachegen.violations>0.1'`.

A threshold is judged at the favourable end of the metric's interval: it is violated only where the measurement is
certain enough, so that noise does not fail a job. Metrics without an interval are judged by their value; where
traces are too few for an interval of a share, the narrower one of independent units has to do.

A threshold that nothing could violate on the run's units would be a job that cannot fail, and is refused beforehand.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from kvstream.testbed.errors import SpecError
from kvstream.testbed.results import stats
from kvstream.testbed.results.words import many
from kvstream.traces.errors import TraceError
from kvstream.traces.nearest import nearest
from kvstream.traces.units import parse_quantity

METRICS: Mapping[str, str] = {
    "violations": "share of sessions that violated the SLO (missed the deadline)",
    "met": "share of sessions that met the deadline",
    "distortion": "mean nats",
    "distortion_met": "mean nats over the sessions that met the deadline",
    "regret": "mean nats above the oracle",
    "measured_kl": "mean nats, measured",
    "ttft_p50": "seconds",
    "ttft_p95": "seconds",
    "ttft_p99": "seconds",
    "answers": "share of correct answers",
    "bytes": "mean bytes per session",
}
SHARES: Final = ("violations", "met", "answers")
"""Metrics that lie between 0 and 1."""
WITH_INTERVAL: Final = ("violations", "met")

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}
_THRESHOLD = re.compile(r"\s*(?P<scheme>\S+)\.(?P<metric>[a-z0-9_]+)\s*(?P<op>>=|<=|>|<)\s*(?P<value>\S+)\s*")


@dataclass(frozen=True)
class Threshold:
    """Violated when `scheme.metric op value` holds even at the favourable end of the interval."""

    scheme: str
    metric: str
    op: Literal[">", "<", ">=", "<="]
    value: float

    def __str__(self) -> str:
        return f"{self.scheme}.{self.metric}{self.op}{self.value:g}"

    @property
    def upward(self) -> bool:
        """Whether large values violate it."""
        return self.op.startswith(">")


@dataclass(frozen=True)
class Judged:
    """A threshold, and what became of it."""

    threshold: str
    is_violated: bool
    words: str
    """What was measured."""

    def __str__(self) -> str:
        return f"{self.threshold}: {self.words}"


def parse(text: str) -> Threshold:
    """`scheme.metric>value` to a threshold. Raises SpecError listing the metrics."""
    match = _THRESHOLD.fullmatch(text)
    if match is None:
        hint = "'worse by' needs two runs: kvstream compare BEFORE AFTER" if "worse by" in text else (
            "write SCHEME.METRIC>VALUE, as in 'cachegen.violations>0.1'")  # fmt: skip
        raise SpecError(f"--fail-if {text!r}: {hint}")
    metric = match["metric"]
    if metric not in METRICS:
        raise SpecError(f"--fail-if {text!r}: unknown metric {metric!r}; {nearest(metric, METRICS)}")
    try:
        value = parse_quantity(match["value"])
    except TraceError as error:
        raise SpecError(f"--fail-if {text!r}: {error}") from error
    check_share(text, metric, value)
    return Threshold(match["scheme"], metric, match["op"], value)  # type: ignore[arg-type]


def check_share(text: str, metric: str, value: float) -> None:
    """Raise SpecError for a share that is none."""
    if metric in SHARES and not 0.0 <= value <= 1.0:
        percent = f"; {value:g} % is {value / 100:g}" if 1.0 < value <= 100.0 else ""
        raise SpecError(f"--fail-if {text!r}: {metric} is a share from 0 to 1{percent}")


def check(thresholds: Iterable[Threshold], schemes: Collection[str], traces: Sequence[str]) -> None:
    """Raise SpecError for a threshold on a scheme that is not part of the run, or one that cannot be violated on
    units over these `traces`, one name per unit (none are given where they are not known)."""
    for threshold in thresholds:
        check_scheme(f"--fail-if {threshold}", threshold.scheme, schemes)
        if traces:
            _check_that_it_can_fail(threshold, traces)


def check_scheme(what: str, scheme: str, schemes: Collection[str]) -> None:
    """Raise SpecError for an unknown scheme."""
    if scheme not in schemes:
        raise SpecError(f"{what}: unknown scheme {scheme!r}; {nearest(scheme, schemes)}")


def _check_that_it_can_fail(threshold: Threshold, traces: Sequence[str]) -> None:
    exceeds = _OPERATORS[threshold.op]
    if threshold.metric not in WITH_INTERVAL:
        worst = (1.0 if threshold.metric in SHARES else math.inf) if threshold.upward else 0.0
        if not exceeds(worst, threshold.value):
            raise SpecError(f"--fail-if {threshold} cannot fail: {threshold.metric} is never "
                            f"{'above' if threshold.upward else 'below'} {worst:g}")  # fmt: skip
        return
    certain = reach(traces)
    if exceeds(certain if threshold.upward else 1.0 - certain, threshold.value):
        return
    share = threshold.value if threshold.upward else 1.0 - threshold.value
    need = f"use at least {many(traces_to_reach(share), 'trace')}, or " if share < 1.0 else ""
    # rounded towards what can fail
    possible = math.ceil(100 * certain - 1) / 100
    nearest = f"{threshold.op[0]}{possible if threshold.upward else 1.0 - possible:.2g}"
    raise SpecError(
        f"--fail-if {threshold} cannot fail with {many(len(traces), 'unit')} on {many(len(set(traces)), 'trace')}, "
        f"whatever is measured: {need}{threshold.metric}{nearest} at most"
    )


def reach(traces: Sequence[str]) -> float:
    """The highest lower end that the interval of a share can have over units on these traces."""
    n, names = len(traces), list(dict.fromkeys(traces))
    if len(names) < stats.MIN_TRACES:
        return stats.wilson(n, n)[0] or 0.0
    lows = []
    # exceptions, on a trace each, tell how alike the sessions of a trace are, which may narrow the interval
    for exceptions in range(min(3, len(names) - 1) + 1):
        outcomes = [True] * n
        for name in names[:exceptions]:
            outcomes[traces.index(name)] = False
        lows.append(stats.rate(outcomes, traces).low or 0.0)
    return max(lows)


def traces_to_reach(share: float) -> int:
    """Units, each on a trace of its own, with which the interval of a share can lie above this one."""
    squared = stats.NORMAL**2
    return max(math.floor(share * squared / (1.0 - share)) + 1, stats.MIN_TRACES)


def judge(threshold: Threshold, summary: Mapping[str, Any]) -> Judged:
    """What a threshold comes to. Raises SpecError for a scheme that did not run."""
    entries = {entry["scheme"]: entry for entry in summary["schemes"]}
    check_scheme(f"--fail-if {threshold}", threshold.scheme, entries)
    measured, favourable = _measure(entries[threshold.scheme], threshold.metric, upward=threshold.upward)
    if measured is None:
        return Judged(str(threshold), True, "nothing was measured")
    bound = "" if favourable == measured else f", favourable end of the interval {favourable:.4g}"
    is_violated = _OPERATORS[threshold.op](favourable, threshold.value)
    return Judged(str(threshold), is_violated, f"measured {measured:.4g}{bound}")


def _measure(entry: Mapping[str, Any], metric: str, *, upward: bool) -> tuple[float | None, float]:
    """(the value, the end of its interval that is least likely to violate a threshold in this direction)."""
    if metric in WITH_INTERVAL:
        if not entry["n"]:
            return None, 0.0
        rate, low, high = entry["met_rate"], entry["met_low"], entry["met_high"]
        if low is None:
            low, high = stats.wilson(entry["met"], entry["n"])
        if metric == "violations":
            rate, low, high = 1 - rate, 1 - high, 1 - low
        return rate, low if upward else high
    if metric == "answers":
        value = entry["answers_right"] / entry["answers"] if entry["answers"] else None
    else:
        value = entry[f"{metric}_s" if metric.startswith("ttft") else metric]
    return value, 0.0 if value is None else value
