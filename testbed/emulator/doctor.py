"""What this machine can do, and for each thing that it cannot, the command that fixes it.

Links are probed for real, in a sandbox that is thrown away. Nothing is guessed from a version number, and neither
torch nor numba is imported.

    python -m kvstream.testbed.emulator.doctor [FILE]    the inside alone, as JSON; in a sandbox of its own
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from kvstream.testbed.emulator import sandbox
from kvstream.testbed.errors import INSTALL, MachineError
from kvstream.testbed.host.process import IMPORT_ROOT
from kvstream.testbed.terminal import GREEN, RED, coloured, say

MIN_PYTHON: Final = (3, 11)
PROGRAMS: Final = {
    "mnexec": ("mininet", True),
    "ifconfig": ("net-tools", True),
    "ip": ("iproute2", True),
    "tc": ("iproute2", True),
    "ethtool": ("ethtool", True),
    "iptables": ("iptables", False),
    "tcpdump": ("tcpdump", False),
    "g++": ("g++", False),
}
"""Programs with their Debian packages, and whether an emulated run needs them."""
PACKAGES: Final = ("torch", "transformers", "numba", "mininet", "pyroute2", "scapy", "seaborn")
PROBE_S: Final = 60.0


@dataclass(frozen=True)
class Check:
    """One finding. `fix` is a line to run, or what to do without; `needed` by an emulated run with default settings."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
    needed: bool = True


def probe() -> list[Check]:
    """Every check, in an order in which the first failure explains later ones. Takes about a second."""
    checks = [_python(), _cores(), *_programs(), *_packages(), _model(), _gpu()]
    trouble = sandbox.available()
    user = "root" if os.getuid() == 0 else f"user {os.getuid()}"
    if trouble is not None:
        return [
            *checks,
            Check("namespaces", False, f"as {user}: {trouble}", _line_of(trouble)),
        ]
    return [*checks, Check("namespaces", True, f"as {user}"), *_probe_links()]


MIN_WIDTH: Final = 100
"""Columns of a terminal that has room for a table of the checks."""


def show(checks: Sequence[Check]) -> None:
    """Print the checks as a table, and what they come to."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    if console.width < MIN_WIDTH:
        for check in checks:
            mark = coloured("ok", GREEN) if check.ok else coloured("no" if check.needed else "--", RED)
            say(f"{mark} {check.name:<16}  {check.detail}")
            if not check.ok and check.fix:
                say(f"   to fix it:       {check.fix}")
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "found", "to fix it"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        mark = "[green]ok[/]" if check.ok else "[red]no[/]" if check.needed else "[yellow]--[/]"
        table.add_row(mark, check.name, check.detail, "" if check.ok else check.fix)
    if console.width >= MIN_WIDTH:
        console.print(table)
    missing = [check.name for check in checks if check.needed and not check.ok]
    if missing:
        console.print(f"Emulated runs do not work here yet: {', '.join(missing)}. `kvstream simulate` does.")
    else:
        console.print("Emulated runs work here.")


def status(checks: Sequence[Check]) -> int:
    """Exit status: 0 when emulated runs work, else 4."""
    return 4 if any(check.needed and not check.ok for check in checks) else 0


# ---- outside the sandbox ----------------------------------------------------------------------------------------


def _python() -> Check:
    good = sys.version_info >= MIN_PYTHON
    return Check("python", good, platform.python_version(), "install Python 3.11 or newer")


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0))
    detail = f"{cores} cores, load {os.getloadavg()[0]:.1f}, Linux {platform.release()}"
    return Check("processors", cores >= 2, detail, "sender and receiver should have a core each", needed=False)


def _programs() -> Iterator[Check]:
    for program, (package, needed) in PROGRAMS.items():
        path = shutil.which(program, path=sandbox.search_path())
        fix = f"sudo apt-get install --no-install-recommends {package}"
        yield Check(program, path is not None, path or "missing", fix, needed=needed)


def _packages() -> Iterator[Check]:
    for package in PACKAGES:
        try:
            yield Check(package, True, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Check(package, False, "missing", INSTALL)


def _model() -> Check:
    folder = IMPORT_ROOT / "kvstream/testbed/engine/models"
    found = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return Check("bundled model", bool(found), ", ".join(found) or "missing", "give a model with --model", needed=False)


def _gpu() -> Check:
    without = "without one, chunks are decoded on the CPU"
    if shutil.which("nvidia-smi") is None:
        return Check("GPU", False, "none found", without, needed=False)
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    names = [line.partition(" (UUID")[0] for line in done.stdout.splitlines()]
    return Check("GPU", done.returncode == 0 and bool(names), "; ".join(names) or "none found", without, needed=False)


def _line_of(trouble: str) -> str:
    """The line that helps, which a refusal carries between backquotes."""
    found = re.search("`([^`]+)`", trouble)
    return found[1] if found else "see the detail; `kvstream simulate` needs no namespaces"


def _probe_links() -> list[Check]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        root = str(IMPORT_ROOT)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        argv = ["timeout", str(PROBE_S), sys.executable, "-m", "kvstream.testbed.emulator.doctor", file.name]
        try:
            code = sandbox.run(argv, env=os.environ | {"PYTHONPATH": path})
        except MachineError as error:
            return [Check("links", False, str(error), "see the detail")]
        content = file.read()
    if not content:
        return [
            Check(
                "links",
                False,
                f"the probe ended with status {code}",
                "run `python -m kvstream.testbed.emulator.doctor` and report",
            )
        ]
    return [Check(**fields) for fields in json.loads(content)]


# ---- inside the sandbox -----------------------------------------------------------------------------------------


def _inside() -> list[Check]:
    """Try out, in namespaces of our own, everything that a link may be made of."""
    from kvstream.testbed.host.clock import REAL_TIME, Urgency, be_punctual

    checks = [_try("veth", _make_veth, _modules("veth"))]
    if checks[0].ok:
        checks.append(_try("htb, tbf, bfifo", _make_queues, _modules("sch_htb sch_tbf")))
        checks.append(_netem())
        checks.append(_try("NFQUEUE", _make_packet_queue, "sudo modprobe nfnetlink_queue", needed=False))
        checks.append(_iptables())
    checks.append(_congestion_controls())
    granted = be_punctual(Urgency.LINK)
    prompt = granted.startswith((REAL_TIME, "EEVDF"))
    fix = "root, or Linux 6.12 and newer, keeps rate changes punctual on a busy machine"
    checks.append(_mininet())
    return [*checks, Check("punctual shaper", prompt, granted, fix, needed=False)]


def _modules(names: str) -> str:
    """The line that loads modules, or installs them where Ubuntu keeps them in a package of their own."""
    return f"sudo modprobe -a {names} || sudo apt-get install linux-modules-extra-$(uname -r)"


def _try(name: str, attempt: Callable[[], str], fix: str, *, needed: bool = True) -> Check:
    try:
        return Check(name, True, attempt(), needed=needed)
    except (OSError, subprocess.CalledProcessError, MachineError) as error:
        detail = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        return Check(name, False, detail, fix, needed=needed)


def _ip(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def _make_veth() -> str:
    _ip("ip", "link", "add", "probe0", "type", "veth", "peer", "name", "probe1")
    _ip("ip", "link", "set", "probe0", "up")
    _ip("ip", "link", "set", "probe1", "up")
    return "made a pair"


def _make_queues() -> str:
    from kvstream.testbed.emulator.tc import Interface

    with contextlib.closing(Interface("probe0")) as interface:
        interface.create(20e6, 125_000, 70_000)
        for rate_bps in (1e6, 100e9):
            interface.set_rate(rate_bps)
            if (got := interface.state().rate_bps) != rate_bps:
                raise MachineError(f"asked for {rate_bps:.0f} bit/s, the kernel has {got:.0f}")
        interface.set_queue(10_000, 1514, open=False)
        if interface.queue_state() != (10_000, False):
            raise MachineError(f"asked for a closed queue of 10000 bytes, the kernel has {interface.queue_state()}")
    return "rates from 1 Mbit/s to 100 Gbit/s and outages, read back"


def _netem() -> Check:
    done = subprocess.run(
        ["tc", "qdisc", "add", "dev", "probe1", "root", "netem", "delay", "1ms"],
        capture_output=True,
        text=True,
        check=False,
    )
    fix = f"{_modules('sch_netem')}  # without it packets are delayed through NFQUEUE"
    detail = "delay and loss in the kernel" if done.returncode == 0 else done.stderr.strip().rpartition("Error: ")[2]
    return Check("netem", done.returncode == 0, detail, fix, needed=False)


def _make_packet_queue() -> str:
    from kvstream.testbed.emulator.nfqueue import PacketQueue

    with contextlib.closing(PacketQueue(0)):
        return "bound a queue"


def _iptables() -> Check:
    from kvstream.testbed.emulator.impairments import IPTABLES

    working = []
    for program in IPTABLES:
        if shutil.which(program):
            rule = [program, "-w", "-A", "FORWARD", "-j", "NFQUEUE", "--queue-num", "0"]
            if subprocess.run(rule, capture_output=True, check=False).returncode == 0:
                working.append(program)
    fix = "sudo apt-get install --no-install-recommends iptables && sudo modprobe xt_NFQUEUE  # or netem"
    return Check("iptables to NFQUEUE", bool(working), ", ".join(working) or "none works", fix, needed=False)


def _congestion_controls() -> Check:
    names = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    return Check(
        "congestion controls", "cubic" in names, ", ".join(names), "sudo modprobe tcp_cubic  # or --link cc=reno"
    )


def _mininet() -> Check:
    from kvstream.testbed.emulator.lock import Taken, alone

    try:
        with alone(wait=False):
            return _try("Mininet", _make_network, "see the detail")
    except Taken as taken:
        found, _, fix = str(taken).partition("; ")
        return Check("Mininet", False, f"not tried: {found}", fix, needed=False)


def _make_network() -> str:
    import time

    from kvstream.testbed.emulator.link import LinkSettings
    from kvstream.testbed.emulator.path import open_path

    start = time.monotonic()
    with open_path(LinkSettings()):
        up = time.monotonic()
    return f"a shaped link in {up - start:.2f} s, gone in {time.monotonic() - up:.2f} s"


def main(arguments: Sequence[str]) -> int:
    """The checks of the inside, to the file named or to standard output. Outside a sandbox it runs itself in one."""
    if not sandbox.inside():
        try:
            return sandbox.run([sys.executable, "-m", "kvstream.testbed.emulator.doctor", *arguments])
        except MachineError as error:
            print(f"doctor: {error}", file=sys.stderr)
            return 4
    found = json.dumps([asdict(check) for check in _inside()])
    if arguments:
        Path(arguments[0]).write_text(found)
    else:
        print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
