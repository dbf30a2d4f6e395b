"""Caches of other libraries, seen as the tensor `[L, 2, T, H, D]` that codecs encode.

A view where the memory allows it, else one copy. `kvstream.codec.targets` is the inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from kvstream.codec.errors import CodecError

LMCACHE_SIDES: Final = {"KV_2LTD": 0, "KV_L2TD": 1}
"""LMCache's layouts, and the dimension that has keys and values."""


class HuggingFaceCache(Protocol):
    """A cache of the transformers library, whose layers have `keys` and `values` `[1, H, T, D]`."""

    layers: list[Any]


def from_huggingface(cache: HuggingFaceCache, start: int = 0, tokens: int | None = None) -> Tensor:
    """Tokens `[start, start + tokens)` (by default all from `start` on) of a Hugging Face cache of one sequence.

    A view where all layers are evenly spaced in one storage. Raises CodecError for caches that are empty or keep
    only a sliding window.
    """
    pairs = huggingface_layers(cache)
    held = min(int(layer.get_seq_length()) for layer in cache.layers)
    stop = held if tokens is None else start + tokens
    if not 0 <= start < stop <= held:
        raise CodecError(f"tokens [{start}, {stop}) are not in a cache of {held}")
    return stacked([side[0, :, start:stop].permute(1, 0, 2) for pair in pairs for side in pair])


def from_paged(layers: Sequence[Tensor], block_table: Tensor | Sequence[int], offset: int, tokens: int) -> Tensor:
    """Tokens of a sequence in vLLM's paged blocks, copied; arguments as those of `targets.PagedTarget`."""
    block, slot = paged_places(layers, block_table, offset, tokens)
    out = layers[0].new_empty((len(layers), 2, tokens, *layers[0].shape[3:]))
    for found, layer in zip(out, layers, strict=True):
        found.copy_(layer[:, block, slot])
    return out


def from_lmcache(tensor: Tensor, heads: int, layout: str | None = None) -> Tensor:
    """A view of LMCache's `[2, L, T, H * D]` (KV_2LTD, the current one) or `[L, 2, T, H * D]` (KV_L2TD,
    of older releases) as `[L, 2, T, H, D]`.

    `layout` may be omitted where the shape tells. Raises CodecError for a model of two layers without it.
    """
    sides = [name for name, dim in LMCACHE_SIDES.items() if tensor.dim() == 4 and tensor.shape[dim] == 2]
    if layout is not None:
        sides = [name for name in sides if name == layout]
    if not sides or heads < 1 or tensor.shape[3] % heads:
        wanted = layout or " or ".join(LMCACHE_SIDES)
        raise CodecError(
            f"LMCache's layout is {wanted} ([2, layers, tokens, {heads} heads * dim] or [layers, 2, ...]), not "
            f"{tuple(tensor.shape)}"
        )
    if len(sides) > 1:
        raise CodecError(f"a cache of two layers could be of either layout; pass layout={' or '.join(sides)}")
    view = tensor.unflatten(3, (heads, tensor.shape[3] // heads))
    return view if sides == ["KV_L2TD"] else view.transpose(0, 1)


def huggingface_layers(cache: HuggingFaceCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values `[1, H, T, D]` of each layer. Raises CodecError where there are none, or not all."""
    pairs = []
    for index, layer in enumerate(cache.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not (isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dim() == 4 and len(keys) == 1):
            raise CodecError(
                f"layer {index} of the cache has no keys and values [1, heads, tokens, head_dim]: decode into "
                "kvstream.codec.targets.HuggingFaceTarget.allocate(...), whose dynamic_cache() a model takes"
            )
        if int(layer.get_seq_length()) > keys.shape[2]:
            raise CodecError(
                f"layer {index} of the cache keeps only a sliding window; compute the cache at full length"
            )
        pairs.append((keys, values))
    if not pairs:
        raise CodecError(
            "the cache has no layers yet: run the model over the context first, or decode into "
            "kvstream.codec.targets.HuggingFaceTarget.allocate(...), whose dynamic_cache() a model takes"
        )
    return pairs


def paged_places(
    layers: Sequence[Tensor], block_table: Tensor | Sequence[int], offset: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """Block and slot of each of a sequence's tokens from `offset` on, on the layers' device. Raises CodecError."""
    if not layers or any(t.dim() != 5 or t.shape[0] != 2 or t.shape != layers[0].shape for t in layers):
        raise CodecError("paged layers are equal tensors of [2, blocks, block_size, heads, head_dim]")
    _, n_blocks, block_size, _, _ = layers[0].shape
    table = torch.as_tensor(block_table, dtype=torch.int64)
    if table.dim() != 1 or table.numel() == 0 or int(table.min()) < 0 or int(table.max()) >= n_blocks:
        raise CodecError(f"the block table must list blocks 0 to {n_blocks - 1}")
    if len(torch.unique(table)) != len(table):
        raise CodecError("the block table lists a block twice")
    if offset < 0 or tokens < 1 or offset + tokens > len(table) * block_size:
        raise CodecError(f"tokens [{offset}, {offset + tokens}) do not fit {len(table)} blocks of {block_size}")
    index = torch.arange(offset, offset + tokens, device=table.device)
    return table[index // block_size].to(layers[0].device), (index % block_size).to(layers[0].device)


def stacked(sides: Sequence[Tensor]) -> Tensor:
    """`[L, 2, T, H, D]` of keys and values `[T, H, D]`, layer by layer: a view where they are evenly spaced in one
    storage."""
    first = sides[0]
    if any(side.shape != first.shape or side.dtype != first.dtype or side.device != first.device for side in sides):
        raise CodecError("layers of unequal shapes, dtypes or devices are not supported")
    places = [side.storage_offset() for side in sides]
    side_stride, layer_stride = places[1] - places[0], places[min(2, len(places) - 1)] - places[0]
    evenly = [places[0] + index // 2 * layer_stride + index % 2 * side_stride for index in range(len(sides))]
    storages = {side.untyped_storage().data_ptr() for side in sides}
    strides = {side.stride() for side in sides}
    if len(storages) == len(strides) == 1 and places == evenly and min(side_stride, layer_stride) >= 0:
        shape = (len(sides) // 2, 2, *first.shape)
        return first.as_strided(shape, (layer_stride, side_stride, *first.stride()), places[0])
    return torch.stack(list(sides)).unflatten(0, (-1, 2))
