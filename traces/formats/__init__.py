"""Trace files: read, recognised and written. One file a format; every failure is a TraceError of one line."""

from __future__ import annotations

from pathlib import Path

from traces.errors import TraceError
from traces.formats import (
    cachegen,
    fcc,
    kvstream,
    loggers,
    lumos5g,
    mahimahi,
    oboe,
    pensieve,
    plain_csv,
    puffer,
    purdue,
    sabre,
    ucc,
)
from traces.formats.base import Format, Text
from traces.trace import Trace

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        kvstream.FORMAT,
        plain_csv.FORMAT,
        mahimahi.FORMAT,
        pensieve.FORMAT,
        sabre.FORMAT,
        cachegen.FORMAT,
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


def load(path: str | Path, format: str | None = None, part: int | None = None) -> Trace:
    """The trace in a file. Without a format it is recognised, and refused when two formats fit.

    `part` picks one of several traces in a file (fcc, puffer, cachegen), counted from 0. Raises TraceError.
    """
    return _parsed(Text.read(Path(path)), format, part)


def loads(data: bytes, source: str, format: str | None = None, part: int | None = None) -> Trace:
    """The same from bytes; `source` is the name that errors and the provenance give. Raises TraceError."""
    return _parsed(Text.of(data, source), format, part)


def sniff(path: str | Path) -> str:
    """The name of the one format that fits a file's first lines. Raises TraceError when none or several do."""
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
        raise TraceError(f"format {format!r} can be read but not written; write one of {writable}")
    return write(trace)


def _parsed(text: Text, format: str | None, part: int | None) -> Trace:
    chosen = _named(format) if format is not None else _sniffed(text)
    if part is not None and not chosen.parts:
        raise TraceError(f"{text.source}: a file of format {chosen.name} holds one trace; leave part={part} away")
    return chosen.read(text, part)


def _named(format: str) -> Format:
    if format not in FORMATS:
        raise TraceError(f"no trace format {format!r}; there are {', '.join(FORMATS)}")
    return FORMATS[format]


def _sniffed(text: Text) -> Format:
    fitting = [format for format in FORMATS.values() if format.fits(text)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise TraceError(f"{text.source}: fits no trace format; name one with format=, of {', '.join(FORMATS)}")
    names = [format.name for format in fitting]
    raise TraceError(f"{text.source}: fits {' and '.join(names)}, which are different links; name one with format=")
