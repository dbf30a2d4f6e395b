"""CacheGen's `bw.jsonl` (SIGCOMM 2024 artifact): `{"bw": [0.5658, 5.0257, ...]}`, one trace per line, Gbit/s.

A number is the rate of the whole chunk with that index, whatever time it takes: `per=chunk`. To lay the numbers out in
time instead, which is another link, use `Trace.over_time(hold_s)` or `hold=0.2s` in a spec. The artifact divides a
chunk's encoded bytes by it, so it is goodput, and is converted.
"""

from __future__ import annotations

import json

from kvstream.traces.errors import TraceError
from kvstream.traces.formats.base import Format, Options, choose_part, trace_of
from kvstream.traces.formats.sabre import number_in, parse_json
from kvstream.traces.formats.text import Text
from kvstream.traces.trace import MAX_RATE_BPS, MAX_ROWS, Trace


def read(text: Text, options: Options) -> Trace:
    if "rows" not in text.known:
        text.known["rows"] = list(text.rows())
    rows: list[tuple[int, str]] = text.known["rows"]
    chosen = choose_part(text, options.part, [f"line {line}" for line, _ in rows])
    line, row = rows[chosen]
    content = parse_json(text, row, line)
    if not isinstance(content, dict) or not isinstance(content.get("bw"), list) or not content["bw"]:
        raise text.error(line, 'CacheGen\'s format is {"bw": [Gbit/s, ...]} on every line')
    if len(content["bw"]) > MAX_ROWS:
        raise text.error(line, f"more than {MAX_ROWS} numbers; cut the line")
    gbps = [number_in(text, f"line {line}: bw[{i}]", v, 0.0, MAX_RATE_BPS / 2e9) for i, v in enumerate(content["bw"])]
    part = chosen if len(rows) > 1 else None
    rates = [rate * 1e9 for rate in gbps]
    licence = "Apache-2.0 where from LMCache"
    return trace_of(text, "cachegen", [], rates, goodput=True, per="chunk", part=part, licence=licence)


def write(trace: Trace) -> str:
    if trace.per != "chunk":
        raise TraceError(f"cachegen holds one rate a chunk; trace {trace.name!r} is over time")
    if trace.end != "loop":
        raise TraceError(f"cachegen cannot express end={trace.end}; give trace {trace.name!r} end=loop")
    if trace.delay_s is not None or trace.loss is not None:
        raise TraceError(f"cachegen has no column for delay or loss of trace {trace.name!r}; write format kvstream")
    return json.dumps({"bw": (trace.as_goodput().rates_bps / 1e9).tolist()}) + "\n"


def fits(text: Text) -> bool:
    first = text.first[1].replace(" ", "")
    return first.startswith('{"bw":[')


FORMAT = Format(
    name="cachegen",
    unit="Gbit/s of application bytes",
    edge="the chunk with that index (per=chunk)",
    kind="capacity",
    fits=fits,
    read=read,
    write=write,
    takes=("part",),
)
