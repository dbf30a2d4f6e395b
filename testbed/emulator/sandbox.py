"""Namespaces of a run's own: nothing on the host changes, and nothing outlives the run.

`run` starts a launcher process, which enters fresh network, mount, PID and IPC namespaces (and a user namespace
unless it is root), forks the namespaces' first process and, under it, the command. The chain dies from either end:

- the launcher and the first process ask the kernel for SIGKILL when their parent dies (PR_SET_PDEATHSIG);
- when the first process dies, the kernel kills everything in the PID namespace, and with the last process go the
  interfaces, queues, rules and mounts.

So SIGKILL of any process of a run leaves nothing behind, whichever it hits. Only the standard library is imported
here: the launcher starts in some 20 ms.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import kvstream
from kvstream.testbed.errors import MachineError
from kvstream.testbed.host.namespaces import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    MS_NOSUID_NODEV_NOEXEC,
    MS_PRIVATE_RECURSIVE,
    become,
    die_with_parent,
    libc,
    mount,
)

_LAUNCH: Final = f"""
import sys
sys.path.insert(0, {str(Path(kvstream.__file__).resolve().parent.parent)!r})
from kvstream.testbed.emulator.sandbox import _launch
_launch()
"""

MARK: Final = "KVSTREAM_SANDBOX"
"""Environment variable that holds, inside a sandbox, the inode of its network namespace."""

SYSTEM_FOLDERS: Final = ("/usr/local/sbin", "/usr/sbin", "/sbin")
LAUNCH_FAILED: Final = 125
FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

APPARMOR_SWITCH: Final = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
DEBIAN_SWITCH: Final = Path("/proc/sys/kernel/unprivileged_userns_clone")
MAX_USER_NAMESPACES: Final = Path("/proc/sys/user/max_user_namespaces")
STATUS: Final = Path("/proc/self/status")
MOUNTS: Final = Path("/proc/self/mountinfo")


def inside() -> bool:
    """Whether this process runs in a sandbox's namespaces (not merely with a sandbox's environment)."""
    mark = os.environ.get(MARK)
    return mark is not None and mark == _network_namespace()


def run(argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> int:
    """Run a command in namespaces of its own and return its exit status (128 + n when signal n ended it).

    Works as root and as an ordinary user. Standard streams and the working directory are inherited; `env` replaces
    the environment. SIGINT, SIGTERM and SIGHUP that reach this process are passed on to the command.
    Raises MachineError, naming the cause and the line that helps, where the machine refuses namespaces.
    """
    if not argv:
        raise ValueError("nothing to run: argv is empty")
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as report:
        try:
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", _LAUNCH, str(os.getpid()), str(write_end), *argv],
                env=env,
                pass_fds=(write_end,),
            )
        finally:
            os.close(write_end)
        with _forwarding(process):
            trouble = report.read().decode()
            status = process.wait()
    if trouble:
        raise MachineError(trouble)
    return 128 - status if status < 0 else status


def search_path() -> str:
    """PATH as sandboxed programs have it: with the system folders that an ordinary user's often lacks."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join([*folders, *(folder for folder in SYSTEM_FOLDERS if folder not in folders)])


def available() -> str | None:
    """None where sandboxes work here, else why not and what helps (the text of the MachineError)."""
    try:
        status = run(["true"])
    except MachineError as error:
        return str(error)
    return None if status == 0 else f"a sandboxed `true` ended with status {status}"


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass the signals that a user or a job runner sends on to the sandbox while it runs."""

    def forward(number: int, frame: FrameType | None) -> None:
        if process.poll() is None:
            process.send_signal(number)

    try:
        previous = {number: signal.signal(number, forward) for number in FORWARDED}
    except ValueError:  # not the main thread: Python allows no handlers there
        previous = {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _network_namespace() -> str:
    return str(os.stat("/proc/self/ns/net").st_ino)


# ---- the launcher: a process of its own, without threads, so that it may fork ----------------------------------


def _launch() -> NoReturn:
    """Entry of the launcher: argv holds the parent's PID, the descriptor to report trouble on, and the command."""
    parent, report_fd, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    with contextlib.suppress(OSError):
        # A terminal's Ctrl-C goes to the whole process group; the command gets it once, by forwarding.
        os.setpgid(0, 0)
    os.set_inheritable(report_fd, False)
    alive, held = os.pipe()
    try:
        _enter_namespaces()
        die_with_parent()  # after the namespaces: a new user namespace clears the request
        if os.getppid() != parent:
            os._exit(LAUNCH_FAILED)
        first = os.fork()
    except OSError as error:
        os.write(report_fd, _explain(error).encode())
        os._exit(LAUNCH_FAILED)
    if first == 0:
        os.close(held)
        _first_process(alive, report_fd, argv)
    os.close(report_fd)
    _relay(first)


def _enter_namespaces() -> None:
    uid, gid = os.getuid(), os.getgid()
    wanted = CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC
    if uid == 0:
        try:
            libc("unshare", wanted)
            return
        except PermissionError:  # root of a container without CAP_SYS_ADMIN: go on like an ordinary user
            pass
    libc("unshare", wanted | CLONE_NEWUSER)
    become(0, uid, gid)


def _first_process(alive: int, report_fd: int, argv: list[str]) -> NoReturn:
    """PID 1 of the sandbox: mounts, then the command as a child, then reaping until the command ends.

    `alive` is the read end of a pipe that the launcher holds open: it tells a launcher that died before the request
    to die with it, which getppid() cannot tell across PID namespaces.
    """
    die_with_parent()
    if select.select([alive], [], [], 0.0)[0]:
        os._exit(LAUNCH_FAILED)
    try:
        mount(None, "/", None, MS_PRIVATE_RECURSIVE)
        mount("proc", "/proc", "proc", MS_NOSUID_NODEV_NOEXEC)
        # iptables takes a lock in /run, which an ordinary user could not write.
        mount("tmpfs", "/run", "tmpfs", MS_NOSUID_NODEV_NOEXEC)
    except OSError as error:
        os.write(report_fd, _explain(error).encode())
        os._exit(LAUNCH_FAILED)
    os.environ.update({MARK: _network_namespace(), "PATH": search_path()})
    command = os.fork()
    if command == 0:
        try:
            os.execvp(argv[0], argv)
        except OSError as error:
            status, why = _refused(argv[0], error)
            os.write(2, f"{argv[0]}: {why}\n".encode())
            os._exit(status)
    os.close(report_fd)
    _relay(command)


def _refused(program: str, error: OSError) -> tuple[int, str]:
    """Exit status and reason of a program that did not start, as a shell gives them: 127 when there is none, 126 else.

    Asked for a program that is nowhere, the kernel says "permission denied" if it could not look into one folder of
    PATH: one of root's, say, which an ordinary user's sandbox may not search though it looks like root's.
    """
    import shutil

    if os.sep in program or shutil.which(program, mode=os.F_OK) is not None:
        return (127 if isinstance(error, FileNotFoundError) else 126), error.strerror or str(error)
    closed = [folder for folder in dict.fromkeys(os.get_exec_path()) if not _searchable(folder)]
    return 127, "not found in PATH" + (f", of which {', '.join(closed)} may not be searched" if closed else "")


def _searchable(folder: str) -> bool:
    try:
        os.stat(os.path.join(folder, "."))
    except OSError as error:
        return not isinstance(error, PermissionError)
    return True


def _relay(child: int) -> NoReturn:
    """Pass signals to the child, reap whatever ends, and end as the child did."""

    def forward(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in FORWARDED:
        signal.signal(number, forward)
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


# ---- why it failed, and the line that helps ---------------------------------------------------------------------


def _explain(error: OSError) -> str:
    """One line: what was refused, by what as far as that can be told, and what to do."""
    refused = f"cannot make namespaces for the emulated link ({error.filename or 'fork'}: {error.strerror})"
    cause, remedy = _cause(error)
    return f"{refused}: {cause}; {remedy}; or use the simulator, which needs none"


def _cause(error: OSError) -> tuple[str, str]:
    if _reads(MAX_USER_NAMESPACES) == "0":
        return "user.max_user_namespaces is 0", "run `sudo sysctl -w user.max_user_namespaces=15000`"
    if error.errno == errno.ENOSPC:
        return "the limit on nested or counted namespaces is reached", "see user.max_*_namespaces in `sysctl -a`"
    if _reads(DEBIAN_SWITCH) == "0":
        return (
            "kernel.unprivileged_userns_clone is 0",
            "run `sudo sysctl -w kernel.unprivileged_userns_clone=1`, or this command as root",
        )
    contained, filtered = _in_container(), "Seccomp:\t2" in (_reads(STATUS) or "")
    if filtered and not contained:
        return (
            "a seccomp filter forbids it",
            "lift it: `--security-opt seccomp=unconfined` for Docker, `RestrictNamespaces=no` for a systemd service",
        )
    # AppArmor's switch is about making namespaces; a mount inside them is up to the container's own profile.
    mounting = (error.filename or "").startswith("mount")
    if not filtered and not mounting and _reads(APPARMOR_SWITCH) == "1" and (contained or os.getuid() != 0):
        return (
            "AppArmor restricts unprivileged user namespaces",
            "run `sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`"
            + (" on the container's host" if contained else ", or this command with sudo"),
        )
    if contained:
        return (
            "the container's seccomp profile or capabilities forbid it",
            "start the container with `--security-opt seccomp=unconfined --security-opt apparmor=unconfined "
            "--security-opt systempaths=unconfined`, or with `--privileged`",
        )
    return "the kernel or a security policy forbids it", "run this command as root on the host"


def _in_container() -> bool:
    if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        return True
    if any(mark in (_reads(Path("/proc/1/cgroup")) or "") for mark in ("docker", "kubepods", "containerd", "lxc")):
        return True
    # Where containers have control groups of their own, only their layered root file system gives them away.
    roots = [line for line in (_reads(MOUNTS) or "").splitlines() if line.split()[4:5] == ["/"]]
    return any(" - overlay " in line for line in roots)


def _reads(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
