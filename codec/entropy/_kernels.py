"""The compiled inner loops of both coders: columns in, units out and back. No argument is checked here.

Kernels are compiled on first use for one set of types each (read-only inputs, outputs of any strides), so that no
call meets an unexpected compilation; they run without the GIL. Machine code is kept in numba's cache where one is
writable (beside this file, the user's cache directory, or NUMBA_CACHE_DIR). All kernels are in one file because the
cache notices a change only in the file of the kernel itself, not in what it inlines.

A rANS decoder's table has one 32-bit word per slot (`tables.Tables.packed`), from which a step takes everything:

    bit 31        20 19          8 7        0
        +-----------+-------------+----------+
        | remainder |  frequency  |  symbol  |     remainder = slot - the symbol's first slot, in 0..1023
        +-----------+-------------+----------+     frequency in 1..1024, its bit 19 unused

    state = frequency * (state >> 10) + remainder

A decoder works on tiles: `LANES` columns side by side, one per lane of its vectors, and `TILE` tokens.
"""

# numba gives these functions their types; mypy cannot see them.
# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numba
import numpy as np
from llvmlite import ir
from numba import int64, types, uint8, uint32, uint64
from numba.extending import intrinsic

from kvstream.codec.entropy.kinds import KINDS
from kvstream.codec.entropy.tables import FREQUENCY_SHIFT, PROB_BITS, PROB_SCALE, REMAINDER_SHIFT

Kernel = Callable[..., Any]
VECTOR = 16
"""Lanes of one vector: 16 float32 are a cache line of token-major output."""
LANES = 32
"""Columns decoded into one tile: two vectors, so that one's memory accesses hide the other's."""
TILE = 128
"""Tokens of a tile: it stays in the L1 cache."""
VECTOR_BYTES = 4 * VECTOR
"""Of 32-bit lanes."""
ROW_BYTES = 4 * LANES
"""A row of `lookup`: one float32 per lane."""

SYMBOL, FLOAT32, FLOAT16, BFLOAT16 = (KINDS[kind] for kind in ("uint8", "float32", "float16", "bfloat16"))
SLOT_MASK = PROB_SCALE - 1
FREQUENCY_MASK = 2 * PROB_SCALE - 1
WORD_BITS = 16
LOWER_BOUND = 1 << WORD_BITS
"""A decoder whose state falls below this takes in the stream's next word."""
RECIPROCAL_BITS = 42
"""x < f * 2^22 when x is divided by a frequency f, so x // f == (x * ceil(2^42 / f)) >> 42 exactly, in 64 bits."""


@dataclass(frozen=True)
class LengthKernels:
    pack: Kernel
    unpack: Kernel


@dataclass(frozen=True)
class CoderKernels:
    encode: Kernel
    decode: Mapping[str, Kernel]
    """By the output's dtype: uint8 (symbols), uint16 (bits of 16-bit floats), float32."""


def _array(dtype: types.Type, ndim: int, layout: Literal["C", "A"] = "C", *, readonly: bool = True) -> Any:
    return types.Array(dtype, ndim, layout, readonly=readonly)


_BYTES, _WORDS, _LENGTHS = _array(types.uint8, 1), _array(types.uint16, 1), _array(types.int64, 1)
_LENGTHS_OUT = _array(types.int64, 1, readonly=False)
_GRID16, _GRID32 = _array(types.uint16, 2), _array(types.uint32, 2)
_SYMBOLS = _array(types.uint8, 2, "A")
_FLOATS, _FLOAT_GRID = _array(types.float32, 1), _array(types.float32, 2)
_TASK = types.Tuple((_LENGTHS, types.int64, types.int64, types.int64, types.int64))
"""`sections.Task` as a plain tuple: with a class in a signature, numba's cache breaks when the class is renamed."""


@cache
def lengths() -> LengthKernels:
    return LengthKernels(
        pack=_compile(
            _pack_deltas, types.void(_array(types.int64, 2), _BYTES, _array(types.uint32, 1, readonly=False))
        ),
        unpack=_compile(_unpack_lengths, types.int64(_WORDS, _BYTES, _array(types.uint32, 1), _LENGTHS_OUT)),
    )


@cache
def rans() -> CoderKernels:
    words_out = _array(types.uint16, 1, readonly=False)
    return CoderKernels(
        encode=_compile(_rans_encode, types.int64(_SYMBOLS, _WORDS, _GRID16, _GRID16, words_out, _LENGTHS_OUT)),
        decode=_decoders(_rans_decode, _WORDS, _GRID16, _GRID32, types.boolean, _WORDS),
    )


@cache
def arithmetic() -> CoderKernels:
    bytes_out = _array(types.uint8, 1, readonly=False)
    return CoderKernels(
        encode=_compile(_arithmetic_encode, types.int64(_SYMBOLS, _WORDS, _GRID32, bytes_out, _LENGTHS_OUT)),
        decode=_decoders(_arithmetic_decode, _WORDS, _GRID32, _BYTES),
    )


def _decoders(function: Kernel, *leading: types.Type) -> dict[str, Kernel]:
    return {
        str(dtype): _compile(function, types.int64(*leading, _TASK, _output(dtype)))
        for dtype in (types.uint8, types.uint16, types.float32)
    }


def _output(dtype: types.Type) -> Any:
    """`sections.Output` as a plain tuple."""
    reconstruction = (_FLOAT_GRID, _FLOATS, _FLOATS, _FLOAT_GRID, types.int64, types.boolean)
    strides = (types.int64, types.int64, types.int64, types.int64)
    return types.Tuple((*reconstruction, _array(dtype, 1, readonly=False), *strides))


def _compile(function: Kernel, signature: Any) -> Kernel:
    try:
        return numba.njit(signature, nogil=True, cache=True)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        return numba.njit(signature, nogil=True)(function)


def _rans_encode(symbols, table_of_column, frequencies, starts, words, lengths):
    """Code `symbols` [C, T]; returns the words written, or -1 - column for a symbol without a slot.

    Each stream is written downward from the end of the longest room it can need, then moved next to the one before.
    """
    columns, tokens = symbols.shape
    n_symbols = frequencies.shape[1]
    step = np.empty((n_symbols, 2), np.uint64)
    used = int64(0)
    for c in range(columns):
        k = table_of_column[c]
        for s in range(n_symbols):
            f = uint64(frequencies[k, s])
            step[s, 0] = (uint64(1 << RECIPROCAL_BITS) + f - uint64(1)) // f if f > uint64(0) else uint64(0)
            step[s, 1] = f | (uint64(starts[k, s]) << uint64(32))
        top = used + tokens + 2
        at = top
        x = uint64(0)
        for t in range(tokens - 1, -1, -1):
            s = int64(symbols[c, t])
            if s >= n_symbols or step[s, 0] == uint64(0):
                return -1 - c
            f = step[s, 1] & uint64(0xFFFFFFFF)
            if x >= (f << uint64(32 - PROB_BITS)):
                at -= 1
                words[at] = x & uint64(0xFFFF)
                x >>= uint64(16)
            q = (x * step[s, 0]) >> uint64(RECIPROCAL_BITS)
            x = (q << uint64(PROB_BITS)) + (x - q * f) + (step[s, 1] >> uint64(32))
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


def _rans_decode(table_of_column, frequencies, packed, shared, words, task, output):
    """Decode a task's streams; returns a damaged column or -1.

    With `shared`, all columns use the rows of `packed`, else each lane's table is unpacked from `frequencies` first.
    Lanes without a column decode an empty stream into a part of the tile that is never read.
    """
    offsets, low_column, high_column, first, last = task
    values, scale, offset, token_scale, kind, linear, out, width, block_stride, token_stride, lane_stride = output
    columns = table_of_column.shape[0]
    n_symbols = frequencies.shape[1]
    columns_per_group = columns // token_scale.shape[0]
    state = np.empty(LANES, np.uint32)
    at = np.empty(LANES, np.int32)
    end = np.empty(LANES, np.int32)
    row = np.empty(LANES, np.int32)
    tile = np.empty((TILE, LANES), np.uint8)
    lookup = np.empty((256, LANES), np.float32)
    line = np.empty(VECTOR, np.float32)
    own = np.empty((1 if shared else LANES, PROB_SCALE), np.uint32)
    table = packed if shared else own
    base = low_column
    while base < high_column:
        block, place, group = base // width, base % width, base // columns_per_group
        # All lanes of a tile lie in one block of the output and one group of `token_scale`.
        lanes = min(LANES, high_column - base, width - place, (group + 1) * columns_per_group - base)
        # Words are read in pairs of which the second counts, so the first place read from is 1.
        origin = max(offsets[base] - 1, 0)
        for lane in range(LANES):
            state[lane], at[lane], end[lane], row[lane] = 0, 1, 1, 0
            if lane >= lanes:
                continue
            c = base + lane
            k = table_of_column[c]
            x = uint32(0)
            start, stop = offsets[c], offsets[c + 1]
            for _ in range(min(2, stop - start)):
                x = uint32(x << uint32(WORD_BITS)) | uint32(words[start])
                start += 1
            state[lane], at[lane], end[lane] = x, max(start - origin, 1), max(stop - origin, 1)
            row[lane] = (int64(k) if shared else lane) << PROB_BITS
            if not shared:
                slot = 0
                for s in range(n_symbols):
                    f = int64(frequencies[k, s])
                    entry = uint32(s) | (uint32(f) << uint32(FREQUENCY_SHIFT))
                    for i in range(f):
                        own[lane, slot + i] = entry + (uint32(i) << uint32(REMAINDER_SHIFT))
                    slot += f
            _fill_lookup(lookup, lane, k, values, scale[c], offset[c], kind, linear)
        for t0 in range(first, last, TILE):
            n = min(TILE, last - t0)
            _rans_tile(
                uint64(words.ctypes.data + 2 * origin), uint64(table.ctypes.data), uint64(state.ctypes.data),
                uint64(at.ctypes.data), uint64(end.ctypes.data), uint64(row.ctypes.data), uint64(tile.ctypes.data), n,
            )  # fmt: skip
            corner = uint64(block * block_stride + t0 * token_stride + place * lane_stride)
            factors = token_scale[group, t0 : t0 + n]
            _write_tile(tile, lookup, line, factors, kind, linear, out, corner, token_stride, lane_stride, lanes)
        for lane in range(lanes):
            if state[lane] != 0 or at[lane] != end[lane]:
                return base + lane
        base += lanes
    return -1


@numba.njit(inline="always")
def _fill_lookup(lookup, lane, k, values, scale, offset, kind, linear):
    """What the symbols of a lane with table k stand for: `lookup` [symbol, lane]; where that is linear in the symbol,
    rows 0 to 2 hold the first value, scale and offset instead."""
    if linear:
        lookup[0, lane], lookup[1, lane], lookup[2, lane] = values[0, 0], scale, offset
    elif kind != SYMBOL:
        row = k if values.shape[0] > 1 else 0
        for s in range(values.shape[1]):
            lookup[s, lane] = values[row, s] * scale + offset


@numba.njit(inline="always")
def _write_tile(tile, lookup, line, factors, kind, linear, out, corner, token_stride, lane_stride, lanes):
    """Write a tile's symbols, or what they stand for, to `out` from element `corner` on."""
    for t in range(uint64(factors.shape[0])):
        for first in range(0, lanes, VECTOR):
            valid = min(VECTOR, lanes - first)
            whole = valid == VECTOR and lane_stride == 1
            at = corner + t * uint64(token_stride) + uint64(first * lane_stride)
            symbols = uint64(tile.ctypes.data) + t * uint64(LANES) + uint64(first)
            address = uint64(out.ctypes.data) + at * uint64(out.itemsize)
            if kind == SYMBOL:
                if whole:
                    _copy_row(address, symbols)
                else:
                    for i in range(uint64(valid)):
                        out[at + i * uint64(lane_stride)] = tile[t, uint64(first) + i]
                continue
            entries, values = uint64(lookup.ctypes.data) + uint64(4 * first), uint64(line.ctypes.data)
            if linear:
                _linear_row(values, symbols, entries)
            else:
                _lookup_row(values, symbols, entries)
            if whole:
                if kind == FLOAT32:
                    _write_row_float32(address, values, factors[t])
                elif kind == FLOAT16:
                    _write_row_float16(address, values, factors[t])
                else:
                    _write_row_bfloat16(address, values, factors[t])
            else:
                for i in range(uint64(valid)):
                    y = line[i] * factors[t]
                    to = at + i * uint64(lane_stride)
                    if kind == FLOAT32:
                        out[to] = y
                    elif kind == FLOAT16:
                        out[to] = _float16_bits(y)
                    else:
                        out[to] = _bfloat16_bits(y)


_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _vector(element):
    return ir.VectorType(element, VECTOR)


def _all(value, element=_I32):
    return ir.Constant(_vector(element), [value] * VECTOR)


def _broadcast(builder, value):
    one = builder.insert_element(ir.Constant(_vector(value.type), ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, _all(0))


def _load(builder, address, element, offset=0):
    """A vector of `element` from an address plus a number of bytes."""
    address = builder.add(address, _I64(offset))
    loaded = builder.load(builder.inttoptr(address, _vector(element).as_pointer()))
    loaded.align = 1
    return loaded


def _store(builder, value, address, offset=0):
    address = builder.add(address, _I64(offset))
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _gather(builder, address, index, scale_bits, align):
    """32 bits a lane, from an address plus index (int32, not negative) times 2^scale_bits."""
    distance = builder.shl(builder.zext(index, _vector(_I64)), _all(scale_bits, _I64))
    pointers = _vector(_I32.as_pointer())
    places = builder.inttoptr(builder.add(_broadcast(builder, address), distance), pointers)
    kind = ir.FunctionType(_vector(_I32), [pointers, _I32, _vector(ir.IntType(1)), _vector(_I32)])
    name = f"llvm.masked.gather.v{VECTOR}i32.v{VECTOR}p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, [places, _I32(align), _all(1, ir.IntType(1)), _all(0)])


@intrinsic
def _rans_tile(typing_context, words, table, state, at, end, row, tile, n):
    """Decode n > 0 tokens of all lanes into rows of `tile`; states and places are read and written back.

    A step looks up the slot's word, takes the symbol out of the state, and takes in the stream's next word, if any,
    where that left less than `LOWER_BOUND`. Explicit vectors: where the processor gathers, this is twice as
    fast as scalar code, and elsewhere the compiler makes scalar code of it.
    """

    def generate(context, builder, signature, args):
        words, table, state, at, end, row, tile, n = args
        vectors = range(LANES // VECTOR)
        starts, ends, rows = [], [], []
        for v in vectors:
            starts.append((_load(builder, state, _I32, VECTOR_BYTES * v), _load(builder, at, _I32, VECTOR_BYTES * v)))
            ends.append(_load(builder, end, _I32, VECTOR_BYTES * v))
            rows.append(_load(builder, row, _I32, VECTOR_BYTES * v))
        before = builder.block
        loop, after = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        token = builder.phi(_I64)
        token.add_incoming(_I64(0), before)
        now = [(builder.phi(_vector(_I32)), builder.phi(_vector(_I32))) for _ in vectors]
        for v in vectors:
            for phi, start in zip(now[v], starts[v], strict=True):
                phi.add_incoming(start, before)
        then = []
        for v in vectors:
            x, place = now[v]
            entry = _gather(builder, table, builder.or_(builder.and_(x, _all(SLOT_MASK)), rows[v]), 2, 4)
            word = builder.lshr(_gather(builder, words, builder.sub(place, _all(1)), 1, 2), _all(WORD_BITS))
            frequency = builder.and_(builder.lshr(entry, _all(FREQUENCY_SHIFT)), _all(FREQUENCY_MASK))
            x = builder.mul(frequency, builder.lshr(x, _all(PROB_BITS)))
            x = builder.add(x, builder.lshr(entry, _all(REMAINDER_SHIFT)))
            low, more = builder.icmp_unsigned("<", x, _all(LOWER_BOUND)), builder.icmp_signed("<", place, ends[v])
            need = builder.and_(low, more)
            x = builder.select(need, builder.or_(builder.shl(x, _all(WORD_BITS)), word), x)
            then.append((x, builder.add(place, builder.zext(need, _vector(_I32)))))
            to = builder.add(tile, builder.mul(token, _I64(LANES)))
            _store(builder, builder.trunc(entry, _vector(_I8)), to, VECTOR * v)
        following = builder.add(token, _I64(1))
        token.add_incoming(following, loop)
        for v in vectors:
            for phi, value in zip(now[v], then[v], strict=True):
                phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, n), loop, after)
        builder.position_at_end(after)
        for v in vectors:
            _store(builder, then[v][0], state, VECTOR_BYTES * v)
            _store(builder, then[v][1], at, VECTOR_BYTES * v)
        return context.get_dummy_value()

    addresses = [types.uint64] * 7
    return types.void(*addresses, types.int64), generate


def _round_float16(builder, y):
    """Bits of the float16 nearest to each float32, ties to even."""
    bits = builder.bitcast(y, _vector(_I32))
    sign = builder.and_(builder.lshr(bits, _all(16)), _all(0x8000))
    bits = builder.and_(bits, _all(0x7FFFFFFF))
    nan = builder.icmp_unsigned(">", bits, _all(0x7F800000))
    huge = builder.select(nan, _all(0x7E00), _all(0x7C00))
    # Below the smallest normal float16: adding 0.5 lets the float32 adder round to a multiple of 2^-24.
    small = builder.fadd(builder.bitcast(bits, y.type), _all(0.5, _F32))
    small = builder.sub(builder.bitcast(small, bits.type), _all(0x3F000000))
    odd = builder.and_(builder.lshr(bits, _all(13)), _all(1))
    normal = builder.add(builder.sub(bits, _all(0x38000000 - 0xFFF)), odd)
    half = builder.select(
        builder.icmp_unsigned(">=", bits, _all(0x47800000)),
        huge,
        builder.select(builder.icmp_unsigned("<", bits, _all(0x38800000)), small, builder.lshr(normal, _all(13))),
    )
    return builder.or_(half, sign)


def _round_bfloat16(builder, y):
    """Bits of the bfloat16 nearest to each float32, ties to even."""
    bits = builder.bitcast(y, _vector(_I32))
    high = builder.lshr(bits, _all(16))
    odd = builder.and_(high, _all(1))
    rounded = builder.lshr(builder.add(builder.add(bits, _all(0x7FFF)), odd), _all(16))
    nan = builder.icmp_unsigned(">", builder.and_(bits, _all(0x7FFFFFFF)), _all(0x7F800000))
    return builder.select(nan, builder.or_(high, _all(0x40)), rounded)


@intrinsic
def _copy_row(typing_context, to, symbols):
    """Copy a vector of symbols between addresses."""

    def generate(context, builder, signature, args):
        _store(builder, _load(builder, args[1], _I8), args[0])
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), generate


@intrinsic
def _linear_row(typing_context, line, symbols, lookup):
    """A vector of symbols to float32: (symbol + lookup[0]) * lookup[1] + lookup[2], lane by lane."""

    def generate(context, builder, signature, args):
        line, symbols, lookup = args
        y = builder.uitofp(_load(builder, symbols, _I8), _vector(_F32))
        y = builder.fadd(y, _load(builder, lookup, _F32))
        y = builder.fmul(y, _load(builder, lookup, _F32, ROW_BYTES))
        y = builder.fadd(y, _load(builder, lookup, _F32, 2 * ROW_BYTES))
        _store(builder, y, line)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), generate


@intrinsic
def _lookup_row(typing_context, line, symbols, lookup):
    """A vector of symbols to float32: lookup[symbol, lane]."""

    def generate(context, builder, signature, args):
        line, symbols, lookup = args
        symbol = builder.zext(_load(builder, symbols, _I8), _vector(_I32))
        lane = ir.Constant(_vector(_I32), list(range(VECTOR)))
        index = builder.add(builder.mul(symbol, _all(LANES)), lane)
        _store(builder, _gather(builder, lookup, index, 2, 4), line)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), generate


def _row_writer(rounding):
    """Write a vector of float32 times a factor to an address, as float32 or rounded to 16 bits."""

    @intrinsic
    def write_row(typing_context, to, line, factor):
        def generate(context, builder, signature, args):
            to, line, factor = args
            y = builder.fmul(_load(builder, line, _F32), _broadcast(builder, factor))
            if rounding is not None:
                y = builder.trunc(rounding(builder, y), _vector(_I16))
            _store(builder, y, to)
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64, types.float32), generate

    return write_row


_write_row_float32 = _row_writer(None)
_write_row_float16 = _row_writer(_round_float16)
_write_row_bfloat16 = _row_writer(_round_bfloat16)


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
    """First words of all streams; returns the last stream's end. `deltas` holds a word a width, and one more that is
    not used; widths are <= 16."""
    n = offsets.shape[0] - 1
    at = int64(0)
    first_bit = int64(0)
    for group in range(widths.shape[0]):
        width = int64(widths[group])
        mask = (uint64(1) << uint64(width)) - uint64(1)
        least = int64(shortest[group])
        for i in range(min(32, n - group * 32)):
            offsets[group * 32 + i] = at
            bit = first_bit + i * width
            both = uint64(deltas[bit >> 5]) | uint64(deltas[(bit >> 5) + 1]) << uint64(32)
            at += least + int64((both >> uint64(bit & 31)) & mask)
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


def _arithmetic_encode(symbols, table_of_column, cdf, data, lengths):
    """Code `symbols` [C, T] with `cdf` [K, S + 1]; returns the bytes written, or -1 - column for an unknown symbol.

    Bits that low and high share leave at once; a run of undecided middle bits (`pending`) leaves behind the first bit
    that decides it.
    """
    columns, tokens = symbols.shape
    n_symbols = cdf.shape[1] - 1
    used = uint64(0)
    for c in range(columns):
        k = table_of_column[c]
        start = used
        low, high = uint32(0), uint32(0xFFFFFFFF)
        pending = int64(0)
        bits, n_bits = uint64(0), int64(0)
        for t in range(tokens + 1):
            if t < tokens:
                s = symbols[c, t]
                if s >= n_symbols:
                    return -1 - c
                low, high = _narrow(low, high, cdf[k, s], cdf[k, s + 1])
                same = _leading_zeros(low ^ high)
                leaving = low
            else:
                # One more bit, and behind it one more undecided one, tell the last interval's middle half apart.
                same, leaving = int64(1), low & uint32(0x40000000)
                leaving = uint32(0x80000000) if leaving else uint32(0)
                pending += 1
            if same > 0:
                first = uint64(leaving >> uint32(31))
                bits, n_bits = (bits << uint64(1)) | first, n_bits + 1
                while pending > 0:
                    n = min(pending, 24)
                    run = (uint64(1) << uint64(n)) - uint64(1)
                    bits, n_bits = (bits << uint64(n)) | (uint64(0) if first else run), n_bits + n
                    pending -= n
                    while n_bits >= 8:
                        n_bits -= 8
                        data[used] = uint8(bits >> uint64(n_bits))
                        used += uint64(1)
                rest = uint64(leaving & uint32(0x7FFFFFFF)) >> uint64(32 - same)
                bits, n_bits = (bits << uint64(same - 1)) | rest, n_bits + same - 1
                while n_bits >= 8:
                    n_bits -= 8
                    data[used] = uint8(bits >> uint64(n_bits))
                    used += uint64(1)
            if t < tokens:
                low, high, undecided = _renormalise(low, high, same)
                pending += undecided
        if n_bits > 0:
            data[used] = uint8(bits << uint64(8 - n_bits))
            used += uint64(1)
        lengths[c] = used - start
    return int64(used)


def _arithmetic_decode(table_of_column, cdf, data, task, output):
    """As `_rans_decode`, with `cdf` [K, S + 1] in place of tables."""
    offsets, low_column, high_column, first, last = task
    values, scale, offset, token_scale, kind, linear, out, width, block_stride, token_stride, lane_stride = output
    columns = table_of_column.shape[0]
    n_symbols = cdf.shape[1] - 1
    columns_per_group = columns // token_scale.shape[0]
    low = np.empty(LANES, np.uint32)
    high = np.empty(LANES, np.uint32)
    value = np.empty(LANES, np.uint32)
    bits = np.empty(LANES, np.uint64)
    n_bits = np.empty(LANES, np.int64)
    at = np.empty(LANES, np.uint64)
    taken = np.empty(LANES, np.int64)
    tile = np.empty((TILE, LANES), np.uint8)
    lookup = np.empty((256, LANES), np.float32)
    line = np.empty(VECTOR, np.float32)
    base = low_column
    while base < high_column:
        block, place, group = base // width, base % width, base // columns_per_group
        lanes = min(LANES, high_column - base, width - place, (group + 1) * columns_per_group - base)
        for lane in range(lanes):
            c = base + lane
            low[lane], high[lane] = uint32(0), uint32(0xFFFFFFFF)
            bits[lane], n_bits[lane], at[lane] = _refill(
                data, uint64(0), int64(0), uint64(offsets[c]), uint64(offsets[c + 1])
            )
            value[lane] = uint32(bits[lane] >> uint64(n_bits[lane] - 32))
            n_bits[lane] -= 32
            taken[lane] = 0
            _fill_lookup(lookup, lane, table_of_column[c], values, scale[c], offset[c], kind, linear)
        for t0 in range(first, last, TILE):
            n = min(TILE, last - t0)
            for lane in range(lanes):
                k = table_of_column[base + lane]
                end = uint64(offsets[base + lane + 1])
                lo, hi, v, b, n_b, a = low[lane], high[lane], value[lane], bits[lane], n_bits[lane], at[lane]
                row = cdf[k]
                for t in range(n):
                    span = uint64(hi - lo) + uint64(1)
                    target = uint64(uint32(v - lo))
                    s, step = uint64(0), uint64(n_symbols)
                    while step > uint64(1):
                        half = step >> uint64(1)
                        # The symbol's count reaches c exactly when value - low >= (span * c) >> 16.
                        s = s + half if target >= (span * uint64(row[s + half])) >> uint64(16) else s
                        step -= half
                    tile[t, lane] = s
                    lo, hi = _narrow(lo, hi, row[s], row[s + uint64(1)])
                    same = _leading_zeros(lo ^ hi)
                    lo, hi, undecided = _renormalise(lo, hi, same)
                    shift = same + undecided
                    b, n_b, a = _refill(data, b, n_b, a, end)
                    incoming = uint32((b >> uint64(n_b - shift)) & ((uint64(1) << uint64(shift)) - uint64(1)))
                    v = uint32(uint64(v) << uint64(shift)) | incoming
                    v ^= uint32(0x80000000) if undecided > 0 else uint32(0)
                    n_b -= shift
                    taken[lane] += shift
                low[lane], high[lane], value[lane], bits[lane], n_bits[lane], at[lane] = lo, hi, v, b, n_b, a
            corner = uint64(block * block_stride + t0 * token_stride + place * lane_stride)
            factors = token_scale[group, t0 : t0 + n]
            _write_tile(tile, lookup, line, factors, kind, linear, out, corner, token_stride, lane_stride, lanes)
        for lane in range(lanes):
            # The encoder ended with two bits, then zeros to a full byte.
            ending = uint32(0x80000000) if low[lane] & uint32(0x40000000) else uint32(0x40000000)
            if value[lane] != ending or offsets[base + lane + 1] - offsets[base + lane] != (taken[lane] + 9) // 8:
                return base + lane
        base += lanes
    return -1


@numba.njit(inline="always")
def _narrow(low, high, below, above):
    """The part of the interval [low, high] that belongs to cumulative counts `below` to `above` of 65,536."""
    span = uint64(high - low) + uint64(1)
    return (
        uint32(low + uint32((span * uint64(below)) >> uint64(16))),
        uint32(low + uint32((span * uint64(above)) >> uint64(16)) - uint32(1)),
    )


@numba.njit(inline="always")
def _renormalise(low, high, same):
    """Drop `same` leading bits, then every second bit that straddles the middle; returns how many of the latter."""
    low = uint32(uint64(low) << uint64(same))
    high = uint32((uint64(high) << uint64(same)) | ((uint64(1) << uint64(same)) - uint64(1)))
    undecided = _leading_zeros(uint32(~uint32((low & ~high) << uint32(1))))
    low = uint32(uint64(low) << uint64(undecided)) & uint32(0x7FFFFFFF)
    high = uint32((uint64(high) << uint64(undecided)) | ((uint64(1) << uint64(undecided)) - uint64(1)))
    return low, high | uint32(0x80000000), undecided


@numba.njit(inline="always")
def _refill(data, bits, n_bits, at, end):
    """At least 32 bits in the reservoir; beyond a stream's end there are zeros."""
    while n_bits <= 32:
        more = uint64(0)
        for i in range(uint64(4)):
            more = (more << uint64(8)) | (uint64(data[at + i]) if at + i < end else uint64(0))
        bits, n_bits, at = (bits << uint64(32)) | more, n_bits + 32, at + uint64(4)
    return bits, n_bits, at


@intrinsic
def _leading_zeros(typing_context, x):
    """Of a uint32, as int64; 32 for 0."""

    def generate(context, builder, signature, args):
        return builder.zext(builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0)), ir.IntType(64))

    return types.int64(types.uint32), generate
