"""Where decoded KV goes: a strided tensor, a Hugging Face cache, LMCache's layout or vLLM's paged blocks.

A decoder produces blocks `[n, H, D]` of some tokens of one (layer, K or V) and hands them to `write`, which converts to
the destination's dtype in the same pass: the whole cache never exists twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.errors import CodecError
from kvstream.codec.layouts import HuggingFaceCache, from_lmcache, huggingface_layers, paged_places

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a target's elements are in memory, for kernels that write them directly.

    Element (l, s, t, h, d) is `a(t) + h * head_stride + d * dim_stride` elements after `addresses[2 l + s]`; a(t) is
    `token_at[t]` where that is given, else `t * token_stride`.
    """

    addresses: NDArray[np.int64]
    """`[L * 2]`."""
    device: torch.device
    token_at: Tensor | None
    """int64 `[T + 1]`, on the target's device; the entry after the last token is not used, but may be read."""
    token_stride: int
    head_stride: int
    dim_stride: int
    aligned: bool
    """Every head of every token begins at a multiple of 16 bytes and is contiguous."""

    @classmethod
    def of(
        cls, first: Tensor, addresses: Sequence[int] | NDArray[np.int64], token_at: Tensor | None = None,
        token_steps: Sequence[int] = (),
    ) -> Placement:  # fmt: skip
        """`first` is `[T, H, D]`, layer 0's keys; the others, at `addresses`, have the same strides. With `token_at`,
        whose entries are sums of multiples of `token_steps`, those replace the stride of the first dimension."""
        item = first.element_size()
        token_stride, head_stride, dim_stride = first.stride()
        steps = [head_stride, *(token_steps if token_at is not None else [token_stride])]
        where = np.array(addresses, np.int64)
        aligned = dim_stride == 1 and not (where % 16).any() and not any(item * step % 16 for step in steps)
        return cls(where, first.device, token_at, token_stride, head_stride, dim_stride, aligned)

    @cached_property
    def bases(self) -> Tensor:
        """`addresses` on the device."""
        return torch.from_numpy(self.addresses).to(self.device)


class CacheTarget(ABC):
    """A destination of shape `[L, 2, T, H, D]`."""

    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def placement(self) -> Placement | None:
        """Where kernels may write directly; None where everything goes through `write`."""
        return None

    @abstractmethod
    def write(self, layer: int, kv: int, values: Tensor, first: int = 0) -> None:
        """Store `values` `[n, H, D]`, converted to `dtype`, as keys (`kv` 0) or values (1) of a layer's tokens
        `[first, first + n)`."""

    def narrow(self, start: int, tokens: int) -> CacheTarget:
        """Tokens `[start, start + tokens)` as a target of their own, over the same memory. Raises CodecError."""
        return _Narrowed(self, start, tokens)


class _Narrowed(CacheTarget):
    """Some tokens of a target that knows no better way: every write goes through it, moved along."""

    def __init__(self, whole: CacheTarget, start: int, tokens: int) -> None:
        layers, sides, _, heads, head_dim = whole.shape
        check_span(start, tokens, whole.shape[2])
        self._whole, self._start = whole, start
        self.shape = (layers, sides, tokens, heads, head_dim)
        self.dtype, self.device = whole.dtype, whole.device

    def write(self, layer: int, kv: int, values: Tensor, first: int = 0) -> None:
        self._whole.write(layer, kv, values, self._start + first)


def check_span(start: int, tokens: int, capacity: int) -> None:
    """Raise CodecError unless a cache of `capacity` tokens has `[start, start + tokens)`."""
    if start < 0 or tokens < 1 or start + tokens > capacity:
        raise CodecError(f"tokens [{start}, {start + tokens}) do not fit into a cache of {capacity}")


KVTarget: TypeAlias = Tensor | CacheTarget | HuggingFaceCache
"""What `Codec.decode` writes into. A plain tensor `[L, 2, T, H, D]` may have any strides; a Hugging Face cache has room
for exactly the chunk's tokens."""


class StridedTarget(CacheTarget):
    """A tensor `[L, 2, T, H, D]` with any strides, written in place."""

    def __init__(self, tensor: Tensor) -> None:
        if tensor.dim() != 5 or tensor.shape[1] != 2:
            raise CodecError(f"a KV tensor is [layers, 2, tokens, heads, head_dim], not {tuple(tensor.shape)}")
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise CodecError(
                "an expanded tensor stores several elements at one address; decode into one with its own memory"
            )
        self.tensor = tensor
        layers, _, tokens, heads, head_dim = tensor.shape
        self.shape = (layers, 2, tokens, heads, head_dim)
        self.dtype, self.device = _kind_of([tensor])

    def write(self, layer: int, kv: int, values: Tensor, first: int = 0) -> None:
        self.tensor[layer, kv, first : first + len(values)].copy_(saturate(values, self.dtype))

    def narrow(self, start: int, tokens: int) -> CacheTarget:
        check_span(start, tokens, self.shape[2])
        return StridedTarget(self.tensor[:, :, start : start + tokens])

    @cached_property
    def placement(self) -> Placement:
        tensor = self.tensor
        layer, side, *_ = (stride * tensor.element_size() for stride in tensor.stride())
        blocks = layer * np.arange(len(tensor))[:, None] + side * np.arange(2)
        return Placement.of(tensor[0, 0], tensor.data_ptr() + blocks.ravel())


class HuggingFaceTarget(CacheTarget):
    """Tokens `[start, start + T)` of preallocated Hugging Face keys and values.

    `layers` is one `(keys, values)` pair a layer, each `[1, H, >= start + T, D]`: those of a `StaticCache`
    (`layouts.huggingface_layers`), or those over which `dynamic_cache` then makes a `DynamicCache`.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], start: int, tokens: int) -> None:
        if not layers or any(t.dim() != 4 or t.shape[0] != 1 for pair in layers for t in pair):
            raise CodecError("Hugging Face layers are (keys, values) pairs of [1, heads, tokens, head_dim]")
        shapes = {tuple(t.shape) for pair in layers for t in pair}
        if len(shapes) != 1:
            raise CodecError(f"layers of unequal shapes are not supported: {sorted(shapes)}")
        (_, heads, capacity, head_dim) = shapes.pop()
        check_span(start, tokens, capacity)
        self._layers = layers
        self._start = start
        self.shape = (len(layers), 2, tokens, heads, head_dim)
        self.dtype, self.device = _kind_of([side for pair in layers for side in pair])

    @classmethod
    def allocate(
        cls, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> HuggingFaceTarget:
        """A target with its own contiguous memory for `[L, 2, T, H, D]`."""
        layers, _, tokens, heads, head_dim = shape
        memory = torch.empty((layers, 2, 1, heads, tokens, head_dim), dtype=dtype, device=device)
        return cls([(keys, values) for keys, values in memory], 0, tokens)

    def write(self, layer: int, kv: int, values: Tensor, first: int = 0) -> None:
        destination = self._layers[layer][kv][0].narrow(1, self._start + first, len(values))
        destination.copy_(saturate(values, self.dtype).permute(1, 0, 2))

    def narrow(self, start: int, tokens: int) -> CacheTarget:
        check_span(start, tokens, self.shape[2])
        return HuggingFaceTarget(self._layers, self._start + start, tokens)

    @cached_property
    def placement(self) -> Placement | None:
        sides = [side[0] for layer in self._layers for side in layer]
        views = [side.narrow(1, self._start, self.shape[2]).permute(1, 0, 2) for side in sides]
        if len({view.stride() for view in views}) > 1:
            return None
        return Placement.of(views[0], [view.data_ptr() for view in views])

    def dynamic_cache(self) -> Any:
        """A `transformers.DynamicCache` over the target's own tensors (no copy), when they are exactly full."""
        if self._layers[0][0].shape[2] != self.shape[2]:
            raise CodecError("the cache has room for more tokens than were decoded; pass slices of exactly that length")
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache = DynamicCache()
        for keys, values in self._layers:
            layer = DynamicLayer()
            layer.keys, layer.values = keys, values  # `update` would copy them
            layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
            cache.layers.append(layer)
        return cache


class LMCacheTarget(StridedTarget):
    """LMCache's `[2, L, T, H * D]` or `[L, 2, T, H * D]` tensor; arguments as those of `layouts.from_lmcache`."""

    def __init__(self, tensor: Tensor, heads: int, layout: str | None = None) -> None:
        super().__init__(from_lmcache(tensor, heads, layout))


class PagedTarget(CacheTarget):
    """vLLM's paged blocks: per layer `[2, blocks, block_size, H, D]`, and the blocks that hold the sequence.

    Token `offset + t` of the sequence is in block `block_table[(offset + t) // block_size]`.
    """

    def __init__(self, layers: Sequence[Tensor], block_table: Tensor | Sequence[int], offset: int, tokens: int) -> None:
        self._block, self._slot = paged_places(layers, block_table, offset, tokens)
        self._layers, self._table, self._offset = layers, block_table, offset
        _, _, _, heads, head_dim = layers[0].shape
        self.shape = (len(layers), 2, tokens, heads, head_dim)
        self.dtype, self.device = _kind_of(layers)

    def write(self, layer: int, kv: int, values: Tensor, first: int = 0) -> None:
        some = slice(first, first + len(values))
        self._layers[layer][kv][self._block[some], self._slot[some]] = saturate(values, self.dtype).to(self.dtype)

    def narrow(self, start: int, tokens: int) -> CacheTarget:
        check_span(start, tokens, self.shape[2])
        return PagedTarget(self._layers, self._table, self._offset + start, tokens)

    @cached_property
    def placement(self) -> Placement | None:
        views = [side for layer in self._layers for side in layer]
        if len({view.stride() for view in views}) > 1:
            return None
        block_stride, slot_stride, *_ = views[0].stride()
        token_at = torch.nn.functional.pad(self._block * block_stride + self._slot * slot_stride, (0, 1))
        addresses = [view.data_ptr() for view in views]
        return Placement.of(views[0][0], addresses, token_at, (block_stride, slot_stride))


class LayeredTarget(CacheTarget):
    """Targets that each take some of the layers, in order; they may be on different devices.

    For a model split over several GPUs: each GPU decodes its own layers of a chunk.
    """

    def __init__(self, parts: Sequence[CacheTarget]) -> None:
        if not parts:
            raise CodecError("a layered target needs at least one part")
        if len({(part.shape[1:], part.dtype, part.device.type) for part in parts}) > 1:
            raise CodecError("the parts of a layered target differ in tokens, heads, head_dim, dtype or kind of device")
        self.parts = tuple(parts)
        first = parts[0]
        layers = sum(part.shape[0] for part in parts)
        self.shape = (layers, *first.shape[1:])
        self.dtype, self.device = first.dtype, first.device

    def shares(self) -> list[tuple[CacheTarget, range]]:
        """Each part and its layers."""
        found, start = [], 0
        for part in self.parts:
            found.append((part, range(start, start + part.shape[0])))
            start += part.shape[0]
        return found

    def write(self, layer: int, kv: int, values: Tensor, first: int = 0) -> None:
        part, own = next((part, own) for part, own in self.shares() if layer in own)
        part.write(layer - own.start, kv, values.to(part.device), first)

    def narrow(self, start: int, tokens: int) -> CacheTarget:
        return LayeredTarget([part.narrow(start, tokens) for part in self.parts])


class SomeLayers(CacheTarget):
    """All layers of a chunk, of which only those are kept that `part` holds."""

    def __init__(self, part: CacheTarget, layers: range, count: int) -> None:
        if part.shape[0] != len(layers):
            raise CodecError(f"the target has {part.shape[0]} layers, not the {len(layers)} of {layers}")
        self._part, self._layers = part, layers
        self.shape = (count, *part.shape[1:])
        self.dtype, self.device = part.dtype, part.device

    def write(self, layer: int, kv: int, values: Tensor, first: int = 0) -> None:
        if layer in self._layers:
            self._part.write(layer - self._layers.start, kv, values, first)


def as_target(out: KVTarget) -> CacheTarget:
    """The target itself, or a tensor or Hugging Face cache wrapped as one. Raises CodecError for anything else."""
    if isinstance(out, CacheTarget):
        return out
    if isinstance(out, Tensor):
        return StridedTarget(out)
    if hasattr(out, "layers"):
        pairs = huggingface_layers(out)
        return HuggingFaceTarget(pairs, 0, pairs[0][0].shape[2])
    raise CodecError(
        f"cannot decode into a {type(out).__name__}: pass a tensor [layers, 2, tokens, heads, head_dim], a target of "
        "kvstream.codec.targets or a Hugging Face cache"
    )


def _kind_of(tensors: Sequence[Tensor]) -> tuple[torch.dtype, torch.device]:
    """The dtype and device they share. Raises CodecError where they differ, and for dtypes that no cache has."""
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) != 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise CodecError(f"a cache has one dtype and one device, not {found}")
    dtype, device = kinds.pop()
    if dtype not in DTYPES.values():
        raise CodecError(f"a KV tensor is bfloat16, float16 or float32, not {dtype}")
    return dtype, device


def saturate(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values clamped to `dtype`: decoding wider values into float16 must not turn the largest into infinity.

    Infinities in the cache (the raw codec keeps them) pass when the two dtypes agree.
    """
    if dtype == torch.float16 and values.dtype != torch.float16:
        limit = torch.finfo(torch.float16).max
        return values.clamp(-limit, limit)
    return values
