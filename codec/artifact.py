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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.api import Codec, Level
from kvstream.codec.cachegen import columns_first
from kvstream.codec.container import DTYPE_BYTES, Chunk, Header
from kvstream.codec.entropy import arithmetic
from kvstream.codec.entropy.sections import Streams, in_order
from kvstream.codec.entropy.tables import column_counts
from kvstream.codec.errors import CodecError
from kvstream.codec.raw import frombuffer
from kvstream.codec.sharing import share_out
from kvstream.codec.targets import DTYPES, CacheTarget
from kvstream.codec.uniform import as_bytes, checked_scale, quantise

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
        halves = half_of_layer(header.layers, level)
        segment = min(SEGMENT_TOKENS, header.tokens)
        found: list[Any] = [None] * header.layers

        def some(layers: range, threads: int) -> None:
            for layer in layers:
                rows = kv[layer].flatten(2).cpu()
                scale = rows.abs().amax(dim=2)
                symbols = columns_first(quantise(rows, scale, halves[layer]))
                cdfs = arithmetic.from_counts(column_counts(symbols, MAX_BINS))
                own = np.arange(cdfs.count)
                streams = arithmetic.encode_streams(symbols, own, cdfs, segment_tokens=segment, threads=threads)
                found[layer] = as_bytes(scale), cdfs.cumulative.astype("<u2").tobytes(), streams

        share_out(some, header.layers, header.layers)
        scales, tables, coded = zip(*found, strict=True)
        lengths, units = in_order(coded)
        return {
            "scal": b"".join(scales),
            "cdfs": b"".join(tables),
            "lens": lengths.astype("<u4").tobytes(),
            "data": b"".join(part.data for part in units),
        }

    def _check_chunk(self, chunk: Chunk) -> None:
        header = chunk.header
        columns = header.layers * 2 * header.heads * header.head_dim
        segments = -(-header.tokens // SEGMENT_TOKENS)
        chunk.section("scal", header.layers * 2 * header.tokens * DTYPE_BYTES[header.dtype])
        chunk.section("cdfs", columns * (MAX_BINS + 1) * 2)
        lengths = np.frombuffer(chunk.section("lens", 4 * segments * columns), "<u4")
        if int(lengths.sum(dtype=np.uint64)) != len(chunk.section("data")):
            raise CodecError("section 'data' is not as long as its strings; encode again")

    def _decode(self, chunk: Chunk, target: CacheTarget) -> None:
        header = chunk.header
        dtype = DTYPES[header.dtype]
        scale = checked_scale(frombuffer(chunk.section("scal"), dtype)).view(header.layers, 2, header.tokens).float()
        streams = _streams(chunk)
        halves = half_of_layer(header.layers, header.level)

        def some(layers: range, threads: int) -> None:
            for layer in layers:
                half = halves[layer]
                cdfs = _cdfs(chunk, layer)
                for segment in range(streams.segments):
                    first = segment * SEGMENT_TOKENS
                    symbols = _symbols(streams, segment, layer, cdfs, threads)
                    if int(symbols.max()) > 2 * half:
                        raise CodecError(f"section 'data' holds symbols that layer {layer} does not have; encode again")
                    step = scale[layer, :, None, first : first + symbols.shape[1]] / half
                    values = (torch.from_numpy(symbols).float().view(2, -1, symbols.shape[1]) - half) * step
                    for side in (0, 1):
                        block = values[side].view(header.heads, header.head_dim, -1).permute(2, 0, 1)
                        target.write(layer, side, block.to(target.device), first)

        share_out(some, header.layers, header.layers)

    def _describe(self, chunk: Chunk) -> dict[str, Any]:
        """Bits by layer of the strings; ideal coding takes their symbols' and the scales, but neither tables nor
        lengths."""
        header = chunk.header
        streams = _streams(chunk)
        bits = 8 * np.diff(streams.offsets).reshape(streams.segments, header.layers, 2, -1).sum(axis=(0, 3))
        ideal = 8.0 * len(chunk.section("scal"))
        for layer in range(header.layers):
            cdfs = _cdfs(chunk, layer)
            cost = 16 - np.log2(np.diff(cdfs.bounds.astype(np.int64), axis=1))
            for segment in range(streams.segments):
                symbols = _symbols(streams, segment, layer, cdfs)
                ideal += float(np.take_along_axis(cost, symbols.astype(np.int64), axis=1).sum())
        return {
            "bits_by_layer": (bits / (header.elements / header.layers / 2)).tolist(),
            "ideal_bits_per_element": ideal / header.elements,
        }


def _streams(chunk: Chunk) -> Streams:
    """Where each string lies; their lengths add up, as the codec has checked."""
    header = chunk.header
    offsets = np.zeros(len(chunk.section("lens")) // 4 + 1, np.int64)
    np.cumsum(np.frombuffer(chunk.section("lens"), "<u4"), out=offsets[1:])
    data = np.frombuffer(chunk.section("data"), np.uint8)
    columns = header.layers * 2 * header.heads * header.head_dim
    return Streams(data, offsets, columns, header.tokens, min(SEGMENT_TOKENS, header.tokens))


def _cdfs(chunk: Chunk, layer: int) -> arithmetic.Cdfs:
    """The tables of a layer's keys and values. Raises CodecError."""
    tables = np.frombuffer(chunk.section("cdfs"), "<u2").reshape(chunk.header.layers, -1, MAX_BINS + 1)
    return arithmetic.Cdfs(tables[layer])


def _symbols(
    streams: Streams, segment: int, layer: int, cdfs: arithmetic.Cdfs, threads: int | None = None
) -> NDArray[np.uint8]:
    """Symbols `[2 * H * D, n]` of a layer's keys and values in one segment. Raises CodecError."""
    part = padded(streams.part(segment, layer * cdfs.count, (layer + 1) * cdfs.count))
    return arithmetic.decode_streams(part, np.arange(cdfs.count), cdfs, threads=threads)


def padded(part: Streams) -> Streams:
    """A copy of its strings alone, followed by what the decoder may read past the last one."""
    first, last = int(part.offsets[0]), int(part.offsets[-1])
    units = np.zeros(last - first + PADDING_BYTES, np.uint8)
    units[: last - first] = part.units[first:last]
    return replace(part, units=units, offsets=part.offsets - first)


def half_of_layer(layers: int, level: int) -> list[int]:
    """Steps on either side of zero, for each layer: `bins // 2 - 1`."""
    return [BINS[level][layer * 3 // layers] // 2 - 1 for layer in range(layers)]
