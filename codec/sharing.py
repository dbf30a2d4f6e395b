"""Layers shared out to threads, so that a chunk is coded on several cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def share_out(work: Callable[[range, int], None], count: int, layers: int) -> None:
    """Call `work` with some of the numbers below `count` and the threads that it may use, on several threads at once.

    `count` are the parts of a cache of `layers` layers. Threads of torch within an operation would not do: between
    operations they spin, and keep the entropy coder's threads from the processors. Each call holds float32 buffers for
    its part: there are two calls at most, or one for every eight layers, so that they stay small beside the cache.
    """
    allowed = torch.get_num_threads()
    workers = min(allowed, count, max(2, layers // 8))
    if workers == 1:
        work(range(count), 1)
        return

    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def some(first: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(stream):  # each thread has a mode and a stream of its own
            work(range(first, count, workers), allowed // workers)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="layers") as pool:
            list(pool.map(some, range(workers)))
    finally:
        torch.set_num_threads(allowed)
