"""FCC Measuring Broadband America, `curr_webget.csv`: one web page fetch a row.

Columns: unit_id, dtime (`%Y-%m-%d %H:%M:%S`), target, address, fetch_time, bytes_total, bytes_sec, ...; the seventh is
application bytes per second. A (unit, target) pair is one trace; each fetch stands for the 5 s from its start, in the
order of the file, as Pensieve's converter has it (the fetches themselves were far apart). A header row is allowed.
"""

from __future__ import annotations

from datetime import datetime

from traces.errors import TraceError
from traces.formats.base import Format, Text, choose_part
from traces.trace import MAX_ROWS, Trace

FETCH_S = 5.0
BYTES_SEC = 6


def read(text: Text, part: int | None) -> Trace:
    groups: dict[tuple[str, str], list[float]] = {}
    for count, (line, row) in enumerate(text.rows()):
        fields = text.csv_fields(line, row)
        if count == 0 and fields[0].strip().lower() == "unit_id":
            continue
        if len(fields) <= BYTES_SEC:
            raise text.error(line, f"{len(fields)} columns; bytes_sec is the seventh")
        if count > MAX_ROWS:
            raise text.error(line, f"more than {MAX_ROWS} rows; cut the file")
        if not _is_time(fields[1]):
            raise text.error(line, f"dtime is {fields[1][:40]!r}; YYYY-MM-DD HH:MM:SS is wanted")
        rate = text.rate(line, fields[BYTES_SEC], "bytes_sec", 8.0)
        groups.setdefault((fields[0].strip(), fields[2].strip()), []).append(rate)
    if not groups:
        raise TraceError(f"{text.source}: a header and no rows")
    labels = [f"unit {unit} to {target}" for unit, target in groups]
    chosen = choose_part(text, part, labels)
    rates = list(groups.values())[chosen]
    notes = (labels[chosen], "each fetch held 5 s")
    part = chosen if len(labels) > 1 else None
    return text.trace(
        "fcc",
        [FETCH_S] * len(rates),
        rates,
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
    rows = [line.split(",") for line in text.head()]
    body = rows[1:] if rows[0][0].strip().lower() == "unit_id" else rows
    return bool(body) and all(len(row) > BYTES_SEC and _is_time(row[1]) for row in body)


FORMAT = Format(
    name="fcc",
    unit="bytes/s of application bytes",
    edge="5 s from the fetch's start",
    kind="achieved",
    fits=fits,
    read=read,
    parts=True,
)
