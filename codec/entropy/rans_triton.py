"""rANS on a GPU: the bitstream of `kvstream.codec.entropy.rans`, decoded (with reconstruction) and encoded by Triton
kernels.

A lane decodes one stream; the lanes of a warp write neighbouring columns of one token. Tables are two small levels,
1,024 bytes of slot -> symbol and then symbol -> (frequency, start), which stay in the L1 cache; neighbouring
columns should use the same table where the codec can choose. A lane's next words are read ahead, two at a time, so that
their latency is off the critical path from one symbol to the next.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# Triton gives kernels their types.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.entropy import device as shared
from kvstream.codec.entropy import sections
from kvstream.codec.entropy.device import Coded, DeviceReconstruction, DeviceStreams, places, reconstruct
from kvstream.codec.entropy.sections import Data
from kvstream.codec.entropy.tables import Tables
from kvstream.codec.errors import CodecError

DECODE_LANES = 64
"""Streams a program decodes, one warp: two per thread are up to 5 % faster than one where a segment has 512 tokens."""
ENCODE_LANES = 32


@dataclass(frozen=True)
class DeviceTables:
    """`Tables` and the table of each column on a device; reusable for every chunk."""

    rows: Tensor
    """int32 `[C]`."""
    slots: Tensor
    """uint8 `[K, 1024]`: the symbol of each slot."""
    entries: Tensor
    """int64 `[K, S]`: frequency (16 bits), start (16 bits), what the symbol stands for (a float32)."""

    @property
    def columns(self) -> int:
        return len(self.rows)


def to_device(
    tables: Tables, table_of_column: NDArray[Any], device: torch.device | str = "cuda",
    values: NDArray[np.float32] | None = None,
) -> DeviceTables:  # fmt: skip
    """Copy tables to a device. `values` float32 `[K, S]` is what symbols stand for, which `advance` hands to
    kernels. Raises CodecError for a column that names none of the tables."""
    rows = sections.table_rows(table_of_column, tables.count, len(table_of_column))
    entries = tables.frequencies.astype(np.int64) | (tables.starts.astype(np.int64) << 16)
    if values is not None:
        entries |= np.ascontiguousarray(values).view(np.uint32).astype(np.int64) << 32
    return DeviceTables(
        rows=torch.from_numpy(rows.astype(np.int32)).to(device),
        slots=torch.from_numpy(tables.slots).to(device),
        entries=torch.from_numpy(entries).to(device),
    )


def decode(data: Data, tables: DeviceTables, tokens: int, out: Tensor | None = None) -> Tensor:
    """Symbols uint8 `[C, T]` of a section, on the tables' device; `out` may have any strides. As `rans.decode`."""
    streams = upload(data, tables, tokens)
    if out is None:
        out = torch.empty((tokens, tables.columns), dtype=torch.uint8, device=tables.rows.device).T
    if out.dtype != torch.uint8 or tuple(out.shape) != (tables.columns, tokens):
        raise CodecError(f"out must be uint8 {(tables.columns, tokens)}, not {out.dtype} {tuple(out.shape)}")
    shared.raise_if_damaged(launch_decode(streams, tables, reconstruction(tables, tokens), out.T), streams)
    return out


def decode_dequantised(
    data: Data, tables: DeviceTables, tokens: int, out: Tensor, *, values: NDArray[Any] | None = None,
    scale: NDArray[Any] | None = None, offset: NDArray[Any] | None = None, token_scale: NDArray[Any] | None = None,
) -> Tensor:  # fmt: skip
    """Decode and reconstruct in one pass into float32, float16 or bfloat16 `[T, C]` or `[B, T, W]`, any strides.

    Arguments and results as `rans.decode_dequantised`, to the bit. Waits for the device, to report damage.
    """
    if out.dtype == torch.uint8:
        raise CodecError("cannot reconstruct into a tensor of torch.uint8")
    streams = upload(data, tables, tokens)
    how = reconstruction(tables, tokens, values, scale, offset, token_scale)
    shared.raise_if_damaged(launch_decode(streams, tables, how, out), streams)
    return out


def upload(data: Data, tables: DeviceTables, tokens: int, segment_tokens: int | None = None) -> DeviceStreams:
    """Copy a section to the tables' device; as `rans.parse`. Raises CodecError for a header that does not fit."""
    return shared.upload(data, tables.columns, tokens, 2, tables.rows.device, segment_tokens)


def reconstruction(
    tables: DeviceTables, tokens: int, values: NDArray[Any] | None = None, scale: NDArray[Any] | None = None,
    offset: NDArray[Any] | None = None, token_scale: NDArray[Any] | None = None,
) -> DeviceReconstruction:  # fmt: skip
    """What symbols stand for, on the tables' device. Raises CodecError."""
    count, n_symbols = tables.entries.shape
    return shared.reconstruction(
        count, n_symbols, tables.columns, tokens, tables.rows.device, values, scale, offset, token_scale
    )


def launch_decode(
    streams: DeviceStreams, tables: DeviceTables, how: DeviceReconstruction, out: Tensor, lanes: int = DECODE_LANES
) -> Tensor:
    """Start decoding into `out` without waiting; returns the flag that `device.raise_if_damaged` reads."""
    columns = streams.columns
    view = shared.target(out, columns, streams.tokens)
    damaged = torch.zeros(1, dtype=torch.int32, device=view.device)
    _decode[(streams.segments * triton.cdiv(columns, lanes),)](
        streams.payload, streams.offsets, tables.rows, tables.slots, tables.entries, damaged,
        units=streams.units, columns=columns, tokens=streams.tokens, segment_tokens=streams.segment_tokens,
        **shared.output_arguments(view, how, columns),
        N_SYMBOLS=tables.entries.shape[1], BLOCK=lanes, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return damaged


def encode(symbols: Tensor, tables: DeviceTables, *, segment_tokens: int | None = None) -> bytes:
    """The section that `rans.encode` makes of symbols uint8 `[C, T]` on the tables' device (any strides)."""
    segment_tokens = shared.symbols_on_device(symbols, segment_tokens)
    if len(symbols) != tables.columns:
        raise CodecError(f"{len(symbols)} columns of symbols for tables of {tables.columns}")
    return bytes(launch_encode(symbols, tables, segment_tokens).section()())


def launch_encode(symbols: Tensor, tables: DeviceTables, segment_tokens: int) -> Coded:
    """Start encoding symbols `[C, T]` on the current stream."""
    columns, tokens = symbols.shape
    segments = triton.cdiv(tokens, segment_tokens)
    # At most one word a symbol and two for the state.
    scratch = torch.empty((segments * columns, segment_tokens + 2), dtype=torch.int16, device=symbols.device)
    lengths = torch.empty(segments * columns, dtype=torch.int32, device=symbols.device)
    damaged = torch.zeros(1, dtype=torch.int32, device=symbols.device)
    _encode[(segments * triton.cdiv(columns, ENCODE_LANES),)](
        symbols, tables.rows, tables.entries, scratch, lengths, damaged,
        columns, tokens, segment_tokens, symbols.stride(0), symbols.stride(1),
        N_SYMBOLS=tables.entries.shape[1], BLOCK=ENCODE_LANES, num_warps=1,
    )  # fmt: skip
    complaint = "column {} holds a symbol that its table gives no slot; escape it"
    return Coded(scratch, lengths, damaged, symbols, segment_tokens, complaint, from_end=True)


@triton.jit
def begin(payload, at, end):
    """State, words read ahead and place of streams that begin at `at`.

    Words are read ahead in aligned pairs, the next one always in the lower half.
    """
    state = tl.zeros_like(at).to(tl.uint32)
    for _ in tl.static_range(2):
        pair = tl.load(payload + (at >> 1)).to(tl.uint32, bitcast=True)
        word = (pair >> ((at & 1) * 16).to(tl.uint32)) & 0xFFFF
        state = tl.where(at < end, (state << 16) | word, state)
        at = tl.minimum(at + 1, end)
    ahead = tl.load(payload + (at >> 1)).to(tl.uint32, bitcast=True) >> ((at & 1) * 16).to(tl.uint32)
    return state, ahead, at


@triton.jit
def advance(state, ahead, at, end, payload, slots, entries):
    """One symbol of each stream, its entry, and the streams' state, words read ahead and place after it."""
    slot = state & 1023
    symbol = tl.load(slots + slot.to(tl.int32)).to(tl.int32)
    entry = tl.load(entries + symbol)
    low = entry.to(tl.uint32)
    state = (low & 0xFFFF) * (state >> 10) + (slot - (low >> 16))
    need = (state < 65536) & (at < end)
    state = tl.where(need, (state << 16) | (ahead & 0xFFFF), state)
    ahead = tl.where(need, ahead >> 16, ahead)
    at += need.to(tl.int32)
    kept = ahead.to(tl.int32, bitcast=True)
    ahead = tl.load(payload + (at >> 1), mask=need & ((at & 1) == 0), other=kept).to(tl.uint32, bitcast=True)
    return symbol, entry, state, ahead, at


@triton.jit(do_not_specialize=["payload", "units", "columns", "tokens", "segment_tokens"])
def _decode(
    payload, offsets, rows, slots, entries, damaged,
    values, scale, offset, token_scale, out,
    units, columns, tokens, segment_tokens,
    width, block_stride, token_stride, lane_stride, columns_per_group, value_stride,
    KIND: tl.constexpr, SCALED: tl.constexpr, N_SYMBOLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    programs = tl.cdiv(columns, BLOCK)
    segment = tl.program_id(0) // programs
    # Lanes beyond the last column repeat it and store the same values: no mask in the loop.
    column = tl.minimum((tl.program_id(0) % programs) * BLOCK + tl.arange(0, BLOCK), columns - 1)
    stream = segment * columns + column
    end = tl.minimum(tl.maximum(tl.load(offsets + stream + 1), 0), units)
    at = tl.minimum(tl.maximum(tl.load(offsets + stream), 0), end)
    row = tl.load(rows + column)
    slots += row * 1024
    entries += row * N_SYMBOLS
    values += row * value_stride
    base = tl.load(values)
    slope = tl.load(scale + column)
    shift = tl.load(offset + column)
    factors = token_scale + (column // columns_per_group) * tokens
    to = places(column, segment, segment_tokens, out, width, block_stride, token_stride, lane_stride)

    state, ahead, at = begin(payload, at, end)
    first = segment * segment_tokens
    last = tl.minimum(first + segment_tokens, tokens)
    for t in range(first, last):
        symbol, _, state, ahead, at = advance(state, ahead, at, end, payload, slots, entries)
        factor = tl.load(factors + t) if SCALED else 1.0
        y = reconstruct(symbol, base, values, slope, shift, factor, KIND, SCALED)
        tl.store(to, y.to(out.dtype.element_ty))
        to += token_stride
    number = tl.max(tl.where((state != 0) | (at != end), stream + 1, 0))
    if number > 0:
        tl.atomic_max(damaged, number)


@triton.jit
def _encode(
    symbols, rows, entries, scratch, lengths, damaged,
    columns, tokens, segment_tokens, column_stride, token_stride,
    N_SYMBOLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each stream is written from the end of its scratch downward, so that it then reads front to back."""
    programs = tl.cdiv(columns, BLOCK)
    segment = tl.program_id(0) // programs
    column = tl.minimum((tl.program_id(0) % programs) * BLOCK + tl.arange(0, BLOCK), columns - 1)
    stream = segment * columns + column
    entries += tl.load(rows + column) * N_SYMBOLS
    capacity = segment_tokens + 2
    to = scratch + stream.to(tl.int64) * capacity
    first = segment * segment_tokens
    n = tl.minimum(first + segment_tokens, tokens) - first
    source = symbols + column.to(tl.int64) * column_stride + (first + n - 1).to(tl.int64) * token_stride
    at = tl.zeros([BLOCK], tl.int32) + capacity
    state = tl.zeros([BLOCK], tl.uint32)
    wrong = tl.zeros([BLOCK], tl.int1)
    # Symbols are read two steps ahead and their entries one, off the critical path from one state to the next.
    symbol = tl.load(source).to(tl.int32)
    next_entry = tl.load(entries + symbol, mask=symbol < N_SYMBOLS, other=0)
    symbol = tl.load(source - token_stride, mask=n > 1, other=0).to(tl.int32)
    source = source - token_stride - token_stride
    for done in range(0, n):
        low = next_entry.to(tl.uint32)
        next_entry = tl.load(entries + symbol, mask=symbol < N_SYMBOLS, other=0)
        symbol = tl.load(source, mask=done + 2 < n, other=0).to(tl.int32)
        source -= token_stride
        frequency = low & 0xFFFF
        wrong |= frequency == 0
        frequency = tl.maximum(frequency, 1)
        full = (state >> 22) >= frequency
        at -= full.to(tl.int32)
        tl.store(to + at, (state & 0xFFFF).to(tl.int16), mask=full)
        state = tl.where(full, state >> 16, state)
        quotient = state // frequency
        state = (quotient << 10) + (state - quotient * frequency) + (low >> 16)
    for _ in tl.static_range(2):
        left = state > 0
        at -= left.to(tl.int32)
        tl.store(to + at, (state & 0xFFFF).to(tl.int16), mask=left)
        state = state >> 16
    tl.store(lengths + stream, capacity - at)
    number = tl.max(tl.where(wrong, stream + 1, 0))
    if number > 0:
        tl.atomic_max(damaged, number)
