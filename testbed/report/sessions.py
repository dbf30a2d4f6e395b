"""What the session viewer shows: a session's cell, cut down to what is drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from traces.errors import TraceError
from traces.framing import goodput_per_capacity
from traces.resolve import open_trace

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
        "link": link(within_view(cell["link"] or virtual_link(row, cell["chunks"]), row)),
    }


def chunk(record: Mapping[str, Any]) -> Json:
    """One chunk: times rounded to 0.1 ms, reasons to five digits."""
    copies = [[_short(at) for at in span] for span in record.get("copies_s") or ()]
    return {
        **{key: _short(record.get(key)) for key in _CHUNK},
        **({"copies_s": copies} if copies else {}),
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


def virtual_link(row: Mapping[str, Any], chunks: Sequence[Mapping[str, Any]]) -> list[Json]:
    """The samples of a simulated session, which kept none: the trace itself, and bytes as chunks came."""
    try:
        trace = open_trace(row["trace"])
        trace = trace.shifted(row["offset_s"]) if row["offset_s"] else trace
        capacity = [] if trace.per == "chunk" else trace.changes(0.0, 2 * row["deadline_s"] + (row["ttft_s"] or 0.0))
    except TraceError:  # a trace file that is not here any more
        capacity = []
    arrivals, free_s = [], 0.0
    for record in sorted((c for c in chunks if c["last_byte_s"] is not None), key=lambda c: c["last_byte_s"]):
        begin_s = max(free_s, record["first_byte_s"])
        free_s = record["last_byte_s"]
        arrivals.append((begin_s, max(free_s - begin_s, 1e-9), record["bytes"] / goodput_per_capacity()))
    samples = []
    end_s = max(row["deadline_s"], row["ttft_s"] or 0.0) + 0.1
    for k in range(MOST_SAMPLES):
        t_s = k * end_s / MOST_SAMPLES
        samples.append(
            {
                "t_s": t_s,
                "capacity_bps": next((rate for at_s, rate in reversed(capacity) if at_s <= t_s), 0.0),
                "delivered_bytes": sum(size * min(1.0, max(0.0, (t_s - at) / took)) for at, took, size in arrivals),
            }
        )
    return samples


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
    size = 0
    for place, unit in enumerate(order):
        part = [json.dumps(session(cell, n_levels(cell["row"], levels)), separators=(",", ":")) for cell in units[unit]]
        size += sum(map(len, part))
        if parts and size > MOST_BYTES:
            return _array(parts), len(order) - place
        parts += part
    return _array(parts), 0


def _array(parts: Sequence[str]) -> str:
    return "[" + ",".join(parts).replace("</", "<\\/") + "]"


def n_levels(row: Mapping[str, Any], levels: Mapping[str, Sequence[Any]]) -> int:
    """Levels of the row's codec: from the manifest, else as many as were seen."""
    known = levels.get(row["codec"]) or levels.get(row["codec"].partition(",")[0])
    if known:
        return len(known)
    seen = [level for level in [*row["levels"], *(row.get("oracle_levels") or [])] if isinstance(level, int)]
    return 1 + max(seen, default=0)


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
