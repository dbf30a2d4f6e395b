"""KIVI (Liu and others, ICML 2024, arXiv 2402.02750): tuning-free quantisation to 2 or 4 bits.

Keys are quantised by channel in groups of 32 tokens, values by token in groups of 32 channels of a head. A group has
its smallest value and a step, `(largest - smallest) / (2^bits - 1)`, both in the dtype of the cache. Keys are taken
with RoPE applied, as in the paper and its code. There is no entropy coder.

What a chunked stream changes. KIVI keeps a residual of 128 recent tokens in full precision, of a cache that grows as
tokens are generated. A context that is streamed is followed by a prompt that its receiver computes itself: these are
the recent tokens, and they are exact under every codec. An encoder does not know which chunk will be a context's last
either. So no token of a chunk counts as recent, which is the smaller of two readings; `recent=128` is the other, and
keeps the last 128 tokens of every chunk exact. A chunk whose tokens do not fill a group of 32 has a smaller last one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvstream.codec.api import LARGEST_MAGNITUDE, Codec, Level, Setting
from kvstream.codec.container import DTYPE_BYTES, Chunk, Header
from kvstream.codec.errors import CodecError
from kvstream.codec.exact import checked_recent, exact_tokens, write_exact
from kvstream.codec.profile import Profile
from kvstream.codec.raw import frombuffer
from kvstream.codec.targets import DTYPES, CacheTarget
from kvstream.codec.uniform import as_bytes, checked_scale, pack_bits, unpack_bits

GROUP = 32


class KIVI(Codec):
    """Sections `exac` (recent tokens `[L, 2, n, H, D]`), `lows` and `step` (smallest value and step of each group, per
    layer those of keys `[H, D, groups]` and of values `[T - n, H, groups]`) and `bits` (per layer, K then V, packed
    `[H, D, T - n]` and `[T - n, H, D]`)."""

    codec_id = "kivi"
    levels = (Level("2-bit", {"bits": 2}), Level("4-bit", {"bits": 4}))

    def __init__(self, *, profile: Profile | None = None, recent: int = 0) -> None:
        super().__init__(profile=profile)
        self._recent = checked_recent(recent)

    def settings(self) -> dict[str, Setting]:
        return {"recent": self._recent}

    def _encode(self, kv: Tensor, level: int, header: Header) -> dict[str, bytes]:
        bits = self._bits(level)
        coded = max(0, header.tokens - self._recent)
        low, step, packed = [], [], []
        for layer in kv:  # one at a time: float32 of all of them would be twice the cache
            keys, values = layer[:, :coded].cpu()
            for rows in (keys.permute(1, 2, 0), values):
                own_low, own_step, symbols = quantise(rows, bits)
                low.append(as_bytes(own_low))
                step.append(as_bytes(own_step))
                packed.append(as_bytes(pack_bits(symbols.flatten()[None], bits)))
        return {
            "exac": as_bytes(kv[:, :, coded:]),
            "lows": b"".join(low),
            "step": b"".join(step),
            "bits": b"".join(packed),
        }

    def _check_chunk(self, chunk: Chunk) -> None:
        header = chunk.header
        coded = header.tokens - exact_tokens(chunk)
        item = DTYPE_BYTES[header.dtype]
        for tag in ("lows", "step"):
            chunk.section(tag, header.layers * item * sum(_groups(header, coded)))
        size = -(-coded * header.heads * header.head_dim // 8) * self._bits(header.level)
        chunk.section("bits", 2 * header.layers * size)

    def _decode(self, chunk: Chunk, target: CacheTarget) -> None:
        header = chunk.header
        dtype = DTYPES[header.dtype]
        recent = exact_tokens(chunk)
        coded = header.tokens - recent
        # A layer at a time, because bytes are copied to become a tensor.
        low, step, packed = (chunk.section(tag) for tag in ("lows", "step", "bits"))
        for layer, side, shape, own, content in _parts(header, coded, self._bits(header.level)):
            part = frombuffer(packed[content], torch.uint8)
            symbols = unpack_bits(part, self._bits(header.level), coded * header.heads * header.head_dim)
            groups = slice(own.start * dtype.itemsize, own.stop * dtype.itemsize)
            rows = dequantise(
                symbols.view(shape),
                checked_low(frombuffer(low[groups], dtype)),
                checked_scale(frombuffer(step[groups], dtype)),
            )
            values = rows if side else rows.permute(2, 0, 1)
            target.write(layer, side, values.to(target.device))
        write_exact(chunk, target, [(coded, recent)])

    def _bits(self, level: int) -> int:
        return int(self.levels[level].settings["bits"])


def _groups(header: Header, coded: int) -> tuple[int, int]:
    """Groups of a layer's keys, and of its values."""
    by_channel = header.heads * header.head_dim * -(-coded // GROUP)
    return by_channel, coded * header.heads * -(-header.head_dim // GROUP)


def _parts(header: Header, coded: int, bits: int) -> Iterator[tuple[int, int, tuple[int, int, int], slice, slice]]:
    """For each layer, K then V: the shape of its rows, which groups and which bytes of `bits` are its own."""
    if not coded:
        return
    heads, dim = header.heads, header.head_dim
    size = -(-coded * heads * dim // 8) * bits
    shapes = ((heads, dim, coded), (coded, heads, dim))
    first = 0
    for index in range(2 * header.layers):
        layer, side = divmod(index, 2)
        count = _groups(header, coded)[side]
        yield layer, side, shapes[side], slice(first, first + count), slice(index * size, (index + 1) * size)
        first += count


def quantise(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest values and steps `[..., groups]` of `rows` `[..., n]` in groups of 32 along n, and symbols uint8
    `[..., n]`.

    Symbols are rounded under the stored values and steps, those of the rows' dtype.
    """
    groups = _in_groups(rows)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    step = ((high.float() - low.float()) / ((1 << bits) - 1)).to(rows.dtype)
    divisor = torch.where(step > 0, step.float(), 1.0)[..., None]
    symbols = (groups.float() - low.float()[..., None]).div_(divisor).round_().clamp_(0, (1 << bits) - 1)
    return low, step, symbols.to(torch.uint8).flatten(-2)[..., : rows.shape[-1]]


def dequantise(symbols: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """float32 values of symbols `[..., n]`; `low` and `step` are flat, in the order of their groups."""
    groups = _in_groups(symbols).float()
    shape = groups.shape[:-1]
    groups.mul_(step.float().view(shape)[..., None]).add_(low.float().view(shape)[..., None])
    return groups.flatten(-2)[..., : symbols.shape[-1]]


def _in_groups(rows: Tensor) -> Tensor:
    """`[..., n]` as `[..., groups, 32]`; a last group that is not full repeats its last element."""
    missing = -rows.shape[-1] % GROUP
    if missing:
        rows = torch.cat((rows, rows[..., -1:].expand(*rows.shape[:-1], missing)), dim=-1)
    return rows.unflatten(-1, (rows.shape[-1] // GROUP, GROUP))


def checked_low(low: Tensor) -> Tensor:
    """Smallest values read from a chunk: none beyond any cache, or CodecError."""
    smallest, largest = (float(x) for x in torch.aminmax(low)) if low.numel() else (0.0, 0.0)
    if not (smallest >= -1.01 * LARGEST_MAGNITUDE and largest <= 1.01 * LARGEST_MAGNITUDE):
        raise CodecError(f"section 'lows' holds values from {smallest:g} to {largest:g}; encode again")
    return low
