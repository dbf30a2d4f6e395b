"""What every trace format shares: how it is described, its options, times to durations, and the trace of a file."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import ArrayLike

from kvstream.traces.columns import Floats
from kvstream.traces.errors import TraceError
from kvstream.traces.formats.text import Text
from kvstream.traces.framing import goodput_per_capacity
from kvstream.traces.trace import MAX_RATE_BPS, End, Kind, Per, Provenance, Trace
from kvstream.traces.units import parse_rate, parse_time

GOODPUT_NOTE = "goodput to layer-2 capacity x1514/1448 (TCP, MTU 1500)"


@dataclass(frozen=True)
class Options:
    """How a file is to be read, beside its format; a format names those that it takes."""

    part: int | None = None
    """Which of several traces in a file, from 0."""
    unit: str = ""
    """What a number of a rate column is, where the file does not say: `Mbps`, `kbps`, `MB/s`."""
    step_s: float | None = None
    """How long each of a column of rates holds."""
    bin_s: float | None = None
    """mahimahi: packets are counted in bins of this length."""
    columns: str = ""
    """Which column is what: see `plain_csv`."""
    repair: Literal["", "sort", "drop"] = ""
    """What to do with a row whose time does not rise: sort the rows, or drop those that go back."""

    @classmethod
    def of(cls, settings: dict[str, str]) -> Options:
        """Takes the settings of a spec that are options out of it. Raises TraceError."""
        part, repair = settings.pop("part", None), settings.pop("repair", "")
        if part is not None and not part.isdecimal():
            raise TraceError(f"part={part}; parts are numbered from 0")
        if repair not in ("", "sort", "drop"):
            raise TraceError(f"repair={repair}; choose from sort, drop")
        unit = settings.pop("unit", "")
        times = {f"{key}_s": parse_time(settings.pop(key)) for key in ("step", "bin") if key in settings}
        for name, value in times.items():
            if not value > 0.0:
                raise TraceError(f"{name[:-2]} must be above 0")
        if unit:
            unit_bps(unit)
        return cls(
            None if part is None else int(part),
            unit,
            columns=settings.pop("columns", ""),
            repair=cast(Any, repair),
            **times,
        )

    def given(self) -> dict[str, object]:
        """The options that are set, by the names that a spec uses."""
        return {
            field.name.removesuffix("_s"): value
            for field in fields(self)
            if (value := getattr(self, field.name)) not in (None, "")
        }


OPTIONS = tuple(field.name.removesuffix("_s") for field in fields(Options))


@dataclass(frozen=True)
class Format:
    """One way to write a trace. `fits` says whether a whole file has its shape; `read` checks every value.

    `unit` and `edge` say what a row's rate is and which interval it holds for; `kind` whether it is what the link
    could carry or what a sender achieved (None: each file says which). `takes` names the options that it has: one
    with `part` may hold several traces per file.
    """

    name: str
    unit: str
    edge: str
    kind: Kind | None
    fits: Callable[[Text], bool]
    read: Callable[[Text, Options], Trace]
    write: Callable[[Trace], str] | None = None
    takes: tuple[str, ...] = ()


def unit_bps(unit: str) -> float:
    """bit/s in one of a unit of rate: 1e6 for `Mbps`. Raises TraceError."""
    try:
        return parse_rate(f"1{unit}")
    except TraceError:
        raise TraceError(f"unit={unit}: no unit of a rate; give Mbps, kbps, bps, or MB/s for bytes") from None


def trace_of(
    text: Text,
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
    name: str = "",
    story: str = "",
    records: tuple[Provenance, ...] = (),
) -> Trace:
    """The trace of a file; with `goodput`, rates of application bytes become layer-2 capacity.

    Arrays are handed over: the trace keeps them, read-only. Name and provenance are the file's unless given.
    """
    columns = [None if one is None else _handed_over(one) for one in (durations_s, rates_bps, delay_s, loss)]
    durations, rates, delays, losses = columns
    assert durations is not None
    assert rates is not None
    if goodput:
        rates, notes = _handed_over(rates / goodput_per_capacity()), (*notes, GOODPUT_NOTE)
    name = name or Path(text.source.removesuffix(".gz")).stem or text.source
    if part is not None:
        name, notes = f"{name}#{part}", (f"part {part}", *notes)
    records = records or (Provenance(text.source, format, licence, tuple(notes), text.sha256, text.chosen),)
    try:
        return Trace(name, durations, rates, end, kind, per, records, delays, losses, story)
    except TraceError as error:
        raise TraceError(f"{text.source}: {error}") from None


def _handed_over(values: ArrayLike) -> Floats:
    column = np.asarray(values, np.float64)
    column.setflags(write=False)
    return column


def rate(text: Text, line: int, field: str, what: str, factor_bps: float) -> float:
    """A rate in bit/s: the field times the unit it is written in."""
    return text.number(line, field, what, 0.0, MAX_RATE_BPS / 2 / factor_bps) * factor_bps


def rising(
    times_s: Floats, others: Sequence[Floats], repair: str, refuse: Callable[[int, str], TraceError]
) -> tuple[Floats, list[Floats], list[str]]:
    """Times that rise, the other columns with them, and notes of what was repaired.

    Raises what `refuse` makes of the first row (by index) that does not, and of what to do about it.
    """
    late = np.flatnonzero(times_s[1:] <= times_s[:-1])
    if not len(late):
        return times_s, list(others), []
    row = int(late[0]) + 1
    if not repair:
        word = "repeats" if times_s[row] == times_s[row - 1] else "falls"
        raise refuse(row, f"time {word}; times must rise: set repair=sort, or repair=drop for rows that go back")
    if repair == "sort":
        order = np.argsort(times_s, kind="stable")
        kept = order[np.concatenate((times_s[order][1:] > times_s[order][:-1], [True]))]  # of equal times the last
        said = f"{len(late)} steps back: rows sorted by time"
    else:
        kept = np.flatnonzero(times_s >= np.maximum.accumulate(times_s))
        kept = kept[np.concatenate(([True], times_s[kept][1:] > times_s[kept][:-1]))]
        said = f"{len(late)} steps back: rows that go back dropped"
    if left := len(times_s) - len(kept):
        said += f", {left} of {len(times_s)} left out"
    return times_s[kept], [other[kept] for other in others], [said]


def until_next(times_s: Floats, last_s: float | None = None) -> Floats:
    """Durations of rows that hold from their own time until the next row's; the last as long as the one before.

    `last_s` is the last row's length instead (by itself a row lasts 1 s).
    """
    durations = np.empty(len(times_s))
    np.subtract(times_s[1:], times_s[:-1], out=durations[:-1])
    durations[-1] = last_s if last_s is not None else durations[-2] if len(durations) > 1 else 1.0
    return durations


def csv_fields(text: Text, line: int, row: str) -> list[str]:
    """The fields of one CSV row, quotes removed."""
    try:
        return next(csv.reader([row]))
    except csv.Error as error:
        raise text.error(line, f"not CSV ({error})") from None


class NoSuchPart(TraceError):
    """A file holds several traces, and none was chosen, or one that is not there."""

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count


def choose_part(text: Text, part: int | None, labels: Sequence[str]) -> int:
    """The part to read out of several, as an index into `labels`. Raises TraceError when it must be named."""
    if part is None and len(labels) == 1:
        return 0
    if part is None or not 0 <= part < len(labels):
        some = ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")
        given = "" if part is None else f" (part={part} does not exist)"
        which = f"choose part=0..{len(labels) - 1}{given}, or part=all where a set can be given"
        raise NoSuchPart(f"{text.source}: holds {len(labels)} traces ({some}); {which}", len(labels))
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
    """Raise TraceError when a format cannot express what a trace holds, rather than lose it silently."""
    if trace.per == "chunk":
        raise TraceError(f"{format} holds rates over time; trace {trace.name!r} has one rate per chunk")
    if trace.end not in ends:
        raise TraceError(
            f"{format} cannot express end={trace.end}; give {trace.name!r} end={ends[0]}, or write format kvstream"
        )
    for what, column in (("delay_s", None if delay else trace.delay_s), ("loss", None if loss else trace.loss)):
        if column is not None:
            raise TraceError(
                f"{format} has no column for {what} of trace {trace.name!r}; write format kvstream, or "
                f"drop={what.removesuffix('_s')}"
            )
