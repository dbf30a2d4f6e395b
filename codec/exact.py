"""Tokens that a codec of the literature keeps as they are: attention sinks, and the most recent.

Section `exac`: their values `[L, 2, n, H, D]` in the dtype of the cache. How many they are follows from its length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvstream.codec.container import DTYPE_BYTES, Chunk
from kvstream.codec.errors import CodecError
from kvstream.codec.raw import frombuffer
from kvstream.codec.targets import DTYPES, CacheTarget


def checked_recent(recent: int) -> int:
    """The setting `recent`. Raises CodecError."""
    if not isinstance(recent, int) or isinstance(recent, bool) or recent < 0:
        raise CodecError(f"recent is a number of tokens of at least 0, not {recent!r}")
    return recent


def exact_tokens(chunk: Chunk) -> int:
    """Tokens that section `exac` holds. Raises CodecError."""
    header = chunk.header
    size = header.layers * 2 * header.heads * header.head_dim * DTYPE_BYTES[header.dtype]
    count, rest = divmod(len(chunk.section("exac")), size)
    if rest or count > header.tokens:
        raise CodecError(
            f"section 'exac' has {len(chunk.section('exac'))} bytes, not those of some of {header.tokens} tokens; "
            "encode again"
        )
    return count


def write_exact(chunk: Chunk, target: CacheTarget, spans: Sequence[tuple[int, int]]) -> None:
    """Write the tokens of section `exac` to (first token, number) of each span, in order. Raises CodecError."""
    header = chunk.header
    values = frombuffer(chunk.section("exac"), DTYPES[header.dtype])
    values = values.view(header.layers, 2, exact_tokens(chunk), header.heads, header.head_dim)
    if not bool(torch.isfinite(values).all()):
        raise CodecError("section 'exac' holds NaN or infinities; encode again")
    at = 0
    for first, count in spans:
        for layer in range(header.layers if count else 0):
            for side in (0, 1):
                target.write(layer, side, values[layer, side, at : at + count].to(target.device), first)
        at += count
