"""The thread that computes, and the threads of torch's kernels."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

SWITCH_INTERVAL_S: Final = 0.0001
"""How long a thread in Python code may hold the interpreter lock while another waits. Each read of the network waits
for it twice, and at 25 Gbit/s 300 KB arrive in this time; the default of 5 ms would delay its events by as much."""


class ComputeThread:
    """One thread that runs steps in the order of their submission."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        # begun now, so that it does not inherit what the network's thread is later granted by the scheduler
        self._executor.submit(lambda: None).result()

    def submit(self, step: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._executor.submit(step, *arguments)

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


def set_threads(threads: int | None) -> int:
    """Threads of torch's kernels: by default half the cores, at least one.

    The rest is for the network: with as many threads as cores, every frame that arrives takes a core from a kernel
    whose other threads then spin, and the time to the first token becomes erratic.
    """
    import torch

    count = threads or max(1, len(os.sched_getaffinity(0)) // 2)
    torch.set_num_threads(count)
    return count
