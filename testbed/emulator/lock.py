"""One emulated network at a time on a machine: two would compete for the CPU and spoil both results.

The lock is a file in a folder that all users of a machine have, wherever TMPDIR points.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvstream.testbed.errors import MachineError

FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
LOCK = next((Path(folder) for folder in FOLDERS if Path(folder).is_dir()), Path("/")) / "kvstream-emulation.lock"
_held = False


class Taken(MachineError):
    """Another emulation holds the lock."""


@contextmanager
def alone(*, wait: bool = True) -> Iterator[None]:
    """Wait until no other emulation runs on this machine, and keep others waiting meanwhile.

    The lock ends with its process, however that dies. Networks of one process count as one emulation. Without `wait`,
    raises Taken while another runs.
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
                raise Taken("another emulation is running here; try again when it has ended") from None
            print("kvstream: waiting for another emulation on this machine to end", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        _held = True
        yield
    finally:
        _held = False
        os.close(lock)


def _open() -> int:
    """Open the lock file of all users, read-only: a lock needs no more, and it may be another user's file."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(LOCK, flags)
    except FileNotFoundError:
        lock = os.open(LOCK, flags | os.O_CREAT, 0o644)
        os.fchmod(lock, 0o644)  # whatever the umask: other users must be able to open it
        return lock
    except OSError as error:
        raise MachineError(f"{LOCK}: cannot be used as the lock of emulations ({error.strerror}); remove it") from None
