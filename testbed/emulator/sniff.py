"""Records the TCP headers that pass an interface, where tcpdump cannot.

    python -m kvstream.testbed.emulator.sniff INTERFACE FILE SNAP_BYTES BUFFER_KIB

In a user namespace that may not change groups (every ordinary user's), tcpdump cannot become the user that it drops
privileges to, and gives up. This needs none: a packet socket whose filter keeps TCP and cuts each frame to SNAP
bytes in the kernel, with its time stamps (nanoseconds) and its count of drops. It speaks like tcpdump on standard error
and writes the same file until SIGINT. Only the standard library is imported: it starts in 30 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import signal
import socket
import struct
import sys
from typing import BinaryIO, Final

ETH_P_ALL: Final = 3
SO_TIMESTAMPNS: Final = 35
SO_ATTACH_FILTER: Final = 26
SO_RCVBUFFORCE: Final = 33
SOL_PACKET: Final = 263
PACKET_STATISTICS: Final = 6
PACKET_AUXDATA: Final = 8
PCAP_HEADER: Final = struct.pack("=IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 65_535, 1)
"""Nanoseconds, version 2.4, Ethernet."""
AT_ONCE: Final = 100_000


def record(interface: str, file: BinaryIO, snap_bytes: int, buffer_bytes: int) -> int:
    """Write what passes until SIGINT; the number of packets that the kernel had no room for."""
    wake, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno())
    signal.signal(signal.SIGINT, lambda *_: None)
    with wake, woken, socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as tap:
        _keep_tcp(tap, snap_bytes)
        tap.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        tap.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        try:
            tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer_bytes)
        except PermissionError:
            tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        tap.bind((interface, ETH_P_ALL))
        file.write(PCAP_HEADER)
        print(f"listening on {interface}", file=sys.stderr, flush=True)
        while wake not in select.select([tap, wake], [], [])[0]:
            _drain(tap, file, snap_bytes)
        _drain(tap, file, snap_bytes)
        _, drops = struct.unpack("II", tap.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    return int(drops)


def _keep_tcp(tap: socket.socket, snap_bytes: int) -> None:
    """Attach the filter: IPv4 and TCP, of each frame the first bytes. It says `return SNAP`, and the kernel cuts."""
    program = [
        (0x28, 0, 0, 12),  # load the EtherType
        (0x15, 0, 3, 0x0800),
        (0x30, 0, 0, 23),  # load the protocol
        (0x15, 0, 1, socket.IPPROTO_TCP),
        (0x06, 0, 0, snap_bytes),
        (0x06, 0, 0, 0),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    tap.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(code)))


def _drain(tap: socket.socket, file: BinaryIO, snap_bytes: int) -> None:
    """Write what waits, up to so much that a signal is heard soon."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(AT_ONCE):
            frame, notes, _, _ = tap.recvmsg(snap_bytes, 128, socket.MSG_DONTWAIT)
            seconds = nanoseconds = 0
            wire_bytes = len(frame)
            for level, kind, data in notes:
                if level == SOL_PACKET and kind == PACKET_AUXDATA:
                    _, wire_bytes = struct.unpack_from("II", data)
                elif level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
                    seconds, nanoseconds = struct.unpack("qq", data)
            file.write(struct.pack("=IIII", seconds, nanoseconds, len(frame), wire_bytes) + frame)


def main() -> None:
    interface, path, snap_bytes, buffer_kib = sys.argv[1:]
    with open(path, "wb", buffering=1 << 20) as file:
        dropped = record(interface, file, int(snap_bytes), int(buffer_kib) << 10)
    print(f"{dropped} packets dropped by kernel", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
