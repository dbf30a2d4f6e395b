"""The kernel's calls for namespaces and mounts, of which Python has none. Only the standard library is imported."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import Final

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWPID: Final = 0x20000000
CLONE_NEWNET: Final = 0x40000000
MS_RDONLY: Final = 0x1
MS_NOSUID_NODEV: Final = 0x2 | 0x4
MS_NOSUID_NODEV_NOEXEC: Final = 0x2 | 0x4 | 0x8
MS_REMOUNT: Final = 0x20
MS_BIND: Final = 0x1000
MS_PRIVATE_RECURSIVE: Final = 0x40000 | 0x4000
MNT_DETACH: Final = 2
PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_NO_NEW_PRIVS: Final = 38


def libc(function: str, *arguments: object, what: str | None = None) -> None:
    """Call a function of the C library. Raises OSError whose filename says `what` was refused."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what or function)


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if word is None else word.encode() for word in (source, target, kind)]
    what = f"mount {kind or 'private'} on {target}"
    libc("mount", *encoded, flags, None if data is None else data.encode(), what=what)


def become(inside: int, uid: int, gid: int) -> None:
    """In a user namespace that was just made: this user, who is `uid` outside, has the number `inside`."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{inside} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{inside} {gid} 1")


def die_with_parent() -> None:
    libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def hide_from_peers() -> None:
    """Let no other process of this user read this one's memory or environment."""
    libc("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
