"""iperf3's JSON (`iperf3 -J`, or `--json-stream`): what one run got, interval by interval.

`sum` of an interval has `seconds` and `bits_per_second`, of application bytes: achieved, and converted to capacity.
Intervals of the start-up that iperf3 itself omits (`-O`) are omitted.
"""

from __future__ import annotations

from typing import Any

from kvstream.traces.errors import TraceError
from kvstream.traces.formats.base import Format, Options, trace_of
from kvstream.traces.formats.numbers import TOO_MANY
from kvstream.traces.formats.sabre import json_of, number_in, parse_json
from kvstream.traces.formats.text import Text
from kvstream.traces.trace import MAX_RATE_BPS, MAX_ROWS, Trace


def read(text: Text, options: Options) -> Trace:
    if _is_stream(text):
        events = [parse_json(text, row, line) for line, row in text.rows()]
        intervals = [e.get("data") for e in events if isinstance(e, dict) and e.get("event") == "interval"]
        said = next((e.get("data") for e in events if isinstance(e, dict) and e.get("event") == "error"), None)
    else:
        content = json_of(text)
        if not isinstance(content, dict) or not isinstance(content.get("intervals"), list):
            raise TraceError(f"{text.source}: iperf3's JSON is an object with a list of intervals (iperf3 -J)")
        intervals, said = content["intervals"], content.get("error")
    if len(intervals) > MAX_ROWS:
        raise TraceError(f"{text.source}: more than {MAX_ROWS} intervals; {TOO_MANY}")
    durations, rates, omitted = [], [], 0
    for i, interval in enumerate(intervals):
        total = _sum(interval)
        if total is None:
            raise TraceError(f"{text.source}: interval {i} (from 0) has no sum with seconds and bits_per_second")
        if total.get("omitted") is True:
            omitted += 1
            continue
        durations.append(number_in(text, f"interval {i}: seconds", total["seconds"], 1e-6, 1e6))
        high = MAX_RATE_BPS / 2
        rates.append(number_in(text, f"interval {i}: bits_per_second", total["bits_per_second"], 0.0, high))
    if not rates:
        why = f": iperf3 says {str(said)[:80]!r}" if said else ""
        raise TraceError(f"{text.source}: no intervals{why}; run iperf3 again with -i 1")
    notes = (f"{omitted} omitted intervals of the start-up left out",) if omitted else ()
    return trace_of(text, "iperf3", durations, rates, kind="achieved", goodput=True, notes=notes)


def _sum(interval: object) -> dict[str, Any] | None:
    total = interval.get("sum") if isinstance(interval, dict) else None
    return total if isinstance(total, dict) and {"seconds", "bits_per_second"} <= set(total) else None


def _is_stream(text: Text) -> bool:
    return text.first[1].replace(" ", "").startswith('{"event":')


def fits(text: Text) -> bool:
    if not text.first[1].startswith("{") or '"bw"' in text.first[1][:40]:
        return False
    if _is_stream(text):
        return True
    content = json_of(text)
    return isinstance(content, dict) and "intervals" in content and "start" in content


FORMAT = Format(
    name="iperf3",
    unit="bit/s of application bytes",
    edge="seconds of the interval, explicit",
    kind="achieved",
    fits=fits,
    read=read,
)
