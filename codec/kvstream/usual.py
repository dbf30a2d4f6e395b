"""What chunks of ordinary text take, measured in calibration; and how far a chunk lies from that.

A profile keeps, for each level, the bytes of a chunk and of each of its tokens, and the coefficients of a token that no
table could code. Sinks, which are coded apart, are left out; other tokens that are coded apart count as unusual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.api import Shift
from kvstream.codec.container import Chunk
from kvstream.codec.kvstream import apart, cpu, escapes
from kvstream.codec.kvstream.parameters import Parameters

SHORT, LONG = 256, 1_024
"""Tokens of the chunks that are coded in calibration: what they differ by is a chunk's own share."""


class Taken(NamedTuple):
    """Of chunks, without their sinks."""

    chunks: int
    tokens: int
    nbytes: float
    escapes: int
    """Coefficients that no table could code, those of tokens coded apart included."""


def measure(parameters: Parameters, caches: Sequence[Tensor]) -> NDArray[np.float32]:
    """float32 `[levels, 3]`: bytes a chunk, bytes a token, escapes a token, of caches `[L, 2, T, H, D]` that begin at
    position 0."""
    found = np.zeros((len(parameters.steps), 3), np.float32)
    for level, row in enumerate(found):
        short, long = (_sum(_pieces(parameters, caches, level, size)) for size in (SHORT, LONG))
        more = short.chunks - long.chunks
        row[0] = max(0.0, (short.nbytes - long.nbytes) / more) if more else 0.0
        row[1:] = np.array([long.nbytes - row[0] * long.chunks, long.escapes]) / max(1, long.tokens)
    return found


def shift(parameters: Parameters, chunk: Chunk) -> Shift | None:
    """How far a chunk lies from the calibration; None where the profile does not say."""
    if parameters.usual is None:
        return None
    header = chunk.header
    values = header.elements // header.tokens
    taken = _taken(parameters, chunk.sections, header.start, header.tokens, values)
    a_chunk, a_token, escapes_a_token = (float(x) for x in parameters.usual[header.level])
    elements = max(1, taken.tokens) * values
    return Shift(
        bits=8 * taken.nbytes / elements,
        expected_bits=8 * (a_chunk + a_token * taken.tokens) / elements,
        escapes=taken.escapes / elements,
        expected_escapes=escapes_a_token / values,
    )


def _pieces(parameters: Parameters, caches: Sequence[Tensor], level: int, size: int) -> list[Taken]:
    """Of each chunk of `size` tokens; what is left of a long cache is left out."""
    found = []
    for kv in caches:
        end = kv.shape[2] // LONG * LONG or kv.shape[2]
        for start in range(0, end, size):
            part = kv[:, :, start : min(start + size, end)]
            tokens, values = part.shape[2], part[:, :, 0].numel()
            try:
                sections = cpu.encode(parameters, part, level, range(start, start + tokens))
            except escapes.UnlikeCalibration:
                found.append(Taken(1, tokens, tokens * values, tokens * values))
            else:
                found.append(_taken(parameters, sections, start, tokens, values))
    return found


def _sum(parts: Sequence[Taken]) -> Taken:
    return Taken(*(sum(column) for column in zip(*parts, strict=True)))


def _taken(
    parameters: Parameters, sections: Mapping[str, bytes | memoryview], start: int, tokens: int, values: int
) -> Taken:
    """Of a chunk's sections; a token has so many values."""
    known = max(0, min(parameters.sinks - start, tokens))
    set_apart = apart.count(sections.get("apar", b""))
    nbytes = sum(map(len, sections.values())) - len(sections.get("apar", b"")) * known / max(1, set_apart)
    outside = escapes.count(sections.get("escs", b"")) + values * max(0, set_apart - known)
    return Taken(1, tokens - min(known, set_apart), nbytes, outside)
