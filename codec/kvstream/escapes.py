"""The section `escs`: coefficients that no table can code, in whole steps.

uint32 count, then, compressed by Deflate, three arrays of that length: columns (uint32, each less the one before),
tokens (uint16), steps (int32); ordered by column, then token; padded to an even size. Empty where there are none.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstream.codec.container import Header
from kvstream.codec.errors import CodecError
from kvstream.codec.kvstream import deflate
from kvstream.codec.quantize import ESCAPES, LARGEST_ESCAPE, array_type, compiled

_COUNT = struct.Struct("<I")
_BYTES = ESCAPES.itemsize
_FEW = 16


class UnlikeCalibration(Exception):
    """So many coefficients have no symbol that a chunk is better coded without the transform."""


def check_count(number: int, elements: int) -> None:
    """Raise UnlikeCalibration for more escapes than a chunk of so many elements may have."""
    if number > most(elements):
        raise UnlikeCalibration


def most(elements: int) -> int:
    """How many a chunk may have: with more it is coded without the transform. Compressed, they say little about the
    memory that they take; so that stays below the cache's."""
    return elements // _FEW


def count(data: bytes | memoryview) -> int:
    """What a section claims to hold."""
    return int(_COUNT.unpack_from(data)[0]) if len(data) > _COUNT.size else 0


def pack(escapes: NDArray[Any]) -> bytes:
    """The section of escapes (`quantize.ESCAPES`)."""
    if not len(escapes):
        return b""
    ordered = escapes[np.lexsort((escapes["token"], escapes["column"]))]
    columns = np.diff(ordered["column"].astype(np.int64), prepend=0).astype("<u4")
    plain = columns.tobytes() + ordered["token"].tobytes() + ordered["value"].tobytes()
    return _COUNT.pack(len(ordered)) + deflate.pack(plain)


def beyond(escapes: NDArray[Any]) -> NDArray[np.int64]:
    """The tokens of escapes that ended at the largest number of steps: they have to be coded apart."""
    return np.unique(escapes["token"][np.abs(escapes["value"]) >= LARGEST_ESCAPE]).astype(np.int64)


def parse(data: memoryview, kinds: NDArray[np.uint8], header: Header) -> NDArray[Any]:
    """The escapes of a chunk whose columns are of these kinds; dead ones have none. Raises CodecError."""
    add_up = _add_up()  # compiled with the first chunk, whether it has escapes or not
    if not len(data):
        return np.empty(0, ESCAPES)
    if (number := count(data)) > most(header.elements):
        raise CodecError(f"section 'escs' claims {number} escapes, more than a chunk may have; fetch the chunk again")
    plain = deflate.parse(data[_COUNT.size :], _BYTES * number, "escs")
    found = np.empty(number, ESCAPES)
    found["column"] = np.frombuffer(plain, "<u4", number)
    found["token"] = np.frombuffer(plain, "<u2", number, 4 * number)
    found["value"] = np.frombuffer(plain, "<i4", number, 6 * number)
    if not add_up(found, kinds, header.tokens):
        raise CodecError("section 'escs' names places outside the chunk, or one twice; fetch the chunk again")
    return found


@cache
def _add_up() -> Callable[..., bool]:
    import numba
    from numba import types

    records = types.Array(numba.from_dtype(ESCAPES), 1, "C")
    return compiled(_add_up_columns, types.boolean(records, array_type("uint8", 1), types.int64))


def _add_up_columns(found: Any, kinds: Any, tokens: Any) -> bool:
    """Turn columns, each less the one before, into columns; whether all places are of live columns, and ascend."""
    column = 0
    before = -1
    for i in range(found.shape[0]):
        column += found[i].column
        if column >= kinds.shape[0] or kinds[column] == 0 or found[i].token >= tokens:
            return False
        place = column * tokens + found[i].token
        value = np.int64(found[i].value)
        if place <= before or value > LARGEST_ESCAPE or value < -LARGEST_ESCAPE:
            return False
        before = place
        found[i].column = column
    return True
