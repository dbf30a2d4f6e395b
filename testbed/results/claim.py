"""One writer at a time in a run's folder: two would write every row twice."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kvstream.testbed.errors import SpecError


@contextmanager
def claimed(folder: Path, part: str = "") -> Iterator[None]:
    """Keep others out of a run's folder, or out of a part of it. The lock, a file beside the folder, ends with its
    process, however that dies.

    Raises SpecError with the other's process id when the folder is taken.
    """
    with ExitStack() as stack:
        if part:
            stack.enter_context(_locked(folder, folder.with_name(f".{folder.name}.{part}.lock"), fcntl.LOCK_EX))
        mode = fcntl.LOCK_SH if part else fcntl.LOCK_EX
        stack.enter_context(_locked(folder, folder.with_name(f".{folder.name}.lock"), mode))
        yield


@contextmanager
def _locked(folder: Path, file: Path, mode: int) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(lock, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
            raise SpecError(
                f"{folder}: another run is writing here (process {holder}); wait for it, or choose another --name"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(lock)
