"""A codec in one file: the upper 12 bits of bfloat16, or the cache as it is, then zlib.

The base class has checked shapes, dtypes, positions and checksums before these methods run.
"""

from __future__ import annotations

import zlib

import torch

from kvstream.codec.api import Codec, Level
from kvstream.codec.container import Chunk, Header
from kvstream.codec.errors import CodecError
from kvstream.codec.targets import DTYPES, CacheTarget


class Zip(Codec):
    """One section `data`: `[L, 2, T, H, D]`, row-major, as bfloat16 (level 0) or in the cache's dtype (1), deflated."""

    codec_id = "zip"
    levels = (Level("12-bit"), Level("whole"))

    def _encode(self, kv: torch.Tensor, level: int, header: Header) -> dict[str, bytes]:
        kept = kv.cpu().contiguous()
        if level == 0:
            kept = kept.to(torch.bfloat16).view(torch.int16) & ~0xF  # zero bits deflate to almost nothing
        return {"data": zlib.compress(kept.view(torch.uint8).numpy().tobytes(), 1)}

    def _decode(self, chunk: Chunk, target: CacheTarget) -> None:
        header = chunk.header
        dtype = torch.bfloat16 if header.level == 0 else DTYPES[header.dtype]
        size = header.elements * dtype.itemsize
        inflate = zlib.decompressobj()
        try:
            data = inflate.decompress(chunk.section("data"), size)  # never more than the header's shape needs
        except zlib.error as error:
            raise CodecError(f"section 'data' cannot be inflated ({error}); encode again") from error
        if len(data) != size or not inflate.eof:
            raise CodecError(f"section 'data' does not hold the {size} bytes of its shape; encode again")
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(header.shape)
        if not bool(torch.isfinite(whole).all()):
            raise CodecError("section 'data' holds NaN or infinities; encode again")
        for layer in range(header.layers):
            for side in (0, 1):  # keys, values
                target.write(layer, side, whole[layer, side].to(target.device).float())
