"""Puffer's daily `video_sent` CSV (Yan et al., NSDI 2020): one row a video chunk sent.

Needs its header; columns are found by name: `time (ns GMT)`, `session_id`, `index`, `delivery_rate`. The last is the
kernel's estimate in *bytes* per second of payload (copies of these traces in Mbit/s are often 8 times too low). A
(session, index) pair is one trace; a row holds from its time until the next row's, the last as long as the one before.
"""

from __future__ import annotations

from traces.errors import TraceError
from traces.formats.base import Format, Text, choose_part, until_next
from traces.trace import MAX_ROWS, Trace

COLUMNS = ("time (ns GMT)", "session_id", "index", "delivery_rate")


def read(text: Text, part: int | None) -> Trace:
    rows = text.rows()
    first, header = next(rows)
    names = [name.strip() for name in text.csv_fields(1, header)]
    if absent := [name for name in COLUMNS if name not in names]:
        raise text.error(first, f"the header lacks {', '.join(absent)}")
    at = [names.index(name) for name in COLUMNS]
    sessions: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    for count, (line, row) in enumerate(rows):
        fields = text.csv_fields(line, row)
        if len(fields) < len(names):
            raise text.error(line, f"{len(fields)} columns; the header names {len(names)}")
        if count >= MAX_ROWS:
            raise text.error(line, f"more than {MAX_ROWS} rows; cut the file")
        time, session, index, rate = (fields[i] for i in at)
        seconds = text.number(line, time, "time in ns", 0.0) / 1e9
        bps = text.rate(line, rate, "delivery_rate in bytes/s", 8.0)
        sessions.setdefault((session, index), []).append((line, seconds, bps))
    if not sessions:
        raise TraceError(f"{text.source}: a header and no rows")
    labels = [f"session {session[:12]} {index}" for session, index in sessions]
    chosen = choose_part(text, part, labels)
    lines, times, rates = zip(*list(sessions.values())[chosen], strict=True)
    return text.trace(
        "puffer",
        until_next(text, lines, times),
        rates,
        kind="achieved",
        goodput=True,
        part=chosen if len(labels) > 1 else None,
        notes=(labels[chosen],),
    )


def fits(text: Text) -> bool:
    names = [name.strip() for name in text.head()[0].split(",")]
    return "delivery_rate" in names and "session_id" in names


FORMAT = Format(
    name="puffer",
    unit="bytes/s of TCP payload (delivery_rate)",
    edge="from the row's time until the session's next row",
    kind="achieved",
    fits=fits,
    read=read,
    parts=True,
)
