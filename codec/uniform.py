"""Quantisation without an entropy coder: the classic baselines.

`uniform` scales each token's vector (per layer, K and V apart) by its largest magnitude, kept in the dtype of the
cache, and rounds to 8, 4 or 3 bits, 127, 7 or 3 steps on either side of zero. `fp8` casts to E4M3 after one such scale
per (layer, K or V, head), as serving engines store FP8 caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from codec.api import Codec, Level
from codec.container import DTYPE_BYTES, Chunk, Header
from codec.raw import frombuffer
from codec.targets import DTYPES, CacheTarget


class Uniform(Codec):
    """Sections `scal` (`[L, 2, T]` in the dtype of the cache) and `bits` (`[L, 2, T, H * D]`, packed)."""

    codec_id = "uniform"
    levels = (Level("3-bit", {"bits": 3}), Level("4-bit", {"bits": 4}), Level("8-bit", {"bits": 8}))

    def _encode(self, kv: Tensor, level: int, header: Header) -> dict[str, bytes]:
        bits = int(self.levels[level].settings["bits"])
        rows = kv.flatten(3)
        scale = rows.abs().amax(dim=3)
        steps = quantise(rows, scale, (1 << (bits - 1)) - 1)
        return {"scal": _bytes(scale), "bits": _bytes(pack_bits(steps.flatten(), bits))}

    def _check_chunk(self, chunk: Chunk) -> None:
        header = chunk.header
        bits = int(self.levels[header.level].settings["bits"])
        chunk.section("scal", header.layers * 2 * header.tokens * DTYPE_BYTES[header.dtype])
        chunk.section("bits", -(-header.elements // 8) * bits)

    def _decode(self, chunk: Chunk, target: CacheTarget) -> None:
        header = chunk.header
        bits = int(self.levels[header.level].settings["bits"])
        half = (1 << (bits - 1)) - 1
        scale = checked_scale(frombuffer(chunk.section("scal"), DTYPES[header.dtype]))
        symbols = unpack_bits(frombuffer(chunk.section("bits"), torch.uint8), bits, header.elements)
        symbols = symbols.view(header.shape).to(target.device)
        step = scale.view(header.layers, 2, header.tokens, 1, 1).to(target.device).float() / half
        for layer in range(header.layers):
            for side in (0, 1):
                target.write(layer, side, (symbols[layer, side].float() - half) * step[layer, side])


class FP8(Codec):
    """Sections `scal` (float32 `[L, 2, H]`) and `data` (`[L, 2, T, H, D]` in float8_e4m3fn)."""

    codec_id = "fp8"
    levels = (Level("fp8"),)

    def _encode(self, kv: Tensor, level: int, header: Header) -> dict[str, bytes]:
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = kv.abs().amax(dim=(2, 4)).float() / largest
        scaled = kv.float() / torch.where(scale > 0, scale, 1.0)[:, :, None, :, None]
        cast = scaled.clamp(-largest, largest).to(torch.float8_e4m3fn)
        return {"scal": _bytes(scale), "data": _bytes(cast)}

    def _check_chunk(self, chunk: Chunk) -> None:
        header = chunk.header
        chunk.section("scal", header.layers * 2 * header.heads * 4)
        chunk.section("data", header.elements)

    def _decode(self, chunk: Chunk, target: CacheTarget) -> None:
        header = chunk.header
        scale = checked_scale(frombuffer(chunk.section("scal"), torch.float32))
        scale = scale.view(header.layers, 2, 1, header.heads, 1).to(target.device)
        data = frombuffer(chunk.section("data"), torch.float8_e4m3fn).view(header.shape).to(target.device)
        for layer in range(header.layers):
            for side in (0, 1):
                target.write(layer, side, data[layer, side].float() * scale[layer, side])


def quantise(rows: Tensor, scale: Tensor, half: int) -> Tensor:
    """Symbols 0..2*half of `rows` `[..., C]` under one scale a row: `round(x * half / scale) + half`.

    A row of zeros has scale 0 and gets the middle symbol.
    """
    factor = torch.where(scale > 0, half / scale.float(), 0.0)
    # A subnormal scale overflows the factor; such a row is zero for every purpose.
    factor = torch.where(torch.isfinite(factor), factor, 0.0)
    return (rows.float() * factor[..., None]).round_().clamp_(-half, half).add_(half).to(torch.uint8)


def checked_scale(scale: Tensor) -> Tensor:
    """Scales read from a chunk: finite and not negative, or CodecError."""
    from codec.errors import CodecError

    if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()):
        raise CodecError("section 'scal' holds scales that are negative or not finite; encode again")
    return scale


def pack_bits(symbols: Tensor, bits: int) -> Tensor:
    """Flat uint8 symbols below `2**bits` as bytes: eight symbols in `bits` bytes, the first in the lowest bits."""
    if bits == 8:
        padding = -len(symbols) % 8
        return torch.nn.functional.pad(symbols, (0, padding)) if padding else symbols
    groups = torch.nn.functional.pad(symbols, (0, -len(symbols) % 8)).view(-1, 8).to(torch.int32)
    shifts = torch.arange(8, dtype=torch.int32) * bits
    if bits == 4:
        return (groups[:, 0::2] | groups[:, 1::2] << 4).to(torch.uint8).flatten()
    words = (groups << shifts).sum(dim=1, dtype=torch.int32)
    return (words[:, None] >> (torch.arange(bits, dtype=torch.int32) * 8) & 0xFF).to(torch.uint8).flatten()


def unpack_bits(data: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits`: the first `count` symbols."""
    if bits == 8:
        return data[:count]
    if bits == 4:
        return torch.stack((data & 0xF, data >> 4), dim=1).flatten()[:count]
    parts = data.view(-1, bits).to(torch.int32)
    words = (parts << (torch.arange(bits, dtype=torch.int32) * 8)).sum(dim=1, dtype=torch.int32)
    shifts = torch.arange(8, dtype=torch.int32) * bits
    return (words[:, None] >> shifts & (1 << bits) - 1).to(torch.uint8).flatten()[:count]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()
