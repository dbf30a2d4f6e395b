"""Entropy-constrained scalar quantisation with a small family of shared tables.

Every column of coefficients, in units of the level's step, belongs to one of K classes. A class is a table of symbol
probabilities, a reconstruction value for each symbol, and thresholds: a magnitude is rounded up to k only where that
lowers squared error plus `RATE_WEIGHT` times the bits of the symbol (Sullivan, "Efficient scalar quantization of
exponential and Laplacian random variables", 1996). That makes a dead zone around zero as wide as each class's table
asks for. Symbols count from the middle of the alphabet; classes are symmetric.

A column whose values spread over more steps than the alphabet has is *wide*: rounded to whole steps q, its class
codes `h = floor(q / 2^k + 1/2)` and k further bits `q - 2^k h + 2^(k-1)` follow, which are as good as equally likely.
What even that cannot hold is an escape, sent apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codec.entropy.escapes import RECORD
from codec.entropy.tables import Tables, assign, from_counts
from codec.errors import CodecError

RATE_WEIGHT = 0.10
"""Squared steps that a bit is worth. At high rate a bit more of rate takes 0.1155 squared steps of error away."""
HALF = 127
"""Largest magnitude of a symbol."""
MAX_SHIFT = 7
"""Most further bits of a wide column; their tables are the uniform ones of 2 to 128 symbols."""
_WIDE = 16.0
"""Mean magnitude, in steps, above which a column is wide."""
_ROUNDED = 4.0
"""Mean magnitude from which on a class's reconstruction values are its symbols."""
ALPHABET = 2 * HALF + 1
ESCAPED = 255
LARGEST_ESCAPE = 32_767
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
        """bool `[K]`: whether a class reconstructs whole steps, as the further bits of wide columns need."""
        return (self.values == np.arange(-HALF, HALF + 1)).all(axis=1)

    @cached_property
    def thresholds(self) -> NDArray[np.float32]:
        """float32 `[K, HALF + 2]`: from which magnitude on symbol k is chosen over k - 1."""
        return _thresholds(self.tables, self.values)

    def quantise(
        self, values: NDArray[np.float32], class_of_column: NDArray[np.uint8], shift_of_column: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[Any]]:
        """Values float32 `[C, T]`, in steps, as symbols uint8 `[C, T]`, further bits uint8 `[W, T]` of the W columns
        with a shift, and escapes (`escapes.RECORD`).

        The symbol in an escape's place is the middle one, which is the shortest. Raises CodecError for values that an
        escape cannot hold.
        """
        symbols = np.empty(values.shape, np.uint8)
        fine = np.empty((np.count_nonzero(shift_of_column), values.shape[1]), np.uint8)
        if not _kernel()(values, class_of_column, shift_of_column, self.thresholds, self.support, symbols, fine):
            return symbols, fine, np.empty(0, RECORD)
        column, token = np.nonzero(symbols == ESCAPED)
        steps = np.rint(values[column, token])
        if not np.abs(steps).max() <= LARGEST_ESCAPE:  # so written, NaN is refused too
            raise CodecError(
                f"the cache holds a value {np.abs(steps).max():g} steps from what the profile was calibrated on, more "
                f"than the {LARGEST_ESCAPE} that can be coded; take a lower level, or codec raw"
            )
        symbols[column, token] = HALF
        escapes = np.empty(len(steps), RECORD)
        escapes["column"], escapes["token"], escapes["value"] = column, token, steps
        return symbols, fine, escapes


@dataclass(frozen=True, eq=False)
class Design:
    """Classes, and for each level the class and the shift of each column, uint8 `[levels, C]`."""

    classes: Classes
    class_of_column: NDArray[np.uint8]
    shift_of_column: NDArray[np.uint8]


def design(values: NDArray[np.float32], steps: Sequence[float], n_classes: int = 32) -> Design:
    """Fit classes to values float32 `[C, N]` quantised in each of `steps`.

    Alternates between quantising with the present classes, giving each column the class that codes it shortest, and
    refitting tables and reconstruction values to their columns.
    """
    spread = np.abs(values).mean(axis=1)[None] / np.array(steps)[:, None]
    shift = np.clip(np.ceil(np.log2(np.maximum(spread, 1e-9) / _WIDE)), 0, MAX_SHIFT).astype(np.uint8)
    spread = spread / (1 << shift.astype(np.int64))
    scales = np.geomspace(0.03, 1.1 * max(float(spread.max()), 0.1), n_classes)
    classes = Classes(_laplace(scales), np.tile(np.arange(-HALF, HALF + 1, dtype=np.float32), (n_classes, 1)))
    nearest = np.abs(np.log(scales) - np.log(np.maximum(spread, 1e-9))[..., None]).argmin(axis=2)
    owner = nearest.astype(np.uint8)
    for _ in range(_ROUNDS):
        histograms = [
            _histograms(values / np.float32(step), own, wide, classes)
            for step, own, wide in zip(steps, owner, shift, strict=True)
        ]
        counts = np.concatenate([count for count, _ in histograms])
        sums = np.concatenate([total for _, total in histograms])
        classes = _refit(counts, sums, _assign(counts, shift.ravel(), classes), classes)
        owner = _assign(counts, shift.ravel(), classes).astype(np.uint8).reshape(owner.shape)
    return Design(classes, owner, shift)


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
        # A magnitude that the sample never showed but a larger one was: half an occurrence keeps the support whole.
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
    # Where tables are noisy (far out) a threshold may not fall below its neighbour's nor leave its own step.
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
    """Mean entropy (bits) of columns `[C, N]`, in steps, rounded with the dead zone that is typical at low rates.

    With Miller and Madow's correction: N tokens show fewer symbols than there are.
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

    return _compiled(
        _quantise,
        types.int64(
            _array("float32", 2), _array("uint8", 1), _array("uint8", 1), _array("float32", 2), _array("int32", 1),
            _array("uint8", 2, readonly=False), _array("uint8", 2, readonly=False),
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

    sums = _array("float64", 2, readonly=False)
    return _FittingKernels(
        _compiled(_tally, types.void(_array("uint8", 2), _array("float32", 2), sums, sums)),
        _compiled(_column_entropy, types.Tuple((types.float64, types.int64))(_array("float32", 2))),
    )


def _array(dtype: str, ndim: int, readonly: bool = True) -> Any:
    from numba import types

    return types.Array(getattr(types, dtype), ndim, "C", readonly=readonly)


def _compiled(function: Callable[..., Any], signature: Any) -> Any:
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
                    symbols[c, t] = 255
                    fine[wide, t] = 0
                else:
                    symbols[c, t] = 127 + high
                    fine[wide, t] = q - (high << shift) + (1 << (shift - 1))
            wide += 1
            continue
        for t in range(tokens):
            v = values[c, t]
            a = abs(v)
            if a >= 128.0:
                magnitude = 128
            else:
                magnitude = int(a) + 1
                while magnitude > 0 and a < thresholds[k, magnitude]:
                    magnitude -= 1
            if magnitude > largest:
                escaped += 1
                symbols[c, t] = 255
            elif v < 0:
                symbols[c, t] = 127 - magnitude
            else:
                symbols[c, t] = 127 + magnitude
    return escaped


def _tally(symbols, values, counts, sums):
    columns, tokens = symbols.shape
    for c in range(columns):
        for t in range(tokens):
            magnitude = min(abs(int(symbols[c, t]) - 127), 127)
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
