"""Arithmetic coding of many columns at once, bit for bit as torchac 0.9.3 does it: encoder and decoder (numba).

The classic 32-bit coder (Nelson, "Data compression with arithmetic coding", Dr. Dobb's 2014) with 16-bit cumulative
counts: CacheGen's public code uses it through torchac. A stream holds one column of one segment and is what torchac
returns for that column alone; `kvstream.codec.entropy.sections` has the layout around the streams. Two identities
remove the division and the loop over bits: a symbol's count reaches c exactly when value - low >= (span * c) >> 16,
and the bits to shift out are counted by leading zeros, first of low ^ high, then of what straddles the middle.

A decoder checks a stream's length and the 32 bits that must remain at its end. That detects most damage, but not all:
the container must checksum the section.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvstream.codec.entropy import sections
from kvstream.codec.entropy.sections import Data, Output, Reconstruction, Streams, Task
from kvstream.codec.entropy.tables import MAX_SYMBOLS, MAX_TABLES, PROB_BITS, Tables
from kvstream.codec.errors import CodecError

if TYPE_CHECKING:
    from kvstream.codec.entropy._kernels import CoderKernels

CDF_BITS = 16


@dataclass(frozen=True, eq=False)
class Cdfs:
    """`cumulative` is uint16 `[K, S + 1]`: how many of 65,536 counts lie below each symbol; the last entry is 0.

    That is torchac's integer form: its last entry stands for 65,536. Rows start at 0 and rise strictly, so every symbol
    can be coded. Raises CodecError for anything else.
    """

    cumulative: NDArray[np.uint16]

    def __post_init__(self) -> None:
        given = np.asarray(self.cumulative)
        if given.ndim != 2 or given.dtype != np.uint16:
            raise CodecError(f"CDFs are uint16 [tables, symbols + 1], not {given.dtype} of shape {given.shape}")
        k, s = given.shape[0], given.shape[1] - 1
        if not (1 <= k <= MAX_TABLES and 1 <= s <= MAX_SYMBOLS):
            raise CodecError(f"{k} CDFs of {s} symbols: at most {MAX_TABLES} of {MAX_SYMBOLS} can be coded")
        rising = (given[:, :-2] < given[:, 1:-1]).all()
        if given[:, 0].any() or given[:, -1].any() or not rising:
            raise CodecError("every CDF must start at 0, rise strictly and end with 0 for 65,536")
        cumulative = np.ascontiguousarray(given).copy()
        cumulative.setflags(write=False)
        object.__setattr__(self, "cumulative", cumulative)

    @property
    def count(self) -> int:
        """K, the number of tables."""
        return int(self.cumulative.shape[0])

    @property
    def symbols(self) -> int:
        """S, the size of the alphabet."""
        return int(self.cumulative.shape[1] - 1)

    @cached_property
    def bounds(self) -> NDArray[np.uint32]:
        """uint32 `[K, S + 1]`: the same with 65,536 at the end."""
        bounds = self.cumulative.astype(np.uint32)
        bounds[:, -1] = 1 << CDF_BITS
        return bounds


def from_tables(tables: Tables) -> Cdfs:
    """The CDFs of rANS tables that give every symbol a slot."""
    return Cdfs(np.pad(tables.starts << np.uint16(CDF_BITS - PROB_BITS), ((0, 0), (0, 1))))


def from_counts(counts: NDArray[Any]) -> Cdfs:
    """CDFs from histograms `[K, S]` as CacheGen's public code makes them: scaled to 65,535 - S, plus 1 per symbol."""
    histogram = np.asarray(counts, dtype=np.float64)
    if histogram.ndim != 2 or not np.isfinite(histogram).all() or histogram.min(initial=0) < 0:
        raise CodecError("counts must be a finite, non-negative histogram [tables, symbols]")
    n_symbols = histogram.shape[1]
    total = histogram.sum(axis=1, keepdims=True)
    share = np.cumsum(np.where(total > 0, histogram / np.where(total > 0, total, 1), 1 / max(n_symbols, 1)), axis=1)
    below = np.pad(share[:, :-1], ((0, 0), (1, 0)))
    cumulative = np.floor(below * (0xFFFF - n_symbols)) + np.arange(n_symbols)
    return Cdfs(np.pad(cumulative, ((0, 0), (0, 1))).astype(np.uint16))


def encode(
    symbols: NDArray[np.uint8], table_of_column: NDArray[Any], cdfs: Cdfs, *,
    segment_tokens: int | None = None, threads: int | None = None,
) -> bytes:  # fmt: skip
    """Code symbols uint8 `[C, T]` (any strides), column c with `cdfs` row `table_of_column[c]`; as `rans.encode`."""
    return sections.join(
        [encode_streams(symbols, table_of_column, cdfs, segment_tokens=segment_tokens, threads=threads)]
    )


def encode_streams(
    symbols: NDArray[np.uint8], table_of_column: NDArray[Any], cdfs: Cdfs, *,
    segment_tokens: int | None = None, threads: int | None = None,
) -> Streams:  # fmt: skip
    """As `rans.encode_streams`."""
    rows = sections.table_rows(table_of_column, cdfs.count, len(symbols))
    kernel = _kernels().encode

    def encode_columns(part: NDArray[np.uint8], low: int, high: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        # The interval never shrinks below 2^14 - 1 before it is widened to 2^30: at most 18 bits a symbol.
        data = np.empty((high - low) * (part.shape[1] * 9 // 4 + 16), np.uint8)
        lengths = np.empty(high - low, np.int64)
        used = kernel(part, rows[low:high], cdfs.bounds, data, lengths)
        if used < 0:
            raise CodecError(f"column {low - used - 1} holds a symbol outside its alphabet of {cdfs.symbols}")
        return data[:used].copy(), lengths

    return sections.encode(symbols, segment_tokens, threads, encode_columns)


def decode(
    data: Data, table_of_column: NDArray[Any], cdfs: Cdfs, columns: int, tokens: int,
    out: NDArray[np.uint8] | None = None, *, threads: int | None = None,
) -> NDArray[np.uint8]:  # fmt: skip
    """Symbols uint8 `[C, T]` of a section that `encode` wrote; as `rans.decode`."""
    return decode_streams(parse(data, columns, tokens), table_of_column, cdfs, out, threads=threads)


def decode_streams(
    streams: Streams, table_of_column: NDArray[Any], cdfs: Cdfs, out: NDArray[np.uint8] | None = None, *,
    threads: int | None = None,
) -> NDArray[np.uint8]:  # fmt: skip
    """As `decode`, for streams whose offsets do not come from a section's header."""
    columns, tokens = streams.columns, streams.tokens
    rows = sections.table_rows(table_of_column, cdfs.count, columns)
    out = sections.symbol_target(out, columns, tokens)
    how = sections.reconstruction(cdfs.count, cdfs.symbols, columns, tokens)
    _decode(streams, rows, cdfs, out.T[None], "uint8", how, threads)
    return out


def decode_dequantised(
    data: Data, table_of_column: NDArray[Any], cdfs: Cdfs, columns: int, tokens: int, out: NDArray[Any], *,
    values: NDArray[np.float32] | None = None, scale: NDArray[np.float32] | None = None,
    offset: NDArray[np.float32] | None = None, token_scale: NDArray[np.float32] | None = None,
    dtype: str | None = None, threads: int | None = None,
) -> NDArray[Any]:  # fmt: skip
    """Decode and reconstruct in one pass; arguments and result as in `rans.decode_dequantised`."""
    rows = sections.table_rows(table_of_column, cdfs.count, columns)
    streams = parse(data, columns, tokens)
    target, kind = sections.value_target(out, dtype, columns, tokens)
    how = sections.reconstruction(cdfs.count, cdfs.symbols, columns, tokens, values, scale, offset, token_scale)
    _decode(streams, rows, cdfs, target, kind, how, threads)
    return out


def parse(data: Data, columns: int, tokens: int, segment_tokens: int | None = None) -> Streams:
    """Check a section's header and lengths against its bytes. `segment_tokens` as in `rans.parse`. Raises
    CodecError."""
    return sections.parse(data, columns, tokens, 1, segment_tokens)


def warm_up() -> None:
    """Compile every kernel, or load it from numba's cache, so that no later call waits for it."""
    cdfs = Cdfs(np.array([[0, 5, 0]], np.uint16))
    rows = np.zeros(3, np.uint16)
    data = encode(np.zeros((3, 5), np.uint8), rows, cdfs, threads=1)
    decode(data, rows, cdfs, 3, 5, threads=1)


def _decode(
    streams: Streams, rows: NDArray[np.uint16], cdfs: Cdfs, target: NDArray[Any], kind: str, how: Reconstruction,
    threads: int | None,
) -> None:  # fmt: skip
    kernel = _kernels().decode[str(target.dtype)]

    def decode_columns(units: NDArray[Any], task: Task, output: Output) -> int:
        return int(kernel(rows, cdfs.bounds, units, tuple(task), tuple(output)))

    sections.decode(streams, target, kind, how, threads, decode_columns)


def _kernels() -> CoderKernels:
    from kvstream.codec.entropy import _kernels

    return _kernels.arithmetic()
