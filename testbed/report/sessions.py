"""What the session viewer shows: a session's cell, cut down to what is drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]

MOST_SAMPLES = 400
"""Link samples kept of a session; more would not be seen."""

MOST_BYTES = 6_000_000
"""The page holds sessions up to this size in all; the cells hold every one."""

_ROW = ("unit_id", "scheme", "context", "trace", "deadline_s", "ttft_s", "met", "status", "why", "distortion")
_CHUNK = ("chunk", "level", "bytes", "request_s", "first_byte_s", "last_byte_s", "decode_start_s", "decode_end_s")


def session(cell: Mapping[str, Any], n_levels: int) -> Json:
    """One session for the viewer. Times in seconds, rates in bit/s, delivered bytes as counted at layer 2."""
    row = cell["row"]
    return {
        **{key: row.get(key) for key in _ROW},
        "n_levels": n_levels,
        "oracle_levels": row.get("oracle_levels") or [],
        "oracle_distortion": row.get("oracle_distortion"),
        "chunks": [chunk(record) for record in cell["chunks"]],
        "link": link(within_view(cell["link"], row)),
    }


def chunk(record: Mapping[str, Any]) -> Json:
    """One chunk: times rounded to 0.1 ms, reasons to five digits."""
    return {
        **{key: _short(record.get(key)) for key in _CHUNK},
        "reason": {key: float(f"{value:.5g}") for key, value in (record.get("reason") or {}).items()},
        "fault": record.get("fault"),
    }


def link(samples: Sequence[Mapping[str, Any]]) -> Json:
    """Samples as columns, thinned so that every kept one stands for as many; the last one always stays."""
    step = max(1, -(-len(samples) // MOST_SAMPLES))
    kept = [*samples[::step], *(samples[-1:] if samples and (len(samples) - 1) % step else [])]
    return {
        "t": [_short(sample["t_s"]) for sample in kept],
        "capacity": [round(sample["capacity_bps"]) for sample in kept],
        "delivered": [round(sample["delivered_bytes"]) for sample in kept],
    }


def within_view(samples: Sequence[Json], row: Mapping[str, Any]) -> list[Json]:
    """Samples until the session is over and its deadline past; what the link did afterwards belongs to nobody."""
    end_s = max(row["deadline_s"] * 1.08, (row["ttft_s"] or row["deadline_s"] * 2) * 1.03)
    return [sample for sample in samples if sample["t_s"] <= end_s]


def embedded(cells: Sequence[Mapping[str, Any]], levels: Mapping[str, Sequence[Any]], first: str) -> tuple[str, int]:
    """(JSON safe inside a script element, number of units left out for size); unit `first` is always in."""
    units: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        units.setdefault(cell["row"]["unit_id"], []).append(cell)
    order = sorted(units, key=lambda unit: (unit != first, unit))
    parts: list[str] = []
    size, left_out = 0, 0
    for unit in order:
        part = [json.dumps(session(cell, n_levels(cell["row"], levels)), separators=(",", ":")) for cell in units[unit]]
        size += sum(map(len, part))
        if parts and size > MOST_BYTES:
            left_out += 1
            size -= sum(map(len, part))
            continue
        parts += part
    return "[" + ",".join(parts).replace("</", "<\\/") + "]", left_out


def n_levels(row: Mapping[str, Any], levels: Mapping[str, Sequence[Any]]) -> int:
    """Levels of the row's codec: from the manifest, else as many as were seen."""
    known = levels.get(row["codec"]) or levels.get(row["codec"].partition(",")[0])
    if known:
        return len(known)
    seen = [level for level in [*row["levels"], *(row.get("oracle_levels") or [])] if isinstance(level, int)]
    return 1 + max(seen, default=0)


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
