"""The hosts, links and routes of an emulated path, made with Mininet: sender — [delay] — router — receiver.
Several senders meet in a host `gather`, several receivers behind a host `fan`.

No switch and no controller: hosts are joined by `addLink` and the middle ones forward. The bottleneck is the router's
egress toward the receivers, on a node that neither sends nor receives, so that neither TCP small queues nor a
receiver's own scheduling reach into the shaper. Every setting that decides what TCP does is pinned here and recorded.

Must run inside a sandbox (`kvstream.testbed.emulator.sandbox`); Mininet is imported when a network is built.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import select
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstream.testbed.emulator import sandbox
from kvstream.testbed.emulator.link import MAX_GSO_BYTES, LinkSettings
from kvstream.testbed.emulator.lock import alone
from kvstream.testbed.errors import INSTALL, MachineError, SpecError
from kvstream.testbed.host.process import IMPORT_ROOT

if TYPE_CHECKING:
    from mininet.node import Host

    from kvstream.traces.trace import Trace

TCP_HEADERS_BYTES = 320
"""What the kernel keeps free of a GSO packet for headers (MAX_TCP_HEADER)."""
SYSCTLS = {
    "net/ipv4/tcp_slow_start_after_idle": "0",
    "net/ipv4/tcp_no_metrics_save": "1",
    # Without this the kernel sends packets of 64 KiB on paths of less than 0.5 ms, whatever the rate.
    "net/ipv4/tcp_tso_rtt_log": "0",
    "net/ipv4/tcp_rmem": "4096 131072 67108864",
    "net/ipv4/tcp_wmem": "4096 65536 67108864",
    "net/ipv4/tcp_timestamps": "1",
    "net/ipv4/tcp_sack": "1",
    "net/ipv4/tcp_ecn": "0",
    "net/ipv6/conf/all/disable_ipv6": "1",
}
"""Pinned on every host, and read back. One that the kernel does not have is recorded as absent."""
PROGRAMS = {
    "mnexec": "mininet",
    "ifconfig": "net-tools",
    "ip": "iproute2",
    "tc": "iproute2",
    "ethtool": "ethtool",
    "bash": "bash",
}
"""Programs a network needs, each with its Debian package."""
DELAY_HOST = "delay"
"""The middle host that delays and loses packets, where the link asks for it."""
CROSS_SENDER, CROSS_RECEIVER = "xsender", "xreceiver"
"""The two ends of the cross traffic, where there is any."""


@dataclass
class Network:
    """A running topology; leaving it (`with Network(...) as network:`) ends its programs and frees every interface.

    `traces` are those that will be replayed: packets are sized to their rates. Raises MachineError outside a sandbox,
    or where a program, a module or a congestion control is missing.
    """

    link: LinkSettings
    receivers: int = 1
    traces: Sequence[Trace] = ()
    senders: int = 1
    hosts: dict[str, Host] = field(default_factory=dict, init=False, repr=False)
    settings: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """What was pinned, as read back: for a run's manifest."""
    _gso_bytes: int = field(default=0, init=False, repr=False)
    """In force: most bytes of a group of packets."""
    _lock: ExitStack = field(default_factory=ExitStack, init=False, repr=False)
    _net: Any = field(default=None, init=False, repr=False)
    _programs: list[subprocess.Popen[Any]] = field(default_factory=list, init=False, repr=False)

    bottleneck = "router-right"
    """The router's interface toward the receivers: where the trace is replayed."""
    upstream = "router-left"
    """The router's interface toward the sender: where an uplink trace is replayed."""

    @property
    def sender(self) -> Host:
        return self.hosts["sender0"]

    @property
    def receiver(self) -> Host:
        return self.hosts["receiver0"]

    @property
    def router(self) -> Host:
        return self.hosts["router"]

    @property
    def sender_hosts(self) -> list[Host]:
        return [self.hosts[f"sender{i}"] for i in range(self.senders)]

    @property
    def receiver_hosts(self) -> list[Host]:
        return [self.hosts[f"receiver{i}"] for i in range(self.receivers)]

    @property
    def sender_ip(self) -> str:
        return self.sender_ips[0]

    @property
    def sender_ips(self) -> list[str]:
        return [f"10.1.{i}.1" for i in range(self.senders)]

    @property
    def receiver_ips(self) -> list[str]:
        return [f"10.2.{i}.2" for i in range(self.receivers)]

    @property
    def cross_ips(self) -> tuple[str, str]:
        """Addresses of the two ends of the cross traffic; their links are the last on either side."""
        return f"10.1.{self.senders}.1", f"10.2.{self.receivers}.2"

    @property
    def packet_bytes(self) -> int:
        """Most bytes that cross the link as one packet, headers included."""
        gso = self._gso_bytes or self.link.gso_bytes(self.traces)
        return gso + 14 if gso <= self.link.mtu else gso + 14 + TCP_HEADERS_BYTES + 66 * (gso // (self.link.mtu - 52))

    def __enter__(self) -> Network:
        if not sandbox.inside():
            raise MachineError("an emulated network needs namespaces of its own: start it through emulator.sandbox.run")
        require_programs(PROGRAMS)
        for what in ("senders", "receivers"):
            if not 1 <= getattr(self, what) <= 100:
                raise SpecError(f"{what}={getattr(self, what)}: use 1 to 100")
        self._lock.enter_context(alone())
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for program in self._programs:
            if program.poll() is None:
                program.kill()
        for program in self._programs:
            program.wait()
            for stream in (program.stdin, program.stdout, program.stderr):
                if stream is not None:
                    with suppress(BrokenPipeError):  # it died with something unread
                        stream.close()
        self._programs.clear()
        if self._net is not None:
            net, self._net = self._net, None
            # The links go with their namespaces; deleting them one by one would need every shell alive.
            for host in net.hosts:
                host.terminate()
            self.hosts.clear()
        self._lock.close()

    def popen(self, host: Host, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program on a host; options as for subprocess.Popen (streams are inherited unless given).

        `python -m testbed...` works on every host. What still runs when the network is left is killed.
        """
        environment = dict(options.pop("env", None) or os.environ)
        paths = [str(IMPORT_ROOT), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        program = host.popen(
            [*self._pinned(host.name), *argv], **({"stdout": None, "stderr": None} | options), env=environment
        )
        self._programs.append(program)
        return program

    def _pinned(self, name: str) -> list[str]:
        """The prefix that keeps a program of a sender or a receiver on its half of the cores."""
        cores = sorted(os.sched_getaffinity(0))
        if not self.link.pin or len(cores) < 2:
            return []
        halves = {"sender": cores[: len(cores) // 2], "receiver": cores[len(cores) // 2 :]}
        mine = halves.get(name.rstrip("0123456789"))
        return [] if mine is None else ["taskset", "-c", ",".join(map(str, mine))]

    def run(self, host: Host, argv: Sequence[str]) -> str:
        """Run a program on a host, wait for it and return its output; MachineError when it fails."""
        process = host.popen(list(argv), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output, _ = process.communicate()
        if process.returncode != 0:
            raise MachineError(f"`{' '.join(argv)}` on {host.name} failed: {output.strip() or process.returncode}")
        return output

    def size_packets(self, traces: Sequence[Trace]) -> None:
        """Limit groups of packets to the rates of these traces, for connections made from now on: between networks of
        fast and slow traces, what suits a fast one would take a tenth of a second on a slow one.
        """
        gso = self.link.gso_bytes(traces)
        if gso == self._gso_bytes or not self._groups():
            return
        size = min(max(gso, self.link.mtu) + TCP_HEADERS_BYTES, MAX_GSO_BYTES)
        running = {}
        for name, host in self.hosts.items():
            links = self.settings["hosts"][name]["interfaces"]
            lines = [f"ip link set {link} gso_max_size {size}" for link in links]
            script = "\n".join(["set -e", *lines, "ip -d -j link show"])
            running[name] = host.popen(
                ["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        for name, process in running.items():
            output, _ = process.communicate()
            found = [link for link in json.loads(output) if link["ifname"] != "lo"] if not process.returncode else []
            if not found or any(link.get("gso_max_size") != size for link in found):
                raise MachineError(f"host {name}: packets cannot be limited to {size} bytes: {output.strip()[:200]}")
        self._gso_bytes = gso

    def _groups(self) -> bool:
        """Whether packets travel in groups for any of the traces."""
        return max((self.link.gso_bytes([trace]) for trace in self.traces), default=MAX_GSO_BYTES) > self.link.mtu

    # ---- building ---------------------------------------------------------------------------------------------

    def _build(self) -> None:
        if self.link.cc not in (available := _read("net/ipv4/tcp_available_congestion_control").split()):
            raise MachineError(
                f"congestion control {self.link.cc!r} is not loaded; this kernel has {', '.join(available)}: "
                f"choose one, or run `sudo modprobe tcp_{self.link.cc}`"
            )
        self._gso_bytes = self.link.gso_bytes(self.traces)
        self._net = _mininet()()
        others = self.link.crossed
        left = [*(f"sender{i}" for i in range(self.senders)), *([CROSS_SENDER] if others else [])]
        right = [*(f"receiver{i}" for i in range(self.receivers)), *([CROSS_RECEIVER] if others else [])]
        gather, fan = (["gather"] if len(left) > 1 else []), (["fan"] if len(right) > 1 else [])
        # The router has one link on either side, so that one queue a direction sees everything; what delays and
        # loses has a host of its own, away from that queue.
        middle = [*gather, *([DELAY_HOST] if self.link.impaired(self.traces) else []), "router", *fan]
        for name in [*left, *middle, *right]:
            self.hosts[name] = self._net.addHost(name, ip=None)
        scripts: dict[str, list[str]] = {name: ["set -e", "ip link set lo up"] for name in self.hosts}

        # Every link is a /24: 10.1.i for sender i, 10.2.i for receiver i, 10.0.k inside. Traffic to 10.1 goes left, to
        # 10.2 right; an end host has one link, so its route is the default and carries the congestion control.
        def join(here: str, there: str, net: str, index: int | None = None) -> None:
            number = "" if index is None else str(index)
            ends = (
                f"{here}-right{'' if here in left else number}",
                f"{there}-left{'' if there in right else number}",
            )
            self._net.addLink(self.hosts[here], self.hosts[there], intfName1=ends[0], intfName2=ends[1])
            for name, end, address in ((here, ends[0], f"{net}.1"), (there, ends[1], f"{net}.2")):
                scripts[name] += self._interface(end, address)

        for i, name in enumerate(left):
            join(name, middle[0], f"10.1.{i}", i if len(left) > 1 else None)
            scripts[name].append(f"ip route add default via 10.1.{i}.2 congctl {self.link.cc}")
        for k, (here, there) in enumerate(itertools.pairwise(middle)):
            join(here, there, f"10.0.{k}")
            scripts[here].append(f"ip route add 10.2.0.0/16 via 10.0.{k}.2")
            scripts[there].append(f"ip route add 10.1.0.0/16 via 10.0.{k}.1")
        for i, name in enumerate(right):
            join(middle[-1], name, f"10.2.{i}", i if len(right) > 1 else None)
            scripts[name].append(f"ip route add default via 10.2.{i}.1 congctl {self.link.cc}")
        for name in middle:
            scripts[name].append("echo 1 > /proc/sys/net/ipv4/ip_forward")
        self._configure(scripts)

    def _interface(self, name: str, address: str) -> list[str]:
        gso = self._gso_bytes
        lines = [f"ip link set {name} mtu {self.link.mtu} up", f"ip address add {address}/24 dev {name}"]
        if not self._groups():
            lines.append(f"ethtool -K {name} tso off gso off gro off")
        elif gso < MAX_GSO_BYTES:
            size = min(max(gso, self.link.mtu) + TCP_HEADERS_BYTES, MAX_GSO_BYTES)
            lines.append(f"ip link set {name} gso_max_size {size}")
        return lines

    def _configure(self, scripts: Mapping[str, list[str]]) -> None:
        """Run every host's script, all at once, and keep what the kernel then says."""
        pins = [f"[ ! -e /proc/sys/{key} ] || echo '{value}' > /proc/sys/{key}" for key, value in SYSCTLS.items()]
        reads = f"cd /proc/sys; for f in {' '.join(SYSCTLS)}; do echo $f=$(cat $f 2>/dev/null || echo absent); done"
        running = {}
        for name, lines in scripts.items():
            script = "\n".join([*lines, *pins, reads, "ip -d -j link show"])
            running[name] = self.hosts[name].popen(
                ["bash", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        outputs = {name: process.communicate()[0] for name, process in running.items()}
        for name, process in running.items():
            if process.returncode != 0:
                raise MachineError(f"cannot set up host {name} of the emulated network: {outputs[name].strip()}")
        self.settings = {
            "link": asdict(self.link),
            "kernel": platform.release(),
            "packet_bytes": self.packet_bytes,
            "hosts": {name: self._checked(name, output) for name, output in outputs.items()},
        }

    def _checked(self, name: str, output: str) -> dict[str, Any]:
        """A host's settings as its kernel reports them. Raises MachineError where they differ from those set."""
        *lines, links = output.strip().splitlines()
        sysctls = dict(line.partition("=")[::2] for line in lines)
        for key, value in SYSCTLS.items():
            if sysctls[key] not in (value, "absent"):
                raise MachineError(f"host {name}: {key} is {sysctls[key]!r} after setting it to {value!r}")
        interfaces = {link["ifname"]: link for link in json.loads(links) if link["ifname"] != "lo"}
        for interface, link in interfaces.items():
            if link["mtu"] != self.link.mtu:
                raise MachineError(f"host {name}: the MTU of {interface} is {link['mtu']}, not {self.link.mtu}")
        kept = ("mtu", "gso_max_size", "qdisc", "operstate")
        return {
            "sysctls": sysctls,
            "interfaces": {key: {what: link.get(what) for what in kept} for key, link in interfaces.items()},
        }


def require_programs(programs: Mapping[str, str]) -> None:
    """MachineError naming the first missing program and the package that has it."""
    for program, package in programs.items():
        if shutil.which(program, path=sandbox.search_path()) is None:
            raise MachineError(f"`{program}` is missing; run `sudo apt-get install --no-install-recommends {package}`")


def _read(key: str) -> str:
    return Path("/proc/sys", key).read_text().strip()


def _mininet() -> Any:
    """Mininet's class for networks, without two habits: raising the machine's limits, and waiting for dead shells."""
    try:
        from mininet.net import Mininet
        from mininet.node import Host
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("distutils"):
            raise MachineError(
                "Mininet needs distutils, which Python 3.12 lacks; run `pip install setuptools`"
            ) from None
        raise MachineError(f"the Python package mininet is missing; run: {INSTALL}") from None

    class LivingHost(Host):
        def read(self, size: int = 1024) -> str:
            while not self.readbuf and not select.select([self.stdout], [], [], 0.1)[0]:
                if self.shell.poll() is not None:
                    raise MachineError(f"the shell of the emulated host {self.name} died")
            return super().read(size)

    # Its init() writes fs.file-max, kernel.pty.max and the like, which no namespace keeps from the host.
    Mininet.inited = True
    return functools.partial(Mininet, host=LivingHost, controller=None, build=False)
