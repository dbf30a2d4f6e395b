"""The two entropy coders behind one small interface, for codecs that let the user choose: `coder=rans` or `coder=ac`.

Both take the same tables (frequencies of 1,024), one a column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from codec.entropy.sections import Streams
from codec.entropy.tables import Tables
from codec.errors import CodecError


class Coder(Protocol):
    """Codes symbols uint8 `[C, T]`, column c with table c."""

    def encode(self, symbols: NDArray[np.uint8]) -> bytes: ...

    def decode(self, data: memoryview, tokens: int) -> NDArray[np.uint8]: ...

    def column_bits(self, data: memoryview, tokens: int) -> NDArray[np.int64]:
        """Bits of each column's streams: `[C]`."""
        ...


class RansCoder:
    """rANS, interleaved by column: fast on CPU and GPU."""

    def __init__(self, frequencies: NDArray[Any]) -> None:
        self._tables = Tables(frequencies)
        self._rows = np.arange(len(frequencies))

    def encode(self, symbols: NDArray[np.uint8]) -> bytes:
        from codec.entropy import rans

        return rans.encode(symbols, self._rows, self._tables) if symbols.size else b""

    def decode(self, data: memoryview, tokens: int) -> NDArray[np.uint8]:
        from codec.entropy import rans

        columns = len(self._rows)
        if tokens == 0:
            return np.empty((columns, 0), np.uint8)
        return rans.decode(data, self._rows, self._tables, columns, tokens)

    def column_bits(self, data: memoryview, tokens: int) -> NDArray[np.int64]:
        from codec.entropy import sections

        return _column_bits(sections.parse(data, len(self._rows), tokens, 2), 16) if tokens else 0 * self._rows


class ArithmeticCoder:
    """Arithmetic coding as torchac does it, bit for bit."""

    def __init__(self, frequencies: NDArray[Any]) -> None:
        from codec.entropy import arithmetic

        self._cdfs = arithmetic.from_tables(Tables(frequencies))
        self._rows = np.arange(len(frequencies))

    def encode(self, symbols: NDArray[np.uint8]) -> bytes:
        from codec.entropy import arithmetic

        return arithmetic.encode(symbols, self._rows, self._cdfs) if symbols.size else b""

    def decode(self, data: memoryview, tokens: int) -> NDArray[np.uint8]:
        from codec.entropy import arithmetic

        columns = len(self._rows)
        if tokens == 0:
            return np.empty((columns, 0), np.uint8)
        return arithmetic.decode(data, self._rows, self._cdfs, columns, tokens)

    def column_bits(self, data: memoryview, tokens: int) -> NDArray[np.int64]:
        from codec.entropy import sections

        return _column_bits(sections.parse(data, len(self._rows), tokens, 1), 8) if tokens else 0 * self._rows


def _column_bits(streams: Streams, unit_bits: int) -> NDArray[np.int64]:
    return unit_bits * np.diff(streams.offsets).reshape(streams.segments, -1).sum(axis=0)


CODERS: dict[str, Callable[[NDArray[Any]], Coder]] = {"rans": RansCoder, "ac": ArithmeticCoder}


def make_coder(name: str, frequencies: NDArray[Any]) -> Coder:
    """A coder by name, for tables uint16 `[C, S]`. Raises CodecError naming the known ones."""
    if name not in CODERS:
        raise CodecError(f"no entropy coder is called {name!r}; known are {', '.join(sorted(CODERS))}")
    return CODERS[name](frequencies)
