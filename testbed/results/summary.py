"""A run's summary: statistics of each scheme with intervals, paired differences to a baseline, and a verdict.

Rows are those of `sessions.jsonl`. Comparisons are paired: a unit counts only if every scheme has a session on it and
none of them is invalid; excluded units are counted by reason. A failed session counts as a missed deadline with an
infinite TTFT, so that failing never looks like being fast. A unit is feasible unless even the oracle, with the whole
trace before it, would be late. Reference lines (`reference` in their rows) run on a few units only and are listed
apart: they exclude no unit and are compared with nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvstream.testbed.config.experiment import Experiment
from kvstream.testbed.errors import SpecError
from kvstream.testbed.results import stats
from kvstream.testbed.results.folder import SIMULATED, Run
from kvstream.testbed.results.paired import Json, Row, changes, is_counted, named, units_of, versus
from kvstream.testbed.results.standing import standing
from kvstream.testbed.results.verdict import verdict
from kvstream.testbed.results.words import many

_OF_A_DEADLINE = ("scheme", "clairvoyant", "n", "met", "met_rate", "met_low", "met_high", "distortion",
                  "distortion_low", "distortion_high")  # fmt: skip


def of_run(rows: Sequence[Row], manifest: Mapping[str, Any], baseline: str = "") -> Json:
    """The summary of a run with this manifest: what terminal, report and `summary.json` show.

    `baseline` is the scheme that the others are compared with (default: the experiment's).
    """
    experiment = manifest["experiment"]
    summary = summarise(
        rows,
        [scheme["name"] for scheme in manifest.get("schemes", ()) if not scheme.get("reference")],
        baseline or experiment.get("baseline", ""),
        target=experiment.get("target", Experiment.target),
        max_invalid=experiment.get("max_invalid", Experiment.max_invalid),
    )
    summary["unfinished"] = _unfinished(summary, rows, manifest.get("units", ()))
    summary["exact_answers"] = {
        context: [right, max(asked)]
        for context, right in manifest.get("exact_answers", {}).items()
        if (asked := _known([row for row in rows if row["context"] == context], "answers"))
    }
    return summary


def _unfinished(summary: Json, rows: Sequence[Row], planned: Sequence[Mapping[str, Any]]) -> str:
    """`64 of 558 units so far, on 1 of 9 traces`: what of a run is there; empty where all of it is."""
    units, seen = summary["units"], {row["unit_id"] for row in rows}
    done = units["seen"] - units["incomplete"]
    if done >= len(planned):
        return ""
    words = []
    for key in ("trace", "link"):
        every = {unit[key] for unit in planned}
        here = {unit[key] for unit in planned if unit["unit_id"] in seen}
        if len(every) > 1:
            words.append(f"{len(here)} of {many(len(every), key)}")
    on = f", on {' and '.join(words)}" if words else ""
    return f"{done} of {many(len(planned), 'unit')} so far{on}"


def summarise(
    rows: Sequence[Row],
    schemes: Sequence[str] = (),
    baseline: str = "",
    pairs: Mapping[str, str] | None = None,
    *,
    target: float = Experiment.target,
    max_invalid: float = Experiment.max_invalid,
) -> Json:
    """The content of `summary.json`.

    `schemes` gives the order of the result and which schemes a unit must have to be complete; by default those of
    the rows, in their order. `baseline` is the scheme that the others are compared with, by default the first.
    With `pairs` (scheme to scheme, such as after a change to before it) the verdict is about the pair that differs
    most. `target` is the share of feasible sessions that should meet the deadline; with a larger fraction of invalid
    units than `max_invalid` there is no verdict. Raises SpecError if the baseline is not one of the schemes.
    """
    references: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("reference"):
            references.setdefault(row["scheme"], []).append(row)
    rows = [row for row in rows if not row.get("reference")]
    names = list(dict.fromkeys(schemes or [row["scheme"] for row in rows]))
    baseline = baseline or (names[0] if names else "")
    if names and baseline not in names:
        raise SpecError(f"unknown baseline {baseline!r}; choose from {', '.join(names)}")
    units = units_of(rows)
    complete = {key: cells for key, cells in units.items() if all(name in cells for name in names)}
    invalid = sorted(key for key, cells in units.items() if any(row["status"] == "invalid" for row in cells.values()))
    counted = [cells for cells in units.values() if is_counted(cells, names)]
    feasible = [any(_may_be_met(row) for row in cells.values()) for cells in counted]
    summary: Json = {
        "backend": ", ".join(sorted({row["backend"] for row in rows})),
        "models": sorted({row["model"] for row in rows}),
        "units": {
            "seen": len(units),
            "counted": len(counted),
            "invalid": len(invalid),
            "invalid_reason": _most_frequent([row["why"] for row in rows if row["status"] == "invalid"]),
            "incomplete": sum(key not in complete and key not in set(invalid) for key in units),
            "feasible": sum(feasible),
        },
        "max_invalid": max_invalid,
        "invalid_units": invalid,
        "traces": len({cells[names[0]]["trace"] for cells in counted}),
        "baseline": baseline,
        "schemes": [
            _scheme(
                name,
                [cells[name] for cells in counted],
                [cells[name] for cells in units.values() if name in cells],
                feasible,
            )
            | {"reference": False, "versus": None if name == baseline else versus(counted, name, baseline)}
            for name in names
        ],
    }
    summary["references"] = [
        _scheme(name, [row for row in every if row["status"] != "invalid"], every) | {"reference": True, "versus": None}
        for name, every in sorted(references.items())
    ]
    deadlines_s = sorted({cells[names[0]]["deadline_s"] for cells in counted})
    summary["deadlines"] = [_at_deadline(d, counted, names) for d in deadlines_s] if len(deadlines_s) > 1 else []
    if pairs:
        summary["pairs"] = {name: versus(counted, name, base) for name, base in pairs.items()}
        summary["changes"] = {name: changes(counted, name, base) for name, base in pairs.items()}
    ran = [entry for entry in summary["schemes"] if entry["n"]]
    judged = [entry for entry in ran if not entry["clairvoyant"]] or ran
    summary["target"], summary["standing"] = target, standing(judged, counted, target).to_json()
    summary["verdict"] = verdict(summary, counted)
    return summary


def beside(run: Run, baseline: str = "") -> Json | None:
    """The summary of the same experiment in the simulator, beside an emulated run; None where there is none."""
    simulated = Run(run.path / SIMULATED)
    return of_run(simulated.rows(), simulated.manifest, baseline) if simulated.exists() else None


def _at_deadline(deadline_s: float, counted: Sequence[Mapping[str, Row]], names: Sequence[str]) -> Json:
    """The schemes' statistics over the units of one deadline."""
    units = [cells for cells in counted if cells[names[0]]["deadline_s"] == deadline_s]
    entries = []
    for name in names:
        rows = [cells[name] for cells in units]
        entry = _scheme(name, rows, rows)
        entries.append({key: entry[key] for key in _OF_A_DEADLINE})
    return {"deadline_s": deadline_s, "n": len(units), "schemes": entries}


def _may_be_met(row: Row) -> bool:
    """Whether this session met the deadline, or the oracle could have, as far as is known."""
    return bool(row["met"]) or row.get("oracle_distortion", math.nan) is not None


def _scheme(name: str, rows: Sequence[Row], every: Sequence[Row], feasible: Sequence[bool] = ()) -> Json:
    """Statistics over `rows`, the counted sessions, each on a feasible unit or not (all of them are by default);
    `every` includes the excluded ones."""
    met = stats.rate([bool(row["met"]) for row in rows], [row["trace"] for row in rows])
    possible = [row for row, may in zip(rows, feasible or [True] * len(rows), strict=True) if may]
    ttft = stats.ttft_quantiles([math.inf if row["ttft_s"] is None else row["ttft_s"] for row in rows])
    judged = [row["fidelity"]["ok"] for row in every if "ok" in row["fidelity"]]
    return {
        "scheme": name,
        "policy": every[0]["policy"] if every else "",
        "codec": every[0]["codec"] if every else "",
        "clairvoyant": bool(every and every[0]["clairvoyant"]),
        "n": len(rows),
        "failed": sum(row["status"] == "failed" for row in rows),
        "met": sum(bool(row["met"]) for row in rows),
        "met_rate": met.value,
        "met_low": met.low,
        "met_high": met.high,
        "feasible_n": len(possible),
        **named("feasible", stats.rate([bool(row["met"]) for row in possible], [row["trace"] for row in possible])),
        "ttft_p50_s": _finite(ttft["p50"]),
        "ttft_p90_s": _finite(ttft["p90"]),
        "ttft_p95_s": _finite(ttft["p95"]),
        "ttft_p99_s": _finite(ttft["p99"]),
        **named("distortion", _distortion(rows)),
        **named("distortion_met", _distortion([row for row in rows if row["met"]])),
        "measured_kl": _mean(_known(rows, "measured_kl")),
        "answers_right": sum(_known(rows, "answers_right")),
        "answers": sum(_known(rows, "answers")),
        "bytes": _mean(_known(rows, "bytes")),
        "wasted_bytes": _mean(_known(rows, "wasted_bytes")),
        "regret": _mean(_known(rows, "regret")),
        "regret_n": len(_known(rows, "regret")),
        "policy_faults": sum(_known(rows, "policy_faults")),
        "fidelity_ok": sum(judged),
        "fidelity_n": len(judged),
        "repeats": sum(_known(every, "repeats")),
    }


def _distortion(rows: Sequence[Row]) -> stats.Mean:
    known = [row for row in rows if row["distortion"] is not None]
    return stats.clustered_mean([row["distortion"] for row in known], [row["trace"] for row in known])


def _most_frequent(reasons: Sequence[str]) -> str:
    """One of the reasons given most often; reasons that differ only in numbers count as one."""
    kinds = [re.sub(r"[0-9.]+", "", reason) for reason in reasons]
    return reasons[kinds.index(max(kinds, key=kinds.count))] if reasons else ""


def _known(rows: Sequence[Row], key: str) -> list[Any]:
    return [row[key] for row in rows if row.get(key) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _finite(value: float | None) -> float | None:
    """None for a quantile that falls on a failed session."""
    return None if value is None or math.isinf(value) else value
