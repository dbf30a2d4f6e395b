"""Arithmetic coding on a GPU: torchac's bitstream, decoded (with reconstruction) and encoded by Triton kernels.

A lane codes one stream, with the two identities of `kvstream.codec.entropy.arithmetic` in place of a division and a
loop over bits. Symbols are found by binary search; when nearly every column has a CDF of its own, CDFs are stored
symbol by symbol, so that the lanes of a warp, which look at about the same symbol of neighbouring columns, read the
same lines.
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
from kvstream.codec.entropy.arithmetic import Cdfs
from kvstream.codec.entropy.device import Coded, DeviceReconstruction, DeviceStreams, places, reconstruct
from kvstream.codec.entropy.sections import Data
from kvstream.codec.errors import CodecError

DECODE_LANES = 32
"""Streams a program decodes, one warp."""
ENCODE_LANES = 32
_MANY = 256
"""From this many CDFs on, they are stored symbol by symbol."""


@dataclass(frozen=True)
class DeviceCdfs:
    """`Cdfs` and the CDF of each column on a device; reusable for every chunk."""

    rows: Tensor
    """int32 `[C]`."""
    cdf: Tensor
    """int32 `[K, S + 1]`, any strides, 65,536 at the end."""

    @property
    def columns(self) -> int:
        return len(self.rows)

    @property
    def symbols(self) -> int:
        return self.cdf.shape[1] - 1


def to_device(cdfs: Cdfs, table_of_column: NDArray[Any], device: torch.device | str = "cuda") -> DeviceCdfs:
    """Copy CDFs to a device. Raises CodecError for a column that names none of them."""
    rows = sections.table_rows(table_of_column, cdfs.count, len(table_of_column))
    cdf = torch.from_numpy(cdfs.bounds.astype(np.int32)).to(device)
    return DeviceCdfs(
        rows=torch.from_numpy(rows.astype(np.int32)).to(device),
        cdf=cdf.T.contiguous().T if cdfs.count >= _MANY else cdf,
    )


def decode(data: Data, cdfs: DeviceCdfs, tokens: int, out: Tensor | None = None) -> Tensor:
    """Symbols uint8 `[C, T]` of a section, on the CDFs' device; `out` may have any strides."""
    streams = upload(data, cdfs, tokens)
    if out is None:
        out = torch.empty((tokens, cdfs.columns), dtype=torch.uint8, device=cdfs.rows.device).T
    if out.dtype != torch.uint8 or tuple(out.shape) != (cdfs.columns, tokens):
        raise CodecError(f"out must be uint8 {(cdfs.columns, tokens)}, not {out.dtype} {tuple(out.shape)}")
    shared.raise_if_damaged(launch_decode(streams, cdfs, reconstruction(cdfs, tokens), out.T), streams)
    return out


def decode_dequantised(
    data: Data, cdfs: DeviceCdfs, tokens: int, out: Tensor, *, values: NDArray[Any] | None = None,
    scale: NDArray[Any] | None = None, offset: NDArray[Any] | None = None, token_scale: NDArray[Any] | None = None,
) -> Tensor:  # fmt: skip
    """Decode and reconstruct in one pass; arguments and results as in `rans_triton.decode_dequantised`."""
    if out.dtype == torch.uint8:
        raise CodecError("cannot reconstruct into a tensor of torch.uint8")
    streams = upload(data, cdfs, tokens)
    how = reconstruction(cdfs, tokens, values, scale, offset, token_scale)
    shared.raise_if_damaged(launch_decode(streams, cdfs, how, out), streams)
    return out


def upload(data: Data, cdfs: DeviceCdfs, tokens: int) -> DeviceStreams:
    """Copy a section to the CDFs' device. Raises CodecError for a header that does not fit."""
    return shared.upload(data, cdfs.columns, tokens, 1, cdfs.rows.device)


def reconstruction(
    cdfs: DeviceCdfs, tokens: int, values: NDArray[Any] | None = None, scale: NDArray[Any] | None = None,
    offset: NDArray[Any] | None = None, token_scale: NDArray[Any] | None = None,
) -> DeviceReconstruction:  # fmt: skip
    """What symbols stand for, on the CDFs' device. Raises CodecError."""
    return shared.reconstruction(
        cdfs.cdf.shape[0], cdfs.symbols, cdfs.columns, tokens, cdfs.rows.device, values, scale, offset, token_scale
    )


def launch_decode(
    streams: DeviceStreams, cdfs: DeviceCdfs, how: DeviceReconstruction, out: Tensor, lanes: int = DECODE_LANES
) -> Tensor:
    """Start decoding into `out` without waiting; returns the flag that `device.raise_if_damaged` reads."""
    columns = streams.columns
    view = shared.target(out, columns, streams.tokens)
    damaged = torch.zeros(1, dtype=torch.int32, device=view.device)
    _decode[(streams.segments * triton.cdiv(columns, lanes),)](
        streams.payload, streams.offsets, cdfs.rows, cdfs.cdf, damaged,
        units=streams.units, columns=columns, tokens=streams.tokens, segment_tokens=streams.segment_tokens,
        table_stride=cdfs.cdf.stride(0), symbol_stride=cdfs.cdf.stride(1),
        **shared.output_arguments(view, how, columns),
        N_SYMBOLS=cdfs.symbols, STEPS=(cdfs.symbols - 1).bit_length(), BLOCK=lanes, num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip
    return damaged


def encode(symbols: Tensor, cdfs: DeviceCdfs, *, segment_tokens: int | None = None) -> bytes:
    """The section that `arithmetic.encode` makes of symbols uint8 `[C, T]` on the CDFs' device (any strides)."""
    segment_tokens = shared.symbols_on_device(symbols, segment_tokens)
    if len(symbols) != cdfs.columns:
        raise CodecError(f"{len(symbols)} columns of symbols for CDFs of {cdfs.columns}")
    return bytes(launch_encode(symbols, cdfs, segment_tokens).section()())


def launch_encode(symbols: Tensor, cdfs: DeviceCdfs, segment_tokens: int) -> Coded:
    """Start encoding symbols `[C, T]` on the current stream."""
    columns, tokens = symbols.shape
    segments = triton.cdiv(tokens, segment_tokens)
    # At most 18 bits a symbol and two at the end, in whole words.
    words = (18 * segment_tokens + 2) // 32 + 1
    scratch = torch.empty((segments * columns, words), dtype=torch.int32, device=symbols.device)
    lengths = torch.empty(segments * columns, dtype=torch.int32, device=symbols.device)
    damaged = torch.zeros(1, dtype=torch.int32, device=symbols.device)
    _encode[(segments * triton.cdiv(columns, ENCODE_LANES),)](
        symbols, cdfs.rows, cdfs.cdf, scratch, lengths, damaged,
        columns, tokens, segment_tokens, words, symbols.stride(0), symbols.stride(1),
        cdfs.cdf.stride(0), cdfs.cdf.stride(1),
        N_SYMBOLS=cdfs.symbols, BLOCK=ENCODE_LANES, num_warps=1,
    )  # fmt: skip
    complaint = f"column {{}} holds a symbol outside its alphabet of {cdfs.symbols}"
    return Coded(scratch.view(torch.uint8), lengths, damaged, symbols, segment_tokens, complaint, from_end=False)


@triton.jit
def _decode(
    payload, offsets, rows, cdf, damaged,
    values, scale, offset, token_scale, out,
    units, columns, tokens, segment_tokens, table_stride, symbol_stride,
    width, block_stride, token_stride, lane_stride, columns_per_group, value_stride,
    KIND: tl.constexpr, SCALED: tl.constexpr, N_SYMBOLS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    programs = tl.cdiv(columns, BLOCK)
    segment = tl.program_id(0) // programs
    # Lanes beyond the last column repeat it and store the same values: no mask in the loop.
    column = tl.minimum((tl.program_id(0) % programs) * BLOCK + tl.arange(0, BLOCK), columns - 1)
    stream = segment * columns + column
    end = tl.minimum(tl.maximum(tl.load(offsets + stream + 1), 0), units)
    start = tl.minimum(tl.maximum(tl.load(offsets + stream), 0), end)
    row = tl.load(rows + column)
    cdf += row * table_stride
    values += row * value_stride
    base = tl.load(values)
    slope = tl.load(scale + column)
    shift = tl.load(offset + column)
    factors = token_scale + (column // columns_per_group) * tokens
    to = places(column, segment, segment_tokens, out, width, block_stride, token_stride, lane_stride)

    # A reservoir of bits, filled by aligned words, each read one word ahead.
    word = start >> 2
    some = start < end
    bits = _aligned_word(payload, word, end, some).to(tl.uint64)
    held = 32 - 8 * (start & 3)
    bits = (bits << 32) | _aligned_word(payload, word + 1, end, some).to(tl.uint64)
    value = ((bits << (32 - held).to(tl.uint64)) >> 32).to(tl.uint32)
    word += 2
    ahead = _aligned_word(payload, word, end, some)
    low = tl.zeros([BLOCK], tl.uint32)
    high = low + 0xFFFFFFFF
    taken = tl.zeros([BLOCK], tl.int32)

    first = segment * segment_tokens
    last = tl.minimum(first + segment_tokens, tokens)
    for t in range(first, last):
        extent = high - low
        reached = value - low
        symbol = tl.zeros([BLOCK], tl.int32)
        below = tl.zeros([BLOCK], tl.uint32)
        # The whole span, extent + 1, is 2^32 at first: as 0 it gives the right `high` all the same.
        above = extent + 1
        for i in tl.static_range(STEPS):
            candidate = symbol + (1 << (STEPS - 1 - i))
            inside = candidate < N_SYMBOLS
            bound = _scaled(extent, cdf + tl.minimum(candidate, N_SYMBOLS) * symbol_stride)
            higher = inside & (reached >= bound)
            symbol = tl.where(higher, candidate, symbol)
            below = tl.where(higher, bound, below)
            above = tl.where(higher, above, bound)
        high = low + above - 1
        low = low + below
        same = _leading_zeros(low ^ high)
        low, high, undecided = _renormalise(low, high, same)
        drop = same + undecided
        empty = held < 32
        bits = tl.where(empty, (bits << 32) | ahead.to(tl.uint64), bits)
        held = tl.where(empty, held + 32, held)
        word += empty.to(tl.int32)
        ahead = tl.where(empty, _aligned_word(payload, word, end, empty), ahead)
        held -= drop
        incoming = (bits >> held.to(tl.uint64)).to(tl.uint32) & ((1 << drop.to(tl.uint32)) - 1)
        value = (value << drop.to(tl.uint32)) | incoming
        value = tl.where(undecided > 0, value ^ 0x80000000, value)
        taken += drop
        factor = tl.load(factors + t) if SCALED else 1.0
        y = reconstruct(symbol, base, values, slope, shift, factor, KIND, SCALED)
        tl.store(to, y.to(out.dtype.element_ty))
        to += token_stride
    # The encoder ended with two bits, then zeros to a full byte.
    ending = tl.where((low & 0x40000000) != 0, 0x80000000, 0x40000000).to(tl.uint32)
    number = tl.max(tl.where((value != ending) | (end - start != (taken + 9) // 8), stream + 1, 0))
    if number > 0:
        tl.atomic_max(damaged, number)


@triton.jit
def _encode(
    symbols, rows, cdf, scratch, lengths, damaged,
    columns, tokens, segment_tokens, words, column_stride, token_stride, table_stride, symbol_stride,
    N_SYMBOLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    programs = tl.cdiv(columns, BLOCK)
    segment = tl.program_id(0) // programs
    column = tl.minimum((tl.program_id(0) % programs) * BLOCK + tl.arange(0, BLOCK), columns - 1)
    stream = segment * columns + column
    cdf += tl.load(rows + column) * table_stride
    to = scratch + stream.to(tl.int64) * words
    first = segment * segment_tokens
    n = tl.minimum(first + segment_tokens, tokens) - first
    source = symbols + column.to(tl.int64) * column_stride + first.to(tl.int64) * token_stride
    low = tl.zeros([BLOCK], tl.uint32)
    high = low + 0xFFFFFFFF
    pending = tl.zeros([BLOCK], tl.int32)
    bits = tl.zeros([BLOCK], tl.uint64)
    held = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.int32)
    wrong = tl.zeros([BLOCK], tl.int1)
    for t in range(0, n + 1):
        coding = t < n
        symbol = tl.load(source + tl.minimum(t, n - 1) * token_stride).to(tl.int32)
        wrong |= symbol >= N_SYMBOLS
        symbol = tl.minimum(symbol, N_SYMBOLS - 1)
        below = _scaled(high - low, cdf + symbol * symbol_stride)
        above = _scaled(high - low, cdf + (symbol + 1) * symbol_stride)
        high = tl.where(coding, low + above - 1, high)
        low = tl.where(coding, low + below, low)
        # In the end one more bit, and behind it one more undecided one, tell the last interval's middle half apart.
        same = tl.where(coding, _leading_zeros(low ^ high), 1)
        leaving = tl.where(coding, low, (low & 0x40000000) << 1)
        pending += tl.where(coding, 0, 1)
        total += tl.where(same > 0, same + pending, 0)
        one = (leaving >> 31) != 0
        bits = tl.where(same > 0, (bits << 1) | one.to(tl.uint64), bits)
        held += (same > 0).to(tl.int32)
        # A run of undecided bits leaves behind the first decided one, rarely more than 16 of them.
        rounds = tl.max(tl.where(same > 0, (pending + 15) // 16, 0))
        for _ in range(0, rounds):
            run = tl.where(same > 0, tl.minimum(pending, 16), 0)
            ones = ((1 << run.to(tl.uint32)) - 1).to(tl.uint64)
            bits = (bits << run.to(tl.uint64)) | tl.where(one, 0, ones)
            held += run
            pending -= run
            bits, held, to = _flush(bits, held, to)
        rest = tl.maximum(same - 1, 0)
        tail = (leaving & 0x7FFFFFFF).to(tl.uint64) >> (31 - rest).to(tl.uint64)
        bits = (bits << rest.to(tl.uint64)) | tail
        held += rest
        bits, held, to = _flush(bits, held, to)
        low, high, undecided = _renormalise(low, high, same)
        pending += undecided
    left = (bits << (32 - held).to(tl.uint64)).to(tl.uint32)
    tl.store(to, _swap_bytes(left).to(tl.int32, bitcast=True), mask=held > 0)
    tl.store(lengths + stream, (total + 7) // 8)
    number = tl.max(tl.where(wrong, stream + 1, 0))
    if number > 0:
        tl.atomic_max(damaged, number)


@triton.jit
def _scaled(extent, cumulative):
    """The cumulative count at a place, out of 65,536, as a part of the span extent + 1."""
    count = tl.load(cumulative).to(tl.uint32, bitcast=True).to(tl.uint64)
    return ((extent.to(tl.uint64) * count + count) >> 16).to(tl.uint32)


@triton.jit
def _flush(bits, held, to):
    """Store the oldest 32 of more than 31 bits."""
    full = held >= 32
    spare = tl.where(full, held - 32, 0)
    word = (bits >> spare.to(tl.uint64)).to(tl.uint32)
    tl.store(to, _swap_bytes(word).to(tl.int32, bitcast=True), mask=full)
    return bits, tl.where(full, spare, held), to + full.to(tl.int32)


@triton.jit
def _aligned_word(payload, word, end, wanted):
    """32 bits of a stream, first bit highest, from byte 4 * word on, if `wanted`; zeros beyond the byte `end`."""
    left = tl.minimum(tl.maximum(end - 4 * word, 0), 4)
    loaded = tl.load(payload + word, mask=wanted & (left > 0), other=0).to(tl.uint32, bitcast=True)
    missing = (8 * (4 - left)).to(tl.uint64)
    return ((_swap_bytes(loaded).to(tl.uint64) >> missing) << missing).to(tl.uint32)


@triton.jit
def _swap_bytes(x):
    return (x << 24) | ((x & 0xFF00) << 8) | ((x >> 8) & 0xFF00) | (x >> 24)


@triton.jit
def _renormalise(low, high, same):
    """Drop `same` leading bits, then every second bit that straddles the middle; returns how many of the latter."""
    room = high ^ 0xFFFFFFFF
    low = low << same.to(tl.uint32)
    room = room << same.to(tl.uint32)
    undecided = _leading_zeros(((low & room) << 1) ^ 0xFFFFFFFF)
    n = undecided.to(tl.uint32)
    return (low << n) & 0x7FFFFFFF, ((room << n) ^ 0xFFFFFFFF) | 0x80000000, undecided


@triton.jit
def _leading_zeros(x):
    """Of a uint32 other than 0. With the bit below the highest cleared, rounding to float32 keeps the exponent."""
    exponent = (x ^ (x & (x >> 1))).to(tl.float32).to(tl.int32, bitcast=True) >> 23
    return 158 - exponent
