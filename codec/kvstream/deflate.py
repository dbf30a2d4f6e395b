"""Small sections, compressed by Deflate (zlib's format), with a zero behind them where their length is odd.

What follows in a chunk then lies at even addresses, and its 16-bit words are read in place.
"""

from __future__ import annotations

import zlib
from typing import Any

from kvstream.codec.errors import CodecError

try:  # three times as fast
    from isal import isal_zlib

    _Damaged: type[Exception] = isal_zlib.error  # type: ignore[assignment]  # its stub says an instance
    decompressobj: Any = isal_zlib.decompressobj
except ImportError:
    _Damaged, decompressobj = zlib.error, zlib.decompressobj


def pack(plain: bytes) -> bytes:
    """The bytes of a section."""
    data = zlib.compress(plain, 4)
    return data + bytes(len(data) % 2)


def parse(data: memoryview, nbytes: int, tag: str) -> bytes:
    """What a section holds, which must be `nbytes`; no more memory is taken than that. Raises CodecError."""
    reader = decompressobj()
    try:
        plain = reader.decompress(data, nbytes + 1)
    except _Damaged as error:
        raise CodecError(f"section '{tag}' is damaged ({error}); fetch the chunk again") from None
    if len(plain) != nbytes or not reader.eof or reader.unused_data.strip(b"\0") or len(reader.unused_data) > 1:
        raise CodecError(f"section '{tag}' does not hold {nbytes} bytes; fetch the chunk again")
    return plain
