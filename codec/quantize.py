"""Entropy-constrained scalar quantisation with a small family of shared tables.

Every column of coefficients, in units of the level's step, belongs to one of K classes. A class is a table of symbol
probabilities, a reconstruction value for each symbol, and thresholds: a magnitude is rounded up to k only where that
lowers squared error plus `RATE_WEIGHT` times the bits of the symbol (Sullivan, "Efficient scalar quantization of
exponential and Laplacian random variables", 1996). That makes a dead zone around zero as wide as each class's table
asks for. Symbols count from the middle of the alphabet; classes are symmetric.

A column whose values spread over more steps than the alphabet has is *wide*: rounded to whole steps q, its class
codes `h = floor(q / 2^k + 1/2)` and k low bits `q - 2^k h + 2^(k-1)` follow, which are close to equally likely.
Values that even that cannot hold are escapes, sent separately.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstream.codec.entropy.tables import Tables, assign, from_counts
from kvstream.codec.errors import CodecError

RATE_WEIGHT = 0.10
"""Squared steps that a bit is worth. At high rate one more bit removes 0.1155 squared steps of error."""
HALF = 127
"""Largest magnitude of a symbol."""
MAX_SHIFT = 7
"""Most low bits of a wide column; their tables are the uniform ones of 2 to 128 symbols."""
WIDE = 16.0
"""Mean magnitude, in steps, above which a column is wide."""
_ROUNDED = 4.0
"""Mean magnitude above which a class's reconstruction values are its symbols."""
ALPHABET = 2 * HALF + 1
ESCAPED = 255
LARGEST_ESCAPE = (1 << 21) - 1
"""In steps: two numbers of eleven bits, which a GPU's matrix units take exactly."""
ESCAPES = np.dtype([("column", "<u4"), ("token", "<u2"), ("value", "<i4")])
"""A coefficient that no table can code, in whole steps."""
_ROUNDS = 4


@dataclass(frozen=True, eq=False)
class Classes:
    """K classes: `tables` of `2 * HALF + 1` symbols and `values` float32 `[K, 2 * HALF + 1]`, in steps."""

    tables: Tables
    values: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.values.shape != (self.tables.count, ALPHABET) or self.tables.symbols != ALPHABET:
            raise CodecError(f"classes need {ALPHABET} symbols, values are {self.values.shape}")
        if not np.isfinite(self.values).all():
            raise CodecError("reconstruction values are not finite")

    @cached_property
    def support(self) -> NDArray[np.int32]:
        """int32 `[K]`: the largest magnitude that each table codes, on both sides and without gaps."""
        frequencies = self.tables.frequencies
        both = (frequencies[:, HALF:] > 0) & (frequencies[:, HALF::-1] > 0)
        return (np.cumprod(both, axis=1).sum(axis=1) - 1).astype(np.int32)

    @cached_property
    def whole(self) -> NDArray[np.bool_]:
        """bool `[K]`: whether a class reconstructs whole steps, as the low bits of wide columns require."""
        return (self.values == np.arange(-HALF, HALF + 1)).all(axis=1)

    @cached_property
    def thresholds(self) -> NDArray[np.float32]:
        """float32 `[K, HALF + 2]`: the magnitude from which symbol k is chosen over k - 1."""
        return _thresholds(self.tables, self.values)

    def quantise(
        self, values: NDArray[np.float32], class_of_column: NDArray[np.uint8], shift_of_column: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[Any]]:
        """Values float32 `[C, T]`, in steps, as symbols uint8 `[C, T]`, low bits uint8 `[W, T]` of the W columns with a
        shift, and escapes (`ESCAPES`), which end at LARGEST_ESCAPE.

        The symbol in an escape's place is the middle one, which is the shortest.
        """
        symbols = np.empty(values.shape, np.uint8)
        fine = np.empty((np.count_nonzero(shift_of_column), values.shape[1]), np.uint8)
        if not _kernel()(values, class_of_column, shift_of_column, self.thresholds, self.support, symbols, fine):
            return symbols, fine, np.empty(0, ESCAPES)
        column, token = np.nonzero(symbols == ESCAPED)
        symbols[column, token] = HALF
        escapes = np.empty(len(column), ESCAPES)
        escapes["column"], escapes["token"], escapes["value"] = column, token, whole_steps(values[column, token])
        return symbols, fine, escapes


def whole_steps(values: NDArray[np.float32]) -> NDArray[np.int32]:
    """Values of escapes, rounded; what is too large, or no number, ends at LARGEST_ESCAPE."""
    known = np.nan_to_num(values, nan=LARGEST_ESCAPE)
    return np.clip(np.rint(known), -LARGEST_ESCAPE, LARGEST_ESCAPE).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Design:
    """Classes, and for each level the class and the shift of each column, uint8 `[levels, C]`."""

    classes: Classes
    class_of_column: NDArray[np.uint8]
    shift_of_column: NDArray[np.uint8]


def design(
    values: NDArray[np.float32], steps: Sequence[float], alive: NDArray[np.bool_], n_classes: int = 32
) -> Design:
    """Fit classes to values float32 `[C, N]` quantised in each of `steps`, as far as `alive` bool `[levels, C]`.

    Alternates between quantising with the present classes, giving each column the class that codes it shortest, and
    refitting tables and reconstruction values to their columns.
    """
    columns = [np.flatnonzero(own) for own in alive]
    ends = np.cumsum([len(own) for own in columns])[:-1]
    parts = [np.ascontiguousarray(values[own]) / np.float32(step) for own, step in zip(columns, steps, strict=True)]
    spread = np.concatenate([np.abs(part).mean(axis=1) for part in parts])
    shift = np.clip(np.ceil(np.log2(np.maximum(spread, 1e-9) / WIDE)), 0, MAX_SHIFT).astype(np.uint8)
    spread = spread / (1 << shift.astype(np.int64))
    scales = np.geomspace(0.002, 1.1 * max(float(spread.max(initial=0)), 0.1), n_classes)
    classes = Classes(_laplace(scales), np.tile(np.arange(-HALF, HALF + 1, dtype=np.float32), (n_classes, 1)))
    nearest = np.abs(np.log(scales) - np.log(np.maximum(spread, 1e-9))[:, None]).argmin(axis=1)
    owner = nearest.astype(np.uint8)
    for _ in range(_ROUNDS):
        histograms = [
            _histograms(part, own, wide, classes)
            for part, own, wide in zip(parts, np.split(owner, ends), np.split(shift, ends), strict=True)
        ]
        counts = np.concatenate([count for count, _ in histograms])
        sums = np.concatenate([total for _, total in histograms])
        classes = _refit(counts, sums, _assign(counts, shift, classes), classes)
        owner = _assign(counts, shift, classes).astype(np.uint8)
    class_of_column, shift_of_column = np.zeros((2, *alive.shape), np.uint8)
    class_of_column[alive], shift_of_column[alive] = owner, shift
    return Design(classes, class_of_column, shift_of_column)


def _assign(counts: NDArray[np.float64], shift: NDArray[np.uint8], classes: Classes) -> NDArray[np.uint16]:
    """The class that codes each column shortest; for wide columns, of those that reconstruct whole steps."""
    chosen = assign(counts, classes.tables)
    whole = np.flatnonzero(classes.whole)
    if len(whole) and shift.any():
        chosen[shift > 0] = whole[assign(counts[shift > 0], Tables(classes.tables.frequencies[whole]))]
    return chosen


def _histograms(
    values: NDArray[np.float32], own: NDArray[np.uint8], shift: NDArray[np.uint8], classes: Classes
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Symmetric histogram `[C, S]` of each column's symbols and the sums of the magnitudes that got each of them."""
    symbols = np.empty(values.shape, np.uint8)
    fine = np.empty((np.count_nonzero(shift), values.shape[1]), np.uint8)
    everything = np.full(classes.tables.count, HALF, np.int32)
    _kernel()(values, own, shift, classes.thresholds, everything, symbols, fine)
    n, total = np.zeros((2, len(values), HALF + 1))
    _fitting_kernels().tally(symbols, values, n, total)
    n, total = n / 2, total / 2
    counts = np.concatenate([n[:, :0:-1], 2 * n[:, :1], n[:, 1:]], axis=1)
    sums = np.concatenate([total[:, :0:-1], 0 * total[:, :1], total[:, 1:]], axis=1)
    return counts, sums


def _refit(
    counts: NDArray[np.float64], sums: NDArray[np.float64], own: NDArray[np.uint16], classes: Classes
) -> Classes:
    """Tables and reconstruction values from the columns of each class; a class without columns stays as it was."""
    frequencies = classes.tables.frequencies.copy()
    values = classes.values.copy()
    magnitudes = np.arange(HALF + 1)
    for k in range(classes.tables.count):
        members = own == k
        if not members.any():
            continue
        total, magnitude_sums = counts[members].sum(axis=0), sums[members].sum(axis=0)
        # A magnitude absent from the sample below one that occurred: half an occurrence leaves no gap in the support.
        largest = int(np.flatnonzero(total[HALF:])[-1])
        total[HALF - largest : HALF + largest + 1] += 0.25
        frequencies[k] = from_counts(total, floor=0).frequencies[0]
        n = total[HALF:]
        centre = magnitude_sums[HALF:] / np.maximum(n, 1e-9)
        trusted = n >= 50
        centre = np.where(trusted, np.clip(centre, magnitudes - 0.5, magnitudes + 0.5), magnitudes)
        centre[0] = 0.0
        if (n * magnitudes).sum() / n.sum() > _ROUNDED:
            centre = magnitudes
        values[k, HALF:], values[k, HALF::-1] = centre, -centre
    return Classes(Tables(frequencies), values)


def _thresholds(tables: Tables, values: NDArray[np.float32]) -> NDArray[np.float32]:
    bits = tables.cost_bits[:, HALF:]
    worst = np.where(np.isfinite(bits), bits, 0.0).max(axis=1, keepdims=True) + 2
    bits = np.where(np.isfinite(bits), bits, worst)
    points = values[:, HALF:].astype(np.float64)
    gap = np.maximum(np.diff(points, axis=1), 0.1)
    found = np.zeros((tables.count, HALF + 2))
    found[:, 1:-1] = (points[:, 1:] + points[:, :-1]) / 2 + RATE_WEIGHT * np.diff(bits, axis=1) / (2 * gap)
    # Where tables are noisy (in the tails) a threshold may neither fall below its neighbour's nor leave its own step.
    found[:, 1:-1] = np.clip(found[:, 1:-1], np.arange(HALF) + 0.4, np.arange(HALF) + 1.0)
    found[:, -1] = HALF + 0.5
    return found.astype(np.float32)


def _laplace(scales: NDArray[np.float64]) -> Tables:
    """Tables of Laplace distributions with these mean magnitudes, in steps."""
    edges = np.arange(ALPHABET + 1) - HALF - 0.5
    x = edges / scales[:, None]
    cdf = np.where(x < 0, 0.5 * np.exp(np.minimum(x, 0)), 1 - 0.5 * np.exp(-np.maximum(x, 0)))
    p = np.diff(cdf, axis=1)
    return from_counts(np.where(p > 1e-5, p, 0), floor=0)


def column_entropy(values: NDArray[np.float32]) -> float:
    """Mean entropy (bits) of columns `[C, N]`, in steps, rounded with the dead zone typical of low rates.

    With the Miller-Madow correction: N tokens show fewer symbols than exist.
    """
    columns, tokens = values.shape
    bits, shown = _fitting_kernels().entropy(values)
    return float(bits / columns + (shown - columns) / (2 * np.log(2) * tokens * columns))


def warm_up() -> None:
    """Compile the quantiser's loop, or load it from numba's cache."""
    _kernel()


@cache
def _kernel() -> Callable[..., int]:
    """The compiled loop over columns; ESCAPED marks what has no symbol. Returns how many there are."""
    from numba import types

    return compiled(
        _quantise,
        types.int64(
            array_type("float32", 2), array_type("uint8", 1), array_type("uint8", 1), array_type("float32", 2),
            array_type("int32", 1),
            array_type("uint8", 2, readonly=False), array_type("uint8", 2, readonly=False),
        ),
    )  # fmt: skip


@dataclass(frozen=True)
class _FittingKernels:
    """Compiled loops that only calibration needs."""

    tally: Callable[..., None]
    entropy: Callable[..., tuple[float, int]]


@cache
def _fitting_kernels() -> _FittingKernels:
    from numba import types

    sums = array_type("float64", 2, readonly=False)
    return _FittingKernels(
        compiled(_tally, types.void(array_type("uint8", 2), array_type("float32", 2), sums, sums)),
        compiled(_column_entropy, types.Tuple((types.float64, types.int64))(array_type("float32", 2))),
    )


def array_type(dtype: str, ndim: int, readonly: bool = True) -> Any:
    from numba import types

    return types.Array(getattr(types, dtype), ndim, "C", readonly=readonly)


def compiled(function: Callable[..., Any], signature: Any) -> Any:
    import numba

    try:
        return numba.njit(signature, nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(signature, nogil=True)(function)


def _quantise(values, class_of_column, shift_of_column, thresholds, support, symbols, fine):
    columns, tokens = values.shape
    escaped = 0
    wide = 0
    for c in range(columns):
        k = class_of_column[c]
        largest = support[k]
        shift = shift_of_column[c]
        if shift > 0:
            for t in range(tokens):
                v = values[c, t]
                q = math.floor(v + 0.5) if abs(v) < 1e6 else 1 << 30
                high = (q + (1 << (shift - 1))) >> shift
                if high > largest or high < -largest:
                    escaped += 1
                    symbols[c, t] = ESCAPED
                    fine[wide, t] = 0
                else:
                    symbols[c, t] = HALF + high
                    fine[wide, t] = q - (high << shift) + (1 << (shift - 1))
            wide += 1
            continue
        for t in range(tokens):
            v = values[c, t]
            a = abs(v)
            if not a < 128.0:  # NaN too
                magnitude = 128
            else:
                magnitude = int(a) + 1
                while magnitude > 0 and a < thresholds[k, magnitude]:
                    magnitude -= 1
            if magnitude > largest:
                escaped += 1
                symbols[c, t] = ESCAPED
            elif v < 0:
                symbols[c, t] = HALF - magnitude
            else:
                symbols[c, t] = HALF + magnitude
    return escaped


def _tally(symbols, values, counts, sums):
    columns, tokens = symbols.shape
    for c in range(columns):
        for t in range(tokens):
            magnitude = min(abs(int(symbols[c, t]) - HALF), HALF)
            counts[c, magnitude] += 1.0
            sums[c, magnitude] += abs(values[c, t])


def _column_entropy(values):
    columns, tokens = values.shape
    counts = np.zeros(1 << 16, np.int32)
    symbols = np.empty(tokens, np.int32)
    bits = 0.0
    shown = 0
    for c in range(columns):
        for t in range(tokens):
            v = values[c, t]
            q = int(min(abs(v) + np.float32(0.4), np.float32(1e18))) & 32767  # what is beyond is spread out anyway
            symbols[t] = 32768 + (q if v > 0 else -q)
            counts[symbols[t]] += 1
        for t in range(tokens):
            n = counts[symbols[t]]
            if n > 0:
                bits -= n / tokens * math.log2(n / tokens)
                shown += 1
                counts[symbols[t]] = 0
    return bits, shown
