"""Probability tables that both coders share, and which table each column of symbols uses.

A *column* is what is coded with one distribution: one channel of one layer, keys or values. Probabilities are integers
that sum to 1024, so a rANS decoder finds a symbol by looking up its slot, and a chunk needs one byte per column instead
of a table per column.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstream.codec.errors import CodecError

PROB_BITS = 10
PROB_SCALE = 1 << PROB_BITS
MAX_SYMBOLS = 256
MAX_TABLES = 1 << 16
FREQUENCY_SHIFT = 8
REMAINDER_SHIFT = 20
"""Of the fields of `Tables.packed`."""


@dataclass(frozen=True, eq=False)
class Tables:
    """`frequencies` is uint16 `[K, S]`: how many of 1,024 slots each of S symbols has in each of K tables.

    Every row sums to 1,024. A symbol with frequency 0 cannot be coded. Raises CodecError for anything else.
    """

    frequencies: NDArray[np.uint16]

    def __post_init__(self) -> None:
        given = np.asarray(self.frequencies)
        if given.ndim != 2 or given.dtype.kind not in "iu":
            raise CodecError(f"tables are integers [tables, symbols], not {given.dtype} of shape {given.shape}")
        k, s = given.shape
        if not (1 <= k <= MAX_TABLES and 1 <= s <= MAX_SYMBOLS):
            raise CodecError(f"{k} tables of {s} symbols: at most {MAX_TABLES} of {MAX_SYMBOLS} can be coded")
        if given.min() < 0 or not (given.sum(axis=1, dtype=np.int64) == PROB_SCALE).all():
            raise CodecError(f"every table must be non-negative and sum to {PROB_SCALE}")
        frequencies = np.ascontiguousarray(given, dtype=np.uint16).copy()
        frequencies.setflags(write=False)
        object.__setattr__(self, "frequencies", frequencies)

    @property
    def count(self) -> int:
        """K, the number of tables."""
        return int(self.frequencies.shape[0])

    @property
    def symbols(self) -> int:
        """S, the size of the alphabet."""
        return int(self.frequencies.shape[1])

    @cached_property
    def starts(self) -> NDArray[np.uint16]:
        """uint16 `[K, S]`: the first slot of each symbol."""
        ends = np.cumsum(self.frequencies, axis=1, dtype=np.uint32)
        return (ends - self.frequencies).astype(np.uint16)

    @cached_property
    def slots(self) -> NDArray[np.uint8]:
        """uint8 `[K, 1024]`: the symbol that owns each slot."""
        symbols = np.tile(np.arange(self.symbols, dtype=np.uint8), self.count)
        return np.repeat(symbols, self.frequencies.ravel()).reshape(self.count, PROB_SCALE)

    @cached_property
    def packed(self) -> NDArray[np.uint32]:
        """uint32 `[K, 1024]`, a decoder's step for each slot: bits 0-7 symbol, 8-18 frequency, 20-29 remainder (the
        slot's distance from the symbol's first)."""
        rows = np.arange(self.count)[:, None]
        slots = self.slots
        frequency = self.frequencies[rows, slots].astype(np.uint32)
        remainder = np.arange(PROB_SCALE, dtype=np.uint32) - self.starts[rows, slots]
        return slots | (frequency << np.uint32(FREQUENCY_SHIFT)) | (remainder << np.uint32(REMAINDER_SHIFT))

    @cached_property
    def cost_bits(self) -> NDArray[np.float64]:
        """float64 `[K, S]`: the ideal length of each symbol in bits, infinite where it cannot be coded."""
        with np.errstate(divide="ignore"):
            return PROB_BITS - np.log2(self.frequencies.astype(np.float64))


def from_counts(counts: NDArray[Any], *, floor: int = 1) -> Tables:
    """Tables that code a histogram `[K, S]` (or `[S]`) in the fewest bits, every symbol getting at least `floor` slots.

    Slots go one by one to the symbol whose code length they shorten most, which is optimal for integer frequencies
    (the cost is convex in each). An empty row becomes uniform.
    """
    histogram = np.atleast_2d(np.asarray(counts, dtype=np.float64))
    if histogram.ndim != 2 or not np.isfinite(histogram).all() or histogram.min(initial=0.0) < 0:
        raise CodecError("counts must be a finite, non-negative histogram [tables, symbols]")
    s = histogram.shape[1]
    if not 1 <= s <= MAX_SYMBOLS or floor < 0 or floor * s > PROB_SCALE:
        raise CodecError(f"{s} symbols of at least {floor} slots do not fit {PROB_SCALE} slots")
    total = histogram.sum(axis=1, keepdims=True)
    p = np.where(total > 0, histogram / np.where(total > 0, total, 1), 1 / s)
    floors = np.maximum(floor, (p > 0).astype(np.int64))
    return Tables(_round(p, floors))


def laplace_family(n_classes: int = 32, n_symbols: int = 32, *, narrowest: float = 0.08, cut: float = 2e-5) -> Tables:
    """Tables of Laplace distributions, scales log-spaced from `narrowest` steps to a quarter of the alphabet.

    Symbol `n_symbols // 2` is the centre, each symbol one quantisation step. 32 classes lose under 0.03 bit per symbol
    against a table per column, most of it to 10-bit probabilities. Symbols rarer than `cut` (never the three
    in the middle) get no slot: at 8 bytes for an escape (`kvstream.codec.entropy.escapes`) that is cheaper than one
    slot of 1,024 each. `cut=0` gives every symbol at least one slot.
    """
    if n_classes < 1 or not 2 <= n_symbols <= MAX_SYMBOLS:
        raise CodecError(f"a family needs at least one class and 2 to {MAX_SYMBOLS} symbols")
    scales = np.geomspace(narrowest, max(n_symbols / 4, 2 * narrowest), n_classes)
    centre = n_symbols // 2
    edges = np.arange(n_symbols + 1) - centre - 0.5
    edges[0], edges[-1] = -np.inf, np.inf
    x = edges / scales[:, None]
    cdf = np.where(x < 0, 0.5 * np.exp(np.minimum(x, 0)), 1 - 0.5 * np.exp(-np.maximum(x, 0)))
    p = np.diff(cdf, axis=1)
    distance = np.abs(np.arange(n_symbols) - centre)
    # The outermost symbols stand for a whole tail: they must not outlast a rarer neighbour and leave a gap.
    kept = (p >= cut) | (distance <= 1)
    for d in range(2, n_symbols):
        kept &= (distance != d) | kept[:, distance == d - 1].all(axis=1, keepdims=True)
    p = np.where(kept, np.maximum(p, 1e-12), 0.0)
    return from_counts(p, floor=0 if cut else 1)


def assign(counts: NDArray[Any], tables: Tables, *, escape_bits: float = 64.0) -> NDArray[np.uint16]:
    """The table for each column of a histogram `[C, S]` that codes it in the fewest bits: uint16 `[C]`.

    A symbol without a slot counts `escape_bits`: what `kvstream.codec.entropy.escapes` spends on it.
    """
    histogram = np.asarray(counts, dtype=np.float64)
    if histogram.ndim != 2 or histogram.shape[1] != tables.symbols:
        raise CodecError(f"counts {histogram.shape} do not match tables of {tables.symbols} symbols")
    cost = np.where(np.isfinite(tables.cost_bits), tables.cost_bits, escape_bits)
    return np.argmin(histogram @ cost.T, axis=1).astype(np.uint16)


def cross_entropy_bits(counts: NDArray[Any], table_of_column: NDArray[Any], tables: Tables) -> float:
    """Bits that ideal coding of the histogram `[C, S]` takes with each column's table, infinite if it cannot."""
    histogram = np.asarray(counts, dtype=np.float64)
    cost = tables.cost_bits[np.asarray(table_of_column)]
    if histogram.shape != cost.shape:
        raise CodecError(f"counts {histogram.shape} do not match {cost.shape} columns and symbols")
    return float((histogram * np.where(histogram > 0, cost, 0.0)).sum())


def column_counts(symbols: NDArray[np.uint8], n_symbols: int) -> NDArray[np.int64]:
    """Histogram int64 `[C, S]` of symbols uint8 `[C, T]`. Raises CodecError for a symbol outside the alphabet."""
    columns, tokens = symbols.shape
    if tokens and int(symbols.max(initial=0)) >= n_symbols:
        raise CodecError(f"symbol {int(symbols.max())} is outside an alphabet of {n_symbols}")
    counts = np.zeros((columns, n_symbols), np.int64)
    block = max(1, (1 << 18) // max(tokens, 1))  # eight bytes per symbol for that many
    for first in range(0, columns, block):
        part = symbols[first : first + block]
        flat = part.astype(np.int64) + np.arange(len(part))[:, None] * n_symbols
        counts[first : first + block] = np.bincount(flat.ravel(), minlength=len(part) * n_symbols).reshape(
            len(part), n_symbols
        )
    return counts


def _round(p: NDArray[np.float64], floors: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Integer frequencies for probabilities `[K, S]`: one slot per step in every row that still changes."""
    frequency = np.maximum(floors, np.floor(p * PROB_SCALE).astype(np.int64))
    rows = np.arange(len(p))
    while len(rows):
        f, q = frequency[rows], p[rows]
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.where(q > 0, q * np.log2((f + 1) / f), 0.0)
            loss = np.where(f > floors[rows], q * np.log2(f / (f - 1)), np.inf)
        to, source = gain.argmax(axis=1), loss.argmin(axis=1)
        total = f.sum(axis=1)
        each = np.arange(len(rows))
        # Once the sum is right, moving a slot must still pay: rounding down is not always the optimal start.
        pays = gain[each, to] > loss[each, source] * (1 + 1e-12)
        add = (total < PROB_SCALE) | ((total == PROB_SCALE) & pays)
        take = (total > PROB_SCALE) | ((total == PROB_SCALE) & pays)
        frequency[rows[add], to[add]] += 1
        frequency[rows[take], source[take]] -= 1
        rows = rows[add | take]
    return frequency.astype(np.uint16)
