"""Where a submission runs: it sees Python, kvstream and its own file, and no process, network or file of the grader's.

`python -m kvstream.testbed.lab.jail FILE WORK -- COMMAND...` enters user, PID, mount, network, IPC and UTS namespaces,
builds a root of read-only views of what COMMAND needs, with FILE in an empty folder WORK, and runs COMMAND there as an
ordinary user without any privilege. When this process dies, so does everything in the jail, however it was started.

Where the machine refuses namespaces, a grader that is root lets COMMAND run as nobody, who cannot read what is root's
alone; any other grader only makes its own memory and environment unreadable. `kind` says which of these holds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Final, Literal, NoReturn

import kvstream
from kvstream.testbed.host import namespaces as kernel
from kvstream.testbed.host.process import IMPORT_ROOT

Kind = Literal["namespaces", "user", "none"]

SYSTEM: Final = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
STUDENT: Final = 1000
"""The submission's user inside: not root, so that a program that starts has no privilege."""
NOBODY: Final = 65534
WORK_BYTES: Final = "16m"
PIVOT_ROOT: Final = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine, 155)
"""The number of a system call that the C library has no function for."""


@cache
def kind() -> Kind:
    """What separates submissions from the grader on this machine."""
    kinds: tuple[Kind, ...] = ("namespaces", "user") if os.getuid() == 0 else ("namespaces",)
    for how in kinds:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "probe.py"
            file.touch()
            probe = command(file, Path(folder), [sys.executable, "-c", "import kvstream"], how)
            environment = os.environ | {"PYTHONPATH": str(IMPORT_ROOT)}
            if subprocess.run(probe, capture_output=True, env=environment, check=False).returncode == 0:
                return how
    return "none"


def command(file: Path, work: Path, argv: Sequence[str], how: Kind) -> list[str]:
    """The command line that runs `argv` in a jail, in the folder `work`, which has a copy of `file`."""
    return [sys.executable, "-m", "kvstream.testbed.lab.jail", how, str(file), str(work), "--", *argv]


def visible() -> Iterator[Path]:
    """What is seen of the file system, all of it read-only: the system's programs, this Python, kvstream."""
    root = Path(kvstream.__file__).resolve().parent
    needed = [Path(name) for name in (*SYSTEM, *DEVICES, sys.prefix, sys.base_prefix, sysconfig.get_paths()["stdlib"])]
    for path in (*needed, root, *(folder.resolve() for folder in root.iterdir() if folder.is_dir())):
        if path.exists() or path.is_symlink():
            yield path


def main(how: str, file: str, work: str, argv: list[str]) -> NoReturn:
    if how != "namespaces":
        (Path(work) / Path(file).name).write_bytes(Path(file).read_bytes())
        if how == "user":
            os.chmod(work, 0o755)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        kernel.die_with_parent()
        os.chdir(work)
        os.execvp(argv[0], argv)
    uid, gid = os.getuid(), os.getgid()
    parent = os.getppid()
    flags = (
        kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC
        | kernel.CLONE_NEWUTS
    )  # fmt: skip
    kernel.libc("unshare", flags)
    kernel.become(STUDENT, uid, gid)
    kernel.die_with_parent()  # after the namespaces: a new user namespace clears the request
    if os.getppid() != parent:
        os._exit(1)
    first = os.fork()
    if first == 0:
        kernel.die_with_parent()
        _build_root(Path(file), Path(work))
        kernel.libc("prctl", kernel.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # the first process of a PID namespace ignores what it does not handle, and ends everything with it
        os.execvp(argv[0], argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os.kill(first, signal.SIGKILL))
    _, status = os.waitpid(first, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _build_root(file: Path, work: Path) -> None:
    """Make a new root beside the old one, move into it, and let go of the old one."""
    seen, submission = list(dict.fromkeys(visible())), file.read_bytes()
    kernel.mount(None, "/", None, kernel.MS_PRIVATE_RECURSIVE)
    new = Path("/tmp")
    kernel.mount("tmpfs", str(new), "tmpfs", kernel.MS_NOSUID_NODEV, f"size={WORK_BYTES},mode=755")
    for path in seen:
        _show(path, new)
    inside = new / work.relative_to("/")
    inside.mkdir(parents=True, exist_ok=True)
    (inside / file.name).write_bytes(submission)
    (new / "proc").mkdir()
    kernel.mount("proc", str(new / "proc"), "proc", kernel.MS_NOSUID_NODEV_NOEXEC)
    (new / "old").mkdir()
    kernel.libc("syscall", PIVOT_ROOT, os.fsencode(new), os.fsencode(new / "old"), what="pivot_root")
    os.chdir("/")
    kernel.libc("umount2", b"/old", kernel.MNT_DETACH)
    os.rmdir("/old")
    os.chdir(work)


def _show(path: Path, new: Path) -> None:
    """A read-only view of a path in the new root; links stay links."""
    place = new / path.relative_to("/")
    if place.exists() or place.is_symlink():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        place.symlink_to(os.readlink(path))
        return
    if path.is_dir():
        place.mkdir()
    else:
        place.touch()
    kernel.mount(str(path), str(place), None, kernel.MS_BIND)
    if str(path) in DEVICES:
        return
    # flags that the original mount has are locked in a user namespace: they must be asked for again
    kept = os.statvfs(path).f_flag & 0xE
    kernel.mount(None, str(place), None, kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY | kept)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[5:])
