"""A connection that wakes its reader not for every packet but for a good part at once, while bytes come fast.

A wake-up costs an event loop some 10 us, and twice it waits for the interpreter lock where a thread beside it computes,
so what bounds the rate of one connection is how many bytes a wake-up brings. SO_RCVLOWAT says how many are worth one.
It is set where WORTH_BYTES come within PATIENCE_S at the rate just seen, from 2 Gbit/s on; slower links are seen packet
by packet. When a fast one falls silent, after PATIENCE_S every byte is worth a wake-up again: a mark can delay, but not
hang (Linux wakes a reader whose mark is lowered below what is there).
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

PATIENCE_S: Final = 0.001
WORTH_BYTES: Final = 1 << 18
"""So much is worth a wake-up while bytes come fast. Waiting for more gained nothing."""


class LowWater:
    """The mark of one connection. Everything runs on the event loop's thread."""

    def __init__(self, socket_: socket.socket) -> None:
        self._socket = socket_
        self._loop = asyncio.get_running_loop()
        self._mark = 1
        self._timer: asyncio.TimerHandle | None = None
        self._read_s = self._since_s = self._loop.time()
        self._bytes = 0
        """Read since `_since_s`."""
        self._soon = 0.0
        """Bytes that come within PATIENCE_S at the rate of the last stretch, which was no shorter."""

    def after_read(self, nbytes: int, awaited: int) -> None:
        """`nbytes` were read. The next `awaited`, which surely come, would best be one read; 0 where none are such."""
        self._read_s = self._loop.time()
        self._bytes += nbytes
        if (passed_s := self._read_s - self._since_s) >= PATIENCE_S:
            self._soon = self._bytes * PATIENCE_S / passed_s
            self._since_s, self._bytes = self._read_s, 0
        self._set(min(awaited, WORTH_BYTES) if awaited and self._soon >= WORTH_BYTES else 1)
        if self._mark > 1 and self._timer is None:
            self._timer = self._loop.call_later(PATIENCE_S, self._look)

    def close(self) -> None:
        """Nothing is read any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Wait no longer for what does not come."""
        self._timer = None
        if self._mark == 1:
            return
        until_s = self._read_s + PATIENCE_S
        if self._loop.time() < until_s:
            self._timer = self._loop.call_at(until_s, self._look)
        else:
            self._soon = 0.0
            self._set(1)

    def _set(self, mark: int) -> None:
        if mark != self._mark:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark)
            self._mark = mark
