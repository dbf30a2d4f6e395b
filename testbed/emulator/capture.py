"""Packets at both ends of a link, recorded with tcpdump or, where that cannot, by `kvstream.testbed.emulator.sniff`.

The always-on counters say what the queue let through; a capture says what TCP made of it
(`kvstream.testbed.emulator.analysis`). Only headers are kept, and read back with Scapy. A packet under segmentation
offload is one record of up to 64 KiB: bytes are summed as the segments it stands for, never counted as packets.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, cast

from kvstream.testbed.errors import MachineError

if TYPE_CHECKING:
    from kvstream.testbed.emulator.topology import Network

SNAP_BYTES: Final = 96
"""Ethernet, IP and TCP headers with every option."""
BUFFER_KIB: Final = 65_536
SETTLE_S: Final = 0.2
"""A capture goes on this long, for packets that are still under way or not yet read."""
RST: Final = 0x04
ACK: Final = 0x10
DROPPED: Final = re.compile(r"(\d+) packets? dropped by kernel")

Flow: TypeAlias = tuple[str, int, str, int]
"""Source address and port, destination address and port."""


class Packet(NamedTuple):
    """One record: a TCP packet, or a group of segments under offload."""

    t_s: float
    """CLOCK_MONOTONIC, like the session's times."""
    flow: Flow
    flags: int
    """The TCP header's: ACK, RST, ..."""
    sequence: int
    payload_bytes: int
    acknowledgement: int
    frame_bytes: int
    """Layer-2 bytes of all its segments."""


@dataclass(frozen=True)
class Capture:
    """What was recorded at one end."""

    file: Path
    clock_offset_s: float
    """CLOCK_MONOTONIC minus the wall clock of the file's stamps."""
    dropped: int | None
    """Packets that are missing from it; None where the recorder did not say."""

    def packets(self, mtu: int = 1500) -> Iterator[Packet]:
        """Every TCP packet of the file, in order. Raises MachineError for a file that is no capture."""
        from scapy.error import Scapy_Exception
        from scapy.utils import RawPcapReader

        try:
            with open(self.file, "rb") as file:  # given a name, the reader would leave a bad file open
                reader = RawPcapReader(cast(Any, file))
                unit = 1e-9 if reader.nano else 1e-6
                for frame, about in reader:
                    packet = _parse(frame, about.wirelen, about.sec + about.usec * unit + self.clock_offset_s, mtu)
                    if packet is not None:
                        yield packet
        except (Scapy_Exception, EOFError, OSError) as error:
            raise MachineError(f"{self.file}: not a capture that can be read: {error}") from error


def recorder() -> Literal["tcpdump", "sniff"]:
    """What records here. tcpdump changes its user once it listens, which a user namespace may forbid."""
    from kvstream.testbed.emulator.sandbox import search_path

    found = shutil.which("tcpdump", path=search_path()) is not None
    return "tcpdump" if found and Path("/proc/self/setgroups").read_text().strip() != "deny" else "sniff"


@contextlib.contextmanager
def capture(network: Network, folder: Path, name: str = "") -> Iterator[dict[str, Capture]]:
    """Record every sender and the first receiver while the context lasts. The dictionary has each by its host's name
    (`sender0`, `receiver0`) once it is left.

    The files are `folder/[name-]sender0.pcap` and so on. Raises MachineError where recording does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    interfaces = {host.name: f"{host.name}-right" for host in network.sender_hosts} | {"receiver0": "receiver0-left"}
    files = {end: folder / f"{name}{'-' if name else ''}{end}.pcap" for end in interfaces}
    captures: dict[str, Capture] = {}
    running = {}
    offset_s = time.monotonic() - time.time()
    for end, interface in interfaces.items():
        host, words = network.hosts[end], _words(interface, files[end])
        running[end] = network.popen(host, words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for end, process in running.items():
        assert process.stderr is not None
        said: list[str] = []
        while not said or (said[-1] and "listening on" not in said[-1]):
            said.append(process.stderr.readline())
        if not said[-1]:
            raise MachineError(f"recording packets at {end} did not start: {''.join(said).strip()}")
    try:
        yield captures
    finally:
        time.sleep(SETTLE_S)
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for end, process in running.items():
            found = DROPPED.search(process.communicate()[1])
            captures[end] = Capture(files[end], offset_s, int(found[1]) if found else None)


def _words(interface: str, file: Path) -> list[str]:
    snap, buffer = str(SNAP_BYTES), str(BUFFER_KIB)
    if recorder() == "sniff":
        return [sys.executable, "-m", "kvstream.testbed.emulator.sniff", interface, str(file), snap, buffer]
    # Without immediate mode, what the kernel holds back for up to a second would be lost at the end. And a user of its
    # own could not write where root may.
    words = ["tcpdump", "-i", interface, "-n", "--immediate-mode", "--time-stamp-precision=nano", "-Z", "root"]
    return [*words, "-s", snap, "-B", buffer, "-w", str(file), "tcp"]


def _parse(frame: bytes, wire_bytes: int, t_s: float, mtu: int) -> Packet | None:
    if len(frame) < 54 or frame[12:14] != b"\x08\x00" or frame[23] != 6:
        return None
    ip_bytes = (frame[14] & 0xF) * 4
    tcp = 14 + ip_bytes
    tcp_bytes = (frame[tcp + 12] >> 4) * 4
    payload = max(wire_bytes - tcp - tcp_bytes, 0)
    ports = (int.from_bytes(frame[tcp : tcp + 2], "big"), int.from_bytes(frame[tcp + 2 : tcp + 4], "big"))
    source, target = (".".join(map(str, frame[begin : begin + 4])) for begin in (26, 30))
    # Each segment of a group travels with headers of its own.
    segments = max(-(-payload // (mtu - ip_bytes - tcp_bytes)), 1)
    return Packet(
        t_s,
        (source, ports[0], target, ports[1]),
        frame[tcp + 13],
        int.from_bytes(frame[tcp + 4 : tcp + 8], "big"),
        payload,
        int.from_bytes(frame[tcp + 8 : tcp + 12], "big"),
        payload + segments * (tcp + tcp_bytes),
    )
