"""One emulated network at a time on a machine: two would take each other's processors and spoil both results."""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from testbed.errors import MachineError

LOCK = Path(tempfile.gettempdir()) / "kvstream-emulation.lock"
_held = False


class Taken(MachineError):
    """Another emulation has its turn."""


@contextmanager
def alone(*, wait: bool = True) -> Iterator[None]:
    """Wait until no other emulation runs on this machine, and keep others waiting meanwhile.

    The lock ends with its process, however that dies. Networks of one process count as one emulation. Without `wait`,
    raises Taken where another has its turn.
    """
    global _held
    if _held:
        yield
        return
    lock = _open()
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise Taken("another emulation is running here; try again when it is over") from None
            print("kvstream: waiting for another emulation on this machine to end", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        _held = True
        yield
    finally:
        _held = False
        os.close(lock)


def _open() -> int:
    """Open the lock file of all users, read-only: a lock needs no more, and it may be another user's file."""
    try:
        return os.open(LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        lock = os.open(LOCK, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.fchmod(lock, 0o644)  # whatever the umask: other users must be able to open it
        return lock
