"""The Triton kernels of `kvstream.codec.kvstream.triton_job`: coefficients from streams, values from coefficients.

They are not specialised on what differs from chunk to chunk: each such variant would be compiled in mid-session.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# Triton gives kernels their types.

from __future__ import annotations

import triton
import triton.language as tl

from kvstream.codec.entropy.rans_triton import advance, begin


@triton.jit
def token_offset(token_at, t, mask, token_stride, TABLE: tl.constexpr):
    """Element offsets of tokens."""
    if TABLE:
        return tl.load(token_at + t, mask=mask, other=0)
    else:
        return t.to(tl.int64) * token_stride


@triton.jit
def halves(dims, CONTIGUOUS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """The dimensions of a head's two halves: as they lie, or from a table."""
    j = tl.arange(0, HALF)
    if CONTIGUOUS:
        first = j
        second = D // 2 + j
    else:
        first = tl.load(dims + j, mask=j < D // 2, other=0)
        second = tl.load(dims + D // 2 + j, mask=j < D // 2, other=0)
    return first, second


@triton.jit
def cosine_sine(angles, mask):
    """What is in the lower and the upper half of some int64, as float32; in one read."""
    both = tl.load(angles, mask=mask, other=0)
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _window(payload, at, last):
    """The four words of each stream from `at` on, the first one lowest, uint64; pairs after `last` are not read."""
    pair = at >> 1
    first = tl.load(payload + tl.minimum(pair, last)).to(tl.uint32, bitcast=True).to(tl.uint64)
    second = tl.load(payload + tl.minimum(pair + 1, last)).to(tl.uint32, bitcast=True).to(tl.uint64)
    third = tl.load(payload + tl.minimum(pair + 2, last)).to(tl.uint32, bitcast=True).to(tl.uint64)
    both = first | (second << 32)
    return tl.where((at & 1) == 1, (both >> 16) | (third << 48), both)


@triton.jit
def _advance(state, words, at, end, slots, entries):
    """One symbol of each stream: its entry, and state, words read ahead and place after it."""
    slot = state & 1023
    entry = tl.load(entries + tl.load(slots + slot.to(tl.int32)).to(tl.int32))
    low = entry.to(tl.uint32)
    state = (low & 0xFFFF) * (state >> 10) + (slot - (low >> 16))
    need = (state < 65536) & (at < end)
    state = tl.where(need, (state << 16) | (words.to(tl.uint32) & 0xFFFF), state)
    words = tl.where(need, words >> 16, words)
    return entry, state, words, at + need.to(tl.int32)


@triton.jit
def _store(to, entry, factor):
    value = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True) * factor
    tl.store(to, value.to(tl.float16))


@triton.jit(
    do_not_specialize=[
        "payload", "units", "columns", "first_column", "last_column", "first_segment", "programs", "own", "place",
        "low_units", "low_columns", "low_own", "low_place", "low_offsets", "low_payload", "tokens", "segment_tokens",
        "width",
    ]
)  # fmt: skip
def coefficients(
    payload, offsets, words, slots, entries, out,
    units, columns, first_column, last_column, first_segment, programs, own, place,
    low_units, low_columns, low_own, low_place, low_offsets, low_payload,
    tokens, segment_tokens, width,
    N_SYMBOLS: tl.constexpr, SHIFT: tl.constexpr, LOW_FLAG: tl.constexpr, BLOCK: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Decode streams into `out` float16 `[T, width]`, each column to its place: `programs` of them streams of live
    columns, from segment `first_segment` on; the others those of low bits. `own` and so on are places in `words`; a
    column's own word has its table and, from bit SHIFT on, its number of low bits.

    A symbol takes at most one word. So what four of them may take is read four symbols before it is needed, and its
    latency is hidden however few streams there are.
    """
    program = tl.program_id(0)
    damaged = words
    if program >= programs:
        program -= programs
        payload = words + low_payload
        offsets = words + low_offsets
        damaged = words + LOW_FLAG
        units = low_units
        columns = low_columns
        first_column = 0
        last_column = low_columns
        first_segment = 0
        own = low_own
        place = low_place
    each = tl.cdiv(last_column - first_column, BLOCK)
    segment = first_segment + program // each
    # Lanes beyond the last column repeat it and store the same values: no mask in the loop.
    column = first_column + (program % each) * BLOCK + tl.arange(0, BLOCK)
    column = tl.minimum(column, last_column - 1)
    stream = segment * columns + column
    end = tl.minimum(tl.maximum(tl.load(offsets + stream + 1), 0), units)
    at = tl.minimum(tl.maximum(tl.load(offsets + stream), 0), end)
    what = tl.load(words + own + column)
    row = what & ((1 << SHIFT) - 1)
    slots += row * 1024
    entries += row * N_SYMBOLS
    factor = (1 << (what >> SHIFT)).to(tl.float32)
    first = segment * segment_tokens
    last = tl.minimum(first + segment_tokens, tokens)
    to = out + first.to(tl.int64) * width + tl.load(words + place + column)
    state, ahead, at = begin(payload, at, end)
    if FAR:
        last_pair = units >> 1
        words = _window(payload, at, last_pair)
        for _ in range(0, (last - first) // 4):
            further = _window(payload, at + 4, last_pair)
            before = at
            for _ in tl.static_range(4):
                entry, state, words, at = _advance(state, words, at, end, slots, entries)
                _store(to, entry, factor)
                to += width
            taken = at - before
            words = tl.where(taken > 0, words | (further << ((4 - taken) * 16).to(tl.uint64)), words)
        for _ in range(0, (last - first) % 4):
            entry, state, words, at = _advance(state, words, at, end, slots, entries)
            _store(to, entry, factor)
            to += width
    else:
        for _ in tl.range(first, last, loop_unroll_factor=4):
            _, entry, state, ahead, at = advance(state, ahead, at, end, payload, slots, entries)
            _store(to, entry, factor)
            to += width
    number = tl.max(tl.where((state != 0) | (at != end), stream + 1, 0))
    if number > 0:
        tl.atomic_max(damaged, number)


@triton.jit(
    do_not_specialize=[
        "groups", "step", "first_token", "last_token", "first_turned", "turned_rows", "first_pair", "group_pairs",
        "width", "token_stride", "head_stride", "dim_stride",
    ]
)  # fmt: skip
def synthesise(
    bases, token_at, source, basis, words,
    scale, mean, dims, turned, rope_of_layer, step, groups,
    first_token, last_token, first_turned, turned_rows, first_pair, group_pairs, heads, width, row_stride,
    token_stride, head_stride, dim_stride,
    TABLE: tl.constexpr, VALUE: tl.constexpr, CONTIGUOUS: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Values of `BLOCK` tokens of one head's keys or values, from the coefficients of its group.

    `basis` has a row for each column of `source`; a group's heads lie side by side, and in each the first half's
    dimensions alternate with the second's: a thread that has one has its partner too, and a product as wide as a head
    reads shared memory less often than two of half the width. `turned` int64 `[R, turned_rows, HALF]` has a cosine's
    bits and, above them, a sine's; the chunk's first token is in row `first_turned`. At `groups` in `words` is where
    each group begins.
    """
    pair = first_pair + tl.program_id(0)
    block = pair // heads
    group = pair // group_pairs
    j = tl.arange(0, HALF)
    begin_token = first_token + tl.program_id(1) * BLOCK
    t = begin_token + tl.arange(0, BLOCK)
    there = t < last_token
    first_column, last_column = tl.load(words + groups + group), tl.load(words + groups + group + 1)
    k = tl.arange(0, STEP)
    tile = source + t[:, None].to(tl.int64) * width + first_column + k[None, :]
    place = (pair - group * group_pairs) * (2 * HALF) + tl.arange(0, 2 * HALF)
    rows = basis + (first_column + k[:, None]).to(tl.int64) * row_stride + place[None, :]
    total = tl.zeros([BLOCK, 2 * HALF], tl.float32)
    for _ in range(first_column, last_column, STEP):
        # Groups begin at multiples of STEP: what is loaded is an address, so that has to be said.
        c = tl.load(tl.max_contiguous(tl.multiple_of(tile, [1, 16]), [1, STEP]), mask=there[:, None], other=0.0)
        total = tl.dot(c, tl.load(tl.max_contiguous(tl.multiple_of(rows, [1, 16]), [1, 2 * HALF])), total)
        tile += STEP
        rows += STEP * row_stride.to(tl.int64)
    a, b = tl.split(tl.reshape(total, [BLOCK, HALF, 2]))
    factor = tl.load(scale + pair) * step
    a = a * factor + tl.load(mean + pair * (2 * HALF) + j)[None, :]
    b = b * factor + tl.load(mean + pair * (2 * HALF) + HALF + j)[None, :]
    if block % 2 == 0:
        row = (tl.load(rope_of_layer + block // 2) * turned_rows + first_turned + begin_token).to(tl.int64)
        angles = turned + row * HALF + tl.arange(0, BLOCK)[:, None] * HALF + j[None, :]
        cos, sin = cosine_sine(angles, there[:, None])
        x = a * cos - b * sin
        b = b * cos + a * sin
        a = x
    if tl.float16 == VALUE:
        a = tl.minimum(tl.maximum(a, -65504.0), 65504.0)
        b = tl.minimum(tl.maximum(b, -65504.0), 65504.0)
    stored = there[:, None] & (j < D // 2)[None, :]
    to = tl.load(bases + block).to(tl.pointer_type(VALUE)) + (pair % heads).to(tl.int64) * head_stride
    to += token_offset(token_at, t, there, token_stride, TABLE)[:, None]
    if ALIGNED and CONTIGUOUS:
        to_a = tl.max_contiguous(tl.multiple_of(to + j[None, :], [1, 16]), [1, HALF])
        to_b = tl.max_contiguous(tl.multiple_of(to + (D // 2 + j)[None, :], [1, 16]), [1, HALF])
    else:
        first, second = halves(dims, CONTIGUOUS, D, HALF)
        to_a = to + first[None, :].to(tl.int64) * dim_stride
        to_b = to + second[None, :].to(tl.int64) * dim_stride
    tl.store(to_a, a.to(VALUE), mask=stored)
    tl.store(to_b, b.to(VALUE), mask=stored)


@triton.jit(do_not_specialize=["count", "token_stride", "head_stride", "dim_stride"])
def write_apart(
    bases, token_at, which, values, count, heads, token_stride, head_stride, dim_stride,
    TABLE: tl.constexpr, VALUE: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Write the tokens that are coded apart, `values` `[L, 2, n, H, D]`, one head of one token a program."""
    pair = tl.program_id(0)
    number = tl.program_id(1)
    block = pair // heads
    d = tl.arange(0, DIM)
    t = tl.load(which + number)
    source = values + ((block * count + number) * heads + pair % heads).to(tl.int64) * D
    to = tl.load(bases + block).to(tl.pointer_type(VALUE)) + (pair % heads).to(tl.int64) * head_stride
    to += token_offset(token_at, t, True, token_stride, TABLE)
    value = tl.load(source + d, mask=d < D, other=0.0)
    if tl.float16 == VALUE:
        value = tl.minimum(tl.maximum(value.to(tl.float32), -65504.0), 65504.0)
    tl.store(to + d.to(tl.int64) * dim_stride, value.to(VALUE), mask=d < D)
