"""`kvstream compare`: the schemes of two runs on the same units, in one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kvstream.testbed.errors import SpecError
from kvstream.testbed.results import stats, summary, table, words
from kvstream.testbed.results.folder import Run
from kvstream.testbed.results.thresholds import Judged

_SETTINGS = ("traces", "workload")
"""Keys of a run's manifest that must agree as well, since units depend on them."""
_FACTS = ("context", "trace", "offset_s", "deadline_s", "link", "seed", "model", "backend")


def compare(before: str, after: str) -> dict[str, Any]:
    """A summary over both runs; schemes are named `scheme@run`, the baseline is the first run's.

    Raises SpecError where the runs' units differ: numbers from different units are not comparable.
    """
    runs = [Run.open(before), Run.open(after)]
    labels = [run.path.resolve().name for run in runs]
    if labels[0] == labels[1]:
        labels = ["before", "after"]
    rows = [run.rows() for run in runs]
    units = [{row["unit_id"]: tuple(row[fact] for fact in _FACTS) for row in part} for part in rows]
    _require_same(units[0], units[1], before, after)
    for name, one, other in _shared_settings(runs):
        if one != other:
            raise SpecError(f"{before} and {after} differ in {name}: their units are not the same")
    combined = [
        row | {"scheme": f"{row['scheme']}@{label}"} for part, label in zip(rows, labels, strict=True) for row in part
    ]
    first = runs[0].manifest
    baseline = f"{first['experiment']['baseline'] or first['schemes'][0]['name']}@{labels[0]}"
    was = _former(*({one["name"]: _policy(one) for one in run.manifest["schemes"]} for run in runs))
    pairs = {f"{name}@{labels[1]}": f"{former}@{labels[0]}" for name, former in was.items()}
    stated = {key: first["experiment"][key] for key in ("target", "max_invalid") if key in first["experiment"]}
    return summary.summarise(combined, baseline=baseline, pairs=pairs, **stated)


def _former(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    """Name after -> name before, of schemes by that name, or else of the only other one with this policy: its settings
    may be what changed. Both map names to policies."""
    was = {name: name for name in after if name in before}
    for name, policy in after.items():
        alike = [[other for other in run if run[other] == policy and other not in was] for run in (before, after)]
        if name not in was and [len(names) for names in alike] == [1, 1]:
            was[name] = alike[0][0]
    return was


def _policy(scheme: Mapping[str, Any]) -> str:
    return str(scheme.get("policy", scheme["name"])).partition(",")[0]


def text(result: Mapping[str, Any], judged: Sequence[Judged] = (), width: float = math.inf) -> str:
    """What changed for each scheme, thresholds, the verdict; then the table, and each scheme against the baseline."""
    blocks = [[*changed(result), *map(str, judged)], [str(result["verdict"])], [table.text(dict(result), width)]]
    blocks.append([_against_baseline(name, versus) for name, versus in _differences(result)])
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def changed(result: Mapping[str, Any]) -> list[str]:
    """Two lines per scheme that both runs have: distortion and SLO violations, before, after and paired."""
    lines = []
    for name, change in result.get("changes", {}).items():
        scheme, former = (one.rpartition("@")[0] for one in (name, result["pairs"][name]["baseline"]))
        scheme += "" if scheme == former else f" (was {former})"
        if change["distortion"] is not None:
            before, after = (words.nats(change[f"distortion_{when}"]) for when in ("before", "after"))
            paired = f"{words.nats(change['distortion'], '+')}{_bracketed(change, 'distortion', words.nats)}"
            lines.append(f"{scheme}: distortion before {before}, after {after} nats, paired {paired}")
        if change["violations"] is not None:
            before, after = (words.percent(change[f"violations_{when}"]) for when in ("before", "after"))
            paired = f"{_points(change['violations'])} points{_bracketed(change, 'violations', _points)}"
            lines.append(f"{scheme}: SLO violations before {before}, after {after}, paired {paired}")
    return lines


def _bracketed(change: Mapping[str, Any], metric: str, shown: Callable[[float, str], str]) -> str:
    """` [-0.004, -0.001]`; where there is no interval, why."""
    low, high = change[f"{metric}_low"], change[f"{metric}_high"]
    if low is None:
        return f" (no interval: fewer than {stats.MIN_TRACES} traces)"
    return f" [{shown(low, '+')}, {shown(high, '+')}]"


def _points(share: float, sign: str = "+") -> str:
    return f"{100 * share:{sign}.1f}"


def _against_baseline(name: str, versus: Mapping[str, Any]) -> str:
    line = f"{name} - {versus['baseline']}: deadlines met {versus['met'] * 100:+.1f} points"
    if versus["met_low"] is not None:
        line += f" [{versus['met_low'] * 100:+.1f}, {versus['met_high'] * 100:+.1f}]"
    if versus["distortion"] is not None:
        line += f", distortion {words.nats(versus['distortion'], '+')} nats"
    if versus["distortion_low"] is not None:
        low, high = (words.nats(versus[f"distortion_{end}"], "+") for end in ("low", "high"))
        line += f" [{low}, {high}]"
    return f"{line} over {words.many(versus['n'], 'unit')}"


def _differences(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(scheme, its difference to the baseline)."""
    for entry in result["schemes"]:
        if entry["versus"] is not None and entry["versus"]["met"] is not None:
            yield entry["scheme"], entry["versus"]


def _shared_settings(runs: Sequence[Run]) -> Iterator[tuple[str, Any, Any]]:
    """(name, the first run's value, the second's) of all settings that must agree."""
    one, other = (run.manifest for run in runs)
    for name in _SETTINGS:
        yield name, one.get(name), other.get(name)
    yield "chunk_tokens", one["experiment"].get("chunk_tokens"), other["experiment"].get("chunk_tokens")


def _require_same(one: Mapping[str, Any], other: Mapping[str, Any], before: str, after: str) -> None:
    if not one or not other:
        raise SpecError(f"{before if not one else after}: no finished session; nothing to compare")
    differing = sorted(unit for unit in {*one, *other} if one.get(unit) != other.get(unit))
    if differing:
        raise SpecError(
            f"{before} and {after} differ in {words.many(len(differing), 'unit')} (such as {differing[0]}); "
            "compare runs of the same contexts, traces, offsets, deadlines, links, seeds, model and backend"
        )
