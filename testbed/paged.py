"""A KV cache as serving engines keep it: blocks of a few tokens in no order, and a table that says which is where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from codec.targets import DTYPES, CacheTarget, LayeredTarget, PagedTarget
from testbed.manifest import KVShape

BLOCK_TOKENS: Final = 16
"""vLLM's default."""


class PagedCache:
    """Room for `capacity` tokens of one sequence, in vLLM's layout: per layer `[2, blocks, BLOCK_TOKENS, H, D]`.

    With several devices each holds some of the layers, as a model does that is split over them.
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
        """Tokens from `start` on as `[L, 2, T, H, D]`: what attention reads that knows no pages."""
        at = torch.arange(start, start + view.shape[2])
        layer = 0
        for part in self.parts:
            block, slot = (where.to(part[0].device) for where in (self.table[at // BLOCK_TOKENS], at % BLOCK_TOKENS))
            for pages in part:
                view[layer].copy_(pages[:, block, slot])
                layer += 1

    def poison(self) -> None:
        """As `KVCache.poison`."""
        for pages in self.layers:
            pages.fill_(float("nan"))
