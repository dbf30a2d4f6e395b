"""Chunks encoded and decoded on the CPU: torch for the transform, numba for quantisation and rANS."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.container import DTYPE_BYTES, Chunk
from kvstream.codec.entropy import rans
from kvstream.codec.entropy.sections import Streams, join
from kvstream.codec.errors import CodecError
from kvstream.codec.kvstream import apart, escapes, kinds
from kvstream.codec.kvstream.parameters import UNIFORM, Group, Parameters
from kvstream.codec.kvstream.rest import Rest
from kvstream.codec.sharing import share_out
from kvstream.codec.targets import CacheTarget
from kvstream.codec.transform import restore, vectors

ROWS = 128
"""Tokens of a group whose values a decoder rotates and writes at a time."""
COLUMNS = 256
"""Columns that a decoder takes at a time."""
DECODER_SHARE, ENCODER_SHARE = 0.12, 2.5
"""What a decoder's and an encoder's threads may hold together, of the chunk's bytes."""


@dataclass(frozen=True)
class Quantised:
    """A group's columns in one chunk: K columns, A of them alive, W wide."""

    kinds: NDArray[np.uint8]
    """`[K]`."""
    symbols: NDArray[np.uint8]
    """`[A, T]`."""
    low_bits: NDArray[np.uint8]
    """`[W, T]`."""
    escapes: NDArray[Any]
    """`quantize.ESCAPES`, columns counted over the codec's."""
    lost: NDArray[np.int64]
    """Tokens of which the columns leave out too much."""


def quantise(
    parameters: Parameters, kv: Tensor, level: int, positions: range, group: Group, skipped: NDArray[np.int64]
) -> Quantised:
    """A group's columns of a chunk `[L, 2, T, H, D]`; `skipped` tokens, which are coded apart, have no coefficients."""
    rows = vectors(kv, group.layers, parameters.rope, positions, parameters.mean)
    rows[skipped] = 0.0
    steps = ((group.analysis * (1 / parameters.step(level))) @ rows.T).numpy()
    expected = parameters.expected[level, group.columns]
    chosen = parameters.kinds.choose(steps, expected, -(-len(positions) // parameters.segment_tokens))
    alive, own, shift = parameters.kinds.of_columns(chosen)
    symbols, low_bits, outside = parameters.classes.quantise(np.ascontiguousarray(steps[alive]), own, shift)
    escapes.check_count(len(outside), kv.numel())
    outside["column"] = alive[outside["column"]] + group.columns.start
    lost = apart.inexpressible(group.left_out(rows, parameters.step(level))[None])
    return Quantised(chosen, symbols, low_bits, outside, np.flatnonzero(lost.numpy()))


def encode(parameters: Parameters, kv: Tensor, level: int, positions: range) -> dict[str, bytes]:
    """Sections of a chunk `[L, 2, T, H, D]`. Raises UnlikeCalibration."""
    skipped = apart.find(kv, parameters.mean, parameters.spread, parameters.sinks, positions)
    while True:
        coded = _code(parameters, kv, level, positions, skipped)
        chosen, coef, fine, escaped, lost = zip(*coded, strict=True)
        found = np.concatenate(escaped)
        escapes.check_count(len(found), kv.numel())
        if not len(beyond := np.union1d(escapes.beyond(found), np.concatenate(lost))):
            break
        skipped = apart.more(skipped, beyond)
    return {
        "kind": kinds.pack(np.concatenate(chosen), parameters.expected[level]),
        "apar": apart.pack(kv, skipped),
        "escs": escapes.pack(found),
        "fine": join(list(chain(*fine))) if any(fine) else b"",
        "coef": join(list(chain(*coef))) if any(coef) else b"",
    }


def _code(
    parameters: Parameters, kv: Tensor, level: int, positions: range, skipped: NDArray[np.int64]
) -> list[tuple[NDArray[np.uint8], list[Streams], list[Streams], NDArray[Any], NDArray[np.int64]]]:
    """Kinds, streams, streams of low bits, escapes and lost tokens of each group."""
    found: list[Any] = [None] * len(parameters.groups)

    def some(numbers: range, threads: int) -> None:
        for number in numbers:
            part = quantise(parameters, kv, level, positions, parameters.groups[number], skipped)
            _, own, shift = parameters.kinds.of_columns(part.kinds)
            settings = {"segment_tokens": parameters.segment_tokens, "threads": threads}
            bits = shift[shift > 0]
            found[number] = (
                part.kinds,
                [rans.encode_streams(part.symbols, own, parameters.classes.tables, **settings)] if len(own) else [],
                [rans.encode_streams(part.low_bits, bits - 1, UNIFORM, **settings)] if len(bits) else [],
                part.escapes,
                part.lost,
            )

    layers, heads, dim = parameters.shape
    held = 14 * max(group.basis_values for group in parameters.groups) / (layers * 2 * heads * dim * 2)
    share_out(some, len(found), layers, max(1, min(max(2, layers // 8), int(ENCODER_SHARE / held))))
    return found


@dataclass(frozen=True)
class Content:
    """A chunk's sections, parsed. A columns are alive, W of them wide."""

    rest: Rest
    streams: Streams | None
    """None where no column is alive."""
    low_bits: Streams | None
    """Of the W wide columns; None where there are none."""

    @classmethod
    def of(cls, parameters: Parameters, chunk: Chunk) -> Content:
        """Raises CodecError."""
        tokens, segment_tokens = chunk.header.tokens, parameters.segment_tokens
        rest = Rest.of(parameters, chunk.header, chunk.section)
        wide = int(np.count_nonzero(rest.shift))
        coef, columns = chunk.section("coef"), len(rest.alive)
        if not columns and len(coef):
            raise CodecError("section 'coef' holds streams of no column; fetch the chunk again")
        return cls(
            rest,
            rans.parse(coef, columns, tokens, segment_tokens) if columns else None,
            rans.parse(rest.fine, wide, tokens, segment_tokens) if wide else None,
        )


def decode(parameters: Parameters, chunk: Chunk, target: CacheTarget) -> None:
    """Write a chunk's values into a target of its shape. Raises CodecError."""
    header = chunk.header
    content = Content.of(parameters, chunk)
    widest = max(group.basis_values for group in parameters.groups)
    segment_tokens = min(parameters.segment_tokens, header.tokens)

    def some(numbers: range, threads: int) -> None:
        buffer = torch.empty((segment_tokens, widest))
        for number in numbers:
            group = parameters.groups[number]
            for first in range(0, header.tokens, segment_tokens):
                tokens = min(segment_tokens, header.tokens - first)
                rows = buffer.view(-1)[: tokens * group.basis_values].view(tokens, -1).zero_()
                _add_columns(parameters, content, group, first, rows, parameters.step(header.level), threads)
                for at in range(0, tokens, ROWS):
                    part = rows[at : at + ROWS]
                    positions = header.positions[first + at : first + at + len(part)]
                    values = restore(part, group.layers, parameters.rope, positions, parameters.mean)
                    for index, layer in enumerate(group.layers):
                        for side in (0, 1):
                            target.write(layer, side, values[index, side].to(target.device), first + at)

    held = 4 * (widest * (segment_tokens + 2 * ROWS + COLUMNS) + segment_tokens * COLUMNS)
    share = DECODER_SHARE * header.elements * DTYPE_BYTES[header.dtype]
    share_out(some, len(parameters.groups), header.layers, max(1, int(share / held)))
    content.rest.apart.write(target, range(header.layers))


def _add_columns(
    parameters: Parameters, content: Content, group: Group, first: int, rows: Tensor, step: float, threads: int
) -> None:
    """Add what a group's live columns say of the segment that begins at token `first` to `rows` `[tokens, N]`."""
    alive = content.rest.alive
    begin, end = np.searchsorted(alive, (group.columns.start, group.columns.stop))
    for low in range(begin, end, COLUMNS):
        part = slice(low, min(low + COLUMNS, end))
        own = alive[part] - group.columns.start
        without_gap = own[-1] - own[0] == len(own) - 1
        basis = group.basis[own[0] : own[-1] + 1] if without_gap else group.basis[torch.from_numpy(own)]
        coefficients = torch.from_numpy(_segment(parameters, content, part, first, len(rows), threads))
        rows.addmm_(coefficients, basis, alpha=step)


def _segment(
    parameters: Parameters, content: Content, part: slice, first: int, tokens: int, threads: int
) -> NDArray[np.float32]:
    """Coefficients `[tokens, A']`, in steps, of the live columns `part` in the segment that begins at token `first`."""
    rest, number = content.rest, first // parameters.segment_tokens
    coefficients = np.empty((tokens, part.stop - part.start), np.float32)
    assert content.streams is not None
    segment = content.streams.part(number, part.start, part.stop)
    rans.decode_dequantised(
        segment, rest.own[part], parameters.classes.tables, segment.columns, tokens, coefficients,
        values=parameters.classes.values, threads=threads,
    )  # fmt: skip
    wide = np.flatnonzero(rest.shift[part])
    if len(wide):
        assert content.low_bits is not None
        shift = rest.shift[part][wide]
        before = int(np.count_nonzero(rest.shift[: part.start]))
        coded = content.low_bits.part(number, before, before + len(wide))
        low_bits = rans.decode_streams(coded, shift - 1, UNIFORM, threads=threads)
        unit = np.exp2(shift.astype(np.float32))
        coefficients[:, wide] = coefficients[:, wide] * unit + (low_bits.T - unit / 2)
    where = np.searchsorted(rest.escapes["column"], rest.alive[[part.start, part.stop - 1]] + [0, 1])
    some = rest.escapes[slice(*where)]
    some = some[(some["token"] >= first) & (some["token"] < first + tokens)]
    column = np.searchsorted(rest.alive, some["column"]) - part.start
    coefficients[some["token"] - first, column] = some["value"]
    return coefficients
