"""Puffer's daily `video_sent` CSV (Yan et al., NSDI 2020): one row per video chunk sent.

Needs its header; columns are found by name: `time (ns GMT)`, `session_id`, `index`, `delivery_rate`. The last is the
kernel's estimate in *bytes* per second of payload (copies of these traces in Mbit/s are often 8 times too low). A
(session, index) pair is one trace; a row holds from its time until the next row's, the last as long as the one before.
"""

from __future__ import annotations

from array import array

import numpy as np

from kvstream.traces.errors import TraceError
from kvstream.traces.formats.base import (
    Format,
    Options,
    choose_part,
    csv_fields,
    rate,
    rising,
    trace_of,
    until_next,
)
from kvstream.traces.formats.numbers import TOO_MANY
from kvstream.traces.formats.text import Text
from kvstream.traces.trace import MAX_ROWS, Trace

COLUMNS = ("time (ns GMT)", "session_id", "index", "delivery_rate")
Session = tuple["array[int]", "array[float]", "array[float]"]
"""Lines, seconds, bit/s."""


def _sessions(text: Text) -> dict[tuple[str, str], Session]:
    rows = text.rows()
    first, header = next(rows)
    names = [name.strip() for name in csv_fields(text, first, header)]
    if absent := [name for name in COLUMNS if name not in names]:
        raise text.error(first, f"the header lacks {', '.join(absent)}")
    at = [names.index(name) for name in COLUMNS]
    sessions: dict[tuple[str, str], Session] = {}
    for count, (line, row) in enumerate(rows):
        fields = csv_fields(text, line, row)
        if len(fields) < len(names):
            raise text.error(line, f"{len(fields)} columns; the header names {len(names)}")
        if count >= MAX_ROWS:
            raise text.error(line, f"more than {MAX_ROWS} rows; {TOO_MANY}")
        time, session, index, found = (fields[i] for i in at)
        lines, times, rates = sessions.setdefault((session, index), (array("q"), array("d"), array("d")))
        lines.append(line)
        times.append(text.number(line, time, "time in ns", 0.0) / 1e9)
        rates.append(rate(text, line, found, "delivery_rate in bytes/s", 8.0))
    if not sessions:
        raise TraceError(f"{text.source}: a header and no rows")
    return sessions


def read(text: Text, options: Options) -> Trace:
    if "sessions" not in text.known:
        text.known["sessions"] = _sessions(text)
    sessions: dict[tuple[str, str], Session] = text.known["sessions"]
    labels = [f"session {session[:12]} {index}" for session, index in sessions]
    chosen = choose_part(text, options.part, labels)
    lines, times, rates = list(sessions.values())[chosen]
    seconds, (bps,), notes = rising(
        np.array(times), [np.array(rates)], options.repair, lambda row, why: text.error(lines[row], why)
    )
    return trace_of(
        text,
        "puffer",
        until_next(seconds),
        bps,
        kind="achieved",
        goodput=True,
        part=chosen if len(labels) > 1 else None,
        notes=(labels[chosen], *notes),
    )


def fits(text: Text) -> bool:
    return {"delivery_rate", "session_id"} <= {name.strip() for name in text.first[1].split(",")}


FORMAT = Format(
    name="puffer",
    unit="bytes/s of TCP payload (delivery_rate)",
    edge="from the row's time until the session's next row",
    kind="achieved",
    fits=fits,
    read=read,
    takes=("part", "repair"),
)
