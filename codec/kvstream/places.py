"""Where the coefficients of a chunk lie when a GPU multiplies them with the basis: group by group, side by side.

A group has its live columns, then the low bits of those that are wide, then, for each column with an escape, two parts
of the escapes' values; and is padded to a multiple of STEP. All that is small, what lies where included, goes to the
device as one array of words: a transfer takes longer to start than to finish.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.entropy import device as shared
from kvstream.codec.entropy import sections
from kvstream.codec.kvstream.parameters import Parameters
from kvstream.codec.kvstream.rest import Rest
from kvstream.codec.quantize import array_type, compiled

STEP = 32
"""Columns that are multiplied at a time."""
SHIFT = 16
"""Where a column's number of low bits begins in a word that names its table."""
PART = 1 << 11
"""An escape is sent through the matrix units as a multiple of this and a rest, each exact in float16."""
LARGEST = 65504 - PART
"""Escapes up to this magnitude have multiples that float16 holds as they are."""
_EVEN = 4
"""Words whose multiples parts begin at: 16 bytes, or kernels would be compiled for every alignment."""


FLAGS = 8
"""The first words: number + 1 of a damaged stream, or 0; of the live columns, and from LOW_FLAG of low bits."""
LOW_FLAG = 4


@dataclass(frozen=True)
class Places:
    """Of A live columns, W of them wide, with E escapes in P columns, in G groups, the rest of what kernels need."""

    words: Tensor
    """int32, on the host."""
    begins: dict[str, int]
    """Where in `words` is what:

    `own` `[A]`, a column's table and number of low bits; `live` `[A]`, its place; `low_own`, `low` `[W]`, the same of
    low bits, whose tables follow those of the classes, one bit first; `first` `[G + 1]`, where each group begins;
    `rows` `[width]`, the row of the basis, 0 for padding, whose coefficients are 0; `offsets`, where the streams of
    live columns begin, if that was given; `low_offsets`, `low_units`, streams of low bits; `at` int64 `[2 E]`, where
    parts of escapes go in a row-major array; `parts` float32 `[2 E]`, these; `coarse` `[P]`, the places of second
    parts; `bases` int64, the target's addresses.
    """
    width: int
    live: int
    """A."""
    low: int
    """W."""
    low_units: int
    """Of the streams of low bits."""
    escapes: int
    """E."""
    coarse: int
    """P, if the basis has to be multiplied by PART for their second parts, else 0: float16 does not hold them."""

    @classmethod
    def of(
        cls, parameters: Parameters, group_ends: NDArray[np.int64], rest: Rest, tokens: int,
        addresses: NDArray[np.int64], offsets: NDArray[np.int32] | None, pinned: bool,
    ) -> Places:  # fmt: skip
        """`group_ends` are those of the codec's columns. Raises CodecError for low bits that do not fit."""
        count, wide, escaped = len(rest.alive), int(np.count_nonzero(rest.shift)), rest.escapes
        layout, low_offsets, low_units = None, np.empty(0, np.int32), np.empty(0, np.uint8)
        if wide:
            layout = sections.layout(rest.fine, wide, tokens, 2, parameters.segment_tokens)
            low_offsets, low_units = shared.stream_offsets(layout), layout.data[layout.units_at :]
        sizes = {
            "flags": FLAGS, "own": count, "live": count, "low_own": wide, "low": wide, "first": len(group_ends) + 1,
            "rows": count + wide + 2 * len(escaped) + STEP * len(group_ends),
            "offsets": 0 if offsets is None else len(offsets),
            "low_offsets": len(low_offsets), "low_units": len(low_units) // 4 + 2,  # kernels read ahead
            "at": 4 * len(escaped), "parts": 2 * len(escaped), "coarse": len(escaped), "bases": 2 * len(addresses),
        }  # fmt: skip
        begins, end = {}, 0
        for name, size in sizes.items():
            begins[name] = end
            end += -(-size // _EVEN) * _EVEN
        words = torch.empty(end, dtype=torch.int32, pin_memory=pinned)
        array = words.numpy()
        part = {name: array[begin : begin + sizes[name]] for name, begin in begins.items()}
        for name in ("flags", "rows"):
            part[name][:] = 0
        part["bases"].view(np.int64)[:] = addresses
        if offsets is not None:
            part["offsets"][:] = offsets
        part["low_offsets"][:] = low_offsets
        part["low_units"][-2:] = 0
        part["low_units"].view(np.uint8)[: len(low_units)] = low_units
        gain = 1 if int(np.abs(escaped["value"]).max(initial=0)) < LARGEST else PART
        columns = _lay_out()(
            rest.alive, rest.own, rest.shift, group_ends, parameters.classes.tables.count,
            escaped["column"].astype(np.int64), escaped["token"].astype(np.int64), escaped["value"].astype(np.int64),
            gain, part["first"], part["rows"], part["live"], part["own"], part["low"], part["low_own"],
            part["at"].view(np.int64), part["parts"].view(np.float32), part["coarse"],
        )  # fmt: skip
        return cls(
            words, begins, max(int(part["first"][-1]), STEP), count, wide, layout.units if layout else 0,
            len(escaped), columns if gain > 1 else 0,
        )  # fmt: skip


@cache
def _lay_out() -> Callable[..., int]:
    from numba import types

    numbers, small, out = array_type("int64", 1), array_type("uint8", 1), array_type("int32", 1, readonly=False)
    where, values = array_type("int64", 1, readonly=False), array_type("float32", 1, readonly=False)
    given = (numbers, small, small, numbers, types.int64, numbers, numbers, numbers, types.int64)
    return compiled(_lay_out_columns, types.int64(*given, *[out] * 6, where, values, out))


def _lay_out_columns(
    alive: Any, tables: Any, shifts: Any, group_ends: Any, classes: Any, columns: Any, tokens: Any, values: Any,
    gain: Any, first: Any, rows: Any, live: Any, own: Any, low: Any, low_own: Any, where: Any, parts: Any, coarse: Any,
) -> Any:  # fmt: skip
    """Fill the arrays of `Places`; returns how many columns have escapes, which are ordered by column. Tables of low
    bits follow those of the classes, one bit first."""
    at = 0
    a = 0
    w = 0
    e = 0
    n = 0
    for group in range(group_ends.shape[0]):
        first[group] = at
        end = a + np.searchsorted(alive[a:], group_ends[group])
        for b in range(a, end):  # plain enough to be vectorised
            live[b] = at + b - a
            own[b] = np.int32(tables[b]) | np.int32(shifts[b]) << np.int32(SHIFT)
            rows[at + b - a] = alive[b]
        at += end - a
        for b in range(a, end):
            if shifts[b] > 0:
                low[w] = at
                low_own[w] = classes + shifts[b] - 1
                rows[at] = alive[b]
                at += 1
                w += 1
        a = end
        while e < columns.shape[0] and columns[e] < group_ends[group]:
            column = columns[e]
            # What the wide column's low bits say in an escape's place is taken back.
            half = (1 << np.int64(shifts[np.searchsorted(alive, column)])) >> 1
            rows[at] = column
            rows[at + 1] = column
            coarse[n] = at + 1
            while e < columns.shape[0] and columns[e] == column:
                value = values[e] + half
                multiple = (value + PART // 2) // PART
                where[2 * e] = at
                where[2 * e + 1] = at + 1
                parts[2 * e] = value - multiple * PART
                parts[2 * e + 1] = multiple * (PART // gain)
                e += 1
            at += 2
            n += 1
        at = (at + STEP - 1) // STEP * STEP
    first[group_ends.shape[0]] = at
    width = max(at, STEP)
    for e in range(columns.shape[0]):
        where[2 * e] += tokens[e] * width
        where[2 * e + 1] += tokens[e] * width
    return n
