"""sabre's JSON (Spiteri et al., MMSys 2018): `[{"duration_ms": 30000, "bandwidth_kbps": 5000, "latency_ms": 75}, ...]`.

Durations are explicit. sabre's model delivers application bits at `bandwidth_kbps` and waits `latency_ms` between a
request and its first byte, so rates are goodput (converted) and the one-way delay is half the latency. Most of its
files are logs of achieved throughput.
"""

from __future__ import annotations

import json
from typing import Any

from kvstream.traces.errors import TraceError
from kvstream.traces.formats.base import Format, Options, refuse, trace_of
from kvstream.traces.formats.numbers import TOO_MANY
from kvstream.traces.formats.text import Text
from kvstream.traces.trace import MAX_RATE_BPS, MAX_ROWS, Trace

KEYS = ("duration_ms", "bandwidth_kbps", "latency_ms")


def parse_json(text: Text, content: str, line: int = 1) -> Any:
    """JSON with every failure as a TraceError; NaN and infinities are refused."""

    def refuse_constant(constant: str) -> Any:
        raise ValueError(f"{constant} is not a number")

    try:
        return json.loads(content, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise text.error(line + error.lineno - 1, f"not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        problem = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise text.error(line, f"not usable JSON ({problem[:80]})") from None


def number_in(text: Text, where: str, value: object, low: float, high: float) -> float:
    """A JSON value as a number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        shown = str(value)[:40] if not isinstance(value, int) or abs(value) < 10**30 else "huge"
        raise TraceError(f"{text.source}: {where} is {shown}; expected a number from {low:g} to {high:g}")
    return float(value)


def json_of(text: Text) -> Any:
    """A file's JSON, parsed once. Raises TraceError."""
    if "json" not in text.known:
        text.known["json"] = parse_json(text, text.whole())
    return text.known["json"]


def read(text: Text, options: Options) -> Trace:
    rows = json_of(text)
    if not isinstance(rows, list) or not rows:
        raise TraceError(f"{text.source}: sabre's JSON is a list of rows with {', '.join(KEYS)}")
    if len(rows) > MAX_ROWS:
        raise TraceError(f"{text.source}: more than {MAX_ROWS} rows; {TOO_MANY}")
    durations, rates, delays = [], [], []
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or any(key not in row for key in KEYS[:2]):
            raise TraceError(f"{text.source}: row {i} (from 0) lacks one of {', '.join(KEYS[:2])}")
        duration = number_in(text, f"row {i}: duration_ms", row["duration_ms"], 0.0, 1e12)
        if duration == 0.0:
            raise TraceError(f"{text.source}: row {i}: duration_ms is 0; it must be above 0")
        durations.append(duration / 1000.0)
        kbps = number_in(text, f"row {i}: bandwidth_kbps", row["bandwidth_kbps"], 0.0, MAX_RATE_BPS / 2e3)
        rates.append(kbps * 1e3)
        delays.append(number_in(text, f"row {i}: latency_ms", row.get("latency_ms", 0), 0.0, 1e9) / 2000.0)
    note = () if not any(delays) else ("one-way delay is half of latency_ms",)
    delay = delays if any(delays) else None
    return trace_of(text, "sabre", durations, rates, kind="achieved", goodput=True, notes=note, delay_s=delay)


def write(trace: Trace) -> str:
    refuse(trace, "sabre", delay=True)
    goodput = (trace.as_goodput().rates_bps / 1e3).tolist()
    delays = [0.0] * len(trace) if trace.delay_s is None else (trace.delay_s * 2000.0).tolist()
    rows = [
        json.dumps({"duration_ms": duration * 1000.0, "bandwidth_kbps": rate, "latency_ms": delay})
        for duration, rate, delay in zip(trace.durations_s.tolist(), goodput, delays, strict=True)
    ]
    return "[\n  " + ",\n  ".join(rows) + "\n]\n"


def fits(text: Text) -> bool:
    if not text.first[1].startswith("["):
        return False
    rows = json_of(text)
    return bool(rows) and isinstance(rows[0], dict) and {"bandwidth_kbps", "duration_ms"} <= set(rows[0])


FORMAT = Format(
    name="sabre",
    unit="kbit/s of application bits",
    edge="duration_ms, explicit",
    kind="achieved",
    fits=fits,
    read=read,
    write=write,
)
