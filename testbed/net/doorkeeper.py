"""Who may stay connected to a sender: nobody who asks nothing, and nobody at the expense of all others.

The limit of connections leaves descriptors for files, so that accepting never fails for want of one; when it is
reached, the connection that has been idle longest goes, of the address that holds most.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections import Counter
from typing import Any

from aiohttp import web

log = logging.getLogger("kvstream.sender")

FIRST_REQUEST_S = 10.0
"""A connection without a whole request for this long after it was made is ended."""
MOST_DESCRIPTORS = 8192
LINES_PER_S = 10.0
"""Log lines; beyond it they are counted, not printed."""


class Connection(web.RequestHandler):
    """An HTTP connection that the doorkeeper knows of."""

    __slots__ = ("_deadline", "_keeper", "address", "idle_since_s", "is_busy")

    def __init__(self, keeper: Doorkeeper, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._keeper = keeper
        self.address = ""
        self.is_busy = False
        self.idle_since_s = time.monotonic()
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if peer else ""
        self._deadline = asyncio.get_running_loop().call_later(FIRST_REQUEST_S, self.abort)
        self._keeper.opened(self)

    def connection_lost(self, error: BaseException | None) -> None:
        self._cancel_deadline()
        self._keeper.closed(self)
        super().connection_lost(error)

    def begin(self) -> None:
        """A request has come whole."""
        self._cancel_deadline()
        self.is_busy = True

    def end(self) -> None:
        """The request was answered."""
        self.is_busy = False
        self.idle_since_s = time.monotonic()

    def abort(self) -> None:
        if isinstance(self.transport, asyncio.Transport):
            self.transport.abort()

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Doorkeeper:
    """Makes the connections of one server: the protocol factory of `loop.create_server`."""

    def __init__(self, server: web.Server, most: int, **settings: Any) -> None:
        self._server, self._settings = server, settings
        self._most = most
        self._open: set[Connection] = set()

    def __call__(self) -> Connection:
        return Connection(self, self._server, loop=asyncio.get_running_loop(), **self._settings)

    def opened(self, connection: Connection) -> None:
        self._open.add(connection)
        if len(self._open) <= self._most:
            return
        held = Counter(other.address for other in self._open)
        idle = [other for other in self._open if not other.is_busy and other is not connection]
        victim = min(idle, key=lambda other: (-held[other.address], other.idle_since_s), default=connection)
        log.info("more than %d connections: one of %s ends", self._most, victim.address)
        self._open.discard(victim)
        victim.abort()

    def closed(self, connection: Connection) -> None:
        self._open.discard(connection)


def most_connections() -> tuple[int, int]:
    """(connections that may be open, connections to accept at a time), after raising the limit of descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    soft = wanted if soft == resource.RLIM_INFINITY else soft
    reserve = max(soft // 4, 1)
    return max(soft - 2 * reserve, 1), max(min(reserve, 128), 1)


class LineLimit(logging.Filter):
    """Lets LINES_PER_S lines pass on average, and says how many it dropped. A line is a line: where an exception came
    from is left out, what it was is not."""

    def __init__(self) -> None:
        super().__init__()
        self._credit, self._seen_s, self._dropped = LINES_PER_S, time.monotonic(), 0

    def filter(self, record: logging.LogRecord) -> bool:
        now_s = time.monotonic()
        self._credit = min(self._credit + (now_s - self._seen_s) * LINES_PER_S, 10 * LINES_PER_S)
        self._seen_s = now_s
        if self._credit < 1.0:
            self._dropped += 1
            return False
        self._credit -= 1.0
        if record.exc_info and record.exc_info[1] is not None:
            what = " ".join(str(record.exc_info[1]).split())[:200]
            record.msg = f"{record.getMessage().strip()}: {type(record.exc_info[1]).__name__}: {what}"
            record.args, record.exc_info = (), None
        if self._dropped:
            record.msg, record.args = f"{record.getMessage()} ({self._dropped} lines left out before)", ()
            self._dropped = 0
        return True
