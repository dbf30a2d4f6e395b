"""Kinds of columns: how a column of coefficients is coded in a chunk, chosen for each chunk anew.

Kind 0 is *dead*: every coefficient is zero, and the column has no stream. Every other kind is a class of `quantize`
and a number of low bits. A profile says what kind each column had in calibration; a chunk lists the kinds it uses as
differences from that, compressed. So text unlike the calibration's gets tables that fit it, and a column costs next to
nothing where it holds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.errors import CodecError
from kvstream.codec.kvstream import deflate
from kvstream.codec.quantize import HALF, MAX_SHIFT, RATE_WEIGHT, WIDE, Classes, array_type, compiled

DEAD = 0
CHANGE_BITS = 6.0
"""What it costs to use another kind than expected: about what its difference takes when compressed."""
STREAM_BITS = 12.0
"""What a stream costs beside its symbols: half a word on average, and its length."""
FEW = 4
"""Magnitudes below it are counted one by one when a column's kind is chosen."""
_ESCAPE_BITS = 40.0
FARTHEST = np.float32(1e9)
"""Larger values, in steps, count as this one: to zero them is never free."""


@dataclass(frozen=True, eq=False)
class Kinds:
    """Q kinds beside DEAD; kind q is class `class_of[q - 1]` with `shift_of[q - 1]` low bits."""

    classes: Classes
    class_of: NDArray[np.uint8]
    """uint8 `[Q]`."""
    shift_of: NDArray[np.uint8]
    """uint8 `[Q]`."""

    def __post_init__(self) -> None:
        if not (
            1 <= self.count < 256
            and int(self.class_of.max()) < self.classes.tables.count
            and int(self.shift_of.max()) <= MAX_SHIFT
            and self.classes.whole[self.class_of[self.shift_of > 0]].all()
        ):
            raise CodecError("the profile has impossible kinds of columns; calibrate again")

    @property
    def count(self) -> int:
        """Q: kinds beside DEAD."""
        return len(self.class_of)

    @cached_property
    def cost(self) -> NDArray[np.float32]:
        """float32 `[Q, FEW + 2]`: bits of a symbol of each magnitude below FEW, of a larger one, and of each step of
        that, low bits included: how a class's bits grow is close to linear there."""
        tables = self.classes.tables
        bits = tables.cost_bits[:, HALF:]
        found = np.empty((tables.count, FEW + 2))
        found[:, :FEW] = np.where(np.isfinite(bits[:, :FEW]), bits[:, :FEW], _ESCAPE_BITS)
        magnitude = np.arange(FEW, HALF + 1)
        for row, own, weight in zip(found, bits[:, FEW:], tables.frequencies[:, HALF + FEW :], strict=True):
            known = weight > 0
            if known.sum() >= 2:
                slope, level = np.polyfit(magnitude[known], own[known], 1, w=np.sqrt(weight[known]))
                row[FEW:] = level, max(slope, 0.0)
            else:
                row[FEW:] = _ESCAPE_BITS, 0.0
        found = found[self.class_of]
        found[:, : FEW + 1] += self.shift_of[:, None]
        return found.astype(np.float32)

    def choose(self, values: NDArray[np.float32], expected: NDArray[np.uint8], segments: int) -> NDArray[np.uint8]:
        """The kind of each column of values float32 `[C, T]`, in steps, that costs least, rate and error together."""
        shift = np.empty(len(values), np.uint8)
        counts = np.empty((len(values), FEW + 2), np.float32)
        squares = np.empty((2, len(values)), np.float32)
        _survey()(values, shift, counts, squares)
        known = torch.from_numpy(expected.astype(np.int64))
        found = [torch.from_numpy(array) for array in (shift, counts, squares)]
        return self.cheapest(found[0], found[1], found[2], known, segments, self.prices("cpu")).numpy()

    def prices(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """`cost`, transposed, and `shift_of` on a device, as `cheapest` takes them."""
        return torch.from_numpy(self.cost.T.copy()).to(device), torch.from_numpy(self.shift_of.copy()).to(device)

    def cheapest(
        self, shift: Tensor, counts: Tensor, squares: Tensor, expected: Tensor, segments: int,
        prices: tuple[Tensor, Tensor],
    ) -> Tensor:  # fmt: skip
        """The kinds of columns that `shift` low bits suit, uint8, on the device of what is given.

        `counts` `[C, FEW + 2]` are numbers of magnitudes below FEW, of others, and their sum; `squares` `[2, C]` sums
        of the squared values, and of what rounding leaves of them. `expected` are the kinds in calibration, int64.
        """
        cost, shift_of = prices
        bits = counts @ cost
        bits += STREAM_BITS * segments + CHANGE_BITS
        bits.masked_fill_(shift[:, None] != shift_of, torch.inf)
        known = expected > DEAD
        place = (expected - 1).clamp(min=0)[:, None]
        bits.scatter_add_(1, place, torch.where(known, -CHANGE_BITS, 0.0)[:, None])
        least, best = bits.min(dim=1)
        energy, error = squares
        dead = energy <= error + RATE_WEIGHT * (least + CHANGE_BITS * known)
        return torch.where(dead, DEAD, best + 1).to(torch.uint8)

    def of_columns(self, kinds: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.uint8]]:
        """Which columns are alive, and the class and low bits of each of them."""
        count = int(np.count_nonzero(kinds))
        alive, own, shift = np.empty(count, np.int64), np.empty(count, np.uint8), np.empty(count, np.uint8)
        _select()(kinds, kinds[: len(kinds) // 8 * 8].view(np.uint64), self.class_of, self.shift_of, alive, own, shift)
        return alive, own, shift


def pack(kinds: NDArray[np.uint8], expected: NDArray[np.uint8]) -> bytes:
    """The section `kind`."""
    return deflate.pack((kinds - expected).tobytes())


def parse(data: memoryview, expected: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """The kinds of a section `kind`, uint8 `[C]`. Raises CodecError."""
    plain = deflate.parse(data, len(expected), "kind")
    kinds = np.frombuffer(plain, np.uint8) + expected
    if int(kinds.max()) > count:
        raise CodecError("section 'kind' names kinds that the profile does not have; fetch the chunk again")
    return kinds


@cache
def _survey() -> Callable[..., None]:
    from numba import types

    sums = array_type("float32", 2, readonly=False)
    return compiled(
        _survey_columns, types.void(array_type("float32", 2), array_type("uint8", 1, readonly=False), sums, sums)
    )


@cache
def _select() -> Callable[..., None]:
    from numba import types

    bytes_in, bytes_out = array_type("uint8", 1), array_type("uint8", 1, readonly=False)
    alive = array_type("int64", 1, readonly=False)
    eight = array_type("uint64", 1)
    return compiled(_select_columns, types.void(bytes_in, eight, bytes_in, bytes_in, alive, bytes_out, bytes_out))


def _select_columns(kinds: Any, eight: Any, class_of: Any, shift_of: Any, alive: Any, own: Any, shift: Any) -> None:
    """`Kinds.of_columns`; `eight` kinds at a time, most of which are dead."""
    n = 0
    for begin in range(0, kinds.shape[0], 8):
        if begin // 8 < eight.shape[0] and eight[begin // 8] == 0:
            continue
        for c in range(begin, min(begin + 8, kinds.shape[0])):
            kind = kinds[c]
            if kind != 0:
                alive[n] = c
                own[n] = class_of[kind - 1]
                shift[n] = shift_of[kind - 1]
                n += 1


def _survey_columns(values: Any, shift: Any, counts: Any, squares: Any) -> None:
    """What `Kinds.cheapest` needs to know of each column."""
    columns, tokens = values.shape
    for c in range(columns):
        total: Any = 0.0
        for t in range(tokens):
            v = abs(values[c, t])
            total += v if v < FARTHEST else FARTHEST
        k = 0
        while k < MAX_SHIFT and total > WIDE * (1 << k) * tokens:
            k += 1
        shift[c] = k
        unit = np.float32(1 << k)
        energy: Any = 0.0
        error: Any = 0.0
        for m in range(FEW + 2):
            counts[c, m] = 0.0
        for t in range(tokens):
            v = abs(values[c, t])
            if not v < FARTHEST:  # infinity and NaN too
                v = FARTHEST
            energy += v * v
            gap = v - np.float32(int(v + np.float32(0.5)))
            error += gap * gap
            m = int(min(v / unit, np.float32(HALF)) + np.float32(0.4))
            if m < FEW:
                counts[c, m] += 1.0
            else:
                counts[c, FEW] += 1.0
                counts[c, FEW + 1] += m
        squares[0, c] = energy
        squares[1, c] = error
