"""Traffic control over netlink, for one interface: an HTB class that sets the rate and the queue under it.

Why not pyroute2 here: its messages take 0.45 ms each on the machine this was measured on, as much as a rate change
may be late in all, and its import doubles the shaper's start. These few messages take 15 us. They are `struct tcmsg`
of linux/rtnetlink.h with the attributes of linux/pkt_sched.h.

    root      htb 5:           the unclassified traffic goes to class 1
    5:1       htb class        rate = ceil = what the trace says; burst = cburst = 2 ms of it
    6:        tbf in 5:1       a byte-limited FIFO behind a valve: open (1 Tbit/s), or closed while the trace says 0

HTB knows no rate of 0, and a tiny rate is no substitute: its debt is kept as time, so one packet sent at 1 byte/s
would hold the class for up to 60 s after the outage. TBF starts from fresh tokens at each change, so closing it lets at
most one packet through, keeps what is queued, goes on queueing up to the limit, and opening it costs nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from dataclasses import dataclass
from typing import Final

BURST_S: Final = 0.002
"""HTB may catch up so much of a late wake-up. At 2 ms of line rate it is exact from 2 Mbit/s to 10 Gbit/s."""
OPEN_BPS: Final = 1e12
CLOSED_BPS: Final = 8.0
MIN_BPS: Final = 8.0
"""Rates are whole bytes a second in the kernel; what is below this is an outage."""

NEWQDISC, DELQDISC, GETQDISC, NEWTCLASS, GETTCLASS = 36, 37, 38, 40, 42
ERROR, DONE = 2, 3
REQUEST, ACK, ECHO, EXCL, CREATE = 0x1, 0x4, 0x8, 0x200, 0x400
ROOT: Final = 0xFFFFFFFF
HTB, CLASS, QUEUE = 0x50000, 0x50001, 0x60000
KIND, OPTIONS, STATS2 = 1, 2, 7
TICK_S: Final = 64e-9
"""The kernel's unit for the length of a burst."""
QUANTUM: Final = 60_000
ETHERNET: Final = 1
HEADER: Final = struct.Struct("=IHHII")
TCMSG: Final = struct.Struct("=BBHiIII")
RATESPEC: Final = struct.Struct("=BBHhHI")
ATTRIBUTE: Final = struct.Struct("=HH")


class KernelRefused(OSError):
    """The kernel answered a request with an error."""


@dataclass(frozen=True, slots=True)
class ClassState:
    """What the kernel says of the class: its rate, and counters since it was made."""

    rate_bps: float
    burst_s: float
    sent_bytes: int
    sent_packets: int
    backlog_bytes: int
    drops: int


class Interface:
    """The traffic control of one interface in this process's network namespace."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.index = socket.if_nametoindex(name)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._socket.settimeout(5.0)
        self._sequence = 0
        # Opened once: binding or closing such a socket waits for the kernel's other readers, 7 ms and more.
        self._raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)

    def close(self) -> None:
        self._socket.close()
        self._raw.close()

    def create(self, rate_bps: float, limit_bytes: int, packet_bytes: int) -> None:
        """Put the queueing in place, replacing whatever was on the interface. Raises KernelRefused."""
        with contextlib.suppress(KernelRefused):  # there may be none
            self._ask(DELQDISC, 0, 0, ROOT)
        new = CREATE | EXCL
        init = struct.pack("=IIIII", 3, 10, CLASS & 0xFFFF, 0, 0)
        self._ask(NEWQDISC, new, HTB, ROOT, _string(KIND, "htb") + _attribute(OPTIONS, _attribute(2, init)))
        self._ask(NEWTCLASS, new, CLASS, HTB, _htb(rate_bps))
        self._ask(NEWQDISC, new, QUEUE, CLASS, _tbf(limit_bytes, packet_bytes, open=True))

    def set_rate(self, rate_bps: float) -> None:
        """Change the class's rate, in place."""
        self._ask(NEWTCLASS, 0, CLASS, HTB, _htb(rate_bps))

    def set_queue(self, limit_bytes: int, packet_bytes: int, *, open: bool = True) -> None:
        """Change the queue's byte limit and valve, in place; what is queued stays."""
        self._ask(NEWQDISC, 0, QUEUE, CLASS, _tbf(limit_bytes, packet_bytes, open=open))

    def state(self) -> ClassState:
        """Read the class back. Raises KernelRefused when it is gone."""
        reply = self._ask(GETTCLASS, 0, CLASS, 0, wanted=NEWTCLASS)
        attributes = _attributes(reply, HEADER.size + TCMSG.size, len(reply))
        if KIND not in attributes or _bytes(reply, attributes[KIND]) != b"htb\0" or OPTIONS not in attributes:
            raise KernelRefused(0, f"the class on {self.name} is not the one that was made")
        options = _attributes(reply, *attributes[OPTIONS])
        parameters, _ = options[1]
        (rate,) = struct.unpack_from("=I", reply, parameters + 8)
        (buffer,) = struct.unpack_from("=I", reply, parameters + 24)
        if 6 in options:
            (rate,) = struct.unpack_from("=Q", reply, options[6][0])
        counters = _attributes(reply, *attributes[STATS2])
        sent_bytes, sent_packets = struct.unpack_from("=QI", reply, counters[1][0])
        _, backlog, drops = struct.unpack_from("=III", reply, counters[3][0])
        return ClassState(rate * 8.0, buffer * TICK_S, sent_bytes, sent_packets, backlog, drops)

    def queue_state(self) -> tuple[int, bool]:
        """Byte limit of the queue and whether its valve is open, as the kernel has them. Raises KernelRefused."""
        reply = self._ask(GETQDISC, 0, QUEUE, CLASS, wanted=NEWQDISC)
        attributes = _attributes(reply, HEADER.size + TCMSG.size, len(reply))
        if KIND not in attributes or _bytes(reply, attributes[KIND]) != b"tbf\0":
            raise KernelRefused(0, f"the queue on {self.name} is not the one that was made")
        options = _attributes(reply, *attributes[OPTIONS])
        parameters, _ = options[1]
        (rate,) = struct.unpack_from("=I", reply, parameters + 8)
        (limit,) = struct.unpack_from("=I", reply, parameters + 24)
        return limit, rate * 8.0 > CLOSED_BPS

    def wake(self) -> None:
        """Make the kernel look at the queue again: a valve that opens does not. Sends one 60-byte frame that no host
        listens to (EtherType 0x88B5, for local experiments)."""
        frame = b"\xff" * 6 + bytes(6) + b"\x88\xb5" + bytes(46)
        with contextlib.suppress(OSError):  # a full queue drops the frame, after it was woken
            self._raw.sendto(frame, socket.MSG_DONTWAIT, (self.name, 0))

    def _ask(
        self, kind: int, flags: int, handle: int, parent: int, payload: bytes = b"", wanted: int | None = None
    ) -> bytes:
        """One request and its answer: the acknowledgement, or the message of type `wanted`."""
        self._sequence += 1
        body = TCMSG.pack(0, 0, 0, self.index, handle, parent, 0) + payload
        flags |= REQUEST | (ECHO if wanted else ACK)
        message = HEADER.pack(HEADER.size + len(body), kind, flags, self._sequence, 0) + body
        self._socket.send(message)
        while True:
            reply = self._socket.recv(65_536)
            _, reply_kind, _, sequence, _ = HEADER.unpack_from(reply)
            if sequence != self._sequence:
                continue
            if reply_kind == ERROR:
                (code,) = struct.unpack_from("=i", reply, HEADER.size)
                if code == 0 and wanted is None:
                    return reply
                raise KernelRefused(-code, f"{self.name}: {os.strerror(-code)}")
            if reply_kind == wanted:
                return reply


def _htb(rate_bps: float) -> bytes:
    rate = max(round(rate_bps / 8.0), 1)
    spec = RATESPEC.pack(0, ETHERNET, 0, 0, 0, min(rate, 0xFFFFFFFF))
    burst = round(BURST_S / TICK_S)
    options = _attribute(1, spec + spec + struct.pack("=IIIII", burst, burst, QUANTUM, 0, 0))
    if rate > 0xFFFFFFFF:
        options += _attribute(6, struct.pack("=Q", rate)) + _attribute(7, struct.pack("=Q", rate))
    return _string(KIND, "htb") + _attribute(OPTIONS, options)


def _tbf(limit_bytes: int, packet_bytes: int, *, open: bool) -> bytes:
    rate = round((OPEN_BPS if open else CLOSED_BPS) / 8.0)
    spec = RATESPEC.pack(0, ETHERNET, 0, 0, 0, min(rate, 0xFFFFFFFF))
    options = _attribute(1, spec + RATESPEC.pack(0, 0, 0, 0, 0, 0) + struct.pack("=III", limit_bytes, 0, 0))
    if rate > 0xFFFFFFFF:
        options += _attribute(4, struct.pack("=Q", rate))
    # Closed, the burst is what passes once; it must still admit the largest packet to the queue.
    options += _attribute(6, struct.pack("=I", 1 << 30 if open else packet_bytes))
    return _string(KIND, "tbf") + _attribute(OPTIONS, options)


def _attribute(kind: int, content: bytes) -> bytes:
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(content), kind) + content + bytes(-len(content) % 4)


def _string(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")


def _attributes(message: bytes, begin: int, end: int) -> dict[int, tuple[int, int]]:
    """Where each attribute's content begins and ends, by kind."""
    found = {}
    while begin + ATTRIBUTE.size <= end:
        length, kind = ATTRIBUTE.unpack_from(message, begin)
        if length < ATTRIBUTE.size or begin + length > end:
            break
        found[kind & 0x3FFF] = (begin + ATTRIBUTE.size, begin + length)
        begin += (length + 3) & ~3
    return found


def _bytes(message: bytes, span: tuple[int, int]) -> bytes:
    return message[span[0] : span[1]]
