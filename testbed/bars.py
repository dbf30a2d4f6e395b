"""Bars for CI: `--fail-if 'cachegen.violations>0.1'`.

A bar is judged on the bound of the interval that is kind to the scheme: it fails only where the measurement is sure
enough, so that a job does not flip on noise. Values without an interval are judged as they are.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from testbed.errors import SpecError
from traces.errors import TraceError
from traces.units import parse_quantity

METRICS: Mapping[str, str] = {
    "violations": "share of sessions that missed the deadline",
    "met": "share of sessions that met it",
    "distortion": "mean nats",
    "regret": "mean nats above the oracle",
    "measured_kl": "mean nats, measured",
    "ttft_p50": "seconds",
    "ttft_p95": "seconds",
    "ttft_p99": "seconds",
    "answers": "share of questions answered right",
    "bytes": "mean bytes of a session",
}

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}
_BAR = re.compile(r"\s*(?P<scheme>[A-Za-z0-9._-]+)\.(?P<metric>[a-z0-9_]+)\s*(?P<op>>=|<=|>|<)\s*(?P<value>\S+)\s*")


@dataclass(frozen=True)
class Bar:
    """Fails when `scheme.metric op value` surely holds."""

    scheme: str
    metric: str
    op: Literal[">", "<", ">=", "<="]
    value: float

    def __str__(self) -> str:
        return f"{self.scheme}.{self.metric}{self.op}{self.value:g}"


def parse(text: str) -> Bar:
    """`cachegen.violations>0.1` to a Bar. Raises SpecError."""
    match = _BAR.fullmatch(text)
    if match is None:
        raise SpecError(f"--fail-if {text!r}: write SCHEME.METRIC>VALUE, as in 'cachegen.violations>0.1'")
    if match["metric"] not in METRICS:
        raise SpecError(f"--fail-if {text!r}: no metric {match['metric']!r}; there are {', '.join(METRICS)}")
    try:
        value = parse_quantity(match["value"])
    except TraceError as error:
        raise SpecError(f"--fail-if {text!r}: {error}") from error
    return Bar(match["scheme"], match["metric"], match["op"], value)  # type: ignore[arg-type]


def check(bars: Iterable[Bar], schemes: Collection[str]) -> None:
    """Raise SpecError for a bar of a scheme that is not there."""
    for bar in bars:
        if bar.scheme not in schemes:
            raise SpecError(f"--fail-if {bar}: there is no scheme {bar.scheme!r}; there are {', '.join(schemes)}")


def missed(bar: Bar, summary: Mapping[str, Any]) -> str | None:
    """Why the bar is missed, in one line; None when it is not. Raises SpecError for a scheme that did not run."""
    entries = {entry["scheme"]: entry for entry in summary["schemes"]}
    check([bar], entries)
    measured, kind = _measure(entries[bar.scheme], bar.metric, upward=bar.op.startswith(">"))
    if measured is None:
        return f"{bar}: nothing was measured"
    if _OPERATORS[bar.op](kind, bar.value):
        return f"{bar}: measured {measured:.4g}" + ("" if kind == measured else f", interval bound {kind:.4g}")
    return None


def _measure(entry: Mapping[str, Any], metric: str, *, upward: bool) -> tuple[float | None, float]:
    """(the value, the bound of its interval that is hardest to exceed in the bar's direction)."""
    if metric in ("violations", "met"):
        if not entry["n"]:
            return None, 0.0
        rate, low, high = entry["met_rate"], entry["met_low"], entry["met_high"]
        if metric == "violations":
            rate, low, high = 1 - rate, 1 - high, 1 - low
        return rate, low if upward else high
    if metric == "answers":
        value = entry["answers_right"] / entry["answers"] if entry["answers"] else None
    else:
        value = entry[f"{metric}_s" if metric.startswith("ttft") else metric]
    return value, 0.0 if value is None else value


def write_junit(path: Path, name: str, bars: Sequence[Bar], summary: Mapping[str, Any]) -> None:
    """The bars as JUnit XML, one test case a bar, for CI systems that show such files."""
    suite = ElementTree.Element("testsuite", name=f"kvstream {name}", tests=str(len(bars)))
    failures = 0
    for bar in bars:
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=str(bar))
        if (why := missed(bar, summary)) is not None:
            failures += 1
            ElementTree.SubElement(case, "failure", message=why)
    suite.set("failures", str(failures))
    ElementTree.indent(suite)
    ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
