"""A column of a trace: float64, finite, within bounds, read-only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvstream.traces.errors import TraceError

Floats: TypeAlias = NDArray[np.float64]

LIST_ROWS = 100_000


def checked_column(
    trace: str, what: str, values: ArrayLike, low: float, high: float, length: int | None = None
) -> Floats:
    """`values`, each finite and in [low, high], as a read-only column; raises TraceError naming trace, column and row.

    A copy, unless they are a read-only array already: readers hand over large ones.
    """
    try:
        column = np.asarray(values, dtype=np.float64)
        if column.flags.writeable or not column.flags.c_contiguous:
            column = column.copy()
    except (TypeError, ValueError):
        raise TraceError(f"trace {trace!r}: {what} is not a list of numbers") from None
    if column.ndim != 1 or (length is not None and len(column) != length):
        wanted = "one-dimensional" if length is None else f"of length {length}"
        raise TraceError(f"trace {trace!r}: {what} has shape {column.shape}; it must be {wanted}")
    good = np.isfinite(column) & (column >= low) & (column <= high)
    if not good.all():
        row = int(np.argmin(good))
        raise TraceError(
            f"trace {trace!r}: {what}[{row}] = {column[row]}; it must be a finite number from {low:g} to {high:g}"
        )
    if np.signbit(column).any():
        column = column + 0.0  # turns -0.0 into 0.0, so that equal content hashes equally
    column.setflags(write=False)
    return column


def sequence(column: Floats) -> Sequence[float]:
    """A column for scalar look-ups: a list, or no copy where that would be large."""
    return column.tolist() if len(column) <= LIST_ROWS else cast(Sequence[float], column.data)
