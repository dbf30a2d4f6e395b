"""Being on time: priority over other programs, and a look at who else uses the processors."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import platform
import resource
import struct
from pathlib import Path
from typing import Final

REAL_TIME: Final = "SCHED_RR"
"""What scheduling is called that goes before all ordinary programs."""
SLICE_S: Final = 0.0001
TIMER_SLACK_NS: Final = 1
PR_SET_TIMERSLACK: Final = 29
SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274, "riscv64": 274, "ppc64le": 355, "s390x": 345}
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


class Urgency(enum.IntEnum):
    """Real-time priorities of an emulated run's threads: the link waits for none, and computing for the network."""

    COMPUTE = 1
    NETWORK = 2
    LINK = 3


def go_before_others(urgency: Urgency) -> str | None:
    """Have this thread, and those that it starts later, run before all ordinary programs; None without the right to.

    With real-time priority, a program that keeps a core busy hardly delays a run: Linux moves such threads to whichever
    core runs nothing more urgent, and reserves 5 % for ordinary programs.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(urgency))
        return f"{REAL_TIME} {urgency:d}"
    return None


def be_punctual(urgency: Urgency) -> str:
    """Ask the scheduler to wake this thread promptly even when every core is busy; says what was granted.

    Root gets real-time priority: 0.1 ms late at p99 on a machine with four times its cores' worth of work. Otherwise,
    a slice of 0.1 ms gives a task an early virtual deadline under EEVDF (Linux 6.12 and later), also as an ordinary
    user: some 0.3 ms late at p99 instead of 4 ms.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_TIMERSLACK, TIMER_SLACK_NS, 0, 0, 0)
    if (granted := go_before_others(urgency)) is not None:
        return granted
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -20)
        # Where sessions are groups to the scheduler, it is the group's weight that counts.
        Path("/proc/self/autogroup").write_text("-20")
    weight = os.getpriority(os.PRIO_PROCESS, 0)
    number = SCHED_SETATTR.get(platform.machine())
    if number is not None and _kernel() >= (6, 12):
        # struct sched_attr: size, policy, flags, nice, priority, runtime (the slice), deadline, period
        attributes = struct.pack("=IIQiIQQQ", 48, 0, 0, weight, 0, round(SLICE_S * 1e9), 0, 0)
        if libc.syscall(number, 0, attributes, 0) == 0:
            return f"EEVDF slice {SLICE_S * 1e3:g} ms, nice {weight}"
    return f"nice {weight}"


def _kernel() -> tuple[int, int]:
    major, minor = platform.release().split(".")[:2]
    return int(major), int("".join(filter(str.isdigit, minor)) or 0)


class CpuMeter:
    """What the processors did since the last reading, in core-seconds: see `read`.

    Meant for a sandbox, whose PID namespace holds just the processes of the run. This process is left out.
    """

    def __init__(self) -> None:
        self.cores = os.cpu_count() or 1
        self._tasks: dict[str, tuple[float, float]] = {}
        self._machine_last = self._machine()
        self._own()

    def read(self) -> tuple[float, float, float, float, float]:
        """(idle, own, foreign, waited, stolen) since the reading before, summed over cores and threads.

        Own is the time of this run's threads, foreign that of all other programs and of other virtual machines,
        stolen of the latter alone; interrupts count as none. Waited is how long the run's threads could have run but
        did not.
        """
        now = self._machine()
        spent, rested, taken = (after - before for after, before in zip(now, self._machine_last, strict=True))
        self._machine_last = now
        own, waited = self._own()
        return max(rested, 0.0), own, max(spent - own, 0.0), waited, max(taken, 0.0)

    @staticmethod
    def _machine() -> tuple[float, float, float]:
        """Seconds that all processors were busy, idle, and taken by other virtual machines (which counts as busy)."""
        with open("/proc/stat") as file:
            user, nice, system, idle, iowait, _, _, steal = map(int, file.readline().split()[1:9])
        return (user + nice + system + steal) / TICKS_PER_S, (idle + iowait) / TICKS_PER_S, steal / TICKS_PER_S

    def _own(self) -> tuple[float, float]:
        """Seconds that the run's threads ran and waited since the last look."""
        ran = waited = 0.0
        tasks: dict[str, tuple[float, float]] = {}
        for pid in os.listdir("/proc"):
            if not pid.isdigit() or int(pid) == os.getpid():
                continue
            try:
                for task in os.listdir(f"/proc/{pid}/task"):
                    with open(f"/proc/{pid}/task/{task}/schedstat", "rb") as file:
                        now = tuple(float(word) * 1e-9 for word in file.read().split()[:2])
                    before = self._tasks.get(task, (0.0, 0.0))
                    ran, waited = ran + now[0] - before[0], waited + now[1] - before[1]
                    tasks[task] = (now[0], now[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended, or (without CONFIG_SCHED_INFO) the kernel does not keep the time waited
        self._tasks = tasks
        return max(ran, 0.0), max(waited, 0.0)


def spent_s() -> float:
    """Processor seconds this process has used."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
