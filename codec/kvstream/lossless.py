"""The lossless level: every bit kept, NaN and infinities included, whatever the profile was calibrated on.

What can be predicted of a 16-bit number is how large it is; its last bits are noise. So its two bytes are coded apart:
the first holds the exponent (of bfloat16, whose exponent has eight bits, all of it and nothing else: the number is
rotated left by one bit; of float16 sign, exponent and two bits of the mantissa), the second the rest. A float32 is two
such numbers, the upper one coded as a bfloat16. Keys stay as they are: a rotation undone does not come back to the bit.

A column is one byte of one channel, in the order (layer, K or V, byte, head, dimension), of which the most significant
byte is the first. Each is rANS-coded with one of a few tables, which are fitted to the chunk and stored in it, or kept
as it is where no table saves anything.

Sections: `tabs`, Deflate of the tables uint16 `[K, 256]`; `cols`, Deflate of a byte a column, its table's number from
1, or 0 for a column that is kept; `rans`, the coded columns (empty where there are none); `kept`, for each (layer, K or
V) the others' bytes `[T, columns]`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.container import DTYPE_BYTES, Chunk
from kvstream.codec.entropy import rans
from kvstream.codec.entropy.sections import Streams, join
from kvstream.codec.entropy.tables import Tables, column_counts, from_counts
from kvstream.codec.errors import CodecError
from kvstream.codec.sharing import share_out
from kvstream.codec.targets import DTYPES, CacheTarget

SYMBOLS = 256
MAX_TABLES = 60
"""For each byte of a number, so that those of a float32 are still named by one byte."""
SYMBOLS_PER_TABLE = 1 << 16
"""A table takes about 200 bytes; with fewer symbols than this a table, more of them cost more than they save."""
LEAST_GAIN = 0.2
"""Bits a symbol: a column that saves less is kept, which decodes faster."""
STREAM_BITS = 20
"""What a stream costs beside its symbols: its last state, and its length."""
_SLOT_BITS = 14
"""What a table costs for each of its symbols, compressed."""
_ROUNDS = 4
_SAMPLE = 8_192
"""Columns to whose histograms the tables are fitted."""


@dataclass(frozen=True)
class Bytes:
    """How numbers of a dtype become bytes."""

    count: int
    """Of a number."""
    rotated: bool
    """Whether the upper 16 bits are rotated, because the exponent has eight bits."""

    @classmethod
    def of(cls, dtype: str) -> Bytes:
        return cls(DTYPE_BYTES[dtype], dtype != "float16")

    def split(self, values: Tensor) -> NDArray[np.uint8]:
        """`[bytes, T, C]` of values `[T, H, D]` on the CPU."""
        halves = values.contiguous().view(torch.int16).numpy().view(np.uint16)
        halves = halves.reshape(len(values), -1, self.count // 2)
        found = np.empty((self.count, *halves.shape[:2]), np.uint8)
        for number in range(self.count // 2):
            half = halves[..., self.count // 2 - 1 - number]
            if number == 0 and self.rotated:
                half = half << np.uint16(1) | half >> np.uint16(15)
            found[2 * number] = half >> 8
            found[2 * number + 1] = half & 0xFF
        return found

    def join(self, parts: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """Inverse of `split`: `[T, C, bytes / 2]`, as numbers lie in memory."""
        found = np.empty((*parts.shape[1:], self.count // 2), np.uint16)
        for number in range(self.count // 2):
            half = parts[2 * number].astype(np.uint16) << np.uint16(8) | parts[2 * number + 1]
            if number == 0 and self.rotated:
                half = half >> np.uint16(1) | half << np.uint16(15)
            found[..., self.count // 2 - 1 - number] = half
        return found


@dataclass(frozen=True, eq=False)
class Content:
    """A chunk's sections, parsed. B blocks, one for each (layer, K or V), have N columns each."""

    segment_tokens: ClassVar[int] = 512
    """A column is cut into streams of this many tokens. Part of the format."""

    own: NDArray[np.uint8]
    """`[B, N]`: table of each column, from 1, or 0."""
    tables: Tables | None
    """None where no column is coded."""
    coded: memoryview
    kept: NDArray[np.uint8]
    tokens: int

    @classmethod
    def of(cls, chunk: Chunk) -> Content:
        """Raises CodecError."""
        header = chunk.header
        columns = header.heads * header.head_dim * DTYPE_BYTES[header.dtype]
        found = _inflate(chunk.section("cols"), 2 * header.layers * columns, "cols")
        own = np.frombuffer(found, np.uint8).reshape(-1, columns)
        count = int(own.max())
        coded = chunk.section("rans")
        tables = None
        if count:
            frequencies = _inflate(chunk.section("tabs"), 2 * SYMBOLS * count, "tabs")
            tables = Tables(np.frombuffer(frequencies, "<u2").reshape(count, SYMBOLS))
        elif len(chunk.section("tabs")) or len(coded):
            raise CodecError("section 'rans' holds streams of no column; fetch the chunk again")
        kept = chunk.section("kept", int(np.count_nonzero(own == 0)) * header.tokens)
        return cls(own, tables, coded, np.frombuffer(kept, np.uint8), header.tokens)

    @cached_property
    def rows(self) -> NDArray[np.uint8]:
        """`[A]`: the table of each coded column."""
        return self.own[self.own > 0] - 1

    @cached_property
    def coded_ends(self) -> NDArray[np.int64]:
        """`[B + 1]`: which of the coded columns are each block's."""
        return np.cumsum(np.concatenate([[0], np.count_nonzero(self.own, axis=1)]))

    @cached_property
    def kept_ends(self) -> NDArray[np.int64]:
        """`[B + 1]`: where each block's bytes lie in `kept`."""
        return np.cumsum(np.concatenate([[0], np.count_nonzero(self.own == 0, axis=1)])) * self.tokens


def encode(kv: Tensor) -> dict[str, bytes]:
    """Sections of a chunk `[L, 2, T, H, D]`; one on a GPU is coded on the CPU, a layer at a time."""
    how = Bytes.of(str(kv.dtype).removeprefix("torch."))
    blocks = 2 * len(kv)

    def block(number: int) -> NDArray[np.uint8]:
        """`[N, T]`, strided."""
        parts = how.split(kv[number // 2, number % 2].cpu())
        return parts.transpose(0, 2, 1).reshape(-1, parts.shape[1])

    def every(work: Callable[[int], Any]) -> list[Any]:
        found: list[Any] = [None] * blocks

        def some(numbers: range, threads: int) -> None:
            for number in numbers:
                found[number] = work(number)

        share_out(some, blocks, len(kv))
        return found

    each = kv.shape[3] * kv.shape[4]
    costs = _fit(block, blocks, each, how.count, kv.shape[2])
    chosen = every(lambda number: _choose(block(number), costs))
    own = np.stack([found for found, _ in chosen])
    sums = np.sum([counts for _, counts in chosen], axis=0)
    used = np.flatnonzero(_saved_bits(sums) > 0)
    number_of = np.zeros(len(sums) + 1, np.uint8)
    number_of[used + 1] = np.arange(1, len(used) + 1)
    own = number_of[own]
    tables = from_counts(sums[used], floor=0) if len(used) else None

    def code(number: int) -> tuple[list[Streams], bytes]:
        symbols, which = block(number), own[number]
        streams = []
        if tables is not None and which.any():
            rows = which[which > 0] - 1
            streams = [
                rans.encode_streams(
                    symbols[which > 0], rows, tables, segment_tokens=Content.segment_tokens, threads=1
                )
            ]  # fmt: skip
        return streams, symbols[which == 0].T.tobytes()

    parts = every(code)
    streams = [stream for found, _ in parts for stream in found]
    return {
        "tabs": zlib.compress(tables.frequencies.astype("<u2").tobytes(), 9) if tables is not None else b"",
        "cols": zlib.compress(own.tobytes(), 6),
        "rans": join(streams) if streams else b"",
        "kept": b"".join(kept for _, kept in parts),
    }


def decode(chunk: Chunk, target: CacheTarget) -> None:
    """Write a chunk's values into a target of its shape. Raises CodecError."""
    header, content = chunk.header, Content.of(chunk)
    how, dtype = Bytes.of(header.dtype), DTYPES[header.dtype]
    streams = None
    if content.tables is not None:
        streams = rans.parse(content.coded, len(content.rows), header.tokens, content.segment_tokens)

    def some(numbers: range, threads: int) -> None:
        for number in numbers:
            for first, parts in _pieces(content, streams, number, threads):
                halves = how.join(parts.reshape(len(parts), how.count, -1).transpose(1, 0, 2))
                values = torch.from_numpy(halves.view(np.int16)).view(dtype).view(-1, header.heads, header.head_dim)
                target.write(number // 2, number % 2, values.to(target.device), first)

    share_out(some, len(content.own), header.layers)


def describe(chunk: Chunk) -> dict[str, Any]:
    """Columns of each byte of a number that are coded, the others being kept as they are. Raises CodecError."""
    content = Content.of(chunk)
    by_byte = content.own.reshape(len(content.own), DTYPE_BYTES[chunk.header.dtype], -1)
    return {
        "coded_columns_by_byte": np.count_nonzero(by_byte, axis=(0, 2)).tolist(),
        "columns": chunk.header.elements // chunk.header.tokens,
        "tables": 0 if content.tables is None else content.tables.count,
    }


def _pieces(
    content: Content, streams: Streams | None, number: int, threads: int
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """First token and bytes `[tokens, N]` of each segment of a block."""
    coded = content.own[number] > 0
    low, high = content.coded_ends[number : number + 2]
    kept = content.kept[slice(*content.kept_ends[number : number + 2])].reshape(content.tokens, -1)
    for segment, first in enumerate(range(0, content.tokens, content.segment_tokens)):
        tokens = min(content.segment_tokens, content.tokens - first)
        found = np.empty((tokens, len(coded)), np.uint8)
        if high > low:
            assert streams is not None
            assert content.tables is not None
            symbols = np.empty((tokens, high - low), np.uint8)
            part = streams.part(segment, low, high)
            rans.decode_streams(part, content.rows[low:high], content.tables, symbols.T, threads=threads)
            found[:, coded] = symbols
        found[:, ~coded] = kept[first : first + tokens]
        yield first, found


def _fit(block: Callable[[int], NDArray[np.uint8]], blocks: int, each: int, count: int, tokens: int) -> NDArray[Any]:
    """Bits of each symbol in each of some tables, float32 `[bytes, K, 256]`: those that code a sample of columns best.

    Columns of similar means begin with a table in common, and then take turns with the tables: each column chooses
    the one that codes it best, each table becomes the histogram of its columns.
    """
    step = max(1, -(-blocks * each // _SAMPLE))
    kinds = min(max(blocks * each * tokens // SYMBOLS_PER_TABLE, 1), MAX_TABLES)
    sample: list[list[NDArray[np.uint8]]] = [[] for _ in range(count)]
    for number in range(blocks):
        columns = block(number).reshape(count, each, tokens)[:, number % step :: step]
        for part, own in zip(sample, columns, strict=True):
            part.append(own)
    found = []
    for part in sample:
        counts = column_counts(np.concatenate(part), SYMBOLS).astype(np.float32)
        own = np.empty(len(counts), np.int64)
        own[np.argsort(counts @ np.arange(SYMBOLS, dtype=np.float32))] = np.arange(len(counts)) * kinds // len(counts)
        for _ in range(_ROUNDS):
            sums = _sums(counts, own, kinds) + 1e-3
            costs = -np.log2(sums / sums.sum(axis=1, keepdims=True))
            own = _bits(counts, costs).argmin(axis=1)
        found.append(costs)
    return np.stack(found)


def _choose(symbols: NDArray[np.uint8], costs: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The table of each of a block's columns `[N]`, from 1, or 0; the sums of their histograms, `[all tables, 256]`."""
    count, kinds, _ = costs.shape
    chosen, sums = [], []
    for number, part in enumerate(symbols.reshape(count, -1, symbols.shape[1])):
        counts = column_counts(part, SYMBOLS).astype(np.float32)
        bits = _bits(counts, costs[number])
        own = bits.argmin(axis=1)
        tokens = symbols.shape[1]
        streams = -(-tokens // Content.segment_tokens)
        pays = bits.min(axis=1) + STREAM_BITS * streams <= (8 - LEAST_GAIN) * tokens
        sums.append(_sums(counts[pays], own[pays], kinds))
        chosen.append(np.where(pays, own + 1 + number * kinds, 0))
    return np.concatenate(chosen).astype(np.uint8), np.concatenate(sums)


def _saved_bits(sums: NDArray[np.float32]) -> NDArray[np.float32]:
    """What each table saves `[K]`, itself included, where its columns have these histograms `[K, 256]`."""
    total = sums.sum(axis=1, keepdims=True)
    bits = sums * (8 + np.log2(np.maximum(sums, 1) / np.maximum(total, 1)))
    return bits.sum(axis=1) - _SLOT_BITS * np.count_nonzero(sums, axis=1)


def _sums(counts: NDArray[np.float32], own: NDArray[np.int64], kinds: int) -> NDArray[np.float32]:
    """The sum of the histograms of each table's columns."""
    found = torch.zeros((kinds, counts.shape[1]))
    return found.index_add_(0, torch.from_numpy(own), torch.from_numpy(counts)).numpy()


def _bits(counts: NDArray[np.float32], costs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bits of each column with each table `[C, K]`: by torch, which keeps to the threads it is given."""
    return (torch.from_numpy(counts) @ torch.from_numpy(costs).T).numpy()


def _inflate(data: memoryview, nbytes: int, tag: str) -> bytes:
    reader = zlib.decompressobj()
    try:
        plain = reader.decompress(data, nbytes + 1)
    except zlib.error as error:
        raise CodecError(f"section '{tag}' is damaged ({error}); fetch the chunk again") from None
    if len(plain) != nbytes or not reader.eof or reader.unused_data:
        raise CodecError(f"section '{tag}' does not hold {nbytes} bytes; fetch the chunk again")
    return plain
