"""Any program inside an emulated link: what `kvstream trace replay TRACE -- COMMAND...` runs.

The command runs on the receiver's host from the trace's time zero on, a server on the sender's: one that is named, or
else Python's, which serves the current folder. Where they are stands in environment variables:

    KVSTREAM_SENDER, KVSTREAM_RECEIVER     addresses of the two hosts
    KVSTREAM_URL                           of the current folder, where no server was named
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvstream.testbed.emulator import fidelity
from kvstream.testbed.emulator.link import LinkSettings
from kvstream.testbed.emulator.measure import judgement
from kvstream.testbed.emulator.path import open_path
from kvstream.testbed.emulator.record import LinkRecord
from kvstream.testbed.errors import MachineError, SpecError
from kvstream.traces.trace import Trace

PORT: Final = 8000
LEAD_S: Final = 0.1
LISTENS_S: Final = 10.0
"""A server that listens on no TCP port after this is one that never will (it may speak UDP)."""
STOPS_S: Final = 2.0
TIMED_OUT: Final = 124
"""Exit status of a command that took too long, as `timeout` gives it."""


@dataclass(frozen=True)
class Commanded:
    """A command that ran inside a link, and the verdict on the link meanwhile; the two are apart."""

    trace: str
    command: tuple[str, ...]
    status: int
    """The command's exit status (128 + n where signal n ended it)."""
    seconds: float
    record: LinkRecord
    verdict: fidelity.Fidelity

    def to_json(self) -> dict[str, Any]:
        ran = {"command": list(self.command), "status": self.status, "seconds": self.seconds}
        return {"trace": self.trace, **ran, "verdict": self.verdict.to_json(), "rows": self.record.rows()}

    def text(self) -> str:
        """A few lines for a terminal."""
        how = f"ended with status {self.status}" if self.status != TIMED_OUT else "was stopped: it took too long"
        passed = f"{self.record.delivered_bytes / 1e6:.2f} MB passed the link"
        first = f"{self.command[0]} {how} after {self.seconds:.2f} s; {passed}, {self.verdict.drops} packets dropped"
        return "\n".join([first, *(f"link {line}" for line in judgement(self.verdict))])


def run(
    trace: Trace,
    link: LinkSettings,
    command: Sequence[str],
    longest_s: float,
    *,
    server: Sequence[str] = (),
    stdout: int | None = None,
) -> Commanded:
    """Run a command on the receiver's host while the trace is replayed, for `longest_s` at most. In a sandbox only.

    `stdout` is a file descriptor for the command's output (default: as it is). Raises SpecError for a program that is
    not there, MachineError for a server that ends before anything begins.
    """
    if trace.per == "chunk":
        raise SpecError(f"trace {trace.name!r} has one rate per chunk and no time line: replay one with per=time")
    for name in (command[0], *server[:1]):
        if shutil.which(name) is None:
            raise SpecError(f"{name}: no such program; install it, or give its path")
    with open_path(link, [trace]) as path:
        network = path.network
        environment = os.environ | {"KVSTREAM_SENDER": network.sender_ip, "KVSTREAM_RECEIVER": network.receiver_ips[0]}
        if not server:
            server = [sys.executable, "-m", "http.server", str(PORT)]
            environment["KVSTREAM_URL"] = f"http://{network.sender_ip}:{PORT}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} if "KVSTREAM_URL" in environment else {}
        serving = network.popen(network.sender, server, env=environment, stdin=subprocess.DEVNULL, **quiet)
        _await_listening(serving, server)
        t0_s = time.monotonic() + LEAD_S
        path.arm(trace, t0_s, longest_s)
        time.sleep(max(t0_s - time.monotonic(), 0.0))
        # Not detached from the terminal, so that a shell and Ctrl-C work as they do elsewhere.
        attach = ["mnexec", "-a", str(network.receiver.pid)]
        program = network.popen(network.receiver, command, env=environment, stdout=stdout, mncmd=attach)
        status = _wait(program, longest_s)
        end_s = time.monotonic()
        record = path.finish(end_s)
    return Commanded(trace.name, tuple(command), status, end_s - t0_s, record.down, record.judge(trace))


def _await_listening(server: subprocess.Popen[Any], argv: Sequence[str]) -> None:
    """Wait until a port is open on the server's host. Raises MachineError if the server ends first."""
    give_up_s = time.monotonic() + LISTENS_S
    while time.monotonic() < give_up_s:
        if server.poll() is not None:
            raise MachineError(f"the server `{' '.join(argv)}` ended with status {server.returncode} before it began")
        if _listens(server.pid):
            return
        time.sleep(0.02)


def _listens(pid: int) -> bool:
    """Whether any TCP port is open in the network namespace of a process."""
    for table in ("tcp", "tcp6"):
        with suppress(OSError):  # it has just ended, or there is no IPv6
            rows = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
            if any(row.split()[3] == "0A" for row in rows):
                return True
    return False


def _wait(program: subprocess.Popen[Any], longest_s: float) -> int:
    try:
        status = program.wait(longest_s)
        return status if status >= 0 else 128 - status
    except subprocess.TimeoutExpired:
        program.terminate()
        with suppress(subprocess.TimeoutExpired):
            program.wait(STOPS_S)
        program.kill()
        program.wait()
        return TIMED_OUT
