"""Plain tables whose columns say what they are: in a header, or in `columns=`.

Names are one of `duration_s`, `duration_ms`, `time_s`, `time_ms`; one of `rate_UNIT` (layer-2 capacity) or
`goodput_UNIT` (application bytes, converted), where UNIT is bps, kbps, Mbps, Gbps or, for bytes, Bps, kBps, MBps; and,
optionally, `delay_s` or `delay_ms` (one way) and `loss` (a fraction). A row with a time holds from there until the next
row's time, the last as long as the one before.

`columns=` names the columns of other files: `time_s=timestamp:rate_mbps=bw` by their own names, `time_s=1:rate_mbps=4`
by their numbers, or all from the left, `time_s:_:rate_mbps`, with `_` for those that are not used. Fields are separated
by commas, semicolons (then decimals may have a comma), tabs or blanks, and may be quoted.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvstream.traces.columns import Floats
from kvstream.traces.errors import TraceError
from kvstream.traces.formats import numbers
from kvstream.traces.formats.base import Format, Options, refuse, rising, rows_of, trace_of, until_next
from kvstream.traces.formats.text import Text, is_number
from kvstream.traces.trace import MAX_RATE_BPS, Kind, Trace
from kvstream.traces.units import parse_rate

SECONDS = {"duration_s": 1.0, "duration_ms": 1e-3, "time_s": 1.0, "time_ms": 1e-3}
DELAYS = {"delay_s": 1.0, "delay_ms": 1e-3}
UNUSED = "_"
MANY, LONG = 12, 40
"""Columns, and letters of a name, above which a message gives numbers of columns instead."""
NEEDED = (
    "one of duration_s, duration_ms, time_s, time_ms, one of rate_bps, rate_kbps, rate_mbps, rate_gbps (rate_MBps is "
    "bytes; goodput_... is of application bytes), and optionally delay_s or delay_ms, and loss"
)
_RATE = re.compile(r"(rate|goodput)_([a-z/]+)", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")


@dataclass(frozen=True)
class Column:
    """A column that is used: what it is, what its numbers are multiplied with, and where it stands (from 0)."""

    name: str
    what: str
    factor: float
    place: int
    high: float = np.inf


@dataclass(frozen=True)
class Layout:
    """How a file's rows are to be taken apart."""

    header: tuple[int, str] | None
    separator: str | None
    """None for blanks."""
    width: int
    columns: tuple[Column, ...]
    decimal_comma: bool

    def fields(self, row: str) -> list[str]:
        if self.decimal_comma:
            row = row.replace(",", ".")
        return fields_of(row, self.separator)


def read(text: Text, options: Options) -> Trace:
    layout = _layout(text, options)
    found = numbers.Columns(text, len(layout.columns))
    for line, block in numbers.data(text, layout.header):
        found.add(line, _picked(text, line, block, layout))
    values: dict[str, Floats] = {}
    for column, content in zip(layout.columns, found.joined(), strict=True):
        good = np.isfinite(content) & (content >= 0.0) & (content <= column.high)
        good &= (content > 0.0) | (column.what != "duration")
        if not good.all():
            raise _bad_value(text, int(np.argmin(good)), column, layout)
        if column.factor != 1.0:
            content *= column.factor
        values[column.what] = content
    goodput = "goodput" in values
    rates = values.pop("goodput" if goodput else "rate")
    others = [values.get(what) for what in ("delay", "loss")]
    notes = ["decimal commas"] if layout.decimal_comma else []
    if "duration" in values:
        durations = values.pop("duration")
    else:
        complain = partial(_complaint, text, layout)
        kept = [one for one in others if one is not None]
        times, (rates, *kept), said = rising(values.pop("time"), [rates, *kept], options.repair, complain)
        others = [None if one is None else kept.pop(0) for one in others]
        durations = until_next(times)
        del times
        notes += said
    values.clear()
    kind: Kind = "achieved" if goodput else "capacity"
    delay, loss = others
    return trace_of(text, "csv", durations, rates, kind=kind, goodput=goodput, notes=notes, delay_s=delay, loss=loss)


def meaning(name: str) -> tuple[str, float] | None:
    """(what a column of this name is, what its numbers are multiplied with for SI); None for any other name."""
    lower = name.lower()
    for known in (SECONDS, DELAYS):
        if lower in known:
            return lower.partition("_")[0], known[lower]
    if lower == "loss":
        return "loss", 1.0
    if match := _RATE.fullmatch(name):
        try:
            unit = match[2].lower() if name.isupper() else match[2]  # which is refused where it is used: bits or bytes?
            return match[1].lower(), parse_rate(f"1{unit}")
        except TraceError:
            return None
    return None


def fields_of(row: str, separator: str | None) -> list[str]:
    """The fields of a row, quotes and surrounding blanks removed."""
    if separator is None:
        return row.split()
    if '"' not in row:
        return [field.strip() for field in row.split(separator)]
    try:
        return [field.strip() for field in next(csv.reader([row], delimiter=separator, skipinitialspace=True))]
    except csv.Error:  # quotes that do not end
        return row.split(separator)


def separator_of(row: str) -> str | None:
    """What separates the fields of a row; None for blanks."""
    return next((one for one in ";\t," if one in row), None)


def advice(text: Text) -> str:
    """What to write for a table whose columns are not known: as near to it as names allow."""
    row = text.first[1]
    names = fields_of(row, separator_of(row))
    if all(map(is_number, names)):
        if len(names) > MANY:
            return f"columns=time_s=1:rate_mbps={len(names)}"
        return "columns=" + ":".join(["time_s", *[UNUSED] * (len(names) - 2), "rate_mbps"])
    times = next((name for name in names if re.search(r"time|sec|^t$", name, re.IGNORECASE)), "TIME")
    rates = [
        name for name in names if name != times and re.search(r"bps|rate|band|thr|bw|goodput", name, re.IGNORECASE)
    ]
    rate = rates[0] if rates else "RATE"
    unit = re.search(r"[kKmMgG]?[bB]ps", rate)
    time_unit = "ms" if re.search(r"ms|milli", times, re.IGNORECASE) else "s"
    time, of = (str(names.index(name) + 1) if len(name) > LONG else name for name in (times, rate))
    return f"columns=time_{time_unit}={time}:rate_{unit[0] if unit else 'UNIT'}={of}"


def _layout(text: Text, options: Options) -> Layout:
    line, first = text.first
    separator = separator_of(first)
    names = fields_of(first, separator)
    header = None if any(map(is_number, names)) else (line, first)
    given = options.columns or (f"time_s:rate_{options.unit}" if options.unit else "")
    if header is None and not given:
        raise text.error(line, f"the first row is no header; set {advice(text)}, or let one name {NEEDED}")
    columns = _given(text, given, names, header is not None) if given else _named(text, line, names)
    whats = [column.what for column in columns]
    if len(set(whats)) != len(whats) or ("time" in whats) + ("duration" in whats) != 1 or not _one_rate(whats):
        shown = ", ".join(column.name for column in columns)
        raise text.error(line, f"columns {shown[:80]}; a table has {NEEDED}")
    rows = (row for number, row in text.rows() if header is None or number != line)
    second = next(rows, "")
    comma = separator in (";", "\t") and any(map(_DECIMAL_COMMA.fullmatch, fields_of(second, separator)))
    return Layout(header, separator, len(names), columns, comma)


def _one_rate(whats: list[str]) -> bool:
    return ("rate" in whats) + ("goodput" in whats) == 1


def _named(text: Text, line: int, names: list[str]) -> tuple[Column, ...]:
    """The columns of a header of ours."""
    columns = []
    for place, name in enumerate(names):
        found = meaning(name)
        if found is None:
            problem = f"unknown column {name[:40]!r}; set {_all_but(names, text)}"
            raise text.error(line, f"{problem}, or let the header name {NEEDED}")
        columns.append(_column(text, line, name, place))
    return tuple(columns)


def _all_but(names: list[str], text: Text) -> str:
    """The setting that leaves out unknown columns, if the others suffice."""
    known = [name for name in names if meaning(name) is not None]
    whats = [found[0] for name in known if (found := meaning(name)) is not None]
    enough = ("time" in whats or "duration" in whats) and _one_rate(whats)
    return f"columns={':'.join(known)}" if enough and len(known) <= MANY else advice(text)


def _given(text: Text, given: str, names: list[str], named: bool) -> tuple[Column, ...]:
    """The columns that `columns=` names."""
    line, columns = text.first[0], []
    for at, entry in enumerate(given.split(":")):
        ours, equals, theirs = (piece.strip() for piece in entry.partition("="))
        if ours == UNUSED and not equals:
            continue
        theirs = theirs if equals else ours if named and ours in names else str(at + 1)
        if theirs in names and named:
            place = names.index(theirs)
        elif theirs.isdecimal() and 1 <= int(theirs) <= len(names):
            place = int(theirs) - 1
        else:
            there = ", ".join(names)[:80] if named else f"1 to {len(names)}"
            raise text.error(line, f"columns={given}: no column {theirs[:40]!r}; there are {there}")
        columns.append(_column(text, line, ours, place))
    return tuple(columns)


def _column(text: Text, line: int, name: str, place: int) -> Column:
    found = meaning(name)
    if found is None:
        raise text.error(line, f"unknown column {name[:40]!r}; a table has {NEEDED}")
    what, factor = found
    if what in ("rate", "goodput") and name.isupper():
        low = name.lower()
        octets = re.sub(r"[mg]?bps$", lambda unit: unit[0].upper()[:-2] + "ps", low)
        raise text.error(line, f"{name}: bits or bytes? set columns= with {low}={name}, or {octets}={name} for bytes")
    high = MAX_RATE_BPS / 2 / factor if what in ("rate", "goodput") else 1.0 if what == "loss" else np.inf
    return Column(name, what, factor, place, high)


def _picked(text: Text, line: int, block: bytes, layout: Layout) -> Floats:
    """The columns used, [row, column], of a block: all at once, or line by line for the complaint."""
    if layout.decimal_comma:
        block = block.replace(b",", b".")
    places = [column.place for column in layout.columns]
    if found := numbers.quick(block, layout.width):
        return found[0] if places == list(range(layout.width)) else found[0][:, places]
    content = text.decoded(block)
    regular = layout.separator is not None and '"' not in content and _regular(content, layout.separator, layout.width)
    if regular and content.strip():
        try:
            return np.loadtxt(
                io.StringIO(content),
                delimiter=layout.separator,
                usecols=places,
                comments=None,
                ndmin=2,
            )
        except ValueError:
            pass
    found_rows = [
        [_number(text, number, layout.fields(row), column, layout) for column in layout.columns]
        for number, row in enumerate(content.split("\n"), line)
        if row.strip()
    ]
    return np.array(found_rows, np.float64).reshape(-1, len(places))


def _regular(content: str, separator: str, width: int) -> bool:
    return all(line.count(separator) == width - 1 for line in content.split("\n") if line.strip())


def _number(text: Text, line: int, fields: list[str], column: Column, layout: Layout) -> float:
    if len(fields) != layout.width:
        raise text.error(line, f"{len(fields)} columns; the header names {layout.width}")
    return text.number(line, fields[column.place], column.name, 0.0, column.high)


def _row(text: Text, layout: Layout, index: int) -> tuple[int, list[str]]:
    """(line, fields) of a row by its index."""
    at = -1
    for line, row in text.rows():
        if layout.header is None or line != layout.header[0]:
            at += 1
            if at == index:
                return line, layout.fields(row)
    raise TraceError(f"{text.source}: changed while it was read; try again")


def _bad_value(text: Text, index: int, column: Column, layout: Layout) -> TraceError:
    line, fields = _row(text, layout, index)
    _number(text, line, fields, column, layout)
    return text.error(line, f"{column.name} is {fields[column.place][:40]}; it must be above 0")


def _complaint(text: Text, layout: Layout, index: int, problem: str) -> TraceError:
    return text.error(_row(text, layout, index)[0], problem)


def write(trace: Trace) -> str:
    refuse(trace, "csv", delay=True, loss=True)
    return "\n".join(rows_of(trace)) + "\n"


def fits(text: Text) -> bool:
    if text.is_json:
        return False
    found = [meaning(name) for name in fields_of(text.first[1], separator_of(text.first[1]))]
    whats = {one[0] for one in found if one is not None}
    return bool(whats & {"time", "duration"}) and bool(whats & {"rate", "goodput"})


FORMAT = Format(
    name="csv",
    unit="as the header says: bit/s, kbit/s, Mbit/s or Gbit/s, or bytes/s",
    edge="duration columns are explicit; a time holds until the next row's",
    kind="capacity",
    fits=fits,
    read=read,
    write=write,
    takes=("columns", "unit", "repair"),
)
