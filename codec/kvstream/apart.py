"""Tokens coded apart, exactly: attention sinks, and what no calibration prepares for.

A basis has no column for directions in which calibration saw nothing. What a token has there would be lost without a
sign, so tokens that have much there are coded apart too.

Every later token attends to a sink, so an error in its keys or values costs a hundred thousand times what it costs
elsewhere. Such tokens are few, and 16 bits an element of one token in a thousand are 0.016 bit.

Section `apar`: uint32 count, uint32 tokens within the chunk, ascending, then their values `[L, 2, n, H, D]` in the
cache's dtype; empty where there are none.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.container import DTYPE_BYTES, Header
from kvstream.codec.errors import CodecError
from kvstream.codec.raw import frombuffer
from kvstream.codec.targets import DTYPES, CacheTarget
from kvstream.codec.uniform import as_bytes

OUTLIER = 256.0
"""A token with a value this many standard deviations from its mean is coded apart."""
MOST_LOST, LOST_ON_AVERAGE = 1.0, 1 / 16
"""What of a token may be left out, and of all tokens of a chunk on average, in squared steps for each direction of a
group. Quantisation costs 0.01 to 0.04 there, and text of any kind loses 0.001 to 0.015."""
_TOO_MUCH = 1e12
_COUNT = struct.Struct("<I")


def find(kv: Tensor, mean: Tensor, spread: Tensor, sinks: int, positions: range) -> NDArray[np.int64]:
    """Which tokens of a chunk `[L, 2, T, H, D]` are coded apart; `sinks` are the first ones of a context.

    Keys are compared as they are, with the range of means and deviations that a rotation can give.
    """
    apart = torch.zeros(kv.shape[2], dtype=torch.bool, device=kv.device)
    apart[: max(0, min(sinks - positions.start, len(apart)))] = True
    limit = limits(mean, spread)
    low, high = torch.aminmax(kv, dim=-1)
    largest = torch.maximum(high, -low).float()
    apart |= (largest > limit[:, :, None]).any(dim=3).any(dim=1).any(dim=0)
    return torch.nonzero(apart).flatten().cpu().numpy()


def limits(mean: Tensor, spread: Tensor) -> Tensor:
    """`[L, 2, H]`: a head's largest magnitude in a token that is not coded apart. Rotation changes it by the square
    root of two at most."""
    return 1.5 * (mean.abs() + OUTLIER * spread).amax(dim=-1)


def inexpressible(lost: Tensor) -> Tensor:
    """bool `[T]`: tokens of which a group's columns leave out too much; `lost` `[G, T]` is what they leave out of each
    token, in squared steps for each of a group's directions.

    Those that lose more than MOST_LOST, and of the others the worst until the rest lose LOST_ON_AVERAGE at most.
    """
    known = torch.nan_to_num(lost, nan=_TOO_MUCH).clamp(max=_TOO_MUCH).double()
    worst, order = known.sort(dim=1, descending=True)
    left = worst.flip(1).cumsum(1).flip(1) / lost.shape[1]
    found = torch.zeros_like(lost, dtype=torch.bool)
    found.scatter_(1, order, (worst > MOST_LOST) | (left > LOST_ON_AVERAGE))
    return found.any(dim=0)


def more(tokens: NDArray[np.int64], further: NDArray[np.int64]) -> NDArray[np.int64]:
    """All of them. Raises CodecError where none is new: a token without coefficients has none too large."""
    found = np.union1d(tokens, further)
    if len(found) == len(tokens):
        raise CodecError("the profile's basis or steps give coefficients that are no numbers; calibrate again")
    return found


def pack(kv: Tensor, tokens: NDArray[np.int64]) -> bytes:
    """The section `apar`."""
    if not len(tokens):
        return b""
    chosen = kv[:, :, torch.from_numpy(tokens).to(kv.device)]
    return _COUNT.pack(len(tokens)) + tokens.astype("<u4").tobytes() + as_bytes(chosen)


@dataclass(frozen=True)
class Apart:
    """Tokens coded apart, ascending, and their values `[L, 2, n, H, D]` in the cache's dtype."""

    tokens: NDArray[np.int64]
    values: Tensor

    def write(self, target: CacheTarget, layers: range) -> None:
        """Write them over what `target`, which holds these layers, has in their places."""
        for number, token in enumerate(self.tokens.tolist()):
            for index, layer in enumerate(layers):
                for side in (0, 1):
                    values = self.values[layer, side, number : number + 1].float()
                    target.write(index, side, values.to(target.device), token)


def count(data: bytes | memoryview) -> int:
    """How many tokens a section claims to hold."""
    return int(_COUNT.unpack_from(data)[0]) if len(data) >= _COUNT.size else 0


def parse(data: memoryview, header: Header) -> Apart:
    """The section of a chunk. Raises CodecError."""
    layers, _, tokens, heads, dim = header.shape
    if not len(data):
        return Apart(np.empty(0, np.int64), torch.empty((layers, 2, 0, heads, dim), dtype=DTYPES[header.dtype]))
    number = count(data)
    at = _COUNT.size + 4 * number
    if not 1 <= number <= tokens or len(data) != at + number * layers * 2 * heads * dim * DTYPE_BYTES[header.dtype]:
        raise CodecError(f"section 'apar' has {len(data)} bytes, not those of {number} tokens; fetch the chunk again")
    which = np.frombuffer(data, "<u4", number, _COUNT.size).astype(np.int64)
    if which[-1] >= tokens or (np.diff(which) <= 0).any():
        raise CodecError("section 'apar' names tokens outside the chunk or out of order; fetch the chunk again")
    values = frombuffer(data[at:], DTYPES[header.dtype]).view(layers, 2, number, heads, dim)
    if not bool(torch.isfinite(values).all()):
        raise CodecError("section 'apar' holds NaN or infinities; fetch the chunk again")
    return Apart(which, values)
