"""Entropy-constrained scalar quantisation with a small family of shared tables.

Every column of coefficients, in units of the level's step, belongs to one of K classes. A class is a table of symbol
probabilities, a reconstruction value for each symbol, and thresholds: a magnitude is rounded up to k only where that
lowers squared error plus `RATE_WEIGHT` times the bits of the symbol (Sullivan, "Efficient scalar quantization of
exponential and Laplacian random variables", 1996). That makes a dead zone around zero as wide as each class's table
asks for. Symbols count from the middle of the alphabet; classes are symmetric. What a class's table cannot code is an
exception, sent apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codec.entropy.tables import Tables, assign, from_counts
from codec.errors import CodecError

RATE_WEIGHT = 0.10
"""Squared steps that a bit is worth. At high rate a bit more of rate takes 0.1155 squared steps of error away."""
HALF = 127
"""Largest magnitude of a symbol."""
ALPHABET = 2 * HALF + 1
_ROUNDS = 6


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
    def thresholds(self) -> NDArray[np.float32]:
        """float32 `[K, HALF + 2]`: from which magnitude on symbol k is chosen over k - 1."""
        return _thresholds(self.tables, self.values)

    def quantise(
        self, values: NDArray[np.float32], class_of_column: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int32]]:
        """Symbols uint8 `[C, T]` of values float32 `[C, T]` in steps, and the exceptions.

        Exceptions are flat indices int64 `[E]`, ascending, and whole numbers of steps int32 `[E]`; their symbol is the
        middle one.
        """
        columns, tokens = values.shape
        symbols = np.empty((columns, tokens), np.uint8)
        n = _kernel()(values, class_of_column, self.thresholds, self.support, symbols)
        if n == 0:
            return symbols, np.empty(0, np.int64), np.empty(0, np.int32)
        where = np.flatnonzero(symbols == 255)
        steps = np.rint(values.ravel()[where])
        if np.abs(steps).max() > 2**30:
            raise CodecError("the cache holds values a billion steps from the calibrated mean; use codec raw")
        symbols.ravel()[where] = HALF
        return symbols, where, steps.astype(np.int32)


def design(samples: list[NDArray[np.float32]], n_classes: int = 32) -> tuple[Classes, list[NDArray[np.uint8]]]:
    """Fit classes to values float32 `[C, N]` in steps, one array a level; returns them and the levels' column classes.

    Alternates between quantising with the present classes, giving each column the class that codes it shortest, and
    refitting tables and reconstruction values to their columns.
    """
    units = [np.ascontiguousarray(level) for level in samples]
    spread = np.concatenate([np.abs(level).mean(axis=1) for level in units])
    live = spread[spread > 0.02]
    if len(live) == 0:
        live = np.array([0.05, 0.1])
    scales = np.geomspace(max(float(np.quantile(live, 0.01)), 0.03), float(np.quantile(live, 0.999)) + 0.1, n_classes)
    classes = Classes(_laplace(scales), np.tile(np.arange(-HALF, HALF + 1, dtype=np.float32), (n_classes, 1)))
    owner = [np.argmin(np.abs(np.log(scales)[None] - np.log(np.maximum(np.abs(u).mean(axis=1), 1e-9))[:, None]), axis=1)
             for u in units]  # fmt: skip
    for _ in range(_ROUNDS):
        counts, sums = [], []
        for level, own in zip(units, owner, strict=True):
            count, total = _histograms(level, own.astype(np.uint8), classes)
            counts.append(count)
            sums.append(total)
        pooled, pooled_sums = np.concatenate(counts), np.concatenate(sums)
        chosen = assign(pooled, classes.tables)
        classes = _refit(pooled, pooled_sums, chosen, classes)
        chosen = assign(pooled, classes.tables)
        owner = np.split(chosen, np.cumsum([len(u) for u in units])[:-1])
    return classes, [own.astype(np.uint8) for own in owner]


def entropy_bits(values: NDArray[np.float32], own: NDArray[np.uint8], classes: Classes) -> float:
    """Bits per value that ideal coding of `values` `[C, N]` takes, exceptions (64 bits each) included."""
    symbols, where, _ = classes.quantise(values, own)
    cost = classes.tables.cost_bits[own[:, None], symbols]
    return float((cost.sum() + 64 * len(where)) / values.size)


def _histograms(
    values: NDArray[np.float32], own: NDArray[np.uint8], classes: Classes
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Symmetric histogram `[C, S]` of each column's symbols and the sums of the magnitudes that got each of them."""
    symbols = np.empty(values.shape, np.uint8)
    everything = np.full(classes.tables.count, HALF, np.int32)
    _kernel()(values, own, classes.thresholds, everything, symbols)
    magnitude = np.minimum(np.abs(symbols.astype(np.int64) - HALF), HALF)
    cell = (magnitude + np.arange(len(values))[:, None] * (HALF + 1)).ravel()
    size = len(values) * (HALF + 1)
    n = np.bincount(cell, minlength=size).reshape(-1, HALF + 1) / 2
    total = np.bincount(cell, weights=np.abs(values).ravel(), minlength=size).reshape(-1, HALF + 1) / 2
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


@cache
def _kernel() -> Callable[..., int]:
    """The compiled loop over columns; 255 marks an exception. Returns how many there are."""
    import numba
    from numba import types

    def array(dtype: Any, ndim: int, layout: str = "C", readonly: bool = True) -> Any:
        return types.Array(dtype, ndim, layout, readonly=readonly)

    signature = types.int64(
        array(types.float32, 2, "A"), array(types.uint8, 1), array(types.float32, 2), array(types.int32, 1),
        array(types.uint8, 2, readonly=False),
    )  # fmt: skip
    try:
        return numba.njit(signature, nogil=True, cache=True)(_quantise)
    except RuntimeError:
        return numba.njit(signature, nogil=True)(_quantise)


def _quantise(values, class_of_column, thresholds, support, symbols):  # type: ignore[no-untyped-def]
    columns, tokens = values.shape
    exceptions = 0
    for c in range(columns):
        k = class_of_column[c]
        largest = support[k]
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
                exceptions += 1
                symbols[c, t] = 255
            elif v < 0:
                symbols[c, t] = 127 - magnitude
            else:
                symbols[c, t] = 127 + magnitude
    return exceptions
