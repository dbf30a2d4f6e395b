"""Where a chunk begins, for callers that have keys but not their positions.

Keys rotated back by their true positions lie around the means of the profile; rotated by others they do not, and cost
several times the bits. So the start is the candidate that leaves least.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kvstream.codec.errors import CodecError
from kvstream.codec.kvstream.codec import KVStream

_TOKENS = 64
"""Looked at, evenly spaced: enough for every model that was tried."""
_MARGIN = 4.0
"""Standard errors by which the best candidate must beat the second. Of heads, whose mistakes are nearly independent."""


def find_start(codec: KVStream, kv: Tensor, candidates: Iterable[int]) -> int:
    """The one of `candidates` at which the tokens of `kv` `[L, 2, T, H, D]` began.

    Raises CodecError where the model does not rotate its keys, where there are no candidates, and where two of them
    explain the keys about as well.
    """
    parameters, starts = codec.parameters, sorted(set(candidates))
    if parameters.rope is None:
        raise CodecError("this model's keys do not depend on their positions; pass the chunk's positions to encode")
    if not starts or starts[0] < 0:
        raise CodecError("find_start needs candidates, positions from 0; pass those at which a chunk may begin")
    if kv.dim() != 5 or (kv.shape[0], *kv.shape[3:]) != parameters.shape or kv.shape[1] != 2 or not kv.shape[2]:
        raise CodecError(f"a cache of shape {tuple(kv.shape)} is not of the profile's model {parameters.shape}")
    tokens = range(0, kv.shape[2], max(1, kv.shape[2] // _TOKENS))
    keys = kv[:, 0, tokens.start : tokens.stop : tokens.step].float().cpu()
    with torch.inference_mode():
        bits = torch.stack([_bits(codec, keys, start, tokens.step) for start in starts])
    totals = bits.mean(dim=1)
    best = int(totals.argmin())
    more = torch.cat([bits[:best], bits[best + 1 :]]) - bits[best]
    error = more.std(dim=1) / more.shape[1] ** 0.5 if more.shape[1] > 1 else torch.full((len(more),), torch.inf)
    if not bool((more.mean(dim=1) > _MARGIN * error).all()):
        raise CodecError(
            f"the keys could begin at {starts[best]}, or at another of the {len(starts)} candidates; pass the chunk's "
            "positions, or more of its tokens"
        )
    return starts[best]


def _bits(codec: KVStream, keys: Tensor, start: int, step: int) -> Tensor:
    """About how many bits an element of each head's keys `[L, T, H, D]` costs, `[L * H]`, if they began at `start`."""
    parameters = codec.parameters
    assert parameters.rope is not None
    mean, spread = parameters.mean[:, 0, None], parameters.spread[:, 0, None].clamp(min=1e-6)
    count = keys.shape[1]
    still = torch.empty_like(keys)
    for layer in range(len(keys)):
        turned = keys[layer].transpose(0, 1).clone()
        positions = range(start, start + count * step, step)
        still[layer] = parameters.rope.rotate(turned, layer, positions, undo=True).transpose(0, 1)
    return ((still - mean) / spread).square_().log1p_().mean(dim=(1, 3)).flatten() / 2
