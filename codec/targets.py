"""Where decoded KV goes: a strided tensor, a Hugging Face cache, LMCache's layout or vLLM's paged blocks.

A decoder produces one `[T, H, D]` block per (layer, K or V) and hands it to `write`, which converts to the
destination's dtype in the same pass: the whole cache never exists twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from codec.errors import CodecError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a target's elements lie in memory, for kernels that write them themselves.

    Element (l, s, t, h, d) lies `a(t) + h * head_stride + d * dim_stride` elements behind the address `bases[2 l + s]`;
    a(t) is `token_at[t]` where that is given, else `t * token_stride`.
    """

    bases: Tensor
    """int64 `[L * 2]`, addresses, on the target's device."""
    token_at: Tensor | None
    """int64 `[T]`, on the target's device."""
    token_stride: int
    head_stride: int
    dim_stride: int
    aligned: bool
    """Every head of every token begins at a multiple of 16 bytes and is contiguous."""

    @classmethod
    def of(cls, first: Tensor, addresses: Sequence[int], token_at: Tensor | None = None) -> Placement:
        """`first` is `[T, H, D]`, layer 0's keys; the others, at their addresses, have its strides. With `token_at`,
        its first dimension is what that stands for."""
        item = first.element_size()
        token_stride, head_stride, dim_stride = first.stride()
        steps = [head_stride] if token_at is not None else [head_stride, token_stride]
        aligned = dim_stride == 1 and not any(number % 16 for number in [*addresses, *(item * step for step in steps)])
        if token_at is not None:
            aligned = aligned and not bool((token_at * item % 16).any())
        bases = torch.tensor(addresses, dtype=torch.int64).to(first.device)
        return cls(bases, token_at, token_stride, head_stride, dim_stride, aligned)


class CacheTarget(ABC):
    """A destination of shape `[L, 2, T, H, D]`."""

    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def placement(self) -> Placement | None:
        """Where kernels may write, or None: then all goes through `write`."""
        return None

    @abstractmethod
    def write(self, layer: int, kv: int, values: Tensor) -> None:
        """Store `values` `[T, H, D]` as the keys (`kv` 0) or values (1) of `layer`, converted to `dtype`."""


KVTarget: TypeAlias = Tensor | CacheTarget
"""What `Codec.decode` writes into. A plain tensor `[L, 2, T, H, D]` may have any strides."""


class StridedTarget(CacheTarget):
    """A tensor `[L, 2, T, H, D]` with any strides, written in place."""

    def __init__(self, tensor: Tensor) -> None:
        if tensor.dim() != 5 or tensor.shape[1] != 2:
            raise CodecError(f"a KV tensor is [layers, 2, tokens, heads, head_dim], not {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES.values():
            raise CodecError(f"a KV tensor is bfloat16, float16 or float32, not {tensor.dtype}")
        self.tensor = tensor
        layers, _, tokens, heads, head_dim = tensor.shape
        self.shape = (layers, 2, tokens, heads, head_dim)
        self.dtype = tensor.dtype
        self.device = tensor.device

    def write(self, layer: int, kv: int, values: Tensor) -> None:
        self.tensor[layer, kv].copy_(saturate(values, self.dtype))

    @cached_property
    def placement(self) -> Placement:
        tensor = self.tensor
        layer, side, *_ = (stride * tensor.element_size() for stride in tensor.stride())
        return Placement.of(
            tensor[0, 0], [tensor.data_ptr() + i * layer + k * side for i in range(len(tensor)) for k in (0, 1)]
        )


class HuggingFaceTarget(CacheTarget):
    """Tokens `[start, start + T)` of preallocated Hugging Face keys and values.

    `layers` is one `(keys, values)` pair a layer, each `[1, H, >= start + T, D]`: the tensors of a `StaticCache`, or
    those from which a `DynamicCache` is then built with `dynamic_cache`.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], start: int, tokens: int) -> None:
        if not layers or any(t.dim() != 4 or t.shape[0] != 1 for pair in layers for t in pair):
            raise CodecError("Hugging Face layers are (keys, values) pairs of [1, heads, tokens, head_dim]")
        shapes = {tuple(t.shape) for pair in layers for t in pair}
        if len(shapes) != 1:
            raise CodecError(f"layers of unequal shapes are not supported: {sorted(shapes)}")
        (_, heads, capacity, head_dim) = shapes.pop()
        if start < 0 or start + tokens > capacity:
            raise CodecError(f"tokens [{start}, {start + tokens}) do not fit into a cache of {capacity}")
        self._layers = layers
        self._tokens = slice(start, start + tokens)
        self.shape = (len(layers), 2, tokens, heads, head_dim)
        self.dtype = layers[0][0].dtype
        self.device = layers[0][0].device

    @classmethod
    def allocate(
        cls, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> HuggingFaceTarget:
        """A target with memory of its own for `[L, 2, T, H, D]`."""
        layers, _, tokens, heads, head_dim = shape
        pairs = [
            (
                torch.empty((1, heads, tokens, head_dim), dtype=dtype, device=device),
                torch.empty((1, heads, tokens, head_dim), dtype=dtype, device=device),
            )
            for _ in range(layers)
        ]
        return cls(pairs, 0, tokens)

    def write(self, layer: int, kv: int, values: Tensor) -> None:
        destination = self._layers[layer][kv][0, :, self._tokens]
        destination.copy_(saturate(values, self.dtype).permute(1, 0, 2))

    @cached_property
    def placement(self) -> Placement | None:
        views = [side[0, :, self._tokens].permute(1, 0, 2) for layer in self._layers for side in layer]
        if len({view.stride() for view in views}) > 1:
            return None
        return Placement.of(views[0], [view.data_ptr() for view in views])

    def dynamic_cache(self) -> Any:
        """A `transformers.DynamicCache` over the target's own tensors (no copy), when they are exactly full."""
        if self._layers[0][0].shape[2] != self.shape[2]:
            raise CodecError("the cache holds more tokens than were decoded; pass slices that are exactly full")
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (keys, values) in enumerate(self._layers):
            cache.update(keys, values, index)
        return cache


class LMCacheTarget(StridedTarget):
    """LMCache's `[L, 2, T, H * D]` tensor."""

    def __init__(self, tensor: Tensor, heads: int) -> None:
        if tensor.dim() != 4 or tensor.shape[1] != 2 or heads < 1 or tensor.shape[3] % heads:
            raise CodecError(f"LMCache's layout is [layers, 2, tokens, {heads} heads * dim], not {tuple(tensor.shape)}")
        super().__init__(tensor.unflatten(3, (heads, tensor.shape[3] // heads)))


class PagedTarget(CacheTarget):
    """vLLM's paged blocks: per layer `[2, blocks, block_size, H, D]`, and the blocks that hold the sequence.

    Token `offset + t` of the sequence lies in block `block_table[(offset + t) // block_size]`.
    """

    def __init__(self, layers: Sequence[Tensor], block_table: Tensor | Sequence[int], offset: int, tokens: int) -> None:
        if not layers or any(t.dim() != 5 or t.shape[0] != 2 or t.shape != layers[0].shape for t in layers):
            raise CodecError("paged layers are equal tensors of [2, blocks, block_size, heads, head_dim]")
        _, n_blocks, block_size, heads, head_dim = layers[0].shape
        table = torch.as_tensor(block_table, dtype=torch.int64)
        if table.dim() != 1 or table.numel() == 0 or int(table.min()) < 0 or int(table.max()) >= n_blocks:
            raise CodecError(f"the block table must list blocks 0 to {n_blocks - 1}")
        if len(torch.unique(table)) != len(table):
            raise CodecError("the block table names a block twice")
        if offset < 0 or offset + tokens > len(table) * block_size:
            raise CodecError(f"tokens [{offset}, {offset + tokens}) do not fit {len(table)} blocks of {block_size}")
        index = torch.arange(offset, offset + tokens)
        self._layers = layers
        self._block = table[index // block_size].to(layers[0].device)
        self._slot = (index % block_size).to(layers[0].device)
        self.shape = (len(layers), 2, tokens, heads, head_dim)
        self.dtype = layers[0].dtype
        self.device = layers[0].device

    def write(self, layer: int, kv: int, values: Tensor) -> None:
        self._layers[layer][kv][self._block, self._slot] = saturate(values, self.dtype).to(self.dtype)

    @cached_property
    def placement(self) -> Placement | None:
        views = [side for layer in self._layers for side in layer]
        if len({view.stride() for view in views}) > 1:
            return None
        block_stride, slot_stride, *_ = views[0].stride()
        token_at = self._block * block_stride + self._slot * slot_stride
        return Placement.of(views[0][0], [view.data_ptr() for view in views], token_at)


def as_target(out: KVTarget) -> CacheTarget:
    """The target itself, or a tensor wrapped as one."""
    return out if isinstance(out, CacheTarget) else StridedTarget(out)


def saturate(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values that `dtype` can hold: decoding wider values into float16 must not turn the largest into infinity.

    Infinities that were in the cache (the raw codec keeps them) pass when the two dtypes agree.
    """
    if dtype == torch.float16 and values.dtype != torch.float16:
        limit = torch.finfo(torch.float16).max
        return values.clamp(-limit, limit)
    return values
