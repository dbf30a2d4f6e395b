"""Whether the optimum runs in compiled loops (`kvstream.policies._kernel`): the same results, several times as fast.

They need numba, which comes with the extra [run]. Loading them takes as long as some fifty lines without them, and
compiling them, once on a machine, as long as several hundred. So a process begins without them, and loads them when it
solves its COMPILED_FROM-th line exactly, as for the units of an experiment. A policy's choices, which have little time,
never wait for that; for sessions whose clock is real the oracle loads them before it runs.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any, Final

COMPILED_FROM: Final = 100

_solved = 0
_kernel: Any = None


def kernel() -> Any:
    """The module of compiled loops; None as long as it is not loaded."""
    return _kernel


def count_line() -> None:
    """Note that a line is to be solved exactly."""
    global _solved
    _solved += 1
    if _solved == COMPILED_FROM:
        load()


def load() -> None:
    """Load the compiled loops now, if numba is installed."""
    global _kernel
    if _kernel is None and find_spec("numba") is not None:
        _kernel = importlib.import_module("kvstream.policies._kernel")
