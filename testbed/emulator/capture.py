"""Packets at both ends of a link: recorded with tcpdump, analysed with Scapy's reader.

The always-on counters say what the queue let through; a capture says what TCP made of it: goodput per window,
round-trip times, retransmissions, and how long each chunk's bytes were under way. Only headers are kept. A packet under
segmentation offload is one record of up to 64 KiB: bytes are summed as the segments it stands for, never counted as
packets.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from testbed.errors import MachineError

if TYPE_CHECKING:
    from testbed.emulator.topology import Network

SNAP_BYTES: Final = 96
"""Ethernet, IP and TCP headers with every option."""
BUFFER_KIB: Final = 65_536
SETTLE_S: Final = 0.2
"""A capture goes on this long, for packets that are still under way or not yet read."""
SEQUENCES: Final = 1 << 32
DROPPED: Final = re.compile(r"(\d+) packets? dropped by kernel")
END_OF_LINK: Final = {"sender": "sender0-right", "receiver": "receiver0-left"}


class Packet(NamedTuple):
    """One record: a TCP packet, or a group of segments under offload."""

    t_s: float
    """CLOCK_MONOTONIC, like the session's times."""
    flow: tuple[str, int, str, int]
    """Source address and port, destination address and port."""
    sequence: int
    payload_bytes: int
    acknowledgement: int
    frame_bytes: int
    """Layer-2 bytes of all its segments."""


@dataclass(frozen=True)
class Capture:
    """What was recorded at one end. `dropped` packets are missing from it."""

    file: Path
    clock_offset_s: float
    """CLOCK_MONOTONIC minus the wall clock of the file's stamps."""
    dropped: int

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


@contextlib.contextmanager
def capture(network: Network, folder: Path) -> Iterator[dict[str, Capture]]:
    """Record both ends while the context lasts; the dictionary has `sender` and `receiver` once it is left.

    Raises MachineError where tcpdump is missing or does not start.
    """
    from testbed.emulator.sandbox import search_path

    if shutil.which("tcpdump", path=search_path()) is None:
        raise MachineError("`tcpdump` is missing; run `sudo apt-get install --no-install-recommends tcpdump`")
    folder.mkdir(parents=True, exist_ok=True)
    captures: dict[str, Capture] = {}
    running = {}
    offset_s = time.monotonic() - time.time()
    for end, interface in END_OF_LINK.items():
        host = network.hosts["sender0" if end == "sender" else "receiver0"]
        file = folder / f"{end}.pcap"
        # Without immediate mode, what the kernel holds back for up to a second would be lost at the end. And tcpdump
        # gives root up for a user that an unprivileged namespace does not have, unless told to stay root.
        words = ["tcpdump", "-i", interface, "-n", "--immediate-mode", "--time-stamp-precision=nano", "-Z", "root"]
        words += ["-s", str(SNAP_BYTES), "-B", str(BUFFER_KIB), "-w", str(file), "tcp"]
        running[end] = network.popen(host, words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for end, process in running.items():
        assert process.stderr is not None
        line = process.stderr.readline()
        while line and "listening on" not in line:
            line = process.stderr.readline()
        if not line:
            raise MachineError(f"tcpdump at the {end} did not start")
    try:
        yield captures
    finally:
        time.sleep(SETTLE_S)
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for end, process in running.items():
            said = process.communicate()[1]
            found = DROPPED.search(said)
            captures[end] = Capture(folder / f"{end}.pcap", offset_s, int(found[1]) if found else -1)


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
        int.from_bytes(frame[tcp + 4 : tcp + 8], "big"),
        payload,
        int.from_bytes(frame[tcp + 8 : tcp + 12], "big"),
        payload + segments * (tcp + tcp_bytes),
    )


# ---- analysis ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Analysis:
    """What a pair of captures says about the data from sender to receiver. Times are CLOCK_MONOTONIC."""

    arrival_s: NDArray[np.float64]
    """When each packet with data reached the receiver."""
    frame_bytes: NDArray[np.int64]
    """Its layer-2 bytes."""
    new_bytes: NDArray[np.int64]
    """Its payload that had not arrived before."""
    one_way_s: NDArray[np.float64]
    """From its (last) sending to its arrival; NaN where the sending is not in the capture."""
    rtt_s: NDArray[np.float64]
    """Round trips at the sender: from data to the first acknowledgement of it, retransmitted data left out."""
    rtt_at_s: NDArray[np.float64]
    """When each of these acknowledgements came."""
    sent_bytes: int
    retransmitted_bytes: int
    dropped: int
    """Packets that tcpdump missed, both ends together."""

    def goodput_bps(self, begin_s: float, end_s: float) -> float:
        """Payload that arrived for the first time in a stretch of time, in bit/s."""
        inside = (self.arrival_s >= begin_s) & (self.arrival_s < end_s)
        return float(self.new_bytes[inside].sum()) * 8.0 / (end_s - begin_s)

    def frames_between(self, begin_s: float, end_s: float) -> int:
        """Layer-2 bytes of data that arrived in a stretch of time: comparable with the queue's counter."""
        inside = (self.arrival_s >= begin_s) & (self.arrival_s < end_s)
        return int(self.frame_bytes[inside].sum())

    def windows(self, begin_s: float, end_s: float, window_s: float = 0.1) -> list[dict[str, float]]:
        """Goodput, and median and largest round trip and one-way delay, window by window from `begin_s`."""
        rows = []
        for start_s in np.arange(begin_s, end_s - window_s / 2.0, window_s):
            rows.append({"t_s": float(start_s - begin_s), **self._facts(float(start_s), float(start_s) + window_s)})
        return rows

    def chunks(self, rows: Iterable[Mapping[str, Any]], t0_s: float) -> list[dict[str, Any]]:
        """Rows of `chunks.jsonl` of one session (times from `t0_s`), each with what the capture says of it."""
        joined = []
        for row in rows:
            begin, end = row.get("first_byte_s"), row.get("last_byte_s")
            facts = {} if begin is None or end is None else self._facts(t0_s + begin, t0_s + max(end, begin + 1e-3))
            joined.append({**row, **{f"capture_{name}": value for name, value in facts.items()}})
        return joined

    def _facts(self, begin_s: float, end_s: float) -> dict[str, float]:
        data = (self.arrival_s >= begin_s) & (self.arrival_s < end_s)
        acked = (self.rtt_at_s >= begin_s) & (self.rtt_at_s < end_s)
        return {
            "goodput_bps": self.goodput_bps(begin_s, end_s),
            "rtt_s": _median(self.rtt_s[acked]),
            "one_way_s": _median(self.one_way_s[data]),
            "one_way_max_s": _largest(self.one_way_s[data]),
        }


def analyse(captures: Mapping[str, Capture], sender_ip: str, mtu: int = 1500) -> Analysis:
    """Follow every flow of data that leaves `sender_ip`, from the sender's capture to the receiver's."""
    sent = _Sent()
    for packet in captures["sender"].packets(mtu):
        sent.take(packet, sender_ip)
    flows: dict[tuple[str, int, str, int], int] = {}
    arrivals = []
    for packet in captures["receiver"].packets(mtu):
        if packet.flow[0] != sender_ip or not packet.payload_bytes:
            continue
        begin = _unwrap(packet.sequence, flows.get(packet.flow, packet.sequence))
        end = begin + packet.payload_bytes
        # In-order data is new beyond what came before; what fills a hole counts as soon as it is passed.
        new = max(end - max(begin, flows.get(packet.flow, begin)), 0)
        flows[packet.flow] = max(flows.get(packet.flow, begin), end)
        left_s = sent.last_sent_s(packet, begin)
        arrivals.append((packet.t_s, packet.frame_bytes, new, packet.t_s - left_s if left_s is not None else np.nan))
    table = np.array(arrivals, dtype=np.float64).reshape(-1, 4)
    trips = np.array(sent.trips, dtype=np.float64).reshape(-1, 2)
    return Analysis(
        arrival_s=table[:, 0],
        frame_bytes=table[:, 1].astype(np.int64),
        new_bytes=table[:, 2].astype(np.int64),
        one_way_s=table[:, 3],
        rtt_s=trips[:, 1],
        rtt_at_s=trips[:, 0],
        sent_bytes=sent.bytes,
        retransmitted_bytes=sent.again_bytes,
        dropped=sum(max(capture.dropped, 0) for capture in captures.values()),
    )


class _Sent:
    """The sender's side: when each byte left, what left twice, and the round trips."""

    def __init__(self) -> None:
        self.bytes = self.again_bytes = 0
        self.trips: list[tuple[float, float]] = []
        self._top: dict[tuple[str, int, str, int], int] = {}
        self._times: dict[tuple[str, int, str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._waiting: dict[tuple[str, int, str, int], dict[int, float]] = defaultdict(dict)

    def take(self, packet: Packet, sender_ip: str) -> None:
        if packet.flow[0] != sender_ip:
            self._acknowledge(packet)
            return
        if not packet.payload_bytes:
            return
        top = self._top.get(packet.flow, packet.sequence)
        begin = _unwrap(packet.sequence, top)
        end = begin + packet.payload_bytes
        self.bytes += packet.payload_bytes
        again = max(min(end, top) - begin, 0) if packet.flow in self._top else 0
        self.again_bytes += again
        self._top[packet.flow] = max(top, end)
        self._times[packet.flow][begin].append(packet.t_s)
        waiting = self._waiting[packet.flow]
        if again:
            # Karn's rule: an acknowledgement of data that was sent twice says nothing about the round trip.
            for pending in [edge for edge in waiting if edge > begin]:
                del waiting[pending]
        else:
            waiting[end] = packet.t_s

    def _acknowledge(self, packet: Packet) -> None:
        source, source_port, target, target_port = packet.flow
        flow = (target, target_port, source, source_port)
        waiting = self._waiting.get(flow)
        if not waiting:
            return
        edge = _unwrap(packet.acknowledgement, self._top[flow])
        done = []
        for end in waiting:  # in order of sending, so of the stream
            if end > edge:
                break
            done.append(end)
        if done:
            self.trips.append((packet.t_s, packet.t_s - waiting[done[-1]]))
        for end in done:
            del waiting[end]

    def last_sent_s(self, packet: Packet, begin: int) -> float | None:
        """When the packet with this data last left before it arrived."""
        times = self._times.get(packet.flow, {}).get(begin)
        earlier = [time_s for time_s in times or () if time_s <= packet.t_s]
        return earlier[-1] if earlier else None


def _unwrap(sequence: int, near: int) -> int:
    """The stream position nearest to `near` whose low 32 bits are `sequence`."""
    return near + ((sequence - near + SEQUENCES // 2) % SEQUENCES) - SEQUENCES // 2


def _median(values: NDArray[np.float64]) -> float:
    found = values[~np.isnan(values)]
    return float(np.median(found)) if len(found) else float("nan")


def _largest(values: NDArray[np.float64]) -> float:
    found = values[~np.isnan(values)]
    return float(found.max()) if len(found) else float("nan")
