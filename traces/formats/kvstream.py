"""Our own format: CSV rows `duration_s,rate_bps[,delay_s][,loss]` under a header that says where they come from.

    # kvstream-trace 1
    # name: step-down-up
    # end: loop
    # kind: capacity
    # per: time
    # story: ...
    # provenance: {"source": "...", "format": "...", "licence": "...", "transforms": [], "sha256": ""}
    # sha256: hash of the content, checked on reading when it is there
    duration_s,rate_bps
    0.3,45000000.0

Lines of `per: chunk` have no duration_s. Numbers are written so that they read back bit for bit.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np

from traces.errors import TraceError
from traces.formats.base import Format, Text, rows_of
from traces.formats.sabre import parse_json
from traces.trace import MAX_RATE_BPS, MAX_ROWS, Provenance, Trace

MAGIC = "# kvstream-trace 1"
LABELS = ("name", "end", "kind", "per", "story", "sha256")
COLUMNS = {"duration_s": np.inf, "rate_bps": MAX_RATE_BPS, "delay_s": np.inf, "loss": 1.0}


def read(text: Text, part: int | None) -> Trace:
    rows = text.rows()
    labels: dict[str, str] = {}
    records: list[Provenance] = []
    columns: dict[str, list[float]] = {}
    first = next(rows)
    if first[1] != MAGIC:
        raise text.error(first[0], f"{first[1][:40]!r}; this format begins with {MAGIC!r}")
    for line, row in rows:
        if row.startswith("#") and not columns:
            key, _, value = (piece.strip() for piece in row[1:].partition(":"))
            if key == "provenance":
                records.append(_record(text, line, value))
            elif key in LABELS and key not in labels:
                labels[key] = value
            else:
                raise text.error(
                    line, f"unknown or doubled header {key[:40]!r}; there are {', '.join(LABELS)}, provenance"
                )
        elif not columns:
            columns = _header(text, line, row, labels.get("per", "time"))
        else:
            fields = row.split(",")
            if len(fields) != len(columns):
                raise text.error(line, f"{len(fields)} columns; the header names {len(columns)}")
            for (name, column), field in zip(columns.items(), fields, strict=True):
                column.append(text.number(line, field, name, 0.0, COLUMNS[name]))
                if name == "duration_s" and column[-1] == 0.0:
                    raise text.error(line, "duration_s is 0; a row must last")
                if len(column) > MAX_ROWS:
                    raise text.error(line, f"more than {MAX_ROWS} rows; cut the file")
    if not columns or not columns["rate_bps"]:
        raise TraceError(f"{text.source}: a header and no rows")
    given = {key: labels[key] for key in ("end", "kind", "per") if key in labels}
    trace = text.trace(
        "kvstream",
        columns.get("duration_s", []),
        columns["rate_bps"],
        delay_s=columns.get("delay_s"),
        loss=columns.get("loss"),
        **cast(Any, given),
    )
    if labels.get("sha256", trace.sha256) != trace.sha256:
        raise TraceError(
            f"{text.source}: the rows do not match the header's sha256; the file was damaged or edited "
            "(if you edited it, remove the sha256 line)"
        )
    return replace(
        trace,
        name=labels.get("name") or trace.name,
        story=labels.get("story", ""),
        provenance=tuple(records) or trace.provenance,
    )


def _header(text: Text, line: int, row: str, per: str) -> dict[str, list[float]]:
    names = [name.strip() for name in row.split(",")]
    needed = ["rate_bps"] if per == "chunk" else ["duration_s", "rate_bps"]
    if names[: len(needed)] != needed or len(set(names)) != len(names) or any(name not in COLUMNS for name in names):
        raise text.error(line, f"columns are {row[:60]!r}; {','.join(needed)}[,delay_s][,loss] is wanted")
    return {name: [] for name in names}


def _record(text: Text, line: int, value: str) -> Provenance:
    content = parse_json(text, value, line)
    good = isinstance(content, dict) and all(
        isinstance(content.get(key, ""), str) for key in ("source", "format", "licence", "sha256")
    )
    if not good or not {"source", "format"} <= set(content) <= {"source", "format", "licence", "transforms", "sha256"}:
        raise text.error(line, "provenance is JSON with source, format, and optionally licence, transforms, sha256")
    transforms = content.pop("transforms", [])
    if not isinstance(transforms, list) or not all(isinstance(item, str) for item in transforms):
        raise text.error(line, "provenance: transforms is a list of texts")
    return Provenance(**content, transforms=tuple(transforms))


def write(trace: Trace) -> str:
    lines = [MAGIC]
    for key in LABELS:
        value = " ".join(str(getattr(trace, key)).split())
        if key != "sha256" and value:
            lines.append(f"# {key}: {value}")
    lines += [f"# provenance: {json.dumps(asdict(record))}" for record in trace.provenance]
    lines.append(f"# sha256: {trace.sha256}")
    return "\n".join([*lines, *rows_of(trace)]) + "\n"


def fits(text: Text) -> bool:
    return text.head()[0] == MAGIC


FORMAT = Format(
    name="kvstream",
    unit="bit/s",
    edge="duration_s, explicit",
    kind=None,
    fits=fits,
    read=read,
    write=write,
)
