"""UCC 5G production dataset (Raca et al., MMSys 2020): one row per second of a phone's G-NetTrack log.

`Timestamp` is `YYYY.MM.DD_HH.MM.SS`, `DL_bitrate` kbit/s of application bytes received, `-` or nothing where it was not
read. A row holds from its time until the next row's, the last for 1 s. Rows of one second are averaged (the logger
writes some twice), rows without a bitrate skipped (the rate before holds on). The 4G dataset of 2018 has the same two
columns.
"""

from __future__ import annotations

from array import array
from datetime import UTC, datetime

import numpy as np

from kvstream.traces.errors import TraceError
from kvstream.traces.formats.base import Format, Options, csv_fields, rate, rising, trace_of, until_next
from kvstream.traces.formats.numbers import TOO_MANY
from kvstream.traces.formats.text import Text
from kvstream.traces.trace import MAX_ROWS, Trace


def read(text: Text, options: Options) -> Trace:
    rows = text.rows()
    first, header = next(rows)
    names = _names(text, header)
    if "Timestamp" not in names or "DL_bitrate" not in names:
        raise text.error(first, "the header lacks Timestamp or DL_bitrate")
    at, bitrate = names.index("Timestamp"), names.index("DL_bitrate")
    lines, times, rates = array("q"), array("d"), array("d")
    missing = 0
    for line, row in rows:
        fields = csv_fields(text, line, row)
        if len(fields) <= max(at, bitrate):
            raise text.error(line, f"{len(fields)} columns; the header names {len(names)}")
        if len(lines) >= MAX_ROWS:
            raise text.error(line, f"more than {MAX_ROWS} rows; {TOO_MANY}")
        time_s = _seconds(fields[at].strip())
        if time_s is None:
            raise text.error(line, f"Timestamp is {fields[at][:40]!r}; expected YYYY.MM.DD_HH.MM.SS")
        if fields[bitrate].strip() in ("-", ""):
            missing += 1
            continue
        lines.append(line)
        times.append(time_s)
        rates.append(rate(text, line, fields[bitrate], "DL_bitrate in kbit/s", 1e3))
    if not rates:
        raise TraceError(f"{text.source}: no row has a DL_bitrate")
    seconds, means, notes = _by_second(text, np.array(times), np.array(rates), lines, options.repair)
    if missing:
        notes.insert(0, f"{missing} rows without a bitrate skipped")
    licence = "GPL-3.0 where from uccmisl"
    durations = until_next(seconds, last_s=1.0)
    return trace_of(text, "ucc-5g", durations, means, kind="achieved", goodput=True, notes=notes, licence=licence)


def _by_second(
    text: Text, times: np.ndarray, rates: np.ndarray, lines: array[int], repair: str
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Times that rise, the mean rate of the rows of each, and notes. Raises TraceError where a time goes back."""
    notes = []
    back = int((np.diff(times) < 0.0).sum())
    if back and repair == "sort":
        order = np.argsort(times, kind="stable")
        times, rates = times[order], rates[order]
        notes.append(f"{back} steps back: rows sorted by time")
    starts = np.flatnonzero(np.concatenate(([True], np.diff(times) != 0.0)))
    counts = np.diff(np.append(starts, len(times)))
    if doubled := len(times) - len(starts):
        notes.append(f"{doubled} rows averaged with others of their second")
    means = np.add.reduceat(rates, starts) / counts
    seconds, (means,), said = rising(
        times[starts], [means], repair, lambda row, why: text.error(lines[int(starts[row])], why)
    )
    return seconds, means, notes + said


def _seconds(stamp: str) -> float | None:
    """Seconds of `YYYY.MM.DD_HH.MM.SS`, taken as UTC: only differences count."""
    try:
        return datetime.strptime(stamp, "%Y.%m.%d_%H.%M.%S").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None


def _names(text: Text, row: str) -> list[str]:
    return [name.strip() for name in csv_fields(text, text.first[0], row)]


def fits(text: Text) -> bool:
    names = {name.strip() for name in text.first[1].split(",")}
    return {"Timestamp", "DL_bitrate"} <= names


FORMAT = Format(
    name="ucc-5g",
    unit="kbit/s of application bytes (DL_bitrate)",
    edge="from the row's second until the next row's",
    kind="achieved",
    fits=fits,
    read=read,
    takes=("repair",),
)
