"""A run taken apart by setting: what its units share but for the seed (context, trace, link, deadline).

Each setting stands for itself: a mean over deadlines, or over a trace in time and one a chunk, says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from testbed import stats

Json: TypeAlias = dict[str, Any]

AXES: Final = ("context", "trace", "link", "offset_s", "deadline_s")
_SEED = re.compile(r",(seed|name)=[^,]*")


def by_setting(rows: Sequence[Mapping[str, Any]], schemes: Sequence[str]) -> list[Json]:
    """One entry a setting, in the order of the units: violations with Wilson's interval and TTFT of every
    scheme. Units that are invalid for some scheme, or that some scheme has not run, are left out, as in the summary.
    """
    units: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: int(row["unit_id"].partition("-")[0])):  # ids of one run differ in length
        units.setdefault(row["unit_id"], {})[row["scheme"]] = row
    found: dict[tuple[Any, ...], list[Mapping[str, Mapping[str, Any]]]] = {}
    for cells in units.values():
        if all(name in cells and cells[name]["status"] != "invalid" for name in schemes):
            found.setdefault(setting_of(next(iter(cells.values()))), []).append(cells)
    return [
        dict(zip(AXES, setting, strict=True))
        | {"n": len(members), "schemes": {name: _scheme([cells[name] for cells in members]) for name in schemes}}
        for setting, members in found.items()
    ]


def setting_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The row's setting, in the order of AXES: its trace without the seed it was drawn with."""
    return tuple(unseeded(row[axis]) if axis == "trace" else row[axis] for axis in AXES)


def unseeded(trace: str) -> str:
    """A trace's name without the seed it was drawn with."""
    return _SEED.sub("", trace)


def _scheme(rows: Sequence[Mapping[str, Any]]) -> Json:
    missed = sum(not row["met"] for row in rows)
    low, high = stats.wilson(missed, len(rows))
    ttft_s = [row["ttft_s"] for row in rows if row["ttft_s"] is not None]
    distortion = [row["distortion"] for row in rows if row["distortion"] is not None]
    return {
        "violations": missed / len(rows),
        "violations_low": low,
        "violations_high": high,
        "ttft_mean_s": float(np.mean(ttft_s)) if ttft_s else None,
        "ttft_p50_s": float(np.median(ttft_s)) if ttft_s else None,
        "distortion": float(np.mean(distortion)) if distortion else None,
        "bytes": float(np.mean([row["bytes"] for row in rows if row["bytes"] is not None] or [0.0])),
    }


def text(entries: Sequence[Json]) -> str:
    """A table: a row a setting, a column a scheme. Violations where settings have several units, else TTFT."""
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
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    title = "Deadlines missed, by setting" if repeated else "TTFT, by setting"
    body = [
        "  ".join(
            cell.ljust(width) if i < len(axes) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([title, *body])
