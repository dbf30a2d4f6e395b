"""vLLM's paged cache on one rank: tokens of a sequence written into its blocks, and read from them. Needs no vLLM.

vLLM (0.32) gives every layer a tensor `[blocks, heads, block_tokens, 2 * head_dim]`, of any strides, whose last
dimension holds a token's key and then its value. On a GPU that is what memory holds, and decoders write there
directly. On a CPU the attention kernels pack each block in an order of their own that depends on the processor: there
the layer's own update writes, and what it does to a block of known numbers tells where every element lies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from kvstream.codec.errors import CodecError
from kvstream.codec.layouts import from_paged, paged_places
from kvstream.codec.targets import DTYPES, CacheTarget, PagedTarget, saturate
from kvstream.testbed.errors import SpecError

_DIGITS: Final = 128
"""Numbers below this are exact in every dtype of a cache, bfloat16 with its 8 bits included."""

Update = Callable[[Tensor, Tensor, Tensor, Tensor], object]
"""Writes keys and values `[tokens, heads, head_dim]` into a layer's cache at `slots` `[tokens]`: keys, values, cache,
slots."""


class Blocks(ABC):
    """The blocks of a rank's layers. A `table` lists the blocks of one sequence, in order."""

    def __init__(self, caches: Sequence[Tensor]) -> None:
        """`caches` are one tensor a layer. Raises SpecError for caches that are not what this module knows."""
        if not caches or any(cache.dim() != 4 or cache.shape != caches[0].shape for cache in caches):
            shapes = sorted({tuple(cache.shape) for cache in caches})
            raise SpecError(f"layers with equal caches [blocks, heads, block_tokens, 2 * head_dim] only, not {shapes}")
        blocks, heads, tokens, both = caches[0].shape
        if both % 2 or caches[0].dtype not in DTYPES.values():
            raise SpecError(
                f"a cache of {caches[0].dtype} with {both} numbers a token and head is not one that kvstream writes; "
                "run the engine with --kv-cache-dtype auto"
            )
        self.caches = list(caches)
        self.block_tokens, self.heads, self.head_dim = tokens, heads, both // 2
        self.n_blocks, self.dtype, self.device = blocks, caches[0].dtype, caches[0].device

    @abstractmethod
    def target(self, table: Sequence[int], start: int, tokens: int) -> CacheTarget | None:
        """Tokens `[start, start + tokens)` of a sequence as a target; None where only `write` can write."""

    @abstractmethod
    def is_finite(self, table: Sequence[int], start: int, tokens: int) -> bool:
        """Whether all that a sequence's tokens `[start, start + tokens)` hold are numbers."""

    @abstractmethod
    def write(self, table: Sequence[int], start: int, kv: Tensor) -> None:
        """Store `kv` `[L, 2, T, H, D]` as the sequence's tokens from `start` on."""

    @abstractmethod
    def read(self, table: Sequence[int], tokens: int) -> Tensor:
        """A copy `[L, 2, T, H, D]` of the sequence's first tokens."""


class StridedBlocks(Blocks):
    """Blocks whose memory is what the caches' strides say: GPUs."""

    def __init__(self, caches: Sequence[Tensor]) -> None:
        super().__init__(caches)
        self._layers = [cache.unflatten(3, (2, self.head_dim)).permute(3, 0, 2, 1, 4) for cache in caches]
        """[layer]: `[2, blocks, block_tokens, heads, head_dim]`, a view."""

    def target(self, table: Sequence[int], start: int, tokens: int) -> CacheTarget:
        return PagedTarget(self._layers, table, start, tokens)

    def is_finite(self, table: Sequence[int], start: int, tokens: int) -> bool:
        block, slot = paged_places(self._layers, table, start, tokens)
        return all(bool(layer[:, block, slot].isfinite().all()) for layer in self._layers)

    def write(self, table: Sequence[int], start: int, kv: Tensor) -> None:
        block, slot = paged_places(self._layers, table, start, kv.shape[2])
        for layer, values in zip(self._layers, kv, strict=True):
            layer[:, block, slot] = saturate(values, self.dtype).to(layer.device, self.dtype)

    def read(self, table: Sequence[int], tokens: int) -> Tensor:
        return from_paged(self._layers, table, 0, tokens)


class PackedBlocks(Blocks):
    """Blocks that only the engine's own update can write: CPUs."""

    def __init__(self, caches: Sequence[Tensor], updates: Sequence[Update]) -> None:
        super().__init__(caches)
        self._updates = list(updates)

    def target(self, table: Sequence[int], start: int, tokens: int) -> None:
        return None

    def is_finite(self, table: Sequence[int], start: int, tokens: int) -> bool:
        return bool(self.read(table, start + tokens)[:, :, start:].isfinite().all())

    def write(self, table: Sequence[int], start: int, kv: Tensor) -> None:
        slots = self._slots(table, start, kv.shape[2])
        for update, cache, sides in zip(self._updates, self.caches, kv, strict=True):
            keys, values = saturate(sides, self.dtype).to(self.dtype).contiguous()
            update(keys, values, cache, slots)

    def read(self, table: Sequence[int], tokens: int) -> Tensor:
        self._slots(table, 0, tokens)
        used = torch.as_tensor(table[: -(-tokens // self.block_tokens)])
        shape = (len(used), self.heads, self.block_tokens, self.head_dim)
        layers = []
        for cache in self.caches:
            memory = cache[used].flatten(2)
            sides = [memory[..., places].view(shape).transpose(1, 2) for places in self._places]
            layers.append(torch.stack([side.flatten(0, 1)[:tokens] for side in sides]))
        return torch.stack(layers)

    def _slots(self, table: Sequence[int], start: int, tokens: int) -> Tensor:
        _check_table(table, self.n_blocks, self.block_tokens, start, tokens)
        at = torch.arange(start, start + tokens)
        return torch.as_tensor(table)[at // self.block_tokens] * self.block_tokens + at % self.block_tokens

    @cached_property
    def _places(self) -> list[Tensor]:
        """For keys and for values: where in a block's head `[block_tokens * 2 * head_dim]` element (token, d) is.

        Learnt by letting the engine write the elements' own numbers, digit by digit."""
        size = self.block_tokens * self.head_dim
        slots = torch.arange(self.block_tokens)
        numbers = torch.arange(2 * size)
        found = torch.zeros(2 * size, dtype=torch.int64)
        factor = 1
        while factor < 2 * size:
            digits = (numbers // factor % _DIGITS).to(self.dtype).view(2, self.block_tokens, 1, self.head_dim)
            keys, values = digits.expand(-1, -1, self.heads, -1).contiguous()
            cache = torch.zeros_like(self.caches[0][:1])
            self._updates[0](keys, values, cache, slots)
            head = cache[0, 0].flatten()
            if not torch.equal(cache[0].flatten(1), head.expand(self.heads, -1)):
                raise SpecError("the heads of a block do not lie one after the other: this cache cannot be saved")
            found += head.to(torch.int64) * factor
            factor *= _DIGITS
        if not torch.equal(found.sort().values, numbers):
            raise SpecError("the engine's update does not move single elements: this cache cannot be saved")
        return [places.clone() for places in found.argsort().view(2, size)]


@dataclass(frozen=True)
class Share:
    """What one rank holds of a context: some layers, and some heads of each."""

    layers: tuple[int, ...]
    heads: range

    def of(self, kv: Tensor) -> Tensor:
        """The rank's part of `kv` `[L, 2, T, H, D]`, a view where the layers are in a row."""
        first, last = self.layers[0], self.layers[-1]
        in_a_row = self.layers == tuple(range(first, last + 1))
        part = kv[first : last + 1] if in_a_row else kv[list(self.layers)]
        return part[:, :, :, self.heads.start : self.heads.stop]

    def fits(self, layers: int, heads: int) -> bool:
        """Whether a context of so many layers and heads has all that the rank holds."""
        return self.layers[-1] < layers and self.heads.stop <= heads

    def is_all(self, layers: int, heads: int) -> bool:
        return self.layers == tuple(range(layers)) and self.heads == range(heads)


def heads_of_rank(heads: int, rank: int, ranks: int) -> range:
    """The KV heads that vLLM gives a tensor-parallel rank: an equal share or, where ranks outnumber heads, one that
    several ranks hold. Raises SpecError where they do not divide."""
    if max(heads, ranks) % min(heads, ranks):
        raise SpecError(f"{heads} KV heads do not divide among {ranks} ranks")
    if ranks <= heads:
        each = heads // ranks
        return range(rank * each, (rank + 1) * each)
    head = rank // (ranks // heads)
    return range(head, head + 1)


def kernel_table(blocks: Sequence[int], block_tokens: int, kernel_tokens: int) -> list[int]:
    """The table in blocks of the kernels, where those are a fraction of the scheduler's."""
    ratio, rest = divmod(block_tokens, kernel_tokens)
    if rest or ratio < 1:
        raise SpecError(f"blocks of {block_tokens} tokens are not made of kernel blocks of {kernel_tokens}")
    return [block * ratio + part for block in blocks for part in range(ratio)]


def own_update(layer: Any) -> Update:
    """The update of a vLLM attention layer."""
    return lambda keys, values, cache, slots: layer.impl.do_kv_cache_update(layer, keys, values, cache, slots)


def _check_table(table: Sequence[int], n_blocks: int, block_tokens: int, start: int, tokens: int) -> None:
    if not table or min(table) < 0 or max(table) >= n_blocks or len(set(table)) != len(table):
        raise CodecError(f"the block table must list blocks 0 to {n_blocks - 1}, each once")
    if start < 0 or tokens < 1 or start + tokens > len(table) * block_tokens:
        raise CodecError(f"tokens [{start}, {start + tokens}) do not fit {len(table)} blocks of {block_tokens}")
