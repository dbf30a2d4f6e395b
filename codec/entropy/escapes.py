"""Values that a column's table cannot code, kept next to the symbols so that nothing is clipped silently.

Such an element codes the nearest symbol that the table has; its position and true value follow in a short
list. A decoder, CPU or GPU, decodes all symbols as if there were none and then overwrites these few elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstream.codec.entropy.tables import Tables
from kvstream.codec.errors import CodecError

RECORD = np.dtype([("column", "<u4"), ("token", "<u2"), ("value", "<i2")])
"""One escape: 8 bytes."""


def split(
    values: NDArray[Any], centre: int, table_of_column: NDArray[Any], tables: Tables
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Integers `[C, T]`, value v coded as symbol v + `centre`: symbols uint8 `[C, T]` and escapes (`RECORD`, by place).

    The symbols that each table can code must be consecutive. Raises CodecError for values beyond 16 bits.
    """
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise CodecError(f"values are integers [columns, tokens], not {values.dtype} of shape {values.shape}")
    if values.shape[1] > 1 << 16:
        raise CodecError(f"escapes address at most 65,536 tokens, not {values.shape[1]}; cut the chunk")
    coded = tables.frequencies > 0
    lowest = coded.argmax(axis=1) - centre
    highest = tables.symbols - 1 - coded[:, ::-1].argmax(axis=1) - centre
    if (coded.sum(axis=1) != highest - lowest + 1).any():
        raise CodecError("escapes need tables whose coded symbols are consecutive")
    rows = np.asarray(table_of_column)
    low, high = lowest[rows][:, None].astype(np.int32), highest[rows][:, None].astype(np.int32)
    outside = (values < low) | (values > high)
    column, token = np.nonzero(outside)
    true = values[column, token].astype(np.int64)
    if true.size and (true.min() < -(1 << 15) or true.max() >= 1 << 15):
        raise CodecError(
            f"value {true[np.abs(true).argmax()]} does not fit 16 bits; the step is too small for the data"
        )
    escapes = np.empty(column.size, RECORD)
    escapes["column"], escapes["token"], escapes["value"] = column, token, true
    return (np.clip(values, low, high) + centre).astype(np.uint8), escapes


def parse(data: bytes | memoryview, columns: int, tokens: int) -> NDArray[Any]:
    """The escapes of a section of `escapes.tobytes()`. Raises CodecError for positions outside the chunk or out of
    order."""
    if len(data) % RECORD.itemsize:
        raise CodecError(
            f"escape section has {len(data)} bytes, not a multiple of {RECORD.itemsize}; fetch the chunk again"
        )
    escapes = np.frombuffer(data, RECORD)
    place = escapes["column"].astype(np.int64) * tokens + escapes["token"]
    inside = (escapes["column"] < columns) & (escapes["token"] < tokens)
    if not inside.all() or (np.diff(place) <= 0).any():
        raise CodecError(f"escape section has positions outside {columns} columns of {tokens} tokens, or out of order")
    return escapes


def patch(values: NDArray[Any], escapes: NDArray[Any]) -> None:
    """Write the true values of parsed escapes into `values` `[C, T]` (signed integers or floats), in place."""
    values[escapes["column"], escapes["token"]] = escapes["value"]
