"""Two schemes on the same units: paired differences, and whether they are significant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from kvstream.testbed.results import stats

Json: TypeAlias = dict[str, Any]
Row: TypeAlias = Mapping[str, Any]
"""A row of `sessions.jsonl`."""

SIGNIFICANCE = 0.05


def units_of(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """[unit]: its rows by scheme, without reference lines."""
    units: dict[str, dict[str, Row]] = {}
    for row in rows:
        if not row.get("reference"):
            units.setdefault(row["unit_id"], {})[row["scheme"]] = row
    return units


def is_counted(cells: Mapping[str, Row], schemes: Iterable[str]) -> bool:
    """Whether a unit counts: every scheme has a session on it, and none of them is invalid."""
    return all(name in cells for name in schemes) and all(row["status"] != "invalid" for row in cells.values())


def versus(counted: Sequence[Mapping[str, Row]], name: str, baseline: str) -> Json:
    """Paired differences `name` minus `baseline` over units; intervals are those of `stats`, by trace.

    `counted` holds the rows of each unit by scheme. `distortion` runs over all units, `distortion_met` over the
    `met_both` units whose deadline both met.
    """
    known = [cells for cells in counted if None not in (cells[name]["distortion"], cells[baseline]["distortion"])]
    both = [cells for cells in known if cells[name]["met"] and cells[baseline]["met"]]
    ours, theirs = ([bool(cells[scheme]["met"]) for cells in counted] for scheme in (name, baseline))
    met = stats.rate_difference(ours, theirs, [cells[name]["trace"] for cells in counted])
    gained = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    lost = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    return {
        "baseline": baseline,
        "n": len(counted),
        "met": met.value,
        "met_low": met.low,
        "met_high": met.high,
        "met_p": stats.mcnemar(gained, lost),
        **named("distortion", _distortion(known, name, baseline)),
        "met_both": len(both),
        **named("distortion_met", _distortion(both, name, baseline)),
    }


def changes(counted: Sequence[Mapping[str, Row]], name: str, baseline: str) -> Json:
    """Every metric's paired difference `name` minus `baseline` with its interval, and its mean before, for a scheme
    (`name`) and what it was (`baseline`). Units in which one of the two has no value are left out of a metric."""
    found: Json = {}
    for metric, value in _VALUES.items():
        pairs = [(value(cells[name]), value(cells[baseline]), cells[name]["trace"]) for cells in counted]
        known = [(now, was, trace) for now, was, trace in pairs if now is not None and was is not None]
        ours, theirs, traces = ([pair[place] for pair in known] for place in range(3))
        by = stats.rate_difference if metric in ("violations", "met") else stats.paired_difference
        found |= named(metric, by(ours, theirs, traces)) | {f"{metric}_n": len(known)}
        for when, values in (("before", theirs), ("after", ours)):
            found[f"{metric}_{when}"] = math.fsum(values) / len(values) if values else None
    return found


def _share_right(row: Row) -> float | None:
    return row["answers_right"] / row["answers"] if row.get("answers") else None


_VALUES: Mapping[str, Callable[[Row], Any]] = {
    "violations": lambda row: not row["met"],
    "met": lambda row: bool(row["met"]),
    "answers": _share_right,
    "distortion": lambda row: row["distortion"],
    "distortion_met": lambda row: row["distortion"] if row["met"] else None,
    "measured_kl": lambda row: row["measured_kl"],
    "ttft": lambda row: row["ttft_s"],
    "bytes": lambda row: row["bytes"],
}
"""A session's value of each metric; None where it has none."""


def named(name: str, mean: stats.Mean) -> Json:
    """A mean and its interval as fields of a summary."""
    return {name: mean.value, f"{name}_low": mean.low, f"{name}_high": mean.high}


def is_significant(difference: Json) -> bool:
    """Whether a difference in deadlines met (from `versus`) is statistically significant at the 5 % level.

    McNemar's test takes units for independent; units on one trace are not, so the interval that is clustered by trace
    must exclude 0 as well. Without an interval nothing is significant.
    """
    low, high = difference["met_low"], difference["met_high"]
    return difference["met_p"] < SIGNIFICANCE and low is not None and (low > 0.0 or high < 0.0)


def _distortion(units: Sequence[Mapping[str, Row]], name: str, baseline: str) -> stats.Mean:
    return stats.paired_difference(
        [float(cells[name]["distortion"]) for cells in units],
        [float(cells[baseline]["distortion"]) for cells in units],
        [cells[name]["trace"] for cells in units],
    )
