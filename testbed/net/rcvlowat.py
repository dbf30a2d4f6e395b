"""SO_RCVLOWAT for fast connections: the reader is woken once per WORTH_BYTES instead of once per packet.

A wake-up costs an event loop some 10 us, and waits twice for the interpreter lock while another thread computes, so the
bytes per wake-up bound the rate of a connection. SO_RCVLOWAT is the number of bytes that are worth a wake-up. It is
raised when WORTH_BYTES arrive within PATIENCE_S at the rate just measured, that is from 2 Gbit/s on; slower links wake
the reader for every packet. When a fast one falls silent, the mark drops to one byte after PATIENCE_S: it can delay a
read, but never block it (Linux wakes a reader whose mark is lowered below what has arrived).
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

PATIENCE_S: Final = 0.001
WORTH_BYTES: Final = 1 << 18
MOST_BYTES: Final = 1 << 19
"""From 8 Gbit/s on a wake-up is worth a quarter of what PATIENCE_S brings, up to this."""


class LowWater:
    """The low-water mark of one connection. Everything runs on the event loop's thread."""

    def __init__(self, socket_: socket.socket) -> None:
        self._socket = socket_
        self._loop = asyncio.get_running_loop()
        self._mark = 1
        self._timer: asyncio.TimerHandle | None = None
        self._read_s = self._since_s = self._loop.time()
        self._bytes = 0
        """Read since `_since_s`."""
        self._soon = 0.0
        """Bytes that arrive within PATIENCE_S at the rate of the last interval, which was at least as long."""

    def after_read(self, nbytes: int, awaited: int) -> None:
        """`nbytes` were read. The next `awaited` are certain to arrive and are best read at once; 0 if none are."""
        self._read_s = self._loop.time()
        self._bytes += nbytes
        if (passed_s := self._read_s - self._since_s) >= PATIENCE_S:
            self._soon = self._bytes * PATIENCE_S / passed_s
            self._since_s, self._bytes = self._read_s, 0
        worth = max(WORTH_BYTES, min(MOST_BYTES, int(self._soon / 4)))
        self._set(min(awaited, worth) if awaited and self._soon >= WORTH_BYTES else 1)
        if self._mark > 1 and self._timer is None:
            self._timer = self._loop.call_later(PATIENCE_S, self._look)

    def close(self) -> None:
        """Stop: nothing is read any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Lower the mark if nothing has arrived for PATIENCE_S."""
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
