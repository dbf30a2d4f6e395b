"""A run's statistics by setting: context, trace, link, start offset and deadline, whatever the seed.

Settings are never averaged: a mean over deadlines, or over traces in time and traces per chunk, has no meaning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from kvstream.testbed.results import stats
from kvstream.testbed.results.paired import is_counted, units_of
from kvstream.testbed.terminal import aligned

Json: TypeAlias = dict[str, Any]

AXES: Final = ("context", "trace", "link", "offset_s", "deadline_s")
_SEED = re.compile(r",(seed|name)=[^,]*")


def by_setting(rows: Sequence[Mapping[str, Any]], schemes: Sequence[str]) -> list[Json]:
    """One entry per setting, in the order of the units: SLO violations (with interval) and TTFT of each scheme.
    Units that are invalid for some scheme, or that some scheme has not run, are excluded, as in the summary.
    """
    # ids of one run differ in length
    units = units_of(sorted(rows, key=lambda row: int(row["unit_id"].partition("-")[0])))
    found: dict[tuple[Any, ...], list[Mapping[str, Mapping[str, Any]]]] = {}
    for cells in units.values():
        if is_counted(cells, schemes):
            found.setdefault(setting_of(next(iter(cells.values()))), []).append(cells)
    return [
        dict(zip(AXES, setting, strict=True))
        | {"n": len(members), "schemes": {name: _scheme([cells[name] for cells in members]) for name in schemes}}
        for setting, members in found.items()
    ]


def setting_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The row's setting, in the order of AXES: the trace without its seed."""
    return tuple(unseeded(row[axis]) if axis == "trace" else row[axis] for axis in AXES)


def unseeded(trace: str) -> str:
    """A trace's name without its seed."""
    return _SEED.sub("", trace)


def _scheme(rows: Sequence[Mapping[str, Any]]) -> Json:
    violations = stats.rate([not row["met"] for row in rows], [row["trace"] for row in rows])
    ttft_s = [row["ttft_s"] for row in rows if row["ttft_s"] is not None]
    distortion = [row["distortion"] for row in rows if row["distortion"] is not None]
    return {
        "violations": violations.value,
        "violations_low": violations.low,
        "violations_high": violations.high,
        "ttft_mean_s": float(np.mean(ttft_s)) if ttft_s else None,
        "ttft_p50_s": float(np.median(ttft_s)) if ttft_s else None,
        "distortion": float(np.mean(distortion)) if distortion else None,
        "bytes": float(np.mean([row["bytes"] for row in rows if row["bytes"] is not None] or [0.0])),
    }


def text(entries: Sequence[Json], width: int | None = None) -> str:
    """A table, one row per setting, one column per scheme: SLO violations if a setting has several units, else TTFT."""
    if not entries:
        return ""
    names = list(entries[0]["schemes"])
    axes = [axis for axis in AXES if len({str(entry[axis]) for entry in entries}) > 1]
    repeated = any(entry["n"] > 1 for entry in entries)
    lines = [[*axes, "n", *names]]
    for entry in entries:
        cells = []
        for name in names:
            scheme = entry["schemes"][name]
            if repeated:
                cells.append(f"{scheme['violations'] * 100:.1f} %")
            else:
                cells.append("-" if scheme["ttft_p50_s"] is None else f"{scheme['ttft_p50_s']:.3f} s")
        lines.append([*(str(entry[axis]) for axis in axes), str(entry["n"]), *cells])
    title = "SLO violations by setting" if repeated else "TTFT by setting"
    return "\n".join([title, *aligned(lines, len(axes), width)])
