"""Trace files: read, recognised and written. One module per format; every failure is a one-line TraceError."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

from kvstream.traces.errors import TraceError
from kvstream.traces.formats import (
    cachegen,
    dashjs,
    fcc,
    genet,
    iperf3,
    kvstream,
    loggers,
    lumos5g,
    mahimahi,
    numbers,
    oboe,
    pairs,
    pensieve,
    plain_csv,
    puffer,
    purdue,
    rates,
    sabre,
    ucc,
)
from kvstream.traces.formats.base import Format, NoSuchPart, Options
from kvstream.traces.formats.text import Text, is_number
from kvstream.traces.trace import MAX_ROWS, Trace

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        kvstream.FORMAT,
        plain_csv.FORMAT,
        rates.FORMAT,
        mahimahi.FORMAT,
        pensieve.FORMAT,
        cachegen.FORMAT,
        dashjs.FORMAT,
        sabre.FORMAT,
        genet.FORMAT,
        iperf3.FORMAT,
        fcc.FORMAT,
        loggers.NORWAY,
        loggers.GHENT,
        ucc.FORMAT,
        lumos5g.FORMAT,
        puffer.FORMAT,
        oboe.FORMAT,
        purdue.FORMAT,
    )
}
"""Formats by name."""

MAX_KEPT_ROWS = 4_000_000
"""Rows of parsed traces that are kept, so that a file that is asked for again is not parsed again."""
_kept: OrderedDict[tuple[str, str, str | None, Options], Trace] = OrderedDict()
_last: list[Text] = []
"""The file that was read last: what is known of it serves its other parts."""


def load(path: str | Path, format: str | None = None, part: int | None = None, options: Options | None = None) -> Trace:
    """The trace in a file. Without a format it is recognised, and refused when none or several fit.

    `part` picks one of several traces in a file (fcc, puffer, cachegen, dashjs), counted from 0; `options` say how to
    read what a file leaves open. A file of the same content is parsed once. Raises TraceError.
    """
    return _parsed(Text.read(Path(path)), format, part, options)


def loads(
    data: bytes, source: str, format: str | None = None, part: int | None = None, options: Options | None = None
) -> Trace:
    """The same from bytes; `source` is the name that errors and the provenance give. Raises TraceError."""
    return _parsed(Text.of(data, source), format, part, options)


def parts(path: str | Path, format: str | None = None) -> int:
    """How many traces a file holds. Raises TraceError."""
    try:
        load(path, format, part=MAX_ROWS)
    except NoSuchPart as error:
        return error.count
    return 1


def sniff(path: str | Path) -> str:
    """The name of the one format that fits a file. Raises TraceError when none or several do."""
    return _sniffed(Text.read(Path(path))).name


def save(trace: Trace, path: str | Path, format: str = "kvstream") -> None:
    """Write a trace. Raises TraceError when the format cannot hold it or the file cannot be written."""
    content = dumps(trace, format)
    try:
        Path(path).write_text(content, encoding="utf-8", newline="\n")
    except OSError as error:
        raise TraceError(f"{path}: cannot write this trace file ({error.strerror or error})") from None


def dumps(trace: Trace, format: str = "kvstream") -> str:
    """The text that save writes. Raises TraceError."""
    write = _named(format).write
    if write is None:
        writable = ", ".join(name for name, each in FORMATS.items() if each.write)
        raise TraceError(f"format {format!r} can be read but not written; choose from {writable}")
    return write(trace)


def _parsed(text: Text, format: str | None, part: int | None, options: Options | None) -> Trace:
    options = replace(options or Options(), part=part) if part is not None else options or Options()
    key = (text.sha256, text.source, format, options)
    if key in _kept:
        _kept.move_to_end(key)
        return _kept[key]
    if _last and (_last[0].sha256, _last[0].source) == key[:2]:
        text = _last[0]
    _last[:] = [text]
    text.first  # noqa: B018  an empty file is said to be so, whatever its format
    chosen, how = (_named(format), "named") if format is not None else (_by_options(text, options), "recognised")
    for name in options.given():
        if name not in chosen.takes:
            if name == "part":
                raise TraceError(
                    f"{text.source}: a file of format {chosen.name} holds one trace; omit part={options.part}"
                )
            there = ", ".join(chosen.takes) or "none"
            raise TraceError(f"{text.source}: format {chosen.name} has no setting {name}; it takes {there}")
    text.chosen = how
    trace = chosen.read(text, options)
    _keep(key, trace)
    return trace


def _keep(key: tuple[str, str, str | None, Options], trace: Trace) -> None:
    _kept[key] = trace
    while len(_kept) > 1 and sum(map(len, _kept.values())) > MAX_KEPT_ROWS:
        _kept.popitem(last=False)
    if len(trace) > MAX_KEPT_ROWS:
        _kept.clear()


def _named(format: str) -> Format:
    if format not in FORMATS:
        raise TraceError(f"unknown trace format {format!r}; choose from {', '.join(FORMATS)}")
    return FORMATS[format]


def _by_options(text: Text, options: Options) -> Format:
    """The format that a setting asks for, else the one that fits."""
    if options.columns:
        return plain_csv.FORMAT
    if options.step_s is not None or (options.unit and numbers.width(text) == 1):
        return rates.FORMAT
    if options.unit and numbers.width(text) == 2:
        return plain_csv.FORMAT
    return _sniffed(text)


def _sniffed(text: Text) -> Format:
    for format in (kvstream.FORMAT, plain_csv.FORMAT):  # which say what they are
        if format.fits(text):
            return format
    if text.is_json:  # whose formats have keys of their own, so that at most one fits
        for format in (cachegen.FORMAT, dashjs.FORMAT, iperf3.FORMAT, sabre.FORMAT, genet.FORMAT):
            if format.fits(text):
                return format
    fitting = [format for format in FORMATS.values() if format.fits(text)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = [format.name for format in fitting]
        raise TraceError(f"{text.source}: fits {' and '.join(names)}, which mean different links; set format=")
    raise pairs.problem(text) or _problem(text)


def _problem(text: Text) -> TraceError:
    """Why a file is of no known format, and what to do."""
    if text.is_json:
        why = "JSON of no known trace: those are lists of duration_ms and bandwidth_kbps (sabre) or speed and duration"
        return TraceError(f"{text.source}: {why} (dash.js), timestamps with bandwidths (Genet), and iperf3 -J")
    columns = numbers.width(text)
    first, second = (row for _, row in [*itertools.islice(text.rows(), 2), (0, "")][:2])
    if columns == 1 or (columns and not second):
        why = "numbers that are no rising milliseconds (mahimahi)" if columns == 1 else "one row of numbers"
        return TraceError(f"{text.source}: {why}: if they are rates, set unit= and step=, as in unit=Mbps,step=1s")
    separator = plain_csv.separator_of(first)
    fields = plain_csv.fields_of(second, separator)
    if any(map(is_number, fields)) and len(fields) == len(plain_csv.fields_of(first, separator)):
        return TraceError(f"{text.source}: matches no trace format; name its columns, as in {plain_csv.advice(text)}")
    return TraceError(f"{text.source}: matches no trace format; set format= to one of {', '.join(FORMATS)}")
