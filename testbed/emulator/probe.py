"""What a link carries before anything was sent over it: a train of packets, timed on arrival.

The receiver asks, the sender answers with packets back to back. The time to the first is the round trip; the spacing of
the later ones is the bottleneck's. A shaper lets the first 2 ms of its rate through at once, as real token buckets do,
so a train counts only from 3 ms on and is asked for again, four times as long, until it takes long enough. The median
of three such trains counts, because one may be spoiled by a moment without a CPU. This is what a policy sees
as `prior_bps`: a look at one moment of the link, which costs some 0.2 s before the session.

    python -m kvstream.testbed.emulator.probe answer ADDRESS PEER MTU    at the sender, until its input ends
    python -m kvstream.testbed.emulator.probe ask ADDRESS MTU            at the receiver: a JSON line a line of input
"""

from __future__ import annotations

import json
import select
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kvstream.testbed.errors import INSTALL, MachineError
from kvstream.traces.framing import goodput_per_capacity

if TYPE_CHECKING:
    from kvstream.testbed.emulator.topology import Network

PORT: Final = 5201
FIRST_TRAIN: Final = 32
SINGLE_TRAIN: Final = 128
LONGEST_TRAIN: Final = 32_768
UDP_SEGMENT: Final = 103
MAX_GROUP_BYTES: Final = 65_000
SKIPPED_S: Final = 0.003
ENOUGH_S: Final = 0.006
"""A train is long enough when it arrives over this much time after what is skipped."""
TRAINS: Final = 3
QUIET_S: Final = 0.05
"""A train is over when nothing comes for so long."""
FIRST_ANSWER_S: Final = 2.0
SO_TIMESTAMPNS: Final = 35
START_S: Final = 20.0


@dataclass(frozen=True)
class Estimate:
    """One look at the link."""

    capacity_bps: float
    """Layer-2 bit/s of the bottleneck."""
    goodput_bps: float
    """What a TCP flow can get of it: a policy's `prior_bps`."""
    rtt_s: float
    packets: int
    """Packets of the last train that arrived."""


class Prober:
    """The pair of processes, warm; `measure` takes three round trips and some 0.2 s. Use as a context manager."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._running: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Prober:
        network, mtu = self.network, str(self.network.link.mtu)
        roles = (
            (network.sender, ["answer", network.sender_ip, network.receiver_ips[0], mtu]),
            (network.receiver, ["ask", network.sender_ip, mtu]),
        )
        for host, words in roles:
            process = network.popen(
                host,
                [sys.executable, "-m", "kvstream.testbed.emulator.probe", *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._running.append(process)
        for process in self._running:
            if self._line(process, START_S) != "ready":
                raise MachineError(f"the probe did not start; it needs scapy: {INSTALL}")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            process.kill()
            process.communicate()
        self._running.clear()

    def measure(self) -> Estimate:
        """Probe now. Raises MachineError when no train arrives (an outage, say)."""
        asker = self._running[1]
        assert asker.stdin is not None
        asker.stdin.write("go\n")
        asker.stdin.flush()
        answer = json.loads(self._line(asker, 30.0))
        if "error" in answer:
            raise MachineError(f"the probe found no bandwidth: {answer['error']}")
        capacity = answer["capacity_bps"]
        goodput = capacity * goodput_per_capacity(self.network.link.mtu)
        return Estimate(capacity, goodput, answer["rtt_s"], answer["packets"])

    @staticmethod
    def _line(process: subprocess.Popen[str], seconds: float) -> str:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], seconds)[0]:
            raise MachineError("the probe does not answer")
        return process.stdout.readline().strip()


def answer(address: str, peer: str, mtu: int) -> None:
    """At the sender: each request names a length; send a train of that many packets at once."""
    from scapy.layers.inet import IP, UDP
    from scapy.packet import Raw

    payload = bytes(mtu - 28)
    packet = bytes(IP(src=address, dst=peer) / UDP(sport=PORT, dport=PORT) / Raw(payload))
    len_of_group = min(MAX_GROUP_BYTES // len(payload), 64)
    group = payload * len_of_group
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as groups,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as requests,
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as out,
    ):
        requests.bind((address, PORT))
        groups.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, len(payload))
        print("ready", flush=True)
        while True:
            readable, _, _ = select.select([requests, sys.stdin], [], [])
            if requests not in readable:
                return
            (length,) = struct.unpack("!I", requests.recv(4))
            if length <= SINGLE_TRAIN:
                for _ in range(length):
                    out.sendto(packet, (peer, 0))
                continue
            # Packet by packet this process would be the bottleneck: let the kernel cut up groups of them.
            for _ in range(min(length, LONGEST_TRAIN) // len_of_group):
                groups.sendto(group, (peer, PORT))


def ask(address: str, mtu: int) -> None:
    """At the receiver: for each line of input, ask for trains until one is long enough, and print what it says."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        line.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        line.bind(("", PORT))
        print("ready", flush=True)
        for _ in sys.stdin:
            print(json.dumps(_look(line, address, mtu)), flush=True)


def _look(line: socket.socket, address: str, mtu: int) -> dict[str, Any]:
    length, rtt_s = FIRST_TRAIN, float("inf")
    found: list[float] = []
    while True:
        asked_s = time.time()
        line.sendto(struct.pack("!I", length), (address, PORT))
        stamps = _arrivals(line)
        if len(stamps) < 2:
            return {"error": f"{len(stamps)} of {length} packets arrived"}
        rtt_s = min(rtt_s, stamps[0] - asked_s)
        counted = [stamp for stamp in stamps if stamp >= stamps[0] + SKIPPED_S]
        long_enough = len(counted) >= 2 and counted[-1] - counted[0] >= ENOUGH_S
        if long_enough or length >= LONGEST_TRAIN:
            # A link faster than the longest train can tell is at least as fast as that train arrived.
            used = counted if long_enough else stamps
            # What the kernel cuts out of a group has one stamp, and the time counts from that of the first group.
            later = sum(stamp > used[0] for stamp in used)
            found.append(later * (mtu + 14) * 8.0 / max(used[-1] - used[0], 1e-9))
            if len(found) == TRAINS:
                return {"capacity_bps": sorted(found)[TRAINS // 2], "rtt_s": rtt_s, "packets": len(stamps)}
            continue
        length *= 4


def _arrivals(line: socket.socket) -> list[float]:
    """When the packets of one train came, as the kernel noted it."""
    stamps: list[float] = []
    line.settimeout(FIRST_ANSWER_S)
    try:
        while True:
            _, notes, _, _ = line.recvmsg(16, 64)
            seconds, nanoseconds = struct.unpack("qq", notes[0][2])
            stamps.append(seconds + nanoseconds * 1e-9)
            line.settimeout(QUIET_S)
    except TimeoutError:
        return stamps


if __name__ == "__main__":
    if sys.argv[1] == "answer":
        answer(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        ask(sys.argv[2], int(sys.argv[3]))
