"""rANS coding of many columns at once, each with one of a set of shared tables: bitstream, encoder, decoder (numba).

Every column is coded as streams of its own, one for each segment of `segment_tokens` tokens, so that any number of
them decodes side by side. A stream's state x starts at 0 and lives in [2^16, 2^32) as soon as it is large enough; a
symbol with frequency f and first slot c maps x to (x // f) * 1024 + x % f + c after at most one 16-bit word has been
moved out. Tokens are coded last to first, so a decoder reads words front to back and yields tokens in order. Starting
at 0 instead of 2^16 saves two bytes a stream: a decoder takes no word when its stream has none left.

Section layout, little-endian; N = segments * columns streams, segment by segment, G = ceil(N / 32) groups of them:

    uint32 segment_tokens, uint32 words        words of all streams, padding excluded
    uint16 shortest[G], uint8 width[G]         length in words of a group's shortest stream; bits of its deltas
    (zeros to a multiple of 4)
    uint32 deltas[sum(width)]                  32 deltas of `width` bits each a group, lowest bits first
    uint16 words[words], uint16 0              streams one after another; a stream's first two words are its final
                                               state, high half first (one word if it is below 2^16, none if it is 0)

A decoder checks that every stream ends at x = 0 with all of its words consumed. That notices wrong tables and most
damage, not all: a stream has next to no redundancy, so whatever carries the section must checksum it.

Duda, "Asymmetric numeral systems" (arXiv 1311.2540) is the method; Giesen, "Interleaved entropy coders" (arXiv
1402.3392), has the renormalisation by words.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from codec.entropy.tables import Tables
from codec.errors import CodecError

if TYPE_CHECKING:
    from codec.entropy._rans_kernels import Kernels

GROUP = 32
"""Streams whose lengths share a base and a width: one GPU warp."""
MAX_SEGMENT_TOKENS = 32_768
"""At most one word a symbol and two for the state: a length then fits 16 bits."""
MAX_SHARED_TABLES = 256
"""Up to here all decoding tables are built once (4 KiB each); beyond, each is built for the columns that use it."""
_HEADER = struct.Struct("<II")
_COLUMNS_A_JOB = 512
_PARALLEL_SYMBOLS = 1 << 18
"""Below this many symbols, a second thread costs more than it saves."""
Job = TypeVar("Job")
Result = TypeVar("Result")
_KIND = {"uint8": 0, "float32": 1, "float16": 2, "bfloat16": 3}


@dataclass(frozen=True)
class Streams:
    """A checked section: where each stream's words lie. Nothing in it exceeds the bytes that came."""

    words: NDArray[np.uint16]
    """The words of all streams and one of padding."""
    offsets: NDArray[np.int64]
    """int64 `[N + 1]`: each stream's first word, then the end of the last."""
    columns: int
    tokens: int
    segment_tokens: int

    @property
    def segments(self) -> int:
        return -(-self.tokens // self.segment_tokens)


def encode(
    symbols: NDArray[np.uint8], table_of_column: NDArray[Any], tables: Tables, *,
    segment_tokens: int | None = None, threads: int | None = None,
) -> bytes:  # fmt: skip
    """Code symbols uint8 `[C, T]` (any strides), column c with table `table_of_column[c]`.

    `segment_tokens` cuts columns into streams that decode independently (None: as few as possible). `threads` None
    takes the cores this process may use. Raises CodecError for a symbol that its table cannot code.
    """
    if symbols.ndim != 2 or symbols.dtype != np.uint8:
        raise CodecError(f"symbols are uint8 [columns, tokens], not {symbols.dtype} of shape {symbols.shape}")
    columns, tokens = symbols.shape
    rows = _rows(table_of_column, tables, columns)
    _check_size(columns, tokens)
    if segment_tokens is None:
        segment_tokens = min(tokens, MAX_SEGMENT_TOKENS)
    if not 1 <= segment_tokens <= MAX_SEGMENT_TOKENS:
        raise CodecError(f"segments of {segment_tokens} tokens are outside 1 to {MAX_SEGMENT_TOKENS}")
    encode_columns = _kernels().encode
    jobs = [
        (first, min(first + segment_tokens, tokens), low, min(low + _COLUMNS_A_JOB, columns))
        for first in range(0, tokens, segment_tokens)
        for low in range(0, columns, _COLUMNS_A_JOB)
    ]

    def work(job: tuple[int, int, int, int]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        first, last, low, high = job
        words = np.empty((high - low) * (last - first + 2), np.uint16)
        lengths = np.empty(high - low, np.int64)
        used = encode_columns(
            symbols[low:high, first:last], rows[low:high], tables.frequencies, tables.starts, words, lengths
        )
        if used < 0:
            column = low - used - 1
            raise CodecError(
                f"column {column} holds a symbol that table {rows[column]} gives no slot; escape it or widen the table"
            )
        return words[:used].copy(), lengths

    parts = _spread(work, jobs, columns * tokens, threads)
    lengths = np.concatenate([part[1] for part in parts])
    words = [part[0] for part in parts]
    return b"".join([_pack_lengths(lengths, segment_tokens), *(w.tobytes() for w in words), b"\0\0"])


def decode(
    data: bytes | bytearray | memoryview | NDArray[np.uint8], table_of_column: NDArray[Any], tables: Tables,
    columns: int, tokens: int, out: NDArray[np.uint8] | None = None, *, threads: int | None = None,
) -> NDArray[np.uint8]:  # fmt: skip
    """Symbols uint8 `[C, T]` of a section that `encode` wrote; `out` may have any strides.

    Raises CodecError for bytes that `encode` did not write with these tables: then `out` may be partly written.
    """
    rows = _rows(table_of_column, tables, columns)
    streams = parse(data, columns, tokens)
    if out is None:
        out = np.empty((columns, tokens), np.uint8)
    elif out.shape != (columns, tokens) or out.dtype != np.uint8 or not out.flags.writeable:
        raise CodecError(f"out must be writable uint8 {(columns, tokens)}, not {out.dtype} {out.shape}")
    unit = _affine(None, None, None, None, tables, columns, tokens)
    _decode(streams, rows, tables, out.T[None], "uint8", unit, threads)
    return out


def decode_dequantised(
    data: bytes | bytearray | memoryview | NDArray[np.uint8], table_of_column: NDArray[Any], tables: Tables,
    columns: int, tokens: int, out: NDArray[Any], *, values: NDArray[np.float32] | None = None,
    scale: NDArray[np.float32] | None = None, offset: NDArray[np.float32] | None = None,
    token_scale: NDArray[np.float32] | None = None, dtype: str | None = None, threads: int | None = None,
) -> NDArray[Any]:  # fmt: skip
    """Decode and reconstruct in one pass: `(values[k, symbol] * scale[c] + offset[c]) * token_scale[g, t]`.

    `out` is `[T, C]` or `[B, T, W]` with B * W = C and any strides, column c = b * W + w; k is the column's table (0 if
    `values` has one row). `values` is float32 `[K, S]` or `[1, S]` (default: the symbol itself); `scale` and `offset`
    are float32 `[C]` (default 1 and 0), `token_scale` float32 `[G, T]` where group g is c // (C / G) (default 1). All
    arithmetic is float32, rounded once into `out`: float32, float16, or uint16 holding the bits of `dtype` ("float16"
    or "bfloat16"). Raises CodecError as `decode` does.
    """
    rows = _rows(table_of_column, tables, columns)
    streams = parse(data, columns, tokens)
    kind = dtype or str(out.dtype)
    if kind not in ("float32", "float16", "bfloat16") or out.dtype not in (np.float32, np.float16, np.uint16):
        raise CodecError(f"cannot reconstruct {kind} into an array of {out.dtype}")
    if (kind == "float32") != (out.dtype == np.float32) or (kind == "bfloat16" and out.dtype != np.uint16):
        raise CodecError(f"cannot reconstruct {kind} into an array of {out.dtype}")
    target = out[None] if out.ndim == 2 else out
    if target.ndim != 3 or target.shape[1] != tokens or target.shape[0] * target.shape[2] != columns:
        raise CodecError(f"out {out.shape} does not hold {columns} columns of {tokens} tokens")
    if not out.flags.writeable:
        raise CodecError("out is read-only")
    affine = _affine(values, scale, offset, token_scale, tables, columns, tokens)
    _decode(streams, rows, tables, target.view(np.uint16) if kind == "float16" else target, kind, affine, threads)
    return out


def parse(data: bytes | bytearray | memoryview | NDArray[np.uint8], columns: int, tokens: int) -> Streams:
    """Check a section's header and lengths against its bytes. Raises CodecError."""
    _check_size(columns, tokens)
    view = _as_array(data)
    if len(view) < _HEADER.size + 2:
        raise CodecError(f"rANS section is truncated: {len(view)} bytes; fetch the chunk again")
    segment_tokens, words = _HEADER.unpack_from(view.data)
    if not 1 <= segment_tokens <= MAX_SEGMENT_TOKENS or segment_tokens > max(tokens, 1):
        raise CodecError(f"rANS section claims segments of {segment_tokens} tokens for {tokens}; fetch the chunk again")
    n = columns * -(-tokens // segment_tokens)
    groups = -(-n // GROUP)
    widths_at = _HEADER.size + 2 * groups
    deltas_at = (widths_at + groups + 3) // 4 * 4
    if len(view) < deltas_at + 2:
        raise CodecError(f"rANS section is truncated: {len(view)} bytes for {n} streams; fetch the chunk again")
    shortest = view[_HEADER.size : widths_at].view("<u2")
    widths = view[widths_at : widths_at + groups]
    words_at = deltas_at + 4 * int(widths.sum(dtype=np.int64))
    if (
        int(widths.max(initial=0)) > 16
        or len(view) != words_at + 2 * words + 2
        or view[widths_at + groups : deltas_at].any()
    ):
        raise CodecError(f"rANS section has {len(view)} bytes, its header says otherwise; fetch the chunk again")
    offsets = np.empty(n + 1, np.int64)
    if _kernels().unpack_lengths(shortest.astype(np.uint16), widths, view[deltas_at:words_at], offsets) != words:
        raise CodecError("rANS section's stream lengths do not add up; fetch the chunk again")
    # Compiled code wants aligned words; the copy of a section that lies at an odd address is small beside decoding.
    return Streams(
        np.require(view[words_at:].view("<u2"), requirements=["A", "C"]), offsets, columns, tokens, segment_tokens
    )


def warm_up() -> None:
    """Compile every kernel, or load it from numba's cache, so that no later call waits for it."""
    tables = Tables(np.array([[1000, 24]], np.uint16))
    symbols = np.zeros((3, 5), np.uint8)
    rows = np.zeros(3, np.uint16)
    data = encode(symbols, rows, tables, threads=1)
    decode(data, rows, tables, 3, 5, threads=1)
    for kind, dtype in (("float32", np.float32), ("float16", np.float16), ("bfloat16", np.uint16)):
        decode_dequantised(data, rows, tables, 3, 5, np.empty((5, 3), dtype), values=np.zeros((1, 2), np.float32),
                           dtype=kind, threads=1)  # fmt: skip


@dataclass(frozen=True)
class _Affine:
    values: NDArray[np.float32]
    scale: NDArray[np.float32]
    offset: NDArray[np.float32]
    token_scale: NDArray[np.float32]
    linear: bool
    """`values` is one row v, v + 1, v + 2, ...: reconstruction then needs no table."""


def _decode(
    streams: Streams, rows: NDArray[np.uint16], tables: Tables, out: NDArray[Any], kind: str, affine: _Affine,
    threads: int | None,
) -> None:  # fmt: skip
    compiled = _kernels()
    decode_columns = {"uint8": compiled.decode_uint8, "float32": compiled.decode_float32}.get(
        kind, compiled.decode_uint16
    )
    shared = tables.count <= MAX_SHARED_TABLES
    packed = tables.packed if shared else np.empty((1, 1), np.uint32)
    columns, tokens = streams.columns, streams.tokens
    flat, strides = _flatten(out)

    def work(job: tuple[int, int, int]) -> int:
        segment, low, high = job
        first = segment * streams.segment_tokens
        return int(
            decode_columns(
                streams.words,
                streams.offsets[segment * columns : (segment + 1) * columns + 1],
                rows,
                tables.frequencies,
                packed,
                shared,
                low,
                high,
                first,
                min(first + streams.segment_tokens, tokens),
                affine.values,
                affine.scale,
                affine.offset,
                affine.token_scale,
                _KIND[kind],
                affine.linear,
                flat,
                out.shape[2],
                *strides,
            )
        )

    jobs = [
        (segment, low, min(low + _COLUMNS_A_JOB, columns))
        for segment in range(streams.segments)
        for low in range(0, columns, _COLUMNS_A_JOB)
    ]
    for (segment, _, _), bad in zip(jobs, _spread(work, jobs, columns * tokens, threads), strict=True):
        if bad >= 0:
            raise CodecError(
                f"rANS stream of column {bad}, segment {segment}, is damaged or belongs to other tables; "
                "fetch the chunk again"
            )


def _affine(
    values: NDArray[np.float32] | None, scale: NDArray[np.float32] | None, offset: NDArray[np.float32] | None,
    token_scale: NDArray[np.float32] | None, tables: Tables, columns: int, tokens: int,
) -> _Affine:  # fmt: skip
    steps = np.arange(tables.symbols, dtype=np.float32)
    values = steps[None] if values is None else np.ascontiguousarray(values, np.float32)
    if values.ndim != 2 or values.shape[0] not in (1, tables.count) or values.shape[1] != tables.symbols:
        raise CodecError(f"values must be [{tables.count} or 1, {tables.symbols}], not {values.shape}")
    scale = np.ones(columns, np.float32) if scale is None else np.ascontiguousarray(scale, np.float32)
    offset = np.zeros(columns, np.float32) if offset is None else np.ascontiguousarray(offset, np.float32)
    if scale.shape != (columns,) or offset.shape != (columns,):
        raise CodecError(f"scale {scale.shape} and offset {offset.shape} must each be [{columns}]")
    if token_scale is None:
        token_scale = np.ones((1, tokens), np.float32)
    token_scale = np.ascontiguousarray(token_scale, np.float32)
    if token_scale.ndim != 2 or token_scale.shape[1] != tokens or columns % max(token_scale.shape[0], 1):
        raise CodecError(f"token_scale {token_scale.shape} must be [groups, {tokens}], groups dividing {columns}")
    linear = len(values) == 1 and bool((values[0] == values[0, 0] + steps).all())
    return _Affine(values, scale, offset, token_scale, linear)


def _flatten(out: NDArray[Any]) -> tuple[NDArray[Any], tuple[int, ...]]:
    """The memory that an array spans as one dimension, and the array's strides in elements."""
    strides = tuple(stride // out.itemsize for stride in out.strides)
    if min(out.strides) < 0 or any(stride % out.itemsize for stride in out.strides) or not out.flags.aligned:
        raise CodecError(f"out has strides {out.strides}: they must be non-negative multiples of its element size")
    span = 1 + sum((n - 1) * stride for n, stride in zip(out.shape, strides, strict=True))
    return np.lib.stride_tricks.as_strided(out, (span,), (out.itemsize,)), strides


def _rows(table_of_column: NDArray[Any], tables: Tables, columns: int) -> NDArray[np.uint16]:
    rows = np.asarray(table_of_column)
    if rows.shape != (columns,) or rows.dtype.kind not in "iu":
        raise CodecError(f"table_of_column must be {columns} integers, not {rows.dtype} of shape {rows.shape}")
    if columns and not 0 <= int(rows.min()) <= int(rows.max()) < tables.count:
        raise CodecError(f"table_of_column names table {int(rows.max())} of {tables.count}")
    return np.ascontiguousarray(rows, np.uint16)


def _check_size(columns: int, tokens: int) -> None:
    if columns < 1 or tokens < 1 or columns * tokens > 1 << 40:
        raise CodecError(f"{columns} columns of {tokens} tokens cannot be coded")


def _as_array(data: bytes | bytearray | memoryview | NDArray[np.uint8]) -> NDArray[np.uint8]:
    view = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data
    if view.dtype != np.uint8 or view.ndim != 1 or not view.flags.c_contiguous:
        raise CodecError("a rANS section must be contiguous bytes")
    return view


def _pack_lengths(lengths: NDArray[np.int64], segment_tokens: int) -> bytes:
    groups = -(-len(lengths) // GROUP)
    # Absent streams of the last group take its shortest length, so that they widen nothing.
    padded = np.full(groups * GROUP, lengths[(groups - 1) * GROUP :].min(), np.int64)
    padded[: len(lengths)] = lengths
    grid = padded.reshape(groups, GROUP)
    shortest = grid.min(axis=1)
    deltas = grid - shortest[:, None]
    widths = np.ceil(np.log2(deltas.max(axis=1) + 1)).astype(np.uint8)
    head = _HEADER.pack(segment_tokens, int(lengths.sum())) + shortest.astype("<u2").tobytes() + widths.tobytes()
    packed = np.zeros(int(widths.sum(dtype=np.int64)), np.uint32)
    _kernels().pack_deltas(deltas, widths, packed)
    return head + bytes(-len(head) % 4) + packed.astype("<u4").tobytes()


def _spread(work: Callable[[Job], Result], jobs: list[Job], symbols: int, threads: int | None) -> list[Result]:
    """Run jobs in order of the list, on several threads where that pays; the kernels hold no GIL."""
    n = _cores() if threads is None else threads
    n = min(n, len(jobs), max(1, symbols // _PARALLEL_SYMBOLS))
    if n <= 1:
        return [work(job) for job in jobs]
    with ThreadPoolExecutor(n, thread_name_prefix="rans") as pool:
        return list(pool.map(work, jobs))


@cache
def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _kernels() -> Kernels:
    from codec.entropy import _rans_kernels

    return _rans_kernels.compiled()
