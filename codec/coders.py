"""The two entropy coders behind one small interface, for codecs that let the user choose: `coder=rans` or `coder=ac`.

Both take the same tables (frequencies out of 1,024), one per column. Columns come in blocks, each the keys or values of
one layer with an alphabet of its own; a large model has too many of them to hold as one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvstream.codec.entropy.sections import MAX_SEGMENT_TOKENS, Streams
from kvstream.codec.entropy.tables import Tables, column_counts, cross_entropy_bits
from kvstream.codec.errors import CodecError


class Coder(ABC):
    """Codes blocks of symbols uint8 `[C, T]`, column c of a block with the block's table c."""

    unit_bits: ClassVar[int]
    """Size of the units that streams consist of."""

    def __init__(self, blocks: Sequence[NDArray[Any]]) -> None:
        self._tables = [Tables(frequencies) for frequencies in blocks]
        self._ends = np.cumsum([tables.count for tables in self._tables])

    @abstractmethod
    def encode(self, block: int, symbols: NDArray[np.uint8], threads: int | None = None) -> Streams:
        """The streams of a block; `sections.join` makes a section of all blocks' streams."""

    def parse(self, data: memoryview, tokens: int) -> Streams | None:
        """The checked streams of a section; None for no tokens, which take no bytes. Raises CodecError."""
        from kvstream.codec.entropy import sections

        if not tokens:
            return None
        return sections.parse(data, int(self._ends[-1]), tokens, self.unit_bits // 8, MAX_SEGMENT_TOKENS)

    def decode(self, streams: Streams | None, block: int, threads: int | None = None) -> NDArray[np.uint8]:
        """Symbols `[C, T]` of a block. Raises CodecError."""
        high = int(self._ends[block])
        columns = self._tables[block].count
        if streams is None:
            return np.empty((columns, 0), np.uint8)
        symbols = np.empty((columns, streams.tokens), np.uint8)
        for segment in range(streams.segments):
            part = streams.part(segment, high - columns, high)
            first = segment * streams.segment_tokens
            self._decode(part, block, symbols[:, first : first + part.tokens], threads)
        return symbols

    def block_bits(self, streams: Streams | None) -> NDArray[np.int64]:
        """Bits of each block's streams: `[B]`."""
        if streams is None:
            return 0 * self._ends
        by_column = np.diff(streams.offsets).reshape(streams.segments, -1).sum(axis=0)
        return self.unit_bits * np.add.reduceat(by_column, [0, *self._ends[:-1]])

    def ideal_bits(self, streams: Streams | None) -> float:
        """Bits that ideal coding of the streams' symbols under their tables takes."""
        total = 0.0
        for block, tables in enumerate(self._tables):
            counts = column_counts(self.decode(streams, block), tables.symbols)
            total += cross_entropy_bits(counts, np.arange(tables.count), tables)
        return total

    @abstractmethod
    def _decode(self, part: Streams, block: int, out: NDArray[np.uint8], threads: int | None) -> None: ...


class RansCoder(Coder):
    """rANS, interleaved by column: fast on CPU and GPU."""

    unit_bits = 16

    def encode(self, block: int, symbols: NDArray[np.uint8], threads: int | None = None) -> Streams:
        from kvstream.codec.entropy import rans

        tables = self._tables[block]
        return rans.encode_streams(symbols, np.arange(tables.count), tables, threads=threads)

    def _decode(self, part: Streams, block: int, out: NDArray[np.uint8], threads: int | None) -> None:
        from kvstream.codec.entropy import rans

        tables = self._tables[block]
        rans.decode_streams(part, np.arange(tables.count), tables, out, threads=threads)


class ArithmeticCoder(Coder):
    """Arithmetic coding as torchac does it, bit for bit."""

    unit_bits = 8

    def encode(self, block: int, symbols: NDArray[np.uint8], threads: int | None = None) -> Streams:
        from kvstream.codec.entropy import arithmetic

        cdfs = self._cdfs[block]
        return arithmetic.encode_streams(symbols, np.arange(cdfs.count), cdfs, threads=threads)

    def _decode(self, part: Streams, block: int, out: NDArray[np.uint8], threads: int | None) -> None:
        from kvstream.codec.entropy import arithmetic

        cdfs = self._cdfs[block]
        arithmetic.decode_streams(part, np.arange(cdfs.count), cdfs, out, threads=threads)

    @cached_property
    def _cdfs(self) -> list[Any]:
        from kvstream.codec.entropy import arithmetic

        return [arithmetic.from_tables(tables) for tables in self._tables]


CODERS: dict[str, Callable[[Sequence[NDArray[Any]]], Coder]] = {"rans": RansCoder, "ac": ArithmeticCoder}


def make_coder(name: str, blocks: Sequence[NDArray[Any]]) -> Coder:
    """A coder by name, for tables uint16 `[C, S]` of each block. Raises CodecError listing the available ones."""
    if not isinstance(name, str) or name not in CODERS:
        raise CodecError(f"unknown entropy coder {name!r}; choose from {', '.join(sorted(CODERS))}")
    return CODERS[name](blocks)
