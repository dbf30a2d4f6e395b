"""Our own format: CSV rows `duration_s,rate_bps[,delay_s][,loss]` under a header that says where the rates come from.

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
from dataclasses import asdict
from typing import Any, cast

import numpy as np

from kvstream.traces.errors import TraceError
from kvstream.traces.formats import numbers
from kvstream.traces.formats.base import Format, Options, rows_of, trace_of
from kvstream.traces.formats.sabre import parse_json
from kvstream.traces.formats.text import Text
from kvstream.traces.trace import MAX_RATE_BPS, MIN_ROW_S, Provenance, Trace

MAGIC = "# kvstream-trace 1"
LABELS = ("name", "end", "kind", "per", "story", "sha256")
COLUMNS = {"duration_s": np.inf, "rate_bps": MAX_RATE_BPS, "delay_s": np.inf, "loss": 1.0}


def read(text: Text, options: Options) -> Trace:
    labels: dict[str, str] = {}
    records: list[Provenance] = []
    names: list[str] = []
    rows = text.rows(comments=True)
    first = next(rows)
    if first[1] != MAGIC:
        raise text.error(first[0], f"{first[1][:40]!r}; this format begins with {MAGIC!r}")
    for line, row in rows:
        if not row.startswith("#"):
            names = _header(text, line, row, labels.get("per", "time"))
            break
        key, _, value = (piece.strip() for piece in row[1:].partition(":"))
        if key == "provenance":
            records.append(_record(text, line, value))
        elif key in LABELS and key not in labels:
            labels[key] = value
        else:
            raise text.error(
                line, f"unknown or duplicate header {key[:40]!r}; choose from {', '.join(LABELS)}, provenance"
            )
    if not names:
        raise TraceError(f"{text.source}: a header and no rows")
    columns = dict(zip(names, numbers.table(text, len(names)).columns, strict=True))
    if sum(block.startswith(b"#") + block.count(b"\n#") for block in text.blocks()) > line - 1:
        late = next(number for number, row in text.rows(line, comments=True) if row.startswith("#"))
        raise text.error(late, "a comment among the rows; they stand before the first")
    for place, (name, column) in enumerate(columns.items()):
        low = MIN_ROW_S if name == "duration_s" else 0.0
        numbers.checked(text, column, place, name, low, COLUMNS[name])
    given = {key: labels[key] for key in ("end", "kind", "per") if key in labels}
    trace = trace_of(
        text,
        "kvstream",
        columns.get("duration_s", []),
        columns["rate_bps"],
        delay_s=columns.get("delay_s"),
        loss=columns.get("loss"),
        name=labels.get("name", ""),
        story=labels.get("story", ""),
        records=tuple(records),
        **cast(Any, given),
    )
    if labels.get("sha256", trace.sha256) != trace.sha256:
        raise TraceError(
            f"{text.source}: the rows do not match the header's sha256; the file was damaged or edited "
            "(if you edited it, remove the sha256 line)"
        )
    return trace


def _header(text: Text, line: int, row: str, per: str) -> list[str]:
    names = [name.strip() for name in row.split(",")]
    needed = ["rate_bps"] if per == "chunk" else ["duration_s", "rate_bps"]
    if names[: len(needed)] != needed or len(set(names)) != len(names) or any(name not in COLUMNS for name in names):
        raise text.error(line, f"columns are {row[:60]!r}; {','.join(needed)}[,delay_s][,loss] expected")
    return names


def _record(text: Text, line: int, value: str) -> Provenance:
    content = parse_json(text, value, line)
    texts = ("source", "format", "licence", "sha256", "chosen")
    good = isinstance(content, dict) and all(isinstance(content.get(key, ""), str) for key in texts)
    if not good or not {"source", "format"} <= set(content) <= {*texts, "transforms"}:
        raise text.error(line, "provenance is JSON with source, format, and optionally licence, transforms, sha256")
    transforms = content.pop("transforms", [])
    if not isinstance(transforms, list) or not all(isinstance(item, str) for item in transforms):
        raise text.error(line, "provenance: transforms must be a list of strings")
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
    return next(text.rows(comments=True))[1] == MAGIC


FORMAT = Format(
    name="kvstream",
    unit="bit/s",
    edge="duration_s, explicit",
    kind=None,
    fits=fits,
    read=read,
    write=write,
)
