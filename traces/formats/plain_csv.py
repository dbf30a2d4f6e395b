"""Plain CSV with a header that names its units.

One of `duration_s`, `duration_ms`, `time_s`, `time_ms`; one of `rate_bps`, `rate_kbps`, `rate_mbps`, `rate_gbps`; and,
if wanted, `delay_s` or `delay_ms` (one way) and `loss` (a fraction). A row with a time holds from there until the next
row's time, the last as long as the one before. Rates are layer-2 capacity.
"""

from __future__ import annotations

from traces.errors import TraceError
from traces.formats.base import Format, Text, refuse, rows_of, until_next
from traces.trace import MAX_ROWS, Trace

SECONDS = {"duration_s": 1.0, "duration_ms": 1e-3, "time_s": 1.0, "time_ms": 1e-3}
RATES = {"rate_bps": 1.0, "rate_kbps": 1e3, "rate_mbps": 1e6, "rate_gbps": 1e9}
DELAYS = {"delay_s": 1.0, "delay_ms": 1e-3}
KNOWN = {**SECONDS, **RATES, **DELAYS, "loss": 1.0}


def read(text: Text, part: int | None) -> Trace:
    rows = text.rows()
    first, header = next(rows)
    names = _names(header)
    times, rate, delays = ([name for name in names if name in known] for known in (SECONDS, RATES, DELAYS))
    unknown = [name for name in names if name not in KNOWN]
    if len(times) != 1 or len(rate) != 1 or len(delays) > 1 or unknown or len(set(names)) != len(names):
        problem = f"unknown column {unknown[0][:40]!r}" if unknown else f"columns {', '.join(names)[:80]}"
        raise text.error(
            first,
            f"{problem}; the header names one of {', '.join(SECONDS)}, one of {', '.join(RATES)}, "
            "and optionally delay_s or delay_ms, and loss",
        )
    lines: list[int] = []
    columns: dict[str, list[float]] = {name: [] for name in names}
    for line, row in rows:
        fields = text.csv_fields(line, row)
        if len(fields) != len(names):
            raise text.error(line, f"{len(fields)} columns; the header names {len(names)}")
        if len(lines) >= MAX_ROWS:
            raise text.error(line, f"more than {MAX_ROWS} rows; cut the file")
        lines.append(line)
        for name, field in zip(names, fields, strict=True):
            columns[name].append(_value(text, line, name, field))
    if not lines:
        raise TraceError(f"{text.source}: a header and no rows")
    seconds = columns[times[0]]
    durations = seconds if times[0].startswith("duration") else until_next(text, lines, seconds)
    delay = columns[delays[0]] if delays else None
    return text.trace("csv", durations, columns[rate[0]], delay_s=delay, loss=columns.get("loss"))


def _value(text: Text, line: int, name: str, field: str) -> float:
    if name in RATES:
        return text.rate(line, field, name, RATES[name])
    if name == "loss":
        return text.number(line, field, name, 0.0, 1.0)
    value = text.number(line, field, name, 0.0) * KNOWN[name]
    if value == 0.0 and name.startswith("duration"):
        raise text.error(line, f"{name} is {field.strip()[:40]}; a row must last")
    return value


def write(trace: Trace) -> str:
    refuse(trace, "csv", delay=True, loss=True)
    return "\n".join(rows_of(trace)) + "\n"


def _names(header: str) -> list[str]:
    return [name.strip().lower() for name in header.split(",")]


def fits(text: Text) -> bool:
    names = _names(text.head()[0])
    return len(names) >= 2 and any(name in SECONDS for name in names) and any(name in RATES for name in names)


FORMAT = Format(
    name="csv",
    unit="as the header says: bit/s, kbit/s, Mbit/s or Gbit/s",
    edge="duration columns are explicit; a time holds until the next row's",
    kind="capacity",
    fits=fits,
    read=read,
    write=write,
)
