"""FCC Measuring Broadband America, `curr_webget.csv`: one web page fetch per row.

Columns: unit_id, dtime (`%Y-%m-%d %H:%M:%S`), target, address, fetch_time, bytes_total, bytes_sec, ...; the seventh is
application bytes per second. A (unit, target) pair is one trace; each fetch stands for the 5 s from its start, in the
order of the file, as Pensieve's converter has it (the fetches themselves were far apart). A header row is allowed.
"""

from __future__ import annotations

import itertools
from array import array
from datetime import datetime

import numpy as np

from kvstream.traces.errors import TraceError
from kvstream.traces.formats.base import Format, Options, choose_part, csv_fields, rate, trace_of
from kvstream.traces.formats.numbers import TOO_MANY
from kvstream.traces.formats.text import Text
from kvstream.traces.trace import MAX_ROWS, Trace

FETCH_S = 5.0
BYTES_SEC = 6
HEAD_ROWS = 20


def _fetches(text: Text) -> dict[tuple[str, str], array[float]]:
    groups: dict[tuple[str, str], array[float]] = {}
    for count, (line, row) in enumerate(text.rows()):
        fields = csv_fields(text, line, row)
        if count == 0 and fields[0].strip().lower() == "unit_id":
            continue
        if len(fields) <= BYTES_SEC:
            raise text.error(line, f"{len(fields)} columns; bytes_sec is the seventh")
        if count > MAX_ROWS:
            raise text.error(line, f"more than {MAX_ROWS} rows; {TOO_MANY}")
        if not _is_time(fields[1]):
            raise text.error(line, f"dtime is {fields[1][:40]!r}; expected YYYY-MM-DD HH:MM:SS")
        bps = rate(text, line, fields[BYTES_SEC], "bytes_sec", 8.0)
        groups.setdefault((fields[0].strip(), fields[2].strip()), array("d")).append(bps)
    if not groups:
        raise TraceError(f"{text.source}: a header and no rows")
    return groups


def read(text: Text, options: Options) -> Trace:
    if "fetches" not in text.known:
        text.known["fetches"] = _fetches(text)
    groups: dict[tuple[str, str], array[float]] = text.known["fetches"]
    labels = [f"unit {unit} to {target}" for unit, target in groups]
    chosen = choose_part(text, options.part, labels)
    rates = list(groups.values())[chosen]
    notes = (labels[chosen], "each fetch held 5 s")
    part = chosen if len(labels) > 1 else None
    return trace_of(
        text,
        "fcc",
        np.full(len(rates), FETCH_S),
        np.array(rates),
        kind="achieved",
        goodput=True,
        part=part,
        notes=notes,
        licence="US government",
    )


def _is_time(field: str) -> bool:
    try:
        return bool(datetime.strptime(field.strip(), "%Y-%m-%d %H:%M:%S"))
    except ValueError:
        return False


def fits(text: Text) -> bool:
    """Judged by the first fetches: no other format has a date in its second column."""
    rows = [row.split(",") for _, row in itertools.islice(text.rows(), HEAD_ROWS)]
    body = rows[1:] if rows and rows[0][0].strip().lower() == "unit_id" else rows
    return bool(body) and all(len(row) > BYTES_SEC and _is_time(row[1]) for row in body)


FORMAT = Format(
    name="fcc",
    unit="bytes/s of application bytes",
    edge="5 s from the fetch's start",
    kind="achieved",
    fits=fits,
    read=read,
    takes=("part",),
)
