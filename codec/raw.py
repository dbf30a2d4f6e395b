"""The KV cache as it is: every bit kept, NaN and infinities included."""

from __future__ import annotations

import torch
from torch import Tensor

from codec.api import Codec, Level
from codec.container import DTYPE_BYTES, Chunk, Header
from codec.targets import DTYPES, CacheTarget


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
        kv = frombuffer(chunk.section("data"), DTYPES[header.dtype]).view(header.shape).to(target.device)
        for layer in range(header.layers):
            for side in (0, 1):
                target.write(layer, side, kv[layer, side])


def frombuffer(content: memoryview, dtype: torch.dtype) -> Tensor:
    """A tensor over checked bytes. The bytes are copied only where they are not aligned for `dtype`."""
    import numpy as np

    flat = np.frombuffer(content, dtype=np.uint8)
    if flat.ctypes.data % dtype.itemsize or not flat.flags.writeable:
        flat = flat.copy()
    return torch.from_numpy(flat).view(dtype)
