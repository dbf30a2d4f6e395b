"""UCC 5G production dataset (Raca et al., MMSys 2020): one row a second of a phone's G-NetTrack log.

`Timestamp` is `YYYY.MM.DD_HH.MM.SS`, `DL_bitrate` kbit/s of application bytes received, `-` where nothing was read. A
row holds from its time until the next row's, the last for 1 s. Rows of one second are averaged (the logger writes some
twice), rows without a bitrate skipped (the rate before holds on). The 4G dataset of 2018 has the same two columns.
"""

from __future__ import annotations

from datetime import UTC, datetime

from traces.errors import TraceError
from traces.formats.base import Format, Text, until_next
from traces.trace import MAX_ROWS, Trace


def read(text: Text, part: int | None) -> Trace:
    rows = text.rows()
    _, header = next(rows)
    names = [name.strip() for name in text.csv_fields(1, header)]
    if "Timestamp" not in names or "DL_bitrate" not in names:
        raise text.error(1, "the header lacks Timestamp or DL_bitrate")
    at, bitrate = names.index("Timestamp"), names.index("DL_bitrate")
    lines: list[int] = []
    times: list[float] = []
    rates: list[float] = []
    counts: list[int] = []
    missing = 0
    for count, (line, row) in enumerate(rows):
        fields = text.csv_fields(line, row)
        if len(fields) <= max(at, bitrate):
            raise text.error(line, f"{len(fields)} columns; the header names {len(names)}")
        if count >= MAX_ROWS:
            raise text.error(line, f"more than {MAX_ROWS} rows; cut the file")
        try:
            time = datetime.strptime(fields[at].strip(), "%Y.%m.%d_%H.%M.%S").replace(tzinfo=UTC).timestamp()
        except ValueError:
            raise text.error(line, f"Timestamp is {fields[at][:40]!r}; YYYY.MM.DD_HH.MM.SS is wanted") from None
        if fields[bitrate].strip() == "-":
            missing += 1
            continue
        rate = text.rate(line, fields[bitrate], "DL_bitrate in kbit/s", 1e3)
        if times and time == times[-1]:
            rates[-1] += rate
            counts[-1] += 1
        else:
            lines.append(line)
            times.append(time)
            rates.append(rate)
            counts.append(1)
    if not rates:
        raise TraceError(f"{text.source}: no row has a DL_bitrate")
    notes = []
    if missing:
        notes.append(f"{missing} rows without a bitrate skipped")
    if doubled := sum(counts) - len(counts):
        notes.append(f"{doubled} rows averaged with others of their second")
    durations = until_next(text, lines, times, last_s=1.0)
    means = [rate / count for rate, count in zip(rates, counts, strict=True)]
    return text.trace(
        "ucc-5g", durations, means, kind="achieved", goodput=True, notes=notes, licence="GPL-3.0 where from uccmisl"
    )


def fits(text: Text) -> bool:
    names = [name.strip() for name in text.head()[0].split(",")]
    return "Timestamp" in names and "DL_bitrate" in names


FORMAT = Format(
    name="ucc-5g",
    unit="kbit/s of application bytes (DL_bitrate)",
    edge="from the row's second until the next row's",
    kind="achieved",
    fits=fits,
    read=read,
)
