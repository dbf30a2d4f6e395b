"""Units of a run in several processes at once: the same cells as in one, whatever the number of processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final, TypeVar

from kvstream.testbed.errors import MachineError
from kvstream.testbed.host.process import die_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD: Final = 8
"""Items per process that are handed out before their turn: so many results may wait for a slow one before them."""

_task: list[Callable[[Any], Any]] = []
"""In a worker process: what it does with each item."""


def results(do: Callable[[Item], Result], items: Iterable[Item], jobs: int) -> Iterator[Result]:
    """What `do` returns for each item, in their order, computed in `jobs` processes; in this one if that is 1.

    With several, `do` is pickled once for each process, at its start. Raises what `do` raises, and MachineError if a
    process ends. When the caller stops early, as on Ctrl-C, items in progress are finished and the others dropped.
    """
    if jobs == 1:
        yield from map(do, items)
        return
    # fork would copy the locks of this process's threads in whatever state they are
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (do,))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            with _no_interrupt():
                waiting.append(pool.submit(_work, item))
            if len(waiting) == AHEAD * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise MachineError(
            f"one of {jobs} processes ended, perhaps for want of memory; what is finished is kept: run the same "
            "command again, with fewer --jobs"
        ) from None
    finally:
        with contextlib.suppress(BrokenProcessPool):
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Hold back SIGINT, and in a process that is started within, until `_begin`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(do: Callable[[Any], Any]) -> None:
    """Ctrl-C reaches all processes of a terminal; the one that started the others decides what becomes of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    die_with_parent()
    _task.append(do)


def _work(item: Any) -> Any:
    return _task[0](item)
