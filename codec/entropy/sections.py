"""What both coders share around their inner loops: streams in a section, work for threads, reconstruction.

A section holds one stream for each column and segment of `segment_tokens` tokens, so that any number of them can be
decoded in parallel. Its units are 16-bit words (rANS) or bytes (arithmetic coding). Layout, little-endian; N =
segments * columns streams, segment by segment; G = ceil(N / 32) groups of consecutive streams:

    uint32 tokens, segment_tokens, units       T; units of all streams, padding excluded
    uint16 shortest[G], uint8 width[G]         length in units of a group's shortest stream; bits of its deltas
    (zeros to a multiple of 4)
    uint32 deltas[sum(width)]                  32 deltas of `width` bits each per group, lowest bits first
    units of all streams, one after another, then two bytes of zeros
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvstream.codec.entropy.kinds import KINDS
from kvstream.codec.errors import CodecError

if TYPE_CHECKING:
    from kvstream.codec.entropy._kernels import LengthKernels

Data = bytes | bytearray | memoryview | NDArray[np.uint8]
GROUP = 32
"""Streams whose lengths share a base and a width: one GPU warp."""
MAX_SEGMENT_TOKENS = 16_384
"""A stream's length in units then fits 16 bits for either coder."""
_HEADER = struct.Struct("<III")
_COLUMNS_PER_JOB = 512
_PARALLEL_SYMBOLS = 1 << 18
"""Below this many symbols, a second thread costs more than it saves."""
Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Streams:
    """Coded columns: where each stream's units are. No offset exceeds the bytes received."""

    units: NDArray[Any]
    """uint16 or uint8: the units of all streams, then two bytes of padding at least."""
    offsets: NDArray[np.int64]
    """int64 `[N + 1]`: each stream's first unit, then the end of the last."""
    columns: int
    tokens: int
    segment_tokens: int

    @property
    def segments(self) -> int:
        return -(-self.tokens // self.segment_tokens)

    def part(self, segment: int, low: int, high: int) -> Streams:
        """Columns low to high of one segment, to be decoded alone."""
        first = segment * self.columns
        tokens = min(self.segment_tokens, self.tokens - segment * self.segment_tokens)
        return Streams(self.units, self.offsets[first + low : first + high + 1], high - low, tokens, tokens)


@dataclass(frozen=True)
class Layout:
    """A section whose header fits its size; its lengths are still packed."""

    data: NDArray[np.uint8]
    """The whole section."""
    streams: int
    segment_tokens: int
    units: int
    shortest: NDArray[np.uint16]
    widths: NDArray[np.uint8]
    deltas_at: int
    """Where the packed deltas begin in `data`, a multiple of 4."""
    units_at: int
    """Where the units begin in `data`, a multiple of 4."""


@dataclass(frozen=True)
class Reconstruction:
    """Symbol s of column c at token t becomes (values[k, s] * scale[c] + offset[c]) * token_scale[g, t], in float32."""

    values: NDArray[np.float32]
    """`[K, S]`, row k that of the column's table, or `[1, S]`."""
    scale: NDArray[np.float32]
    offset: NDArray[np.float32]
    token_scale: NDArray[np.float32]
    """`[G, T]`, g = c // (C / G)."""

    @property
    def linear(self) -> bool:
        """`values` is one row v, v + 1, v + 2, ...: no lookup is needed."""
        steps = np.arange(self.values.shape[1], dtype=np.float32)
        return len(self.values) == 1 and bool((self.values[0] == self.values[0, 0] + steps).all())


class Task(NamedTuple):
    """What one thread decodes at a time: columns low to high of a segment, which has a chunk's tokens first to last."""

    offsets: NDArray[np.int64]
    """Of the segment's streams, read-only."""
    low: int
    high: int
    first: int
    last: int


class Output(NamedTuple):
    """What a decoder's kernel writes, and where: `Reconstruction`, then column c, token t in element (c // width) *
    block_stride + t * token_stride + (c % width) * lane_stride of `out`."""

    values: NDArray[np.float32]
    scale: NDArray[np.float32]
    offset: NDArray[np.float32]
    token_scale: NDArray[np.float32]
    kind: int
    """One of `KINDS`."""
    linear: bool
    out: NDArray[Any]
    """One-dimensional."""
    width: int
    block_stride: int
    token_stride: int
    lane_stride: int


def reconstruction(
    n_tables: int, n_symbols: int, columns: int, tokens: int, values: NDArray[Any] | None = None,
    scale: NDArray[Any] | None = None, offset: NDArray[Any] | None = None, token_scale: NDArray[Any] | None = None,
) -> Reconstruction:  # fmt: skip
    """Fill in defaults (the symbol itself) and check shapes. Raises CodecError."""

    def floats(given: NDArray[Any] | None, default: NDArray[Any]) -> NDArray[np.float32]:
        return np.ascontiguousarray(default if given is None else given, np.float32)

    values = floats(values, np.arange(n_symbols)[None])
    scale, offset = floats(scale, np.ones(columns)), floats(offset, np.zeros(columns))
    token_scale = floats(token_scale, np.ones((1, tokens)))
    if values.ndim != 2 or values.shape[0] not in (1, n_tables) or values.shape[1] != n_symbols:
        raise CodecError(f"values must be [{n_tables} or 1, {n_symbols}], not {values.shape}")
    if scale.shape != (columns,) or offset.shape != (columns,):
        raise CodecError(f"scale {scale.shape} and offset {offset.shape} must each be [{columns}]")
    if token_scale.ndim != 2 or token_scale.shape[1] != tokens or columns % max(token_scale.shape[0], 1):
        raise CodecError(f"token_scale {token_scale.shape} must be [groups, {tokens}], groups dividing {columns}")
    return Reconstruction(values, scale, offset, token_scale)


def table_rows(table_of_column: NDArray[Any], n_tables: int, columns: int) -> NDArray[np.uint16]:
    """The checked table of each column. Raises CodecError."""
    rows = np.asarray(table_of_column)
    if rows.shape != (columns,) or rows.dtype.kind not in "iu":
        raise CodecError(f"table_of_column must be {columns} integers, not {rows.dtype} of shape {rows.shape}")
    if columns and not 0 <= int(rows.min()) <= int(rows.max()) < n_tables:
        raise CodecError(f"table_of_column names table {int(rows.max())} of {n_tables}")
    return np.ascontiguousarray(rows, np.uint16)


def encode(
    symbols: NDArray[np.uint8], segment_tokens: int | None, threads: int | None,
    encode_columns: Callable[[NDArray[np.uint8], int, int], tuple[NDArray[Any], NDArray[np.int64]]],
) -> Streams:  # fmt: skip
    """The streams of symbols uint8 `[C, T]`.

    `encode_columns(part, low, high)` codes `part`, the columns low to high of one segment, into units and each
    stream's length.
    """
    if symbols.ndim != 2 or symbols.dtype != np.uint8:
        raise CodecError(f"symbols are uint8 [columns, tokens], not {symbols.dtype} of shape {symbols.shape}")
    columns, tokens = symbols.shape
    _check_size(columns, tokens)
    segment_tokens = segment_length(tokens, segment_tokens)

    def work(job: tuple[int, int, int]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        segment, low, high = job
        first = segment * segment_tokens
        return encode_columns(symbols[low:high, first : first + segment_tokens], low, high)

    parts = _spread(work, _jobs(columns, -(-tokens // segment_tokens)), columns * tokens, threads)
    units = [units for units, _ in parts]
    offsets = np.cumsum(np.concatenate([[0], *(lengths for _, lengths in parts)]), dtype=np.int64)
    padding = np.zeros(4 // units[0].itemsize, units[0].dtype)
    return Streams(np.concatenate([*units, padding]), offsets, columns, tokens, segment_tokens)


def join(blocks: Sequence[Streams]) -> bytes:
    """One section of blocks of columns that were coded separately, in order; all have the same tokens and segments."""
    return assemble(*in_order(blocks), blocks[0].tokens, blocks[0].segment_tokens)


def in_order(blocks: Sequence[Streams]) -> tuple[NDArray[np.int64], list[NDArray[Any]]]:
    """Lengths of the streams of blocks of columns, segment by segment, and their units."""
    parts = [block.part(segment, 0, block.columns) for segment in range(blocks[0].segments) for block in blocks]
    units = [part.units[part.offsets[0] : part.offsets[-1]] for part in parts]
    return np.concatenate([np.diff(part.offsets) for part in parts]), units


def segment_length(tokens: int, segment_tokens: int | None) -> int:
    """Tokens of a segment: `segment_tokens`, checked, or by default the most there can be."""
    if segment_tokens is None:
        return min(tokens, MAX_SEGMENT_TOKENS)
    if not 1 <= segment_tokens <= MAX_SEGMENT_TOKENS:
        raise CodecError(f"segments of {segment_tokens} tokens are outside 1 to {MAX_SEGMENT_TOKENS}")
    return min(tokens, segment_tokens)


def lengths_bytes(data: Data, columns: int, tokens: int, segment_tokens: int | None = None) -> int | None:
    """How many bytes of a section hold its header and all lengths, or None while `data`, its beginning, is too short
    to tell. Raises CodecError."""
    _check_size(columns, tokens)
    view = _as_array(data)
    if len(view) < _HEADER.size:
        return None
    segment_tokens, _ = _read_header(view, tokens, segment_tokens)
    groups = -(-columns * -(-tokens // segment_tokens) // GROUP)
    widths_at = _HEADER.size + 2 * groups
    if len(view) < widths_at + groups:
        return None
    widths = view[widths_at : widths_at + groups]
    return (widths_at + groups + 3) // 4 * 4 + 4 * int(widths.sum(dtype=np.int64))


def layout(
    data: Data, columns: int, tokens: int, unit_bytes: int, segment_tokens: int | None = None, total: int | None = None
) -> Layout:
    """Check a section's header against its bytes. `data` may be only its beginning, lengths included, if `total` is its
    size. `segment_tokens` is the encoder's setting: short segments cost a decoder many times their bytes, so no others
    are accepted; None accepts any. Raises CodecError."""
    _check_size(columns, tokens)
    view = _as_array(data)
    total = len(view) if total is None else total
    if len(view) < _HEADER.size + 2:
        raise CodecError(f"coded section is truncated: {len(view)} bytes; fetch the chunk again")
    segment_tokens, units = _read_header(view, tokens, segment_tokens)
    n = columns * -(-tokens // segment_tokens)
    groups = -(-n // GROUP)
    widths_at = _HEADER.size + 2 * groups
    deltas_at = (widths_at + groups + 3) // 4 * 4
    if len(view) < deltas_at + 2:
        raise CodecError(f"coded section is truncated: {len(view)} bytes for {n} streams; fetch the chunk again")
    shortest = view[_HEADER.size : widths_at].view("<u2").astype(np.uint16)
    widths = view[widths_at : widths_at + groups]
    units_at = deltas_at + 4 * int(widths.sum(dtype=np.int64))
    if (
        int(widths.max()) > 16
        or total != units_at + unit_bytes * units + 2
        or view[widths_at + groups : deltas_at].any()
    ):
        raise CodecError(f"coded section has {total} bytes, which contradicts its header; fetch the chunk again")
    return Layout(view, n, segment_tokens, units, shortest, widths, deltas_at, units_at)


def parse(data: Data, columns: int, tokens: int, unit_bytes: int, segment_tokens: int | None = None) -> Streams:
    """Check a section's header and lengths against its bytes; `segment_tokens` as in `layout`. Raises CodecError."""
    found = layout(data, columns, tokens, unit_bytes, segment_tokens)
    offsets = stream_offsets(found)
    # Compiled code needs aligned units, and at least four bytes. Copying a section at an odd address is cheap next to
    # decoding it.
    tail = found.data[found.units_at :] if found.units else np.zeros(4, np.uint8)
    payload = np.require(tail.view(f"<u{unit_bytes}"), requirements=["A", "C"])
    return Streams(payload, offsets, columns, tokens, found.segment_tokens)


def stream_offsets(found: Layout) -> NDArray[np.int64]:
    """int64 `[N + 1]`: each stream's first unit, then the end of the last. Raises CodecError if they do not add up."""
    offsets = np.empty(found.streams + 1, np.int64)
    deltas = np.zeros((found.units_at - found.deltas_at) // 4 + 2, np.uint32)
    deltas[:-2].view(np.uint8)[:] = found.data[found.deltas_at : found.units_at]
    if _kernels().unpack(found.shortest, found.widths, deltas, offsets) != found.units:
        raise CodecError("coded section's stream lengths do not add up; fetch the chunk again")
    return offsets


def assemble(lengths: NDArray[np.int64], units: list[NDArray[Any]], tokens: int, segment_tokens: int) -> bytes:
    """A section of streams of these lengths (in units, in order), whose units are concatenated in `units`."""
    packed = before_units(lengths, tokens, segment_tokens)
    return b"".join([packed, *(part.data for part in units), b"\0\0"])


def symbol_target(out: NDArray[np.uint8] | None, columns: int, tokens: int) -> NDArray[np.uint8]:
    """`out`, checked, or a new array uint8 `[C, T]`. Raises CodecError."""
    if out is None:
        return np.empty((columns, tokens), np.uint8)
    if out.shape != (columns, tokens) or out.dtype != np.uint8 or not out.flags.writeable:
        raise CodecError(f"out must be writable uint8 {(columns, tokens)}, not {out.dtype} {out.shape}")
    return out


def value_target(out: NDArray[Any], dtype: str | None, columns: int, tokens: int) -> tuple[NDArray[Any], str]:
    """`out` as `[B, T, W]` of float32 or uint16, checked, and the kind of number it takes. Raises CodecError."""
    kind = dtype or str(out.dtype)
    fits = {"float32": ("float32",), "float16": ("float16", "uint16"), "bfloat16": ("uint16",)}
    if str(out.dtype) not in fits.get(kind, ()):
        raise CodecError(f"cannot reconstruct {kind} into an array of {out.dtype}")
    target = out[None] if out.ndim == 2 else out
    if target.ndim != 3 or target.shape[1] != tokens or target.shape[0] * target.shape[2] != columns:
        raise CodecError(f"out {out.shape} does not hold {columns} columns of {tokens} tokens")
    if not out.flags.writeable:
        raise CodecError("out is read-only")
    return target.view(np.uint16) if kind == "float16" else target, kind


def decode(
    streams: Streams, target: NDArray[Any], kind: str, how: Reconstruction, threads: int | None,
    decode_columns: Callable[[NDArray[Any], Task, Output], int],
) -> None:  # fmt: skip
    """Decode every stream into `target` `[B, T, W]`. Raises CodecError for a stream that does not end as it must.

    `decode_columns(units, task, output)` decodes a task's streams and returns a damaged column or -1.
    """
    columns = streams.columns
    flat, strides = _flatten(target)
    values, scale, offset, token_scale = map(_read_only, (how.values, how.scale, how.offset, how.token_scale))
    output = Output(values, scale, offset, token_scale, KINDS[kind], how.linear, flat, target.shape[2], *strides)

    def work(job: tuple[int, int, int]) -> int:
        segment, low, high = job
        first = segment * streams.segment_tokens
        offsets = streams.offsets[segment * columns : (segment + 1) * columns + 1]
        last = min(first + streams.segment_tokens, streams.tokens)
        return decode_columns(streams.units, Task(_read_only(offsets), low, high, first, last), output)

    jobs = _jobs(columns, streams.segments)
    for (segment, _, _), bad in zip(jobs, _spread(work, jobs, columns * streams.tokens, threads), strict=True):
        if bad >= 0:
            raise CodecError(
                f"coded stream of column {bad}, segment {segment}, is damaged or belongs to other tables; "
                "fetch the chunk again"
            )


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    """A view of the one type that kernels take for their inputs; within a tuple, numba converts none to it."""
    view = array.view()
    view.flags.writeable = False
    return view


def _flatten(out: NDArray[Any]) -> tuple[NDArray[Any], tuple[int, int, int]]:
    """The memory that an array spans, as one dimension, and the array's strides in elements."""
    block, token, lane = (stride // out.itemsize for stride in out.strides)
    if min(out.strides) < 0 or any(stride % out.itemsize for stride in out.strides) or not out.flags.aligned:
        raise CodecError(f"out has strides {out.strides}: they must be non-negative multiples of its element size")
    span = 1 + sum((n - 1) * stride for n, stride in zip(out.shape, (block, token, lane), strict=True))
    return np.lib.stride_tricks.as_strided(out, (span,), (out.itemsize,)), (block, token, lane)


def _check_size(columns: int, tokens: int) -> None:
    if columns < 1 or tokens < 1 or columns * tokens > 1 << 40:
        raise CodecError(f"{columns} columns of {tokens} tokens cannot be coded")


def _read_header(view: NDArray[np.uint8], tokens: int, expected: int | None) -> tuple[int, int]:
    """Tokens of a segment, and units, of a section of `tokens` tokens. Raises CodecError."""
    coded, segment_tokens, units = _HEADER.unpack_from(view.data)
    if coded != tokens:
        raise CodecError(f"coded section holds {coded} tokens, the chunk claims {tokens}; fetch the chunk again")
    right = range(1, min(tokens, MAX_SEGMENT_TOKENS) + 1) if expected is None else [segment_length(tokens, expected)]
    if segment_tokens not in right:
        raise CodecError(
            f"coded section claims segments of {segment_tokens} tokens for {tokens}; fetch the chunk again"
        )
    return segment_tokens, units


def _as_array(data: Data) -> NDArray[np.uint8]:
    view = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    if view.dtype != np.uint8 or view.ndim != 1 or not view.flags.c_contiguous:
        raise CodecError("a coded section must be contiguous bytes")
    return view


def most_before_units(streams: int) -> int:
    """The most bytes that can precede the units of so many streams; a multiple of 4."""
    groups = -(-streams // GROUP)
    return _HEADER.size + (3 * groups + 3) // 4 * 4 + 4 * 16 * groups


def before_units(lengths: NDArray[np.int64], tokens: int, segment_tokens: int) -> bytes:
    """What precedes the units of streams of these lengths."""
    if int(lengths.sum()) >= 1 << 32:
        raise CodecError("a section holds at most 2^32 units; cut the chunk")
    groups = -(-len(lengths) // GROUP)
    # Absent streams of the last group take its shortest length, so that they widen nothing.
    padded = np.full(groups * GROUP, lengths[(groups - 1) * GROUP :].min(), np.int64)
    padded[: len(lengths)] = lengths
    grid = padded.reshape(groups, GROUP)
    shortest = grid.min(axis=1)
    deltas = grid - shortest[:, None]
    widths = np.ceil(np.log2(deltas.max(axis=1) + 1)).astype(np.uint8)
    head = _HEADER.pack(tokens, segment_tokens, int(lengths.sum()))
    head += shortest.astype("<u2").tobytes() + widths.tobytes()
    packed = np.zeros(int(widths.sum(dtype=np.int64)), np.uint32)
    _kernels().pack(deltas, widths, packed)
    return head + bytes(-len(head) % 4) + packed.astype("<u4").tobytes()


def _jobs(columns: int, segments: int) -> list[tuple[int, int, int]]:
    """(segment, first column, last column + 1), in the order of streams."""
    return [
        (segment, low, min(low + _COLUMNS_PER_JOB, columns))
        for segment in range(segments)
        for low in range(0, columns, _COLUMNS_PER_JOB)
    ]


def _spread(work: Callable[[Job], Result], jobs: list[Job], symbols: int, threads: int | None) -> list[Result]:
    """Results of all jobs, in order; on several threads where that pays off: the kernels release the GIL."""
    n = _cores() if threads is None else threads
    n = min(n, len(jobs), max(1, symbols // _PARALLEL_SYMBOLS))
    if n <= 1:
        return [work(job) for job in jobs]
    with ThreadPoolExecutor(n, thread_name_prefix="entropy") as pool:
        return list(pool.map(work, jobs))


@cache
def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _kernels() -> LengthKernels:
    from kvstream.codec.entropy import _kernels

    return _kernels.lengths()
