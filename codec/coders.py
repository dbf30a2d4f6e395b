"""The two entropy coders behind one small interface, for codecs that let the user choose: `coder=rans` or `coder=ac`.

Both take the same tables (frequencies of 1,024), one a column.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from codec.entropy.sections import MAX_SEGMENT_TOKENS, Streams
from codec.entropy.tables import Tables
from codec.errors import CodecError


class Coder(ABC):
    """Codes symbols uint8 `[C, T]`, column c with table c."""

    unit_bits: ClassVar[int]
    """What streams consist of, and are as long as a multiple of."""

    def __init__(self, frequencies: NDArray[Any]) -> None:
        self._rows = np.arange(len(frequencies))

    def encode(self, symbols: NDArray[np.uint8]) -> bytes:
        return self._encode(symbols) if symbols.size else b""

    def parse(self, data: memoryview, tokens: int) -> Streams | None:
        """The checked streams of a section; None for no tokens, which take no bytes. Raises CodecError."""
        from codec.entropy import sections

        if not tokens:
            return None
        return sections.parse(data, len(self._rows), tokens, self.unit_bits // 8, MAX_SEGMENT_TOKENS)

    def decode(self, streams: Streams | None, low: int, high: int) -> NDArray[np.uint8]:
        """Symbols `[high - low, T]` of some columns. Raises CodecError."""
        if streams is None:
            return np.empty((high - low, 0), np.uint8)
        symbols = np.empty((high - low, streams.tokens), np.uint8)
        for segment in range(streams.segments):
            part = streams.part(segment, low, high)
            first = segment * streams.segment_tokens
            self._decode(part, self._rows[low:high], symbols[:, first : first + part.tokens])
        return symbols

    def column_bits(self, data: memoryview, tokens: int) -> NDArray[np.int64]:
        """Bits of each column's streams: `[C]`."""
        streams = self.parse(data, tokens)
        if streams is None:
            return 0 * self._rows
        return self.unit_bits * np.diff(streams.offsets).reshape(streams.segments, -1).sum(axis=0)

    @abstractmethod
    def _encode(self, symbols: NDArray[np.uint8]) -> bytes: ...

    @abstractmethod
    def _decode(self, part: Streams, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None: ...


class RansCoder(Coder):
    """rANS, interleaved by column: fast on CPU and GPU."""

    unit_bits = 16

    def __init__(self, frequencies: NDArray[Any]) -> None:
        super().__init__(frequencies)
        self._tables = Tables(frequencies)

    def _encode(self, symbols: NDArray[np.uint8]) -> bytes:
        from codec.entropy import rans

        return rans.encode(symbols, self._rows, self._tables)

    def _decode(self, part: Streams, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        from codec.entropy import rans

        rans.decode_streams(part, rows, self._tables, out)


class ArithmeticCoder(Coder):
    """Arithmetic coding as torchac does it, bit for bit."""

    unit_bits = 8

    def __init__(self, frequencies: NDArray[Any]) -> None:
        from codec.entropy import arithmetic

        super().__init__(frequencies)
        self._cdfs = arithmetic.from_tables(Tables(frequencies))

    def _encode(self, symbols: NDArray[np.uint8]) -> bytes:
        from codec.entropy import arithmetic

        return arithmetic.encode(symbols, self._rows, self._cdfs)

    def _decode(self, part: Streams, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        from codec.entropy import arithmetic

        arithmetic.decode_streams(part, rows, self._cdfs, out)


CODERS: dict[str, Callable[[NDArray[Any]], Coder]] = {"rans": RansCoder, "ac": ArithmeticCoder}


def make_coder(name: str, frequencies: NDArray[Any]) -> Coder:
    """A coder by name, for tables uint16 `[C, S]`. Raises CodecError naming the known ones."""
    if name not in CODERS:
        raise CodecError(f"no entropy coder is called {name!r}; known are {', '.join(sorted(CODERS))}")
    return CODERS[name](frequencies)
