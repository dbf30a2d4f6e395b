"""Layers distributed over threads, so that a chunk is coded on several cores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

import torch

_COUNTING: Final = threading.Lock()
_found: list[int] = []
"""For each call that runs now, the number of threads that torch had before the first of them."""


def share_out(work: Callable[[range, int], None], count: int, layers: int, most: int | None = None) -> None:
    """Call `work` on several threads at once, each time with some of the numbers below `count` and a number of threads
    it may use.

    A cache of `layers` layers has `count` parts. torch's own threads within an operation would not do: they spin
    between operations, and keep the entropy coder's threads off the cores. Each call holds float32 buffers for its
    part: there are at most two calls, or one for every eight layers, so that these stay small next to the cache.
    """
    with _COUNTING:
        allowed = _found[0] if _found else torch.get_num_threads()
    workers = min(allowed, count, max(2, layers // 8) if most is None else most)
    if workers == 1:
        work(range(count), allowed)
        return

    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def some(first: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(stream):  # each thread has a mode and a stream of its own
            work(range(first, count, workers), allowed // workers)

    with _one_core_an_operation(allowed), ThreadPoolExecutor(workers, thread_name_prefix="layers") as pool:
        list(pool.map(some, range(workers)))


@contextmanager
def _one_core_an_operation(allowed: int) -> Iterator[None]:
    """Have torch use one core for each operation, and then as many as before.

    That is a setting of the whole process: what else computes there is slower meanwhile. Several calls may overlap;
    none takes another's 1 for what was before.
    """
    with _COUNTING:
        _found.append(allowed)
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _COUNTING:
            _found.pop()
            torch.set_num_threads(allowed)
