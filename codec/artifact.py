"""The arithmetic of CacheGen's public code, which differs from its paper.

There are no anchors and no differences. Each token's H * D channels of one layer, keys or values, are scaled by their
largest magnitude and rounded to `bins // 2 - 1` steps on either side of zero. Every column (layer, K or V, channel) is
arithmetic coded under its own histogram of the very chunk, whose 33-entry 16-bit cumulative form travels in the chunk,
as do 32-bit lengths of each column's string per 256 tokens and one scale per token in the dtype of the cache.

Levels 0 to 2 are the public code's QUANT_LEVEL 1 to 3, its bins taken by thirds of the layers, for keys and values
alike. Its container, a Python pickle, is replaced by ours. A row of zeros, which it divides by, codes as zeros.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from codec.api import Codec, Level
from codec.cachegen import columns_first
from codec.container import DTYPE_BYTES, Chunk, Header
from codec.entropy.sections import Streams
from codec.entropy.tables import column_counts
from codec.errors import CodecError
from codec.raw import frombuffer
from codec.targets import DTYPES, CacheTarget
from codec.uniform import as_bytes, checked_scale, quantise

MAX_BINS = 32
SEGMENT_TOKENS = 256
PADDING_BYTES = 2
"""What the decoder may read past the last string."""
BINS = ((16, 16, 12), (32, 16, 16), (32, 32, 32))
"""Bins of the first, middle and last third of the layers, by level."""


class Artifact(Codec):
    """Sections `scal` `[L, 2, T]`, `cdfs` uint16 `[C, 33]`, `lens` uint32 `[segments, C]`, `data` (strings, by segment
    then column); C columns in order (layer, K or V, channel)."""

    codec_id = "artifact"
    levels = tuple(
        Level(f"QUANT_LEVEL {index + 1}", {"first": first, "middle": middle, "last": last})
        for index, (first, middle, last) in enumerate(BINS)
    )

    def _encode(self, kv: Tensor, level: int, header: Header) -> dict[str, bytes]:
        from codec.entropy import arithmetic

        scale = kv.abs().amax(dim=(3, 4))
        halves = half_of_layer(header.layers, level)
        quantised = [quantise(kv[i].flatten(2), scale[i], half) for i, half in enumerate(halves)]
        symbols = columns_first(torch.stack(quantised))
        del quantised
        cdfs = arithmetic.from_counts(column_counts(symbols, MAX_BINS))
        own = np.arange(cdfs.count)
        segment = min(SEGMENT_TOKENS, header.tokens)
        coded = arithmetic.encode(symbols, own, cdfs, segment_tokens=segment)
        streams = arithmetic.parse(coded, cdfs.count, header.tokens)
        return {
            "scal": as_bytes(scale),
            "cdfs": cdfs.cumulative.astype("<u2").tobytes(),
            "lens": np.diff(streams.offsets).astype("<u4").tobytes(),
            "data": streams.units[: streams.offsets[-1]].tobytes(),
        }

    def _check_chunk(self, chunk: Chunk) -> None:
        header = chunk.header
        columns = header.layers * 2 * header.heads * header.head_dim
        segments = -(-header.tokens // SEGMENT_TOKENS)
        chunk.section("scal", header.layers * 2 * header.tokens * DTYPE_BYTES[header.dtype])
        chunk.section("cdfs", columns * (MAX_BINS + 1) * 2)
        lengths = np.frombuffer(chunk.section("lens", 4 * segments * columns), "<u4")
        if int(lengths.sum(dtype=np.uint64)) != len(chunk.section("data")):
            raise CodecError("section 'data' is not as long as the strings in it; encode again")

    def _decode(self, chunk: Chunk, target: CacheTarget) -> None:
        from codec.entropy import arithmetic

        header = chunk.header
        layers, tokens = header.layers, header.tokens
        scale = checked_scale(frombuffer(chunk.section("scal"), DTYPES[header.dtype])).view(layers, 2, tokens).float()
        cdfs = arithmetic.Cdfs(np.frombuffer(chunk.section("cdfs"), "<u2").reshape(-1, MAX_BINS + 1))
        offsets = np.zeros(len(chunk.section("lens")) // 4 + 1, np.int64)
        np.cumsum(np.frombuffer(chunk.section("lens"), "<u4"), out=offsets[1:])
        data = np.frombuffer(chunk.section("data"), np.uint8)
        streams = Streams(data, offsets, cdfs.count, tokens, min(SEGMENT_TOKENS, tokens))
        columns = header.heads * header.head_dim
        symbols = np.empty((columns, tokens), np.uint8)
        for number, half in enumerate(np.repeat(half_of_layer(layers, header.level), 2).tolist()):
            layer, side = divmod(number, 2)
            low, high = number * columns, (number + 1) * columns
            for segment in range(streams.segments):
                part = padded(streams.part(segment, low, high))
                first = segment * streams.segment_tokens
                arithmetic.decode_streams(part, np.arange(low, high), cdfs, symbols[:, first : first + part.tokens])
            if int(symbols.max()) > 2 * half:
                raise CodecError(f"section 'data' holds symbols that layer {layer} does not have; encode again")
            values = (torch.from_numpy(symbols).float() - half) * (scale[layer, side] / half)
            block = values.view(header.heads, header.head_dim, tokens).permute(2, 0, 1)
            target.write(layer, side, block.to(target.device))


def padded(part: Streams) -> Streams:
    """A copy of its strings alone, followed by what the decoder may read past the last one."""
    first, last = int(part.offsets[0]), int(part.offsets[-1])
    units = np.zeros(last - first + PADDING_BYTES, np.uint8)
    units[: last - first] = part.units[first:last]
    return replace(part, units=units, offsets=part.offsets - first)


def half_of_layer(layers: int, level: int) -> list[int]:
    """Steps on either side of zero, for each layer: `bins // 2 - 1`."""
    return [BINS[level][layer * 3 // layers] // 2 - 1 for layer in range(layers)]
