"""The Triton kernels of `codec.kvstream_triton`: coefficients from streams, values from coefficients, and back.

Those that decode are not specialised on what differs from chunk to chunk: each such variant would be compiled in
mid-session.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# Triton gives kernels their types.

from __future__ import annotations

import triton
import triton.language as tl

from codec.entropy.rans_triton import advance, begin


@triton.jit
def _at(token_at, t, mask, token_stride, TABLE: tl.constexpr):
    """Element offsets of tokens."""
    if TABLE:
        return tl.load(token_at + t, mask=mask, other=0)
    else:
        return t.to(tl.int64) * token_stride


@triton.jit
def _halves(dims, CONTIGUOUS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """The dimensions of a head's two halves: as they lie, or from a table."""
    j = tl.arange(0, HALF)
    if CONTIGUOUS:
        first = j
        second = D // 2 + j
    else:
        first = tl.load(dims + j, mask=j < D // 2, other=0)
        second = tl.load(dims + D // 2 + j, mask=j < D // 2, other=0)
    return first, second


@triton.jit(do_not_specialize=["payload", "units", "tokens", "segment_tokens", "first_segment"])
def coefficients(
    payload, offsets, rows, slots, entries, unit, damaged, bases, token_at,
    units, columns, tokens, segment_tokens, first_segment, first_column, last_column,
    width, dim, token_stride, head_stride, dim_stride,
    TABLE: tl.constexpr, ELEMENT: tl.constexpr, N_SYMBOLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    programs = tl.cdiv(last_column - first_column, BLOCK)
    segment = first_segment + tl.program_id(0) // programs
    # Lanes beyond the last column repeat it and store the same values: no mask in the loop.
    column = first_column + (tl.program_id(0) % programs) * BLOCK + tl.arange(0, BLOCK)
    column = tl.minimum(column, last_column - 1)
    stream = segment * columns + column
    end = tl.minimum(tl.maximum(tl.load(offsets + stream + 1), 0), units)
    at = tl.minimum(tl.maximum(tl.load(offsets + stream), 0), end)
    row = tl.load(rows + column)
    slots += row * 1024
    entries += row * N_SYMBOLS
    factor = tl.load(unit + column)
    place = column % width
    to = tl.load(bases + column // width).to(tl.pointer_type(ELEMENT))
    to += (place // dim).to(tl.int64) * head_stride + (place % dim).to(tl.int64) * dim_stride
    first = segment * segment_tokens
    last = tl.minimum(first + segment_tokens, tokens)
    if not TABLE:
        to += first.to(tl.int64) * token_stride
    state, ahead, at = begin(payload, at, end)
    if TABLE:
        following = tl.load(token_at + first)
    for t in tl.range(first, last, loop_unroll_factor=4):
        if TABLE:  # a token ahead, so that no store waits for where it goes
            here = following
            following = tl.load(token_at + t + 1)
        _, entry, state, ahead, at = advance(state, ahead, at, end, payload, slots, entries)
        value = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True) * factor
        if TABLE:
            tl.store(to + here, value.to(ELEMENT))
        else:
            tl.store(to, value.to(ELEMENT))
            to += token_stride
    number = tl.max(tl.where((state != 0) | (at != end), stream + 1, 0))
    if number > 0:
        tl.atomic_max(damaged, number)


@triton.jit(do_not_specialize=["column", "token", "n", "first", "last", "wide"])
def clear(
    column, token, wide_index, wide_half, bits, bases, token_at, n, first, last, width, dim, wide,
    token_stride, head_stride, dim_stride, TABLE: tl.constexpr, ELEMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Zero the coefficients in the places of escapes among tokens `[first, last)`: the high part in the target, the
    further bits apart."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.load(column + e, mask=e < n, other=0)
    t = tl.load(token + e, mask=e < n, other=-1)
    some = (t >= first) & (t < last)
    place = c % width
    to = tl.load(bases + c // width).to(tl.pointer_type(ELEMENT)) + _at(token_at, t, some, token_stride, TABLE)
    to += (place // dim).to(tl.int64) * head_stride + (place % dim).to(tl.int64) * dim_stride
    tl.store(to, tl.zeros([BLOCK], ELEMENT), mask=some)
    index = tl.load(wide_index + c, mask=some, other=-1)
    has = some & (index >= 0)
    tl.store(bits + t.to(tl.int64) * wide + index, tl.load(wide_half + index, mask=has).to(tl.uint8), mask=has)


@triton.jit
def _coefficient_tile(
    base, token_at, begin, last_token, offset, token_stride, dim_stride,
    TABLE: tl.constexpr, COEFFICIENT: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Offsets of a tile's tokens, and their coefficients as float16."""
    r = tl.arange(0, BLOCK)
    k = tl.arange(0, DIM)
    there = r < last_token - begin
    if TABLE:
        at = offset + tl.load(token_at + begin + r, mask=there, other=0)
    else:
        at = offset + begin.to(tl.int64) * token_stride + r.to(tl.int64) * token_stride
    places = base.to(tl.pointer_type(COEFFICIENT)) + at[:, None]
    if ALIGNED:  # what is loaded is an address: that vectors may be loaded from it has to be said
        places = tl.max_contiguous(tl.multiple_of(places + k[None, :], [1, 16]), [1, DIM])
    else:
        places += k[None, :].to(tl.int64) * dim_stride
    return at, tl.load(places, mask=there[:, None] & (k < D)[None, :], other=0.0).to(tl.float16)


@triton.jit(
    do_not_specialize=[
        "escape_first", "escape_place", "escape_token", "escape_value", "tokens", "first_token", "last_token",
        "first_pair", "wide",
    ]
)  # fmt: skip
def synthesise(
    bases, token_at, basis, factor, mean, dims, cosine, sine, rope_of_layer,
    wide_first, wide_place, wide_half, bits, escape_first, escape_place, escape_token, escape_value,
    tokens, first_token, last_token, first_pair, heads, wide, token_stride, head_stride, dim_stride,
    TABLE: tl.constexpr, COEFFICIENT: tl.constexpr, VALUE: tl.constexpr, CONTIGUOUS: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Values from coefficients, in place, of one head's keys or values: `TILES` tiles of `BLOCK` tokens.

    Further bits of wide columns are a product of their own, with 16 rows of the basis at a time: a head has few.
    """
    pair = first_pair + tl.program_id(0)
    block = pair // heads
    k = tl.arange(0, DIM)
    j = tl.arange(0, HALF)
    r = tl.arange(0, BLOCK)
    base = tl.load(bases + block)
    offset = (pair % heads).to(tl.int64) * head_stride
    first, second = _halves(dims, CONTIGUOUS, D, HALF)
    rows = basis + pair.to(tl.int64) * (2 * DIM * HALF) + j[None, :]
    basis_a = tl.load(rows + k[:, None] * HALF)
    basis_b = tl.load(rows + (DIM + k[:, None]) * HALF)
    scale = tl.load(factor + pair)
    mean_a = tl.load(mean + pair * (2 * HALF) + j)[None, :]
    mean_b = tl.load(mean + pair * (2 * HALF) + HALF + j)[None, :]
    angle = r[:, None] * HALF + j[None, :]
    if WIDE:
        wide_begin = tl.load(wide_first + pair)
        wide_end = tl.load(wide_first + pair + 1)
    own_first = first_token + tl.program_id(1) * TILES * BLOCK
    own_last = tl.minimum(own_first + TILES * BLOCK, last_token)
    next_at, following = _coefficient_tile(
        base, token_at, own_first, own_last, offset, token_stride, dim_stride,
        TABLE, COEFFICIENT, ALIGNED, D, DIM, BLOCK,
    )  # fmt: skip
    for tile in range(TILES):
        begin = own_first + tile * BLOCK
        there = r < own_last - begin
        at, c = next_at, following
        # a tile ahead, so that this one's products do not wait for memory
        next_at, following = _coefficient_tile(
            base, token_at, begin + BLOCK, own_last, offset, token_stride, dim_stride,
            TABLE, COEFFICIENT, ALIGNED, D, DIM, BLOCK,
        )  # fmt: skip
        a = tl.dot(c, basis_a)
        b = tl.dot(c, basis_b)
        if WIDE:
            for some in range(wide_begin, wide_end, 16):
                index = some + tl.arange(0, 16)
                own = index < wide_end
                place = tl.load(wide_place + index, mask=own, other=0)
                centre = tl.load(wide_half + index, mask=own, other=0)
                low = tl.load(bits + begin.to(tl.int64) * wide + r[:, None] * wide + index[None, :],
                              mask=there[:, None] & own[None, :], other=0)  # fmt: skip
                low = tl.where(own[None, :], low.to(tl.int32) - centre[None, :], 0).to(tl.float16)
                a = tl.dot(low, tl.load(rows + place[:, None] * HALF), a)
                b = tl.dot(low, tl.load(rows + (DIM + place[:, None]) * HALF), b)
        number = pair * tl.cdiv(tokens, BLOCK) + begin // BLOCK
        escape = tl.load(escape_first + number, mask=begin < own_last, other=0)
        last = tl.load(escape_first + number + 1, mask=begin < own_last, other=0)
        for e in range(escape, last):
            place = tl.load(escape_place + e)
            hit = tl.where(r == tl.load(escape_token + e) - begin, tl.load(escape_value + e), 0.0)[:, None]
            a += hit * tl.load(rows + place * HALF).to(tl.float32)
            b += hit * tl.load(rows + (DIM + place) * HALF).to(tl.float32)
        a = a * scale + mean_a
        b = b * scale + mean_b
        if block % 2 == 0:
            row = (tl.load(rope_of_layer + block // 2) * tokens + begin).to(tl.int64) * HALF
            cos = tl.load(cosine + row + angle, mask=there[:, None], other=1.0)
            sin = tl.load(sine + row + angle, mask=there[:, None], other=0.0)
            x = a * cos - b * sin
            b = b * cos + a * sin
            a = x
        if tl.float16 == VALUE:
            a = tl.minimum(tl.maximum(a, -65504.0), 65504.0)
            b = tl.minimum(tl.maximum(b, -65504.0), 65504.0)
        # Every warp has read its coefficients before any of them is overwritten.
        tl.debug_barrier()
        stored = there[:, None] & (j < D // 2)[None, :]
        to = base.to(tl.pointer_type(VALUE)) + at[:, None]
        if ALIGNED and CONTIGUOUS:
            to_a = tl.max_contiguous(tl.multiple_of(to + first[None, :], [1, 16]), [1, HALF])
            to_b = tl.max_contiguous(tl.multiple_of(to + second[None, :], [1, 16]), [1, HALF])
        else:
            to_a = to + first[None, :].to(tl.int64) * dim_stride
            to_b = to + second[None, :].to(tl.int64) * dim_stride
        tl.store(to_a, a.to(VALUE), mask=stored)
        tl.store(to_b, b.to(VALUE), mask=stored)


@triton.jit
def analyse(
    kv, high_part, low_part, inverse_scale, factor, mean, dims, cosine, sine, rope_of_layer,
    rows, shifts, wide_index, thresholds, support,
    symbols, fine, count, places, steps,
    tokens, heads, columns, wide, room,
    layer_stride, side_stride, token_stride, head_stride, dim_stride,
    THRESHOLDS: tl.constexpr, MIDDLE: tl.constexpr, WIDE: tl.constexpr, CONTIGUOUS: tl.constexpr, D: tl.constexpr,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Symbols of one head's keys or values: `TILES` tiles of `BLOCK` tokens.

    Values and the inverse basis are each the sum of two float16 numbers, of whose products the smallest is left out:
    as good as float32.
    """
    pair = tl.program_id(0)
    block = pair // heads
    k = tl.arange(0, DIM)
    j = tl.arange(0, HALF)
    real = k < D
    first, second = _halves(dims, CONTIGUOUS, D, HALF)
    source = kv + (block // 2).to(tl.int64) * layer_stride + (block % 2).to(tl.int64) * side_stride
    source += (pair % heads).to(tl.int64) * head_stride
    matrix = pair.to(tl.int64) * (2 * DIM * HALF) + j[:, None] * DIM + k[None, :]
    high_a = tl.load(high_part + matrix)
    high_b = tl.load(high_part + matrix + HALF * DIM)
    low_a = tl.load(low_part + matrix)
    low_b = tl.load(low_part + matrix + HALF * DIM)
    mean_a = tl.load(mean + pair * (2 * HALF) + j)[None, :]
    mean_b = tl.load(mean + pair * (2 * HALF) + HALF + j)[None, :]
    per_step = 1.0 / tl.load(factor + pair)
    scale = tl.load(inverse_scale + pair)
    column = pair * D + k
    own = tl.load(rows + column, mask=real, other=0)
    largest = tl.load(support + own)[None, :]
    for tile in range(TILES):
        t = (tl.program_id(1) * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        there = t < tokens
        inside = there[:, None] & (j < D // 2)[None, :]
        here = source + t[:, None].to(tl.int64) * token_stride
        a = tl.load(here + first[None, :].to(tl.int64) * dim_stride, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(here + second[None, :].to(tl.int64) * dim_stride, mask=inside, other=0.0).to(tl.float32)
        if block % 2 == 0:
            row = (tl.load(rope_of_layer + block // 2) * tokens + t).to(tl.int64) * HALF
            angle = row[:, None] + j[None, :]
            cos = tl.load(cosine + angle, mask=there[:, None], other=1.0)
            sin = tl.load(sine + angle, mask=there[:, None], other=0.0)
            x = a * cos + b * sin
            b = b * cos - a * sin
            a = x
        a = (a - mean_a) * per_step
        b = (b - mean_b) * per_step
        a_high = a.to(tl.float16)
        b_high = b.to(tl.float16)
        v = tl.dot((a - a_high.to(tl.float32)).to(tl.float16), high_a)
        v = tl.dot((b - b_high.to(tl.float32)).to(tl.float16), high_b, v)
        v = tl.dot(a_high, low_a, v)
        v = tl.dot(b_high, low_b, v)
        v = tl.dot(a_high, high_a, v)
        v = tl.dot(b_high, high_b, v) * scale
        size = tl.abs(v)
        # A threshold lies within a step below its symbol: one comparison tells the symbol.
        ceiling = tl.minimum(size, 127.5).to(tl.int32) + 1
        threshold = tl.load(thresholds + own[None, :] * THRESHOLDS + ceiling)
        magnitude = tl.where(size >= 128.0, 128, ceiling - (size < threshold).to(tl.int32))
        symbol = tl.where(v < 0, -magnitude, magnitude)
        written = there[:, None] & real[None, :]
        if WIDE:
            shift = tl.load(shifts + column, mask=real, other=0)[None, :]
            q = tl.where(size < 1e6, tl.floor(v + 0.5), 1073741824.0).to(tl.int32)
            unit = (1 << shift) >> 1
            symbol = tl.where(shift > 0, (q + unit) >> shift, symbol)
            index = tl.load(wide_index + column, mask=real, other=-1)[None, :]
            beyond = (symbol > largest) | (symbol < -largest)
            low = tl.where(beyond, 0, q - (symbol << shift) + unit)
            tl.store(fine + t[:, None].to(tl.int64) * wide + index, low.to(tl.uint8), mask=written & (index >= 0))
        beyond = written & ((symbol > largest) | (symbol < -largest) | (v != v))
        tl.store(symbols + t[:, None].to(tl.int64) * columns + column[None, :],
                 tl.where(beyond, MIDDLE, MIDDLE + symbol).to(tl.uint8), mask=written)  # fmt: skip
        if tl.max(tl.max(beyond.to(tl.int32), axis=1), axis=0) > 0:
            number = tl.atomic_add(count + tl.zeros([BLOCK, DIM], tl.int32), 1, mask=beyond)
            kept = beyond & (number < room)
            tl.store(places + number, tl.zeros([BLOCK, DIM], tl.int32) + column[None, :], mask=kept)
            tl.store(places + room + number, tl.zeros([BLOCK, DIM], tl.int32) + t[:, None], mask=kept)
            tl.store(steps + number, v, mask=kept)
