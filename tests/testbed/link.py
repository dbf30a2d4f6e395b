"""A relay on loopback between a receiver and a sender: it can be slow, stop, cut connections and change bytes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

PIECE_BYTES = 2048
QUEUE_BYTES = 16 << 10
"""What waits before the link: as little as a kernel allows, like the queue of a router."""


class Link:
    """`rate_bps` bounds what goes towards the receiver; 0 stops it, None is unbounded."""

    def __init__(self, port: int, rate_bps: float | None = None) -> None:
        self.target = port
        self.rate_bps = rate_bps
        self.piece_bytes = PIECE_BYTES
        self.change: Callable[[bytes], bytes] = lambda data: data
        self.carried_bytes = 0
        self.connections = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Reset every connection."""
        for writer in list(self._open):
            writer.transport.abort()

    async def carried(self, n_bytes: int, receiver: asyncio.Task[Any] | None = None) -> None:
        """Wait until so many bytes went towards the receiver, or until it needs no more, or fails."""
        while self.carried_bytes < n_bytes and not (receiver and receiver.done()):
            await asyncio.sleep(0.005)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        far = socket.socket()
        far.setblocking(False)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, QUEUE_BYTES)
        try:
            await asyncio.get_running_loop().sock_connect(far, ("127.0.0.1", self.target))
            far_reader, far_writer = await asyncio.open_connection(sock=far, limit=PIECE_BYTES)
        except OSError:
            far.close()
            writer.transport.abort()
            return
        self._open |= {writer, far_writer}
        for source, sink, is_down in ((reader, far_writer, False), (far_reader, writer, True)):
            task = asyncio.create_task(self._relay(source, sink, is_down))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _relay(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, is_down: bool) -> None:
        loop = asyncio.get_running_loop()
        free_s = loop.time()
        with suppress(OSError):
            while data := await source.read(self.piece_bytes):
                if is_down:
                    while self.rate_bps == 0:
                        await asyncio.sleep(0.01)
                    if self.rate_bps is not None:
                        free_s = max(free_s, loop.time() - 0.01) + len(data) * 8 / self.rate_bps
                        await asyncio.sleep(free_s - loop.time())
                    data = self.change(data)
                    self.carried_bytes += len(data)
                sink.write(data)
                await sink.drain()
        sink.transport.abort()
        self._open.discard(sink)
