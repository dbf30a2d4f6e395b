"""The kernel's packet queue for user space (NFQUEUE), as far as holding and dropping packets needs it.

pyroute2 has no nfnetlink_queue and the usual binding is a C extension, so this is the wire format of
linux/netfilter/nfnetlink_queue.h. Only metadata is copied unless packets are to be duplicated; a GSO packet stays whole
and is one message, which is what makes plain Python fast enough.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Final

NETLINK_NETFILTER: Final = 12
PACKET, VERDICT, CONFIG, VERDICT_BATCH = ((3 << 8) | message for message in range(4))
CFG_CMD, CFG_PARAMS, CFG_QUEUE_MAXLEN, CFG_MASK, CFG_FLAGS = 1, 2, 3, 4, 5
CMD_BIND: Final = 1
COPY_META, COPY_PACKET = 1, 2
FLAG_GSO: Final = 4
VERDICT_HDR, PAYLOAD = 2, 10
DROP, ACCEPT = 0, 1
REQUEST, ACK = 0x1, 0x4
SOL_NETLINK, NETLINK_NO_ENOBUFS, SO_RCVBUFFORCE = 270, 5, 33

HEADER: Final = struct.Struct("=IHHII")
FAMILY: Final = struct.Struct(">BBH")
ATTRIBUTE: Final = struct.Struct("=HH")
PACKET_ID: Final = struct.Struct(">I")
ID_OFFSET: Final = HEADER.size + FAMILY.size + ATTRIBUTE.size
"""The packet's header with its id is the first attribute of a message."""
VERDICT_MESSAGE: Final = struct.Struct("=IHHII4sHH8s")
META_BYTES: Final = 1024
"""A message without its packet is shorter than this."""
MAX_PACKETS: Final = 1 << 18
BUFFER_BYTES: Final = 64 << 20


class PacketQueue:
    """One queue, bound by this process in its network namespace. Raises OSError where the kernel has no NFQUEUE."""

    def __init__(self, number: int, *, payload: bool = False) -> None:
        self.number = number
        self._message_bytes = 70_000 if payload else META_BYTES
        self._family = FAMILY.pack(0, 0, number)
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self.socket.bind((0, 0))
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
        except PermissionError:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        with contextlib.suppress(OSError):
            self.socket.setsockopt(SOL_NETLINK, NETLINK_NO_ENOBUFS, 1)
        self._configure(CFG_CMD, struct.pack(">BxH", CMD_BIND, socket.AF_INET))
        copy = struct.pack(">IB", 0xFFFF if payload else 0, COPY_PACKET if payload else COPY_META)
        self._configure(CFG_PARAMS, copy)
        self._configure(CFG_QUEUE_MAXLEN, struct.pack(">I", MAX_PACKETS))
        if not payload:
            # Without this flag the kernel cuts GSO packets up and completes checksums, as a copied packet needs.
            flag = struct.pack(">I", FLAG_GSO)
            self._configure(CFG_FLAGS, flag, CFG_MASK, flag)

    def close(self) -> None:
        self.socket.close()

    def receive(self, most: int) -> list[tuple[int, bytes]]:
        """The packets that are waiting, at most so many: each one's id and its message."""
        found = []
        receive, unpack, size = self.socket.recv, PACKET_ID.unpack_from, self._message_bytes
        try:
            for _ in range(most):
                message = receive(size, socket.MSG_DONTWAIT)
                if message[4:6] == PACKET_TYPE:
                    found.append((unpack(message, ID_OFFSET)[0], message))
        except BlockingIOError:
            pass
        return found

    def accept_up_to(self, packet_id: int) -> None:
        """Let every held packet up to this id go."""
        self.socket.send(self._verdict(VERDICT_BATCH, ACCEPT, packet_id))

    def decide(self, verdicts: list[tuple[int, int]]) -> None:
        """Give single packets their verdicts: (id, ACCEPT or DROP)."""
        for begin in range(0, len(verdicts), 1000):
            part = verdicts[begin : begin + 1000]
            self.socket.send(b"".join(self._verdict(VERDICT, verdict, packet_id) for packet_id, verdict in part))

    def lost(self) -> int:
        """Packets that the kernel dropped because this queue was full or not read in time."""
        with open("/proc/net/netfilter/nfnetlink_queue") as file:
            for line in file:
                fields = line.split()
                if int(fields[0]) == self.number:
                    return int(fields[5]) + int(fields[6])
        return 0

    def _verdict(self, kind: int, verdict: int, packet_id: int) -> bytes:
        header = struct.pack(">II", verdict, packet_id)
        return VERDICT_MESSAGE.pack(VERDICT_MESSAGE.size, kind, REQUEST, 0, 0, self._family, 12, VERDICT_HDR, header)

    def _configure(self, *attributes: int | bytes) -> None:
        body = self._family
        for kind, content in zip(attributes[::2], attributes[1::2], strict=True):
            assert isinstance(content, bytes)
            body += ATTRIBUTE.pack(ATTRIBUTE.size + len(content), kind) + content + bytes(-len(content) % 4)
        self.socket.send(HEADER.pack(HEADER.size + len(body), CONFIG, REQUEST | ACK, 0, 0) + body)
        self.socket.settimeout(5.0)
        while True:
            reply = self.socket.recv(70_000)
            if HEADER.unpack_from(reply)[1] == 2:  # NLMSG_ERROR, also the acknowledgement
                break
        self.socket.settimeout(None)
        (code,) = struct.unpack_from("=i", reply, HEADER.size)
        if code:
            raise OSError(-code, f"NFQUEUE {self.number} cannot be set up")


PACKET_TYPE: Final = struct.pack("=H", PACKET)


def payload_of(message: bytes) -> bytes:
    """The IP packet in a message of a queue that was bound with `payload`."""
    begin = HEADER.size + FAMILY.size
    while begin + ATTRIBUTE.size <= len(message):
        length, kind = ATTRIBUTE.unpack_from(message, begin)
        if kind & 0x3FFF == PAYLOAD:
            return message[begin + ATTRIBUTE.size : begin + length]
        begin += max((length + 3) & ~3, ATTRIBUTE.size)
    return b""
