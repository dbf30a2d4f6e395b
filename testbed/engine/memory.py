"""The memory that a context is decoded into: the model's cache and, where an engine has them, pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kvstream.codec.targets import DTYPES, CacheTarget, LayeredTarget, PagedTarget
from kvstream.testbed.engine.model import KVCache, Model
from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.manifest import KVShape

BLOCK_TOKENS: Final = 16
"""vLLM's default."""


class KVMemory:
    """A `KVCache` that grows as needed, and a `PagedCache` beside it if `pages_on` names devices.

    With pages, chunks are decoded into them, each device its share of the layers, as for a serving engine; our model,
    which attends to one piece of memory, then gets each chunk by a copy. Raises SpecError for impossible devices.
    """

    def __init__(self, model: Model, pages_on: Sequence[torch.device | str] = ()) -> None:
        self.cache: KVCache | None = None
        self._pages: PagedCache | None = None
        self._model = model
        self._pages_on = _page_devices(pages_on, model) if pages_on else []

    def reserve(self, tokens: int) -> bool:
        """Room for `tokens`, every old value gone. Returns whether the memory is new."""
        is_new = not self.has_room(tokens)
        if is_new:
            self.cache = self._model.new_cache(tokens)
            self._pages = PagedCache(self._model.kv, tokens, self._pages_on) if self._pages_on else None
        self.poison()
        return is_new

    def has_room(self, tokens: int) -> bool:
        return self.cache is not None and self.cache.capacity >= tokens

    def poison(self) -> None:
        """Forget everything: what is then used without having been written gives NaN."""
        for memory in (self.cache, self._pages):
            if memory is not None:
                memory.poison()

    def target(self, start: int, stop: int) -> Tensor | CacheTarget:
        """Where tokens [start, stop) are decoded to."""
        assert self.cache is not None
        return self.cache.view(start, stop) if self._pages is None else self._pages.target(start, stop)

    def settle(self, start: int, stop: int) -> None:
        """Tokens [start, stop) are decoded: copy them to where the model reads them."""
        assert self.cache is not None
        if self._pages is not None:
            self._pages.copy_to(self.cache.view(start, stop), start)


def _page_devices(names: Sequence[torch.device | str], model: Model) -> list[torch.device]:
    try:
        devices = [torch.empty(0, device=name).device for name in names]
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        raise SpecError(f"pages on {', '.join(map(str, names))}: {str(error).splitlines()[0]}") from error
    if devices[0] != model.device:
        raise SpecError(f"the first device with pages must be the model's, {model.device}, not {devices[0]}")
    if len(devices) > model.kv.layers:
        raise SpecError(f"{len(devices)} devices cannot share {model.kv.layers} layers")
    return devices


class PagedCache:
    """Room for `capacity` tokens of one sequence, in vLLM's layout: per layer `[2, blocks, BLOCK_TOKENS, H, D]`.

    With several devices each holds some of the layers, as with pipeline parallelism.
    """

    def __init__(self, shape: KVShape, capacity: int, devices: Sequence[torch.device]) -> None:
        self.capacity = capacity
        blocks = -(-capacity // BLOCK_TOKENS)
        size = (2, blocks, BLOCK_TOKENS, shape.heads, shape.head_dim)
        self.parts = [
            [torch.zeros(size, dtype=DTYPES[shape.dtype], device=device) for _ in part]
            for device, part in zip(devices, np.array_split(range(shape.layers), len(devices)), strict=True)
        ]
        """Layers by device."""
        self.table = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))

    @property
    def layers(self) -> list[Tensor]:
        return [pages for part in self.parts for pages in part]

    def target(self, start: int, stop: int) -> CacheTarget:
        """Where tokens [start, stop) are decoded to."""
        targets = [PagedTarget(part, self.table, start, stop - start) for part in self.parts]
        return targets[0] if len(targets) == 1 else LayeredTarget(targets)

    def copy_to(self, view: Tensor, start: int) -> None:
        """Copy tokens from `start` on to a view `[L, 2, T, H, D]`, for attention without pages."""
        at = torch.arange(start, start + view.shape[2])
        layer = 0
        for part in self.parts:
            block, offset = (where.to(part[0].device) for where in (self.table[at // BLOCK_TOKENS], at % BLOCK_TOKENS))
            for pages in part:
                view[layer].copy_(pages[:, block, offset])
                layer += 1

    def poison(self) -> None:
        """As `KVCache.poison`."""
        for pages in self.layers:
            pages.fill_(float("nan"))
