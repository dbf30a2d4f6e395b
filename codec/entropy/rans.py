"""rANS coding of many columns at once, each with one of a set of shared tables: bitstream, encoder, decoder (numba).

A stream's state x starts at 0 and lives in [2^16, 2^32) as soon as it is large enough; a symbol with frequency f and
first slot c maps x to (x // f) * 1024 + x % f + c after at most one 16-bit word has been moved out. Tokens are coded
last to first, so a decoder reads words front to back and yields tokens in order. A stream is its final state, high
half first (one word if it is below 2^16, none if it is 0), then the words, last written first;
`kvstream.codec.entropy.sections` has the layout around the streams. Starting at 0 instead of 2^16 saves two bytes a
stream: a decoder takes no word when its stream has none left.

A decoder checks that every stream ends at x = 0 with all of its words consumed. That detects wrong tables and most
damage, but not all: a stream has next to no redundancy, so the container must checksum the section.

Duda, "Asymmetric numeral systems" (arXiv 1311.2540) is the method; Giesen, "Interleaved entropy coders" (arXiv
1402.3392) has the renormalisation by words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvstream.codec.entropy import sections
from kvstream.codec.entropy.sections import Data, Output, Reconstruction, Streams, Task
from kvstream.codec.entropy.tables import Tables
from kvstream.codec.errors import CodecError

if TYPE_CHECKING:
    from kvstream.codec.entropy._kernels import CoderKernels

MAX_SHARED_TABLES = 256
"""Up to this number, decoding tables shared by columns are built once (4 KiB each); else one is built per column."""


def encode(
    symbols: NDArray[np.uint8], table_of_column: NDArray[Any], tables: Tables, *,
    segment_tokens: int | None = None, threads: int | None = None,
) -> bytes:  # fmt: skip
    """Code symbols uint8 `[C, T]` (any strides), column c with table `table_of_column[c]`.

    `segment_tokens` cuts columns into streams that decode independently (None: as few as possible). `threads` None
    means the cores this process may use. Raises CodecError for a symbol that its table cannot code.
    """
    streams = encode_streams(symbols, table_of_column, tables, segment_tokens=segment_tokens, threads=threads)
    return sections.join([streams])


def encode_streams(
    symbols: NDArray[np.uint8], table_of_column: NDArray[Any], tables: Tables, *,
    segment_tokens: int | None = None, threads: int | None = None,
) -> Streams:  # fmt: skip
    """As `encode`, for a block of columns; `sections.join` makes a section of several."""
    rows = sections.table_rows(table_of_column, tables.count, len(symbols))
    kernel = _kernels().encode

    def encode_columns(part: NDArray[np.uint8], low: int, high: int) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        # At most one word a symbol and two for the state.
        words = np.empty((high - low) * (part.shape[1] + 2), np.uint16)
        lengths = np.empty(high - low, np.int64)
        used = kernel(part, rows[low:high], tables.frequencies, tables.starts, words, lengths)
        if used < 0:
            column = low - used - 1
            raise CodecError(
                f"column {column} holds a symbol that table {rows[column]} gives no slot; escape it or widen the table"
            )
        return words[:used].copy(), lengths

    return sections.encode(symbols, segment_tokens, threads, encode_columns)


def decode(
    data: Data, table_of_column: NDArray[Any], tables: Tables, columns: int, tokens: int,
    out: NDArray[np.uint8] | None = None, *, threads: int | None = None,
) -> NDArray[np.uint8]:  # fmt: skip
    """Symbols uint8 `[C, T]` of a section that `encode` wrote; `out` may have any strides.

    Raises CodecError for bytes that `encode` did not write with these tables; `out` may then be partly written.
    """
    return decode_streams(parse(data, columns, tokens), table_of_column, tables, out, threads=threads)


def decode_streams(
    streams: Streams, table_of_column: NDArray[Any], tables: Tables, out: NDArray[np.uint8] | None = None, *,
    threads: int | None = None,
) -> NDArray[np.uint8]:  # fmt: skip
    """As `decode`, for parsed streams, or a part of them."""
    columns, tokens = streams.columns, streams.tokens
    rows = sections.table_rows(table_of_column, tables.count, columns)
    out = sections.symbol_target(out, columns, tokens)
    how = sections.reconstruction(tables.count, tables.symbols, columns, tokens)
    _decode(streams, rows, tables, out.T[None], "uint8", how, threads)
    return out


def decode_dequantised(
    data: Data | Streams, table_of_column: NDArray[Any], tables: Tables, columns: int, tokens: int,
    out: NDArray[Any], *,
    values: NDArray[np.float32] | None = None, scale: NDArray[np.float32] | None = None,
    offset: NDArray[np.float32] | None = None, token_scale: NDArray[np.float32] | None = None,
    dtype: str | None = None, threads: int | None = None,
) -> NDArray[Any]:  # fmt: skip
    """Decode and reconstruct in one pass: `(values[k, symbol] * scale[c] + offset[c]) * token_scale[g, t]`.

    `out` is `[T, C]` or `[B, T, W]` with B * W = C and any strides, column c = b * W + w; k is the column's table (0 if
    `values` has one row). `values` is float32 `[K, S]` or `[1, S]` (default: the symbol itself); `scale` and `offset`
    are float32 `[C]` (default 1 and 0), `token_scale` float32 `[G, T]` where group g is c // (C / G) (default 1). All
    arithmetic is float32, rounded once into `out`: float32, float16, or uint16 holding the bits of `dtype` ("float16"
    or "bfloat16"). `data` may be parsed streams, or a part of them. Raises CodecError as `decode` does.
    """
    rows = sections.table_rows(table_of_column, tables.count, columns)
    streams = data if isinstance(data, Streams) else parse(data, columns, tokens)
    if (streams.columns, streams.tokens) != (columns, tokens):
        raise CodecError(f"streams hold {streams.columns} columns of {streams.tokens} tokens, not {columns}, {tokens}")
    target, kind = sections.value_target(out, dtype, columns, tokens)
    how = sections.reconstruction(tables.count, tables.symbols, columns, tokens, values, scale, offset, token_scale)
    _decode(streams, rows, tables, target, kind, how, threads)
    return out


def parse(data: Data, columns: int, tokens: int, segment_tokens: int | None = None) -> Streams:
    """Check a section's header and lengths against its bytes. `segment_tokens` is the encoder's setting: segments
    of any other length are refused; None accepts any. Raises CodecError."""
    return sections.parse(data, columns, tokens, 2, segment_tokens)


def warm_up() -> None:
    """Compile every kernel, or load it from numba's cache, so that no later call waits for it."""
    tables = Tables(np.array([[1000, 24]], np.uint16))
    rows = np.zeros(3, np.uint16)
    data = encode(np.zeros((3, 5), np.uint8), rows, tables, threads=1)
    decode(data, rows, tables, 3, 5, threads=1)


def _decode(
    streams: Streams, rows: NDArray[np.uint16], tables: Tables, target: NDArray[Any], kind: str, how: Reconstruction,
    threads: int | None,
) -> None:  # fmt: skip
    kernel = _kernels().decode[str(target.dtype)]
    shared = tables.count <= MAX_SHARED_TABLES and tables.count < streams.columns
    packed = tables.packed if shared else np.empty((1, 1), np.uint32)

    def decode_columns(units: NDArray[Any], task: Task, output: Output) -> int:
        return int(kernel(rows, tables.frequencies, packed, shared, units, tuple(task), tuple(output)))

    sections.decode(streams, target, kind, how, threads, decode_columns)


def _kernels() -> CoderKernels:
    from kvstream.codec.entropy import _kernels

    return _kernels.rans()
