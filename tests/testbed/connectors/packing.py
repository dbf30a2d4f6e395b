"""A stand-in for an attention layer that packs its blocks in an order of its own."""

from __future__ import annotations

from torch import Tensor


def packed_update(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Keys `[T, H, D]` go into a block's first half with dimensions before tokens, values into the second, in pairs of
    tokens: as CPU kernels like it."""
    blocks, heads, tokens, both = cache.shape
    dim = both // 2
    memory = cache.view(blocks, heads, 2, tokens * dim)
    of_keys = memory[:, :, 0].view(blocks, heads, dim, tokens)
    of_values = memory[:, :, 1].view(blocks, heads, tokens // 2, dim, 2)
    block, slot = slots // tokens, slots % tokens
    of_keys[block, :, :, slot] = keys
    of_values[block, :, slot // 2, :, slot % 2] = values
