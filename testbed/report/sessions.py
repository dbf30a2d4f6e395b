"""The session viewer's data: a session's cell, reduced to what is drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvstream.traces.errors import TraceError
from kvstream.traces.framing import goodput_per_capacity
from kvstream.traces.resolve import open_trace
from kvstream.traces.trace import Trace

Json: TypeAlias = dict[str, Any]

MAX_SAMPLES = 600
"""Link samples kept per session; more would not be visible."""

MAX_BYTES = 6_000_000
"""Total size of the sessions embedded in the page; the cells hold all of them."""

NONE: Mapping[str, str] = {}
_ROW = (
    "unit_id",
    "scheme",
    "context",
    "trace",
    "offset_s",
    "deadline_s",
    "ttft_s",
    "met",
    "status",
    "why",
    "distortion",
)
_CHUNK = ("chunk", "level", "bytes", "request_s", "first_byte_s", "last_byte_s", "decode_start_s", "decode_end_s")


def session(cell: Mapping[str, Any], n_levels: int, specs: Mapping[str, str] = NONE) -> Json:
    """One session for the viewer. Times in seconds, rates in bit/s, delivered bytes as counted at layer 2.

    `specs` opens traces by their names in the run: `trace_specs`."""
    row = cell["row"]
    return {
        **{key: row.get(key) for key in _ROW},
        "n_levels": n_levels,
        "oracle_levels": row.get("oracle_levels") or [],
        "oracle_distortion": row.get("oracle_distortion"),
        "chunks": [chunk(record) for record in cell["chunks"]],
        "link": link(within_view(cell["link"] or virtual_link(row, cell["chunks"], specs), row)),
    }


def chunk(record: Mapping[str, Any]) -> Json:
    """One chunk: times rounded to 0.1 ms, reasons to five digits."""
    return {
        **{key: _short(record.get(key)) for key in _CHUNK},
        "reason": {key: float(f"{value:.5g}") for key, value in (record.get("reason") or {}).items()},
        "fault": record.get("fault"),
    }


def link(samples: Sequence[Mapping[str, Any]]) -> Json:
    """Samples as columns, thinned evenly; the last one is always kept."""
    step = max(1, -(-len(samples) // MAX_SAMPLES))
    kept = [*samples[::step], *(samples[-1:] if samples and (len(samples) - 1) % step else [])]
    return {
        "t": [_short(sample["t_s"]) for sample in kept],
        "capacity": [round(sample["capacity_bps"]) for sample in kept],
        "delivered": [round(sample["delivered_bytes"]) for sample in kept],
    }


def trace_specs(manifest: Mapping[str, Any]) -> dict[str, str]:
    """[name of a trace]: the spec that opens it, as the run's manifest has it."""
    return {name: said["spec"] for name, said in manifest.get("provenance", {}).items()}


def virtual_link(
    row: Mapping[str, Any], chunks: Sequence[Mapping[str, Any]], specs: Mapping[str, str] = NONE
) -> list[Json]:
    """Samples for a simulated session, which has none: the trace itself, and bytes as it carried them."""
    trace = _trace_of(row, specs)
    end_s = max(row["deadline_s"], row["ttft_s"] or 0.0) + 0.1
    capacity = [] if trace is None else trace.changes(0.0, end_s)
    arrivals, free_s = [], 0.0
    for record in sorted((c for c in chunks if c["last_byte_s"] is not None), key=lambda c: c["last_byte_s"]):
        begin_s = max(free_s, record["first_byte_s"])
        free_s = record["last_byte_s"]
        arrivals.append((begin_s, max(free_s, begin_s), record["bytes"] / goodput_per_capacity()))
    times_s = np.arange(MAX_SAMPLES) * end_s / MAX_SAMPLES
    steps_s, rates_bps = np.array([(0.0, 0.0), *capacity]).T
    rows = np.searchsorted(steps_s, times_s, side="right") - 1
    delivered = sum((size * _arrived(trace, at, until, times_s) for at, until, size in arrivals), np.zeros(MAX_SAMPLES))
    columns = zip(times_s.tolist(), rates_bps[rows].tolist(), delivered.tolist(), strict=True)
    return [{"t_s": t_s, "capacity_bps": rate, "delivered_bytes": size} for t_s, rate, size in columns]


def _trace_of(row: Mapping[str, Any], specs: Mapping[str, str]) -> Trace | None:
    """What the link carried over the session's time; None where that is not known: a trace with one rate per chunk, or
    a file that no longer exists."""
    try:
        trace = open_trace(specs.get(row["trace"], row["trace"]))
    except TraceError:
        return None
    if trace.per == "chunk":
        return None
    return trace.shifted(row["offset_s"]) if row["offset_s"] else trace


def _arrived(trace: Trace | None, begin_s: float, end_s: float, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """[time]: of a chunk that arrives from `begin_s` to `end_s`, the part that has by then: as the link carries it, so
    that nothing arrives during an outage."""
    within_s = np.clip(times_s, begin_s, end_s)
    if trace is not None and (whole := trace.bits_by(end_s) - trace.bits_by(begin_s)) > 0.0:
        share: NDArray[np.float64] = (trace.bits_by(within_s) - trace.bits_by(begin_s)) / whole
    else:
        share = (within_s - begin_s) / max(end_s - begin_s, 1e-12)
    return np.where(times_s >= end_s, 1.0, share)


def within_view(samples: Sequence[Json], row: Mapping[str, Any]) -> list[Json]:
    """Samples until the session is over and its deadline past; later ones belong to no session."""
    end_s = max(row["deadline_s"] * 1.08, (row["ttft_s"] or row["deadline_s"] * 2) * 1.03)
    return [sample for sample in samples if sample["t_s"] <= end_s]


def embedded(
    cells: Sequence[Mapping[str, Any]],
    levels: Mapping[str, Sequence[Any]],
    first: str,
    specs: Mapping[str, str] = NONE,
) -> tuple[str, int]:
    """(JSON safe inside a script element, number of units omitted for size); unit `first` is always included."""
    units: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        units.setdefault(cell["row"]["unit_id"], []).append(cell)
    order = sorted(units, key=lambda unit: (unit != first, unit))
    parts: list[str] = []
    size = 0
    for place, unit in enumerate(order):
        found = (session(cell, n_levels(cell["row"], levels), specs) for cell in units[unit])
        part = [json.dumps(one, separators=(",", ":")) for one in found]
        size += sum(map(len, part))
        if parts and size > MAX_BYTES:
            return _array(parts), len(order) - place
        parts += part
    return _array(parts), 0


def _array(parts: Sequence[str]) -> str:
    return "[" + ",".join(parts).replace("</", "<\\/") + "]"


def n_levels(row: Mapping[str, Any], levels: Mapping[str, Sequence[Any]]) -> int:
    """Number of levels of the row's codec: from the manifest, else as many as occur."""
    known = levels.get(row["codec"]) or levels.get(row["codec"].partition(",")[0])
    if known:
        return len(known)
    seen = [level for level in [*row["levels"], *(row.get("oracle_levels") or [])] if isinstance(level, int)]
    return 1 + max(seen, default=0)


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
