"""Margins between two runs, for CI: `kvstream compare BEFORE AFTER --fail-if 'mine.violations worse by 0.05'`.

A margin is judged by the paired difference of a scheme to its former self, with its interval. `worse by` is violated
where the scheme is shown to be worse by more than the margin: the whole interval lies beyond it. `may be worse by` is
the test of non-inferiority: violated unless the whole interval lies within the margin. Between the two lies what the
units do not tell.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvstream.testbed.errors import SpecError
from kvstream.testbed.results import stats
from kvstream.testbed.results.thresholds import Judged, check_scheme, check_share
from kvstream.testbed.results.words import many, nats
from kvstream.traces.errors import TraceError
from kvstream.traces.nearest import nearest
from kvstream.traces.units import Dimension, parse_quantity

METRICS: Final[Mapping[str, tuple[Dimension, float]]] = {
    "violations": ("fraction", 1.0),
    "met": ("fraction", -1.0),
    "answers": ("fraction", -1.0),
    "distortion": ("number", 1.0),
    "distortion_met": ("number", 1.0),
    "measured_kl": ("number", 1.0),
    "ttft": ("time", 1.0),
    "bytes": ("size", 1.0),
}
"""What a margin is measured in, and the sign of a difference that is worse."""
_MARGIN = re.compile(
    r"\s*(?P<scheme>\S+)\.(?P<metric>[a-z0-9_]+)\s+(?P<may>may\s+be\s+)?worse\s+by\s+(?P<value>\S+)\s*(?P<percent>%?)\s*"
)
_FORM: Final = "write 'SCHEME.METRIC worse by MARGIN', as in 'mine.violations worse by 0.05', or 'may be worse by'"


@dataclass(frozen=True)
class Margin:
    """Violated when a scheme is shown to be worse than before by more than `value`; with `strict`, unless it is shown
    not to be."""

    scheme: str
    metric: str
    value: float
    """SI units of the metric; with `relative`, a fraction of what it was before."""
    relative: bool = False
    strict: bool = False

    def __str__(self) -> str:
        value = f"{100 * self.value:g}%" if self.relative else f"{self.value:g}"
        return f"{self.scheme}.{self.metric} {'may be ' if self.strict else ''}worse by {value}"


def parse(text: str) -> Margin:
    """`mine.distortion worse by 5%` to a margin. Raises SpecError."""
    match = _MARGIN.fullmatch(text)
    if match is None:
        raise SpecError(f"--fail-if {text!r}: compare judges differences; {_FORM}")
    metric, value = match["metric"], match["value"] + match["percent"]
    if metric not in METRICS:
        raise SpecError(f"--fail-if {text!r}: unknown metric {metric!r}; {nearest(metric, METRICS)}")
    dimension = METRICS[metric][0]
    relative = value.endswith("%") and dimension != "fraction"
    try:
        margin = parse_quantity(value, "fraction" if relative else dimension)
    except TraceError as error:
        raise SpecError(f"--fail-if {text!r}: {error}") from error
    check_share(text, metric, margin)
    if margin < 0.0:
        raise SpecError(f"--fail-if {text!r}: a margin is 0 or more")
    return Margin(match["scheme"], metric, margin, relative, match["may"] is not None)


def check(margins: Iterable[Margin], schemes: Collection[str], traces: Sequence[str]) -> None:
    """Raise SpecError for an unknown scheme, or a margin that these units cannot decide: `traces` names the trace of
    each unit."""
    n_traces = len(set(traces))
    sample = f"with {many(len(traces), 'unit')} on {many(n_traces, 'trace')}"
    for margin in margins:
        check_scheme(f"--fail-if {margin}", margin.scheme, schemes)
        if n_traces < stats.MIN_TRACES:
            raise SpecError(
                f"--fail-if {margin}: paired intervals need {stats.MIN_TRACES} traces or more; the runs have {n_traces}"
            )
        if METRICS[margin.metric][0] != "fraction" or margin.metric == "answers":
            continue
        if margin.strict:
            even = stats.rate_difference([True] * len(traces), [True] * len(traces), traces).high or 1.0
            if even >= margin.value:
                raise SpecError(
                    f"--fail-if {margin} always fails {sample}: without any difference the interval reaches "
                    f"{even:.2g}; {_enough(margin)}a margin above {even:.2g}, or 'worse by'"
                )
            continue
        worst = -(stats.rate_difference([False] * len(traces), [True] * len(traces), traces).high or 0.0)
        if worst <= margin.value:
            raise SpecError(
                f"--fail-if {margin} cannot fail {sample}, whatever is measured; use more traces, or a margin below "
                f"{worst:.2g}"
            )


def _enough(margin: Margin) -> str:
    """How many traces show that equal schemes are equal within a margin: the interval of no differing pair."""
    if margin.value <= 0.0:
        return "use "
    return f"use at least {many(int(stats.NORMAL / margin.value - 2.0) + 1, 'trace')}, "


def judge(margin: Margin, change: Mapping[str, Any]) -> Judged:
    """What a margin comes to, by the scheme's change (`paired.changes`)."""
    value, low, high = (change[f"{margin.metric}{end}"] for end in ("", "_low", "_high"))
    if value is None or low is None:
        return Judged(str(margin), True, "nothing was measured")
    words = _shown(margin.metric, value, low, high)
    if METRICS[margin.metric][1] < 0.0:
        low, high = -high, -low
    limit = margin.value
    if margin.relative:
        limit *= change[f"{margin.metric}_before"]
        words += f", margin {_shown(margin.metric, limit)}"
    if low > limit:
        return Judged(str(margin), True, f"{words}: shown to be worse")
    if high < limit:
        return Judged(str(margin), False, f"{words}: shown not to be")
    return Judged(str(margin), margin.strict, f"{words}: neither that nor the contrary is shown")


def _shown(metric: str, *values: float) -> str:
    """A difference and, in brackets, its interval, if given."""
    dimension = METRICS[metric][0]
    if dimension == "fraction":
        first, *ends = (f"{100 * value:+.1f}" for value in values)
        unit = "points"
    else:
        first, *ends = (nats(value, "+") if dimension == "number" else f"{value:+.3g}" for value in values)
        unit = {"number": "nats", "time": "s", "size": "bytes"}[dimension]
    interval = f" [{', '.join(ends)}]" if ends else ""
    return f"{first}{interval} {unit}"
