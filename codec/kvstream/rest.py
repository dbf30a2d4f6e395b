"""What a chunk holds beside its coded coefficients, parsed: all that a decoder needs before the first of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstream.codec.container import Header
from kvstream.codec.errors import CodecError
from kvstream.codec.kvstream import apart, escapes, kinds
from kvstream.codec.kvstream.parameters import Parameters


@dataclass(frozen=True)
class Rest:
    """A columns are alive, W of them wide."""

    alive: NDArray[np.int64]
    """`[A]`: which columns, ascending."""
    own: NDArray[np.uint8]
    """`[A]`: their classes."""
    shift: NDArray[np.uint8]
    """`[A]`: their numbers of low bits."""
    fine: memoryview
    """The section of the W wide columns' low bits, as it came."""
    escapes: NDArray[Any]
    """`quantize.ESCAPES`."""
    apart: apart.Apart

    @classmethod
    def of(cls, parameters: Parameters, header: Header, section: Callable[[str], memoryview]) -> Rest:
        """Raises CodecError."""
        expected = parameters.expected[header.level]
        chosen = kinds.parse(section("kind"), expected, parameters.kinds.count)
        alive, own, shift = parameters.kinds.of_columns(chosen)
        fine = section("fine")
        if len(fine) and not shift.any():
            raise CodecError("section 'fine' holds low bits of no column; fetch the chunk again")
        escaped = escapes.parse(section("escs"), chosen, header)
        return cls(alive, own, shift, fine, escaped, apart.parse(section("apar"), header))
