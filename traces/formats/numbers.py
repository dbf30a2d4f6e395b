"""Rows of numbers out of text, fast: whole blocks at a time, columns as arrays, and the line of whatever is wrong.

Plain decimals of up to 15 digits become whole numbers over powers of ten, whose quotient is rounded as `float` rounds;
a block with anything else (exponents, signs, more digits) takes numpy's parser, and a block that is wrong somewhere is
read line by line for the complaint.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstream.traces.columns import Floats
from kvstream.traces.errors import TraceError
from kvstream.traces.formats.text import Text, is_number, split
from kvstream.traces.trace import MAX_RATE_BPS, MAX_ROWS

_SPACES = bytes.maketrans(b",;\t\n\v\f", b"      ")
_POWERS = 10.0 ** np.arange(16)
_DIGITS = 15
_FIRST_ROWS = 1 << 12
_NOT_WHOLE = np.frombuffer(b".eEnNaAiIfFtTyY+-", np.uint8)
TOO_MANY = "cut the file into several, or average its rows over a coarser step first"


@dataclass(frozen=True)
class Rows:
    """A block of rows: `values` [row, column], `whole` says of each column whether it is written in digits alone."""

    line: int
    """Number of the block's first line."""
    values: Floats
    whole: tuple[bool, ...]


@dataclass(frozen=True)
class Table:
    """All rows of a file, a contiguous array for each column."""

    columns: tuple[Floats, ...]
    whole: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.columns[0])


def width(text: Text) -> int:
    """Columns of numbers that the file's first row has, or its second under a line of names; 0 where neither has."""
    for _, (_, row) in zip(range(2), text.rows(), strict=False):
        fields = split(row)
        if all(map(is_number, fields)):
            return len(fields)
    return 0


def header(text: Text) -> tuple[int, str] | None:
    """The file's first row, if it is a line of names: no field of it is a number."""
    line, row = text.first
    return None if any(is_number(field) for field in split(row)) else (line, row)


def data(text: Text, names: tuple[int, str] | None) -> Iterator[tuple[int, bytes]]:
    """(number of its first line, block), with comments and the line of names left empty."""
    line = 1
    for block in text.blocks():
        n_lines = block.count(b"\n")
        if names is not None and line <= names[0] < line + n_lines:
            block = _blanked(block, names[0] - line)
        if b"#" in block:
            block = b"\n".join(b"" if one.lstrip()[:1] == b"#" else one for one in block.split(b"\n"))
        yield line, block
        line += n_lines


def blocks(text: Text, columns: int) -> Iterator[Rows]:
    """Rows of exactly so many numbers, block by block; blank lines, comments and one line of names are passed over.

    Raises TraceError for anything else, naming the line.
    """
    for line, block in data(text, header(text)):
        found = quick(block, columns) or _slow(text, line, block, columns)
        if len(found[0]):
            yield Rows(line, *found)


def table(text: Text, columns: int) -> Table:
    """All rows. Raises TraceError, also for more than MAX_ROWS."""
    whole = [True] * columns
    columns_of = Columns(text, columns)
    for rows in blocks(text, columns):
        columns_of.add(rows.line, rows.values)
        whole = [so_far and here for so_far, here in zip(whole, rows.whole, strict=True)]
    return Table(columns_of.joined(), tuple(whole))


class Columns:
    """Columns that grow in place, block by block, so that nothing is held twice."""

    def __init__(self, text: Text, columns: int) -> None:
        self._text = text
        self._columns = [np.empty(_FIRST_ROWS) for _ in range(columns)]
        self._count = 0

    def add(self, line: int, values: Floats) -> None:
        """Add rows [row, column] of a block that begins at this line. Raises TraceError above MAX_ROWS."""
        count = self._count + len(values)
        if count > MAX_ROWS:
            raise self._text.error(line, f"more than {MAX_ROWS} rows; {TOO_MANY}")
        for column, added in zip(self._columns, values.T, strict=True):
            if count > len(column):
                column.resize(2 * count, refcheck=False)
            column[self._count : count] = added
        self._count = count

    def joined(self) -> tuple[Floats, ...]:
        """A contiguous array for each column. Raises TraceError without rows."""
        if not self._count:
            raise self._text.error(self._text.first[0], "a header and no rows")
        joined, self._columns = tuple(self._columns), []
        for column in joined:
            column.resize(self._count, refcheck=False)
        return joined


def checked(text: Text, values: Floats, column: int, what: str, low: float, high: float = math.inf) -> Floats:
    """The values of a column (from 0), if each is finite and in [low, high]; raises TraceError naming the line."""
    good = np.isfinite(values) & (values >= low) & (values <= high)
    if not good.all():
        line, fields = row_of(text, int(np.argmin(good)))
        text.number(line, fields[column], what, low, high)
        raise text.error(line, f"{what} is {fields[column][:40]}; expected a number from {low:g} to {high:g}")
    return values


def row_of(text: Text, index: int) -> tuple[int, list[str]]:
    """(line number, fields) of a row of numbers by its index: for complaints."""
    names = header(text)
    rows = (pair for pair in text.rows() if pair != names)
    line, row = next(itertools.islice(rows, index, None))
    return line, split(row)


def quick(block: bytes, columns: int) -> tuple[Floats, tuple[bool, ...]] | None:
    """Rows of a block, or None where something is not a number or a line has too many or too few."""
    flat = block.translate(_SPACES)
    chars = np.frombuffer(flat, np.uint8)
    inside = np.zeros(len(chars) + 1, bool)
    np.not_equal(chars, 32, out=inside[1:])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    starts, ends = edges[::2], edges[1::2]  # a block ends with a line end, so that every field has an end
    if len(starts) % columns:
        return None
    breaks = np.flatnonzero(np.frombuffer(block, np.uint8) == 10)
    if len(breaks) * columns != len(starts):  # some lines are blank
        breaks = breaks[np.unique(np.searchsorted(breaks, starts))]
    rows = starts.reshape(-1, columns)
    if len(breaks) != len(rows) or (rows[:, -1] > breaks).any() or (rows[1:, 0] < breaks[:-1]).any():
        return None
    dots = np.flatnonzero(chars == 46)
    field = _holders(dots, starts, ends)
    digits = ends - starts
    digits[field] -= 1
    numeric = np.count_nonzero(chars - 48 < 10) + len(dots) == np.count_nonzero(inside)
    if numeric and (field[1:] > field[:-1]).all() and digits.min(initial=1) >= 1 and digits.max(initial=1) <= _DIGITS:
        values = _fields(flat.replace(b".", b""), np.int64)
        if values is not None and len(dots):
            decimals = np.zeros(len(starts), np.int64)
            decimals[field] = ends[field] - dots - 1
            values = values / _POWERS[decimals]
    else:
        field = _holders(np.flatnonzero(np.isin(chars, _NOT_WHOLE)), starts, ends)
        values = _fields(flat, np.float64)
    if values is None or len(values) != len(starts):
        return None
    whole = np.bincount(field % columns, minlength=columns) == 0
    return values.astype(np.float64, copy=False).reshape(-1, columns), tuple(whole.tolist())


def _holders(places: NDArray[np.int64], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The field that each place lies in."""
    if len(places) == len(starts) and (places >= starts).all() and (places < ends).all():
        return np.arange(len(starts))
    return np.searchsorted(starts, places, side="right") - 1


def _fields(flat: bytes, kind: type) -> NDArray[Any] | None:
    """The numbers between blanks, or None where something is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # how older versions of numpy say it
        try:
            return np.fromstring(flat, dtype=kind, sep=" ")
        except (ValueError, DeprecationWarning):
            return None


def _slow(text: Text, line: int, block: bytes, columns: int) -> tuple[Floats, tuple[bool, ...]]:
    """The same line by line. Raises TraceError for the first that is wrong."""
    found: list[list[float]] = []
    whole = [True] * columns
    for number, row in enumerate(text.decoded(block).split("\n"), line):
        if not row.strip():
            continue
        fields = split(row)
        if len(fields) != columns:
            raise text.error(number, f"{len(fields)} columns; this format has {columns}")
        for column, one in enumerate(fields):
            if not is_number(one):
                raise text.error(number, f"column {column + 1} is {one[:40]!r}; expected a number")
            whole[column] = whole[column] and one.isdigit()
        found.append([float(one) for one in fields])
    return np.array(found).reshape(-1, columns), tuple(whole)


def _blanked(block: bytes, index: int) -> bytes:
    """The block with one of its lines left empty."""
    lines = block.split(b"\n", index + 1)
    lines[index] = b""
    return b"\n".join(lines)


def timed(text: Text, rate_bps: float, rate: str, *, low: float = -math.inf) -> tuple[Floats, Floats]:
    """(times as written, rates in bit/s) of a file of two columns. Raises TraceError."""
    times, rates = table(text, 2).columns
    checked(text, times, 0, "time", low)
    checked(text, rates, 1, rate, 0.0, MAX_RATE_BPS / 2 / rate_bps)
    rates *= rate_bps
    return times, rates


def complaint(text: Text, row: int, problem: str) -> TraceError:
    """A TraceError that names the line of a row of numbers, given by its index."""
    return text.error(row_of(text, row)[0], problem)
