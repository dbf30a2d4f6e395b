"""The compiled inner loops of `codec.entropy.rans`: columns in, words out and back. No argument is checked here.

Kernels are compiled on first use for one set of types each (read-only inputs, outputs of any strides), so that no
call meets an unexpected compilation; they run without the GIL. Machine code is kept in numba's cache where one is
writable (beside this file, the user's cache directory, or NUMBA_CACHE_DIR).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numba
import numpy as np
from numba import int64, types, uint8, uint32, uint64

_LANES = 16
"""Columns decoded into one tile: 16 float32 are a cache line of token-major output."""
_TILE = 64
"""Tokens of a tile: it stays in the L1 cache."""


@dataclass(frozen=True)
class Kernels:
    encode: Callable[..., Any]
    decode_uint8: Callable[..., Any]
    decode_uint16: Callable[..., Any]
    decode_float32: Callable[..., Any]
    unpack_lengths: Callable[..., Any]
    pack_deltas: Callable[..., Any]


@cache
def compiled() -> Kernels:
    """Every kernel, compiled or loaded from the cache."""

    def array(dtype: types.Type, ndim: int, layout: Literal["C", "A"] = "C", *, readonly: bool = True) -> Any:
        return types.Array(dtype, ndim, layout, readonly=readonly)

    def decode(out: types.Type) -> Callable[..., Any]:
        f32 = types.float32
        return _compile(
            _decode_columns,
            types.int64(
                array(types.uint16, 1),
                array(types.int64, 1),
                array(types.uint16, 1),
                array(types.uint16, 2),
                array(types.uint32, 2),
                types.boolean,
                types.int64,
                types.int64,
                types.int64,
                types.int64,
                array(f32, 2),
                array(f32, 1),
                array(f32, 1),
                array(f32, 2),
                types.int64,
                types.boolean,
                array(out, 1, readonly=False),
                types.int64,
                types.int64,
                types.int64,
                types.int64,
            ),
        )

    return Kernels(
        encode=_compile(
            _encode_columns,
            types.int64(
                array(types.uint8, 2, "A"),
                array(types.uint16, 1),
                array(types.uint16, 2),
                array(types.uint16, 2),
                array(types.uint16, 1, readonly=False),
                array(types.int64, 1, readonly=False),
            ),
        ),
        decode_uint8=decode(types.uint8),
        decode_uint16=decode(types.uint16),
        decode_float32=decode(types.float32),
        unpack_lengths=_compile(
            _unpack_lengths,
            types.int64(
                array(types.uint16, 1),
                array(types.uint8, 1),
                array(types.uint8, 1),
                array(types.int64, 1, readonly=False),
            ),
        ),
        pack_deltas=_compile(
            _pack_deltas,
            types.void(array(types.int64, 2), array(types.uint8, 1), array(types.uint32, 1, readonly=False)),
        ),
    )


def _compile(function: Callable[..., Any], signature: Any) -> Callable[..., Any]:
    try:
        return numba.njit(signature, nogil=True, cache=True)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        return numba.njit(signature, nogil=True)(function)


def _encode_columns(symbols, table_of_column, frequencies, starts, words, lengths):
    """Code `symbols` [C, T]; returns the words written, or -1 - column for a symbol without a slot.

    Each stream is written from the end of its longest possible place downward, then moved up against the one before.
    """
    columns, tokens = symbols.shape
    n_symbols = frequencies.shape[1]
    step = np.empty((n_symbols, 2), np.uint64)
    used = int64(0)
    for c in range(columns):
        k = table_of_column[c]
        for s in range(n_symbols):
            f = uint64(frequencies[k, s])
            # x < f * 2^22 here, so x // f == (x * ceil(2^42 / f)) >> 42 exactly, and the product fits 64 bits.
            step[s, 0] = (uint64(1 << 42) + f - uint64(1)) // f if f > uint64(0) else uint64(0)
            step[s, 1] = f | (uint64(starts[k, s]) << uint64(32))
        top = used + tokens + 2
        at = top
        x = uint64(0)
        for t in range(tokens - 1, -1, -1):
            s = int64(symbols[c, t])
            if s >= n_symbols or step[s, 0] == uint64(0):
                return -1 - c
            f = step[s, 1] & uint64(0xFFFFFFFF)
            if x >= (f << uint64(22)):
                at -= 1
                words[at] = x & uint64(0xFFFF)
                x >>= uint64(16)
            q = (x * step[s, 0]) >> uint64(42)
            x = (q << uint64(10)) + (x - q * f) + (step[s, 1] >> uint64(32))
        if x > uint64(0):
            at -= 1
            words[at] = x & uint64(0xFFFF)
            if x > uint64(0xFFFF):
                at -= 1
                words[at] = x >> uint64(16)
        n = top - at
        for i in range(n):
            words[used + i] = words[at + i]
        lengths[c] = n
        used += n
    return used


def _decode_columns(
    words, offsets, table_of_column, frequencies, packed, shared, low, high, first, last,
    values, scale, offset, token_scale, kind, linear, out, width, block_stride, token_stride, lane_stride,
):  # fmt: skip
    """Decode columns low to high, tokens first to last; returns a damaged column or -1.

    `offsets` are the segment's. Column c, token t goes to element (c // width) * block_stride + t * token_stride +
    (c % width) * lane_stride of `out`. `linear` says that `values` is one row of equal steps of 1. Lanes without a
    column decode an empty stream into a part of the tile nobody reads.
    """
    columns = table_of_column.shape[0]
    n_symbols = frequencies.shape[1]
    columns_a_group = columns // token_scale.shape[0]
    x = np.empty(_LANES, np.uint32)
    at = np.empty(_LANES, np.uint64)
    end = np.empty(_LANES, np.uint64)
    row = np.empty(_LANES, np.int64)
    tile = np.empty((_TILE, _LANES), np.uint8)
    level = np.empty((_LANES, 256), np.float32)
    slope = np.empty(_LANES, np.float32)
    shift = np.empty(_LANES, np.float32)
    own = np.empty((1 if shared else _LANES, 1024), np.uint32)
    table = packed if shared else own
    base = low
    while base < high:
        block, place, group = base // width, base % width, base // columns_a_group
        # All lanes of a tile lie in one block of `out` and one group of `token_scale`.
        lanes = min(_LANES, high - base, width - place, (group + 1) * columns_a_group - base)
        for lane in range(_LANES):
            if lane >= lanes:
                x[lane], at[lane], end[lane], row[lane] = uint32(0), uint64(0), uint64(0), int64(0)
                continue
            c = base + lane
            k = table_of_column[c]
            start, stop = uint64(offsets[c]), uint64(offsets[c + 1])
            state = uint32(0)
            for _ in range(min(2, offsets[c + 1] - offsets[c])):
                state = uint32(state << uint32(16)) | uint32(words[start])
                start += uint64(1)
            x[lane], at[lane], end[lane] = state, start, stop
            row[lane] = k if shared else lane
            if not shared:
                slot = 0
                for s in range(n_symbols):
                    f = int64(frequencies[k, s])
                    entry = uint32(s) | (uint32(f) << uint32(8))
                    for i in range(f):
                        own[lane, slot + i] = entry + (uint32(i) << uint32(20))
                    slot += f
            slope[lane], shift[lane] = scale[c], offset[c]
            if linear:
                level[lane, 0] = values[0, 0]
            elif kind > 0:
                v = k if values.shape[0] > 1 else 0
                for s in range(n_symbols):
                    level[lane, s] = values[v, s] * scale[c] + offset[c]
        for t0 in range(first, last, _TILE):
            n = min(_TILE, last - t0)
            for lane in range(0, _LANES, 4):
                x0, x1, x2, x3 = x[lane], x[lane + 1], x[lane + 2], x[lane + 3]
                at0, at1, at2, at3 = at[lane], at[lane + 1], at[lane + 2], at[lane + 3]
                end0, end1, end2, end3 = end[lane], end[lane + 1], end[lane + 2], end[lane + 3]
                table0, table1 = table[row[lane]], table[row[lane + 1]]
                table2, table3 = table[row[lane + 2]], table[row[lane + 3]]
                for t in range(n):
                    e0, e1 = table0[x0 & uint32(1023)], table1[x1 & uint32(1023)]
                    e2, e3 = table2[x2 & uint32(1023)], table3[x3 & uint32(1023)]
                    x0, at0 = _step(words, x0, at0, end0, e0)
                    x1, at1 = _step(words, x1, at1, end1, e1)
                    x2, at2 = _step(words, x2, at2, end2, e2)
                    x3, at3 = _step(words, x3, at3, end3, e3)
                    tile[t, lane], tile[t, lane + 1] = uint8(e0), uint8(e1)
                    tile[t, lane + 2], tile[t, lane + 3] = uint8(e2), uint8(e3)
                x[lane], x[lane + 1], x[lane + 2], x[lane + 3] = x0, x1, x2, x3
                at[lane], at[lane + 1], at[lane + 2], at[lane + 3] = at0, at1, at2, at3
            corner = uint64(block * block_stride + t0 * token_stride + place * lane_stride)
            factors = token_scale[group, t0 : t0 + n]
            if lanes == _LANES and lane_stride == 1:
                # Constants, so that this common case becomes vector instructions.
                _emit(kind, linear, tile, level, slope, shift, factors, out, corner, token_stride, 1, _LANES)
            else:
                _emit(kind, linear, tile, level, slope, shift, factors, out, corner, token_stride, lane_stride, lanes)
        for lane in range(lanes):
            if x[lane] != uint32(0) or at[lane] != end[lane]:
                return base + lane
        base += lanes
    return -1


@numba.njit(inline="always")
def _step(words, x, at, end, entry):
    """One symbol: the state without it, with a word pulled in if it fell below 2^16 and the stream has one."""
    x = uint32(((entry >> uint32(8)) & uint32(2047)) * (x >> uint32(10))) + uint32(entry >> uint32(20))
    need = (x < uint32(65536)) & (at < end)
    # A word of padding follows the last stream, so this read is inside even when the stream is at its end.
    pulled = uint32(x << uint32(16)) | uint32(words[at])
    return (pulled if need else x), at + uint64(need)


@numba.njit(inline="always")
def _emit(kind, linear, tile, level, slope, shift, factors, out, corner, token_stride, lane_stride, lanes):
    """Write one tile, symbols (kind 0) or reconstructed values, to `out` from element `corner` on."""
    for t in range(uint64(factors.shape[0])):
        at = corner + t * uint64(token_stride)
        factor = factors[t]
        for i in range(uint64(lanes)):
            s = tile[t, i]
            to = at + i * uint64(lane_stride)
            if kind == 0:
                out[to] = s
            else:
                if linear:
                    y = ((np.float32(s) + level[0, 0]) * slope[i] + shift[i]) * factor
                else:
                    y = level[i, s] * factor
                if kind == 1:
                    out[to] = y
                elif kind == 2:
                    out[to] = _float16_bits(y)
                else:
                    out[to] = _bfloat16_bits(y)


@numba.njit(inline="always")
def _float16_bits(y):
    """Bits of the float16 nearest to a float32, ties to even."""
    bits = np.float32(y).view(np.uint32)
    sign = (bits >> uint32(16)) & uint32(0x8000)
    bits &= uint32(0x7FFFFFFF)
    if bits >= uint32(0x47800000):
        half = uint32(0x7E00) if bits > uint32(0x7F800000) else uint32(0x7C00)
    elif bits < uint32(0x38800000):
        # Below the smallest normal float16: adding 0.5 lets the float32 adder round to a multiple of 2^-24.
        half = np.float32(np.abs(np.float32(y)) + np.float32(0.5)).view(np.uint32) - uint32(0x3F000000)
    else:
        half = (bits - uint32(0x38000000) + uint32(0xFFF) + ((bits >> uint32(13)) & uint32(1))) >> uint32(13)
    return half | sign


@numba.njit(inline="always")
def _bfloat16_bits(y):
    """Bits of the bfloat16 nearest to a float32, ties to even."""
    bits = np.float32(y).view(np.uint32)
    if (bits & uint32(0x7FFFFFFF)) > uint32(0x7F800000):
        return (bits >> uint32(16)) | uint32(0x40)
    return (bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16)


def _unpack_lengths(shortest, widths, deltas, offsets):
    """First words of all streams; returns the last stream's end. `deltas` holds 4 bytes a width, widths are <= 16."""
    n = offsets.shape[0] - 1
    at = int64(0)
    first_bit = int64(0)
    for group in range(widths.shape[0]):
        width = int64(widths[group])
        mask = (uint32(1) << uint32(width)) - uint32(1)
        for i in range(min(32, n - group * 32)):
            offsets[group * 32 + i] = at
            bit = first_bit + i * width
            delta = uint32(0)
            if width > 0:
                for j in range(3):
                    byte = (bit >> 3) + j
                    if byte < deltas.shape[0]:
                        delta |= uint32(deltas[byte]) << uint32(8 * j)
                delta = (delta >> uint32(bit & 7)) & mask
            at += int64(shortest[group]) + int64(delta)
        first_bit += 32 * width
    offsets[n] = at
    return at


def _pack_deltas(deltas, widths, packed):
    first_bit = int64(0)
    for group in range(deltas.shape[0]):
        width = int64(widths[group])
        for i in range(deltas.shape[1]):
            bit = first_bit + i * width
            value = uint64(deltas[group, i]) << uint64(bit & 31)
            if width > 0:
                packed[bit >> 5] |= uint32(value & uint64(0xFFFFFFFF))
                if (bit & 31) + width > 32:
                    packed[(bit >> 5) + 1] |= uint32(value >> uint64(32))
        first_bit += 32 * width
