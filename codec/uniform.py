"""Quantisation without an entropy coder: the classic baselines.

`uniform` scales each token's vector (per layer, K and V apart) by its largest magnitude, kept in the dtype of the
cache, and rounds to 8, 4 or 3 bits, 127, 7 or 3 steps on either side of zero. `fp8` casts to E4M3 after one such scale
per (layer, K or V, head), as serving engines store FP8 caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvstream.codec.api import LARGEST_MAGNITUDE, Codec, Level
from kvstream.codec.container import DTYPE_BYTES, Chunk, Header
from kvstream.codec.errors import CodecError
from kvstream.codec.raw import blocks, frombuffer
from kvstream.codec.targets import DTYPES, CacheTarget


class Uniform(Codec):
    """Sections `scal` (`[L, 2, T]` in the dtype of the cache) and `bits` (per layer, K then V, `[T, H * D]` packed)."""

    codec_id = "uniform"
    levels = (Level("3-bit", {"bits": 3}), Level("4-bit", {"bits": 4}), Level("8-bit", {"bits": 8}))

    def _encode(self, kv: Tensor, level: int, header: Header) -> dict[str, bytes]:
        return encode_bits(kv, self._bits(level))

    def _check_chunk(self, chunk: Chunk) -> None:
        check_bits(chunk, self._bits(chunk.header.level))

    def _decode(self, chunk: Chunk, target: CacheTarget) -> None:
        decode_bits(chunk, self._bits(chunk.header.level), target)

    def _bits(self, level: int) -> int:
        return int(self.levels[level].settings["bits"])


def encode_bits(kv: Tensor, bits: int) -> dict[str, bytes]:
    """The sections of `uniform` of a cache `[L, 2, T, H, D]`."""
    scale, packed = [], []
    for layer in kv:  # one at a time: float32 of all of them would be twice the cache
        rows = layer.flatten(2)
        scale.append(rows.abs().amax(dim=2))
        steps = quantise(rows, scale[-1], (1 << (bits - 1)) - 1)
        packed.append(as_bytes(pack_bits(steps.flatten(1), bits)))
    return {"scal": as_bytes(torch.stack(scale)), "bits": b"".join(packed)}


def check_bits(chunk: Chunk, bits: int) -> None:
    """Raises CodecError unless a chunk has the sections of `encode_bits`, in their sizes."""
    header = chunk.header
    chunk.section("scal", header.layers * 2 * header.tokens * DTYPE_BYTES[header.dtype])
    block = header.tokens * header.heads * header.head_dim
    chunk.section("bits", header.layers * 2 * -(-block // 8) * bits)


def decode_bits(chunk: Chunk, bits: int, target: CacheTarget) -> None:
    """Write what `encode_bits` made into a target of the chunk's shape. Raises CodecError."""
    header = chunk.header
    half = (1 << (bits - 1)) - 1
    scale = checked_scale(frombuffer(chunk.section("scal"), DTYPES[header.dtype]))
    step = scale.view(header.layers, 2, header.tokens, 1, 1).to(target.device).float() / half
    block = header.tokens * header.heads * header.head_dim
    for layer, side, content in blocks(chunk.section("bits"), header.layers):
        packed = frombuffer(content, torch.uint8).to(target.device)
        symbols = unpack_bits(packed, bits, block).view(header.shape[2:])
        target.write(layer, side, (symbols.float() - half) * step[layer, side])


class FP8(Codec):
    """Sections `scal` (float32 `[L, 2, H]`) and `data` (`[L, 2, T, H, D]` in float8_e4m3fn)."""

    codec_id = "fp8"
    levels = (Level("fp8"),)

    def _encode(self, kv: Tensor, level: int, header: Header) -> dict[str, bytes]:
        largest = torch.finfo(torch.float8_e4m3fn).max
        scales, data = [], []
        for layer in kv:
            # on the CPU: a GPU multiplies by the reciprocal of a number, which is not the same to the bit
            scale = layer.abs().amax(dim=(1, 3)).float().cpu() / largest
            scaled = layer.float() / torch.where(scale > 0, scale, 1.0)[:, None, :, None].to(layer.device)
            scales.append(scale)
            data.append(as_bytes(scaled.clamp_(-largest, largest).to(torch.float8_e4m3fn)))
        return {"scal": as_bytes(torch.stack(scales)), "data": b"".join(data)}

    def _check_chunk(self, chunk: Chunk) -> None:
        header = chunk.header
        chunk.section("scal", header.layers * 2 * header.heads * 4)
        chunk.section("data", header.elements)

    def _decode(self, chunk: Chunk, target: CacheTarget) -> None:
        header = chunk.header
        scale = checked_scale(frombuffer(chunk.section("scal"), torch.float32))
        scale = scale.view(header.layers, 2, 1, header.heads, 1).to(target.device)
        for layer, side, content in blocks(chunk.section("data"), header.layers):
            data = frombuffer(content, torch.float8_e4m3fn).view(header.shape[2:]).to(target.device).float()
            if not bool(torch.isfinite(data).all()):
                raise CodecError("section 'data' holds NaN; encode again")
            target.write(layer, side, data * scale[layer, side])


def quantise(rows: Tensor, scale: Tensor, half: int) -> Tensor:
    """Symbols 0..2*half of `rows` `[..., C]` under one scale a row: `round(x * half / scale) + half`, ties to even.

    All in float32, the product rounded before the quotient. A row of zeros has scale 0 and gets the middle symbol.
    """
    divisor = torch.where(scale > 0, scale.float(), 1.0)[..., None]
    return rows.float().mul(half).div_(divisor).round_().clamp_(-half, half).add_(half).to(torch.uint8)


def checked_scale(scale: Tensor) -> Tensor:
    """Scales read from a chunk: neither negative nor beyond any cache, or CodecError."""
    low, high = (float(x) for x in torch.aminmax(scale)) if scale.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1.01 * LARGEST_MAGNITUDE):
        raise CodecError(f"section 'scal' holds scales from {low:g} to {high:g}; encode again")
    return scale


def pack_bits(symbols: Tensor, bits: int) -> Tensor:
    """uint8 symbols `[rows, n]` below `2**bits` as bytes `[rows, ceil(n / 8) * bits]`.

    Eight symbols take `bits` bytes, the first symbol in the lowest bits of the first byte; a row is padded with zeros.
    """
    padded = torch.nn.functional.pad(symbols, (0, -symbols.shape[1] % 8))
    if bits == 8:
        return padded
    if bits == 4:
        return padded[:, 0::2] | padded[:, 1::2] << 4
    device = symbols.device
    groups = padded.unflatten(1, (-1, 8)).to(torch.int32)
    words = (groups << torch.arange(0, 8 * bits, bits, dtype=torch.int32, device=device)).sum(dim=2, dtype=torch.int32)
    parts = words[..., None] >> torch.arange(0, 8 * bits, 8, dtype=torch.int32, device=device) & 0xFF
    return parts.to(torch.uint8).flatten(1)


def unpack_bits(data: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` symbols of one packed row: the inverse of `pack_bits`."""
    if bits == 8:
        return data[:count]
    if bits == 4:
        return torch.stack((data & 0xF, data >> 4), dim=1).flatten()[:count]
    device = data.device
    parts = data.view(-1, bits).to(torch.int32)
    words = (parts << torch.arange(0, 8 * bits, 8, dtype=torch.int32, device=device)).sum(dim=1, dtype=torch.int32)
    shifts = torch.arange(0, 8 * bits, bits, dtype=torch.int32, device=device)
    return (words[:, None] >> shifts & (1 << bits) - 1).to(torch.uint8).flatten()[:count]


def as_bytes(tensor: Tensor) -> bytes:
    """The tensor's elements, row-major and little-endian."""
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
