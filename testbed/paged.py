"""A KV cache as serving engines keep it: blocks of a few tokens in no order, and a table that says which is where."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from codec.targets import DTYPES, PagedTarget
from testbed.manifest import KVShape

BLOCK_TOKENS: Final = 16
"""vLLM's default."""


class PagedCache:
    """Room for `capacity` tokens of one sequence, in vLLM's layout: per layer `[2, blocks, BLOCK_TOKENS, H, D]`."""

    def __init__(self, shape: KVShape, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        blocks = -(-capacity // BLOCK_TOKENS)
        size = (2, blocks, BLOCK_TOKENS, shape.heads, shape.head_dim)
        self.layers = [torch.zeros(size, dtype=DTYPES[shape.dtype], device=device) for _ in range(shape.layers)]
        self.table = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))
        self._table = self.table.to(device)

    def target(self, start: int, stop: int) -> PagedTarget:
        """Where tokens [start, stop) are decoded to."""
        return PagedTarget(self.layers, self.table, start, stop - start)

    def copy_to(self, view: Tensor, start: int) -> None:
        """Tokens from `start` on as `[L, 2, T, H, D]`: what attention reads that knows no pages."""
        at = torch.arange(start, start + view.shape[2], device=view.device)
        block, slot = self._table[at // BLOCK_TOKENS], at % BLOCK_TOKENS
        for layer, pages in enumerate(self.layers):
            view[layer].copy_(pages[:, block, slot])

    def poison(self) -> None:
        """As `KVCache.poison`."""
        for pages in self.layers:
            pages.fill_(float("nan"))
