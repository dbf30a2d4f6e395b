"""How large the frames of a fast connection are: each costs both ends time, so one should hold what half a millisecond
brings.

The rate is that at which the peer acknowledges: what the kernel takes at once says nothing of the link. Below 1 Gbit/s
frames have their usual size (`kvstream.traces.fluid.frame_bytes`), of which a receiver can tell a rate.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from typing import Final

FRAME_S: Final = 0.0005
LARGEST_BYTES: Final = 1 << 21
_BYTES_ACKED: Final = struct.Struct("@120xQ")
"""Of Linux's `struct tcp_info` the field `tcpi_bytes_acked`."""


class FrameSize:
    """The frames of one connection."""

    def __init__(self, socket_: socket.socket | None) -> None:
        self._socket = socket_ if sys.platform == "linux" else None
        self._since_s = time.monotonic()
        self._acknowledged = 0
        self._soon = 0
        """Bytes that the last interval, which was at least as long, brought within FRAME_S."""

    def next(self, usual: int) -> int:
        """Bytes of the next frame, where at least `usual` are left to send."""
        if self._socket is not None and (passed_s := time.monotonic() - self._since_s) >= FRAME_S:
            acknowledged = _bytes_acked(self._socket)
            self._soon = int((acknowledged - self._acknowledged) * FRAME_S / passed_s)
            self._since_s, self._acknowledged = self._since_s + passed_s, acknowledged
        return max(usual, min(self._soon, LARGEST_BYTES))


def _bytes_acked(socket_: socket.socket) -> int:
    """What the peer has acknowledged in all; 0 of a kernel that does not say."""
    info = socket_.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
    return int(_BYTES_ACKED.unpack(info)[0]) if len(info) == _BYTES_ACKED.size else 0
