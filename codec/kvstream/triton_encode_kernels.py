"""The Triton kernels of `kvstream.codec.kvstream.triton_encode`: coefficients from a cache, and symbols from those."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# Triton gives kernels their types.

from __future__ import annotations

import triton
import triton.language as tl

from kvstream.codec.kvstream.triton_kernels import cosine_sine, halves


@triton.jit(do_not_specialize=["first_turned", "turned_rows", "tokens"])
def prepare(
    kv, apart, out, limit, gain, mean, dims, turned, rope_of_layer, first_turned, turned_rows,
    tokens, heads, width, layer_stride, side_stride, token_stride, head_stride, dim_stride,
    CONTIGUOUS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One head's keys or values of some tokens as rows of `out` float16 `[2, T, width]`, rounded and what that leaves:
    keys turned back to position 0, each value less its mean, times `gain`. Tokens with a magnitude above `limit` are
    marked in `apart`."""
    pair = tl.program_id(0)
    block = pair // heads
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    there = t < tokens
    j = tl.arange(0, HALF)
    first, second = halves(dims, CONTIGUOUS, D, HALF)
    inside = there[:, None] & (j < D // 2)[None, :]
    source = kv + (block // 2).to(tl.int64) * layer_stride + (block % 2).to(tl.int64) * side_stride
    source += (pair % heads).to(tl.int64) * head_stride + t[:, None].to(tl.int64) * token_stride
    a = tl.load(source + first[None, :].to(tl.int64) * dim_stride, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + second[None, :].to(tl.int64) * dim_stride, mask=inside, other=0.0).to(tl.float32)
    far = there & (tl.max(tl.maximum(tl.abs(a), tl.abs(b)), axis=1) > tl.load(limit + pair))
    tl.store(apart + t, tl.full([TOKENS], 1, tl.uint8), mask=far)
    if block % 2 == 0:
        row = tl.load(rope_of_layer + block // 2) * turned_rows + first_turned + t[:, None]
        cos, sin = cosine_sine(turned + row.to(tl.int64) * HALF + j[None, :], there[:, None])
        x = a * cos + b * sin
        b = b * cos - a * sin
        a = x
    scale = tl.load(gain + pair)
    a = (a - tl.load(mean + pair * (2 * HALF) + j)[None, :]) * scale
    b = (b - tl.load(mean + pair * (2 * HALF) + HALF + j)[None, :]) * scale
    # Only values of tokens that are coded apart are beyond what float16 holds.
    a = tl.minimum(tl.maximum(a, -65504.0), 65504.0)
    b = tl.minimum(tl.maximum(b, -65504.0), 65504.0)
    to = out + t[:, None].to(tl.int64) * width + pair * D + j[None, :]
    rest = tokens.to(tl.int64) * width
    rounded = a.to(tl.float16)
    tl.store(to, rounded, mask=inside)
    tl.store(to + rest, (a - rounded.to(tl.float32)).to(tl.float16), mask=inside)
    rounded = b.to(tl.float16)
    tl.store(to + D // 2, rounded, mask=inside)
    tl.store(to + rest + D // 2, (b - rounded.to(tl.float32)).to(tl.float16), mask=inside)


@triton.jit
def analyse(
    rows, analysis, factor, which, tiles, out, step, tokens, width, row_stride, all_columns, count,
    EXACT: tl.constexpr, EVEN: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Coefficients `out` float32 `[A, T]`, in steps, of the columns `which`: the product of their rows of `analysis`
    `[2, C, N]` with their group's part of `rows` `[2, T, width]`, float16, summed in float32. Of both, the second part
    is what rounding left of the first; it is used if EXACT.

    `tiles` int32 `[4, count]`: of a tile, its first place in `which`, where its group ends there, where the group
    begins in a row, and how many values it has; a multiple of STEP if EVEN.
    """
    tile = tl.program_id(0) // tl.cdiv(tokens, TOKENS)
    t = (tl.program_id(0) % tl.cdiv(tokens, TOKENS)) * TOKENS + tl.arange(0, TOKENS)
    c = tl.load(tiles + tile) + tl.arange(0, COLUMNS)
    last = tl.load(tiles + count + tile)
    begin = tl.load(tiles + 2 * count + tile)
    values = tl.load(tiles + 3 * count + tile)
    if EVEN:  # what is loaded may be anything, so that has to be said
        begin = tl.multiple_of(begin, 16)
    k = tl.arange(0, STEP)
    # What lies beyond the last column or token repeats it, and is not stored.
    column = tl.load(which + tl.minimum(c, last - 1))
    left = analysis + column[:, None].to(tl.int64) * row_stride + k[None, :]
    right = rows + tl.minimum(t, tokens - 1)[:, None].to(tl.int64) * width + begin + k[None, :]
    left_rest = all_columns.to(tl.int64) * row_stride
    right_rest = tokens.to(tl.int64) * width
    total = tl.zeros([COLUMNS, TOKENS], tl.float32)
    for at in range(0, values, STEP):
        there = (at + k < values)[None, :]
        a = _part(left, there, EVEN)
        b = tl.trans(_part(right, there, EVEN))
        if EXACT:
            total = tl.dot(_part(left + left_rest, there, EVEN), b, total)
            total = tl.dot(a, tl.trans(_part(right + right_rest, there, EVEN)), total)
        total = tl.dot(a, b, total)
        left += STEP
        right += STEP
    total *= (tl.load(factor + column) * step)[:, None]
    to = out + c[:, None].to(tl.int64) * tokens + t[None, :]
    tl.store(to, total, mask=(c < last)[:, None] & (t < tokens)[None, :])


@triton.jit
def _part(place, there, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(place)
    else:
        return tl.load(place, mask=there, other=0.0)


@triton.jit(do_not_specialize=["columns"])
def survey(
    values, apart, shifts, counts, squares, tokens, columns,
    MAX_SHIFT: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """What `Kinds.cheapest` needs to know of each column of `values` float32 `[C, T]`, in steps; those of tokens that
    are coded apart count as zero."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own = c < columns
    source = values + c.to(tl.int64)[:, None] * tokens
    zeros = tl.zeros([COLUMNS, TOKENS], tl.float32)
    total, energy, error = zeros, zeros, zeros
    r = tl.arange(0, TOKENS)
    for first in range(0, tokens, TOKENS):
        t = first + r
        v = tl.abs(tl.load(source + t[None, :], mask=own[:, None] & (t < tokens)[None, :], other=0.0))
        v = tl.where(v < 1e9, v, 1e9)  # infinity and NaN too
        v = tl.where((tl.load(apart + t, mask=t < tokens, other=1) == 0)[None, :], v, 0.0)
        gap = v - tl.floor(v + 0.5)
        total = total + v
        energy = energy + v * v
        error = error + gap * gap
    mean = tl.sum(total, axis=1) / tokens
    shift = tl.zeros([COLUMNS], tl.int32)
    for k in tl.static_range(MAX_SHIFT):
        shift += (mean > WIDE * (1 << k)).to(tl.int32)
    per_unit = 1.0 / (1 << shift).to(tl.float32)[:, None]
    n0, n1, n2, n3, larger, tail = zeros, zeros, zeros, zeros, zeros, zeros
    for first in range(0, tokens, TOKENS):
        t = first + r
        inside = own[:, None] & (t < tokens)[None, :]
        v = tl.abs(tl.load(source + t[None, :], mask=inside, other=0.0))
        v = tl.where((tl.load(apart + t, mask=t < tokens, other=1) == 0)[None, :], v, 0.0)
        m = (tl.minimum(v * per_unit, HALF) + 0.4).to(tl.int32)
        n0 = n0 + (inside & (m == 0)).to(tl.float32)
        n1 = n1 + (m == 1).to(tl.float32)
        n2 = n2 + (m == 2).to(tl.float32)
        n3 = n3 + (m == 3).to(tl.float32)
        larger = larger + (m > 3).to(tl.float32)
        tail = tail + tl.where(m > 3, m, 0).to(tl.float32)
    to = counts + c * 6
    tl.store(to, tl.sum(n0, axis=1), mask=own)
    tl.store(to + 1, tl.sum(n1, axis=1), mask=own)
    tl.store(to + 2, tl.sum(n2, axis=1), mask=own)
    tl.store(to + 3, tl.sum(n3, axis=1), mask=own)
    tl.store(to + 4, tl.sum(larger, axis=1), mask=own)
    tl.store(to + 5, tl.sum(tail, axis=1), mask=own)
    tl.store(shifts + c, shift.to(tl.uint8), mask=own)
    tl.store(squares + c, tl.sum(energy, axis=1), mask=own)
    tl.store(squares + columns + c, tl.sum(error, axis=1), mask=own)


@triton.jit
def quantise(
    values, apart, rows, shifts, wide_index, thresholds, support, symbols, fine, count, places, steps,
    tokens, columns, wide, room,
    THRESHOLDS: tl.constexpr, MIDDLE: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Symbols uint8 `[T, A]`, low bits uint8 `[T, W]` and escapes of live columns, `values` `[A, T]`; those of
    tokens that are coded apart count as zero."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own = c < columns
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = own[None, :] & (t < tokens)[:, None]
    at = c.to(tl.int64) * tokens
    taken = (tl.load(apart + t, mask=t < tokens, other=1) == 0)[:, None]
    v = tl.load(values + at[None, :] + t[:, None], mask=inside & taken, other=0.0)
    row = tl.load(rows + c, mask=own, other=0)
    shift = tl.load(shifts + c, mask=own, other=0)[None, :]
    largest = tl.load(support + row, mask=own, other=0)[None, :]
    size = tl.abs(v)
    # A threshold lies within a step below its symbol: one comparison tells the symbol.
    ceiling = tl.minimum(size, 127.5).to(tl.int32) + 1
    threshold = tl.load(thresholds + row[None, :] * THRESHOLDS + ceiling, mask=inside, other=0.0)
    magnitude = tl.where(size >= 128.0, 128, ceiling - (size < threshold).to(tl.int32))
    symbol = tl.where(v < 0, -magnitude, magnitude)
    q = tl.where(size < 1e6, tl.floor(v + 0.5), 1073741824.0).to(tl.int32)
    unit = (1 << shift) >> 1
    symbol = tl.where(shift > 0, (q + unit) >> shift, symbol)
    beyond = inside & ((symbol > largest) | (symbol < -largest) | (v != v))
    index = tl.load(wide_index + c, mask=own, other=-1)[None, :]
    low = tl.where(beyond, 0, q - (symbol << shift) + unit)
    tl.store(fine + t[:, None].to(tl.int64) * wide + index, low.to(tl.uint8), mask=inside & (index >= 0))
    tl.store(symbols + t[:, None].to(tl.int64) * columns + c[None, :],
             tl.where(beyond, MIDDLE, MIDDLE + symbol).to(tl.uint8), mask=inside)  # fmt: skip
    if tl.max(tl.max(beyond.to(tl.int32), axis=1), axis=0) > 0:
        number = tl.atomic_add(count + tl.zeros([TOKENS, COLUMNS], tl.int32), 1, mask=beyond)
        kept = beyond & (number < room)
        tl.store(places + number, tl.zeros([TOKENS, COLUMNS], tl.int32) + c[None, :], mask=kept)
        tl.store(places + room + number, tl.zeros([TOKENS, COLUMNS], tl.int32) + t[:, None], mask=kept)
        tl.store(steps + number, v, mask=kept)
