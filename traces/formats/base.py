"""What every trace format shares: the text of a file, numbers with their line, and the trace made of them.

Files come from anywhere, so sizes are bounded before anything is allocated, and every complaint names file and line.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from traces.errors import TraceError
from traces.framing import goodput_per_capacity
from traces.trace import MAX_RATE_BPS, MAX_ROWS, End, Kind, Per, Provenance, Trace

MAX_FILE_BYTES = 256 * 2**20
HEAD_LINES = 200
GOODPUT_NOTE = "goodput to layer-2 capacity x1514/1448 (TCP, MTU 1500)"
_SEPARATOR = re.compile(r"[\s,;]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Text:
    """A file's lines: `source` is its name (not its path), `lines` have no line ends."""

    source: str
    lines: Sequence[str]
    sha256: str

    @classmethod
    def of(cls, data: bytes, source: str) -> Text:
        """Decode a file. Raises TraceError when it is too large, empty or not text."""
        if len(data) > MAX_FILE_BYTES:
            raise TraceError(f"{source}: {len(data)} bytes; a trace file has at most {MAX_FILE_BYTES}")
        try:
            content = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise TraceError(f"{source}: not text (byte {error.start} is no UTF-8); traces are text files") from None
        if "\0" in content:
            raise TraceError(f"{source}: not text (it holds zero bytes); traces are text files")
        if not content.strip():
            raise TraceError(f"{source}: empty; a trace has at least one row")
        return cls(source, content.splitlines(), hashlib.sha256(data).hexdigest())

    @classmethod
    def read(cls, path: Path) -> Text:
        """Read a file of bounded size. Raises TraceError when it cannot be read."""
        try:
            with path.open("rb") as file:
                return cls.of(file.read(MAX_FILE_BYTES + 1), path.name)
        except OSError as error:
            raise TraceError(f"{path}: cannot read this trace file ({error.strerror or error})") from None

    def rows(self, start: int = 1) -> Iterator[tuple[int, str]]:
        """(line number from 1, stripped line) of the lines that are not blank, from line `start`."""
        for number, line in enumerate(self.lines[start - 1 :], start):
            if stripped := line.strip():
                yield number, stripped

    def head(self) -> list[str]:
        """The first lines that are not blank, for a first look."""
        return [line.strip() for line in self.lines[:HEAD_LINES] if line.strip()]

    def error(self, line: int, problem: str) -> TraceError:
        """A TraceError that says where."""
        return TraceError(f"{self.source}:{line}: {problem}")

    def number(self, line: int, field: str, what: str, low: float = -math.inf, high: float = math.inf) -> float:
        """The field as a finite number in [low, high]; raises TraceError naming file, line and field."""
        if not _NUMBER.fullmatch(field.strip()):
            raise self.error(line, f"{what} is {field.strip()[:40]!r}; a number is wanted")
        value = float(field)
        if not (math.isfinite(value) and low <= value <= high):
            bound = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
            wanted = f"a finite number {bound}" if math.isfinite(low) else "a finite number"
            raise self.error(line, f"{what} is {field.strip()[:40]}; {wanted} is wanted")
        return value

    def rate(self, line: int, field: str, what: str, factor_bps: float) -> float:
        """A rate in bit/s: the field times the unit it is written in."""
        return self.number(line, field, what, 0.0, MAX_RATE_BPS / 2 / factor_bps) * factor_bps

    def numbers(self, columns: int, start: int = 1) -> Iterator[tuple[int, list[str]]]:
        """(line number, fields) of rows that must have exactly this many fields; at most MAX_ROWS of them."""
        for count, (line, row) in enumerate(self.rows(start)):
            fields = split(row)
            if len(fields) != columns:
                raise self.error(line, f"{len(fields)} columns; this format has {columns}")
            if count >= MAX_ROWS:
                raise self.error(line, f"more than {MAX_ROWS} rows; cut the file")
            yield line, fields

    def csv_fields(self, line: int, row: str) -> list[str]:
        """The fields of one CSV row, quotes removed."""
        try:
            return next(csv.reader([row]))
        except csv.Error as error:
            raise self.error(line, f"not CSV ({error})") from None

    def trace(
        self,
        format: str,
        durations_s: ArrayLike,
        rates_bps: ArrayLike,
        *,
        kind: Kind = "capacity",
        goodput: bool = False,
        end: End = "loop",
        per: Per = "time",
        part: int | None = None,
        notes: Sequence[str] = (),
        licence: str = "unknown",
        delay_s: ArrayLike | None = None,
        loss: ArrayLike | None = None,
    ) -> Trace:
        """The trace of this file; with `goodput`, rates of application bytes become layer-2 capacity."""
        rates = np.asarray(rates_bps, np.float64)
        if goodput:
            rates, notes = rates / goodput_per_capacity(), (*notes, GOODPUT_NOTE)
        name = Path(self.source).stem or self.source
        if part is not None:
            name, notes = f"{name}#{part}", (f"part {part}", *notes)
        record = Provenance(self.source, format, licence, tuple(notes), self.sha256)
        try:
            return Trace(
                name,
                np.asarray(durations_s, np.float64),
                rates,
                end,
                kind,
                per,
                (record,),
                None if delay_s is None else np.asarray(delay_s, np.float64),
                None if loss is None else np.asarray(loss, np.float64),
            )
        except TraceError as error:
            raise TraceError(f"{self.source}: {error}") from None


@dataclass(frozen=True)
class Format:
    """One way to write a trace. `fits` looks at a file's shape only; `read` checks every value.

    `unit` and `edge` say what a row's rate is and which interval it holds for; `kind` whether it is what the link
    could carry or what a sender achieved (None: each file says which). A format with `parts` may hold several traces in
    a file.
    """

    name: str
    unit: str
    edge: str
    kind: Kind | None
    fits: Callable[[Text], bool]
    read: Callable[[Text, int | None], Trace]
    write: Callable[[Trace], str] | None = None
    parts: bool = False


def split(row: str) -> list[str]:
    """Fields between spaces, tabs, commas or semicolons."""
    return _SEPARATOR.split(row.strip())


def is_number(field: str) -> bool:
    """Whether a field has the form of a number."""
    return _NUMBER.fullmatch(field) is not None


def table(text: Text, columns: int) -> list[list[float]] | None:
    """The first lines as numbers when each has this many numeric fields, else None."""
    rows = [split(line) for line in text.head()]
    if not rows or any(len(row) != columns or not all(map(is_number, row)) for row in rows):
        return None
    return [[float(field) for field in row] for row in rows]


def until_next(text: Text, lines: Sequence[int], times_s: Sequence[float], last_s: float | None = None) -> list[float]:
    """Durations of rows that hold from their own time until the next row's; the last as long as the one before.

    Raises TraceError where times do not rise. `last_s` is the last row's length (needed when there is only one row).
    """
    durations = [later - sooner for sooner, later in pairwise(times_s)]
    for line, duration in zip(lines[1:], durations, strict=True):
        if duration <= 0.0:
            raise text.error(line, f"time goes {'back' if duration < 0 else 'nowhere'}; times must rise")
    if last_s is None:
        last_s = durations[-1] if durations else 1.0
    return [*durations, last_s]


def choose_part(text: Text, part: int | None, labels: Sequence[str]) -> int:
    """The part to read out of several, as an index into `labels`. Raises TraceError when it must be named."""
    if part is None and len(labels) == 1:
        return 0
    if part is None or not 0 <= part < len(labels):
        some = ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")
        given = "" if part is None else f" (part={part} is none of them)"
        raise TraceError(f"{text.source}: holds {len(labels)} traces ({some}); choose part=0..{len(labels) - 1}{given}")
    return part


def rows_of(trace: Trace) -> list[str]:
    """The columns a trace has as CSV, a header first; numbers read back bit for bit."""
    columns = {
        "duration_s": trace.durations_s if trace.per == "time" else None,
        "rate_bps": trace.rates_bps,
        "delay_s": trace.delay_s,
        "loss": trace.loss,
    }
    present = {name: column.tolist() for name, column in columns.items() if column is not None}
    rows = zip(*present.values(), strict=True)
    return [",".join(present), *(",".join(map(repr, row)) for row in rows)]


def refuse(
    trace: Trace, format: str, *, ends: Sequence[End] = ("loop",), delay: bool = False, loss: bool = False
) -> None:
    """Raise TraceError when a format cannot say what a trace holds, rather than lose it in silence."""
    if trace.per == "chunk":
        raise TraceError(f"{format} holds rates over time; trace {trace.name!r} has one rate a chunk")
    if trace.end not in ends:
        raise TraceError(
            f"{format} cannot say end={trace.end}; give trace {trace.name!r} end={ends[0]}, or write format kvstream"
        )
    for what, column in (("delay_s", None if delay else trace.delay_s), ("loss", None if loss else trace.loss)):
        if column is not None:
            raise TraceError(f"{format} has no column for {what} of trace {trace.name!r}; write format kvstream")
