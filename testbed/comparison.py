"""`kvstream compare`: the schemes of two runs on the same units, in one table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from testbed import summary
from testbed.errors import SpecError
from testbed.results import Run

_SETTINGS = ("traces", "workload")
"""What units rest on beside their own facts, in a run's manifest."""
_FACTS = ("context", "trace", "offset_s", "deadline_s", "link", "seed", "model", "backend")


def compare(before: str, after: str) -> dict[str, Any]:
    """A summary over both runs; schemes are called `scheme@run`, the baseline is the first run's.

    Raises SpecError where the runs' units differ: numbers from different situations are not comparable.
    """
    runs = [Run.open(before), Run.open(after)]
    labels = [run.path.resolve().name for run in runs]
    if labels[0] == labels[1]:
        labels = ["before", "after"]
    rows = [run.rows() for run in runs]
    units = [{row["unit_id"]: tuple(row[fact] for fact in _FACTS) for row in part} for part in rows]
    _same(units[0], units[1], before, after)
    for name, one, other in _settings(runs):
        if one != other:
            raise SpecError(f"{before} and {after} differ in {name}, so their units are not the same")
    combined = [
        row | {"scheme": f"{row['scheme']}@{label}"} for part, label in zip(rows, labels, strict=True) for row in part
    ]
    first = runs[0].manifest
    baseline = f"{first['experiment']['baseline'] or first['schemes'][0]['name']}@{labels[0]}"
    names = [[scheme["name"] for scheme in run.manifest["schemes"]] for run in runs]
    pairs = {f"{name}@{labels[1]}": f"{name}@{labels[0]}" for name in names[1] if name in names[0]}
    return summary.summarise(combined, baseline=baseline, pairs=pairs)


def text(result: Mapping[str, Any], width: float = math.inf) -> str:
    """The table, the paired differences of each scheme to itself before and to the baseline, and one line in words."""
    lines = [summary.text(dict(result), width), ""]
    for name, versus in _differences(result):
        words = f"{name} - {versus['baseline']}: deadlines met {versus['met'] * 100:+.1f} points"
        if versus["met_low"] is not None:
            words += f" [{versus['met_low'] * 100:+.1f}, {versus['met_high'] * 100:+.1f}]"
        if versus["distortion"] is not None:
            words += f", distortion {summary.nats(versus['distortion'], '+')} nats"
        if versus["distortion_low"] is not None:
            low, high = (summary.nats(versus[f"distortion_{end}"], "+") for end in ("low", "high"))
            words += f" [{low}, {high}]"
        lines.append(f"{words} over {versus['n']} units")
    return "\n".join([*lines, "", str(result["verdict"])])


def _differences(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(scheme, its difference): first to itself in the other run, then of every scheme to the baseline."""
    shown = list(result.get("pairs", {}).items())
    known = {(name, versus["baseline"]) for name, versus in shown}
    for entry in result["schemes"]:
        versus = entry["versus"]
        if versus is not None and (entry["scheme"], versus["baseline"]) not in known:
            shown.append((entry["scheme"], versus))
    yield from ((name, versus) for name, versus in shown if versus["met"] is not None)


def _settings(runs: Sequence[Run]) -> Iterator[tuple[str, Any, Any]]:
    """(name, the first run's, the second's) of everything that must agree beside the units' own facts."""
    one, other = (run.manifest for run in runs)
    for name in _SETTINGS:
        yield name, one.get(name), other.get(name)
    yield "chunk_tokens", one["experiment"].get("chunk_tokens"), other["experiment"].get("chunk_tokens")


def _same(one: Mapping[str, Any], other: Mapping[str, Any], before: str, after: str) -> None:
    if not one or not other:
        raise SpecError(f"{before if not one else after}: no session has finished there; nothing can be compared")
    differing = sorted(unit for unit in {*one, *other} if one.get(unit) != other.get(unit))
    if differing:
        raise SpecError(
            f"{before} and {after} differ in {len(differing)} units (such as {differing[0]}); "
            "compare runs of the same contexts, traces, offsets, deadlines, links, seeds, model and backend"
        )
