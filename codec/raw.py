"""The KV cache as it is: every bit kept, NaN and infinities included."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kvstream.codec.api import Codec, Level
from kvstream.codec.container import DTYPE_BYTES, Chunk, Header
from kvstream.codec.targets import DTYPES, CacheTarget


class Raw(Codec):
    """One section `data`: `[L, 2, T, H, D]` in the dtype of the cache, little-endian, row-major."""

    codec_id = "raw"
    lossless = True
    levels = (Level("raw"),)

    def _encode(self, kv: Tensor, level: int, header: Header) -> dict[str, bytes]:
        return {"data": kv.contiguous().cpu().view(torch.uint8).numpy().tobytes()}

    def _check_chunk(self, chunk: Chunk) -> None:
        chunk.section("data", chunk.header.elements * DTYPE_BYTES[chunk.header.dtype])

    def _decode(self, chunk: Chunk, target: CacheTarget) -> None:
        header = chunk.header
        for layer, side, content in blocks(chunk.section("data"), header.layers):
            block = frombuffer(content, DTYPES[header.dtype]).view(header.shape[2:])
            target.write(layer, side, block.to(target.device))


def blocks(content: memoryview, layers: int) -> Iterator[tuple[int, int, memoryview]]:
    """The equal parts of a section that hold one (layer, K or V) each, in order."""
    size = len(content) // (2 * layers)
    for layer in range(layers):
        for side in (0, 1):
            first = (2 * layer + side) * size
            yield layer, side, content[first : first + size]


def frombuffer(content: memoryview, dtype: torch.dtype) -> Tensor:
    """A tensor over checked bytes; copied where they are read-only (torch has no such tensors) or not aligned."""
    if len(content) == 0:
        return torch.empty(0, dtype=dtype)
    flat = np.frombuffer(content, dtype=np.uint8)
    if flat.ctypes.data % dtype.itemsize or not flat.flags.writeable:
        flat = flat.copy()
    return torch.from_numpy(flat).view(dtype)
