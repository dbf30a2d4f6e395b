"""The sender's end of a stream: requests come in on a WebSocket, answers go out in their order (see `messages`)."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import deque
from contextlib import suppress
from typing import Final

from aiohttp import WSMsgType, web

from kvstream.testbed.errors import MachineError, SpecError
from kvstream.testbed.net import messages
from kvstream.testbed.net.frame_size import LARGEST_BYTES, FrameSize
from kvstream.testbed.store.cache import Cached, ContentCache, size_of

log = logging.getLogger("kvstream.sender")

IDLE_S: Final = 600.0
STALL_S: Final = 60.0
"""A client that does not take a frame within this time is disconnected."""
CLOSE_S: Final = 1.0
NO_ANSWER: Final = "the store of this sender does not answer; try again"
"""What clients are told: where the store is, and why, stands in the log."""
MAX_REASON_BYTES: Final = 120
"""A control frame has room for 125 bytes, two of them the code (RFC 6455, section 5.5)."""
_ZEROS: Final = memoryview(bytes(LARGEST_BYTES))


class Stream:
    """One WebSocket."""

    def __init__(
        self, cache: ContentCache, cached: Cached, socket_: web.WebSocketResponse, request: web.Request
    ) -> None:
        self._cache = cache
        self._cached = cached
        """Replaced when the client asks for the manifest, and only then: its chunks must fit each other."""
        self._context = cached.manifest.context
        self._ws = socket_
        assert request.transport is not None
        self._transport = request.transport
        self._socket = request.transport.get_extra_info("socket")
        # no buffer in user space: a frame is made when the kernel has taken the one before
        self._transport.set_write_buffer_limits(high=0)
        self._frames = FrameSize(self._socket)
        self._queue: deque[messages.Get] = deque()
        self._cancelled: set[int] = set()
        self._last_req = -1
        self._wake = asyncio.Event()
        self.address = request.remote or ""
        self._idle_since_s = time.monotonic()

    @property
    def idle_s(self) -> float:
        """How long nothing has been asked; 0 while something is answered."""
        return 0.0 if self._queue else time.monotonic() - self._idle_since_s

    def abort(self) -> None:
        """End the stream at once."""
        self._transport.abort()

    async def run(self) -> None:
        answering = asyncio.create_task(self._answer_all())
        try:
            refusal = await self._read_all()
            if refusal is not None:
                log.info("stream of %s refused: %s", self._context, refusal)
                await self._close(messages.REFUSED, refusal)
        finally:
            answering.cancel()
            with suppress(asyncio.CancelledError):
                await answering
            self._transport.abort()

    async def _read_all(self) -> str | None:
        """Take requests until the client is gone (None) or violates the protocol (how)."""
        while True:
            try:
                message = await self._ws.receive(timeout=IDLE_S)
            except TimeoutError:
                return f"no request for {IDLE_S:g} s"
            if message.type is WSMsgType.TEXT:
                try:
                    self._take(messages.parse_request(message.data))
                except SpecError as error:
                    return str(error)
            elif message.type is WSMsgType.BINARY:
                return "requests must be text messages"
            else:
                return None

    def _take(self, request: messages.Request) -> None:
        if isinstance(request, messages.CancelRequest):
            if any(waiting.req == request.req for waiting in self._queue):
                self._cancelled.add(request.req)
            return
        if request.req <= self._last_req:
            raise SpecError(f"request {request.req} is not greater than the last one, {self._last_req}")
        if len(self._queue) >= messages.MAX_QUEUED:
            raise SpecError(f"more than {messages.MAX_QUEUED} requests are waiting")
        if isinstance(request, messages.GetChunk):
            size = size_of(self._cached.manifest, request.chunk, str(request.level))
            if request.offset > size:
                raise SpecError(f"offset {request.offset} is beyond the {size} bytes of chunk {request.chunk}")
        self._last_req = request.req
        self._queue.append(request)
        self._wake.set()

    async def _answer_all(self) -> None:
        try:
            while True:
                while not self._queue:
                    self._wake.clear()
                    await self._wake.wait()
                request = self._queue[0]
                await self._answer(request)
                self._queue.popleft()
                self._idle_since_s = time.monotonic()
                self._cancelled.discard(request.req)
        except (ConnectionError, TimeoutError) as error:
            log.info("stream of %s ends: %s", self._context, error or type(error).__name__)
            self._transport.abort()
        except (SpecError, OSError) as error:  # the store changed under the stream, or a bucket does not answer
            log.warning("stream of %s ends: %s", self._context, error)
            await self._close(messages.FAILED, NO_ANSWER if isinstance(error, MachineError) else str(error))
            self._transport.abort()

    async def _close(self, code: int, why: str) -> None:
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(CLOSE_S):
                await self._ws.close(code=code, message=why.encode()[:MAX_REASON_BYTES])

    async def _answer(self, request: messages.Get) -> None:
        if isinstance(request, messages.GetPadding):
            await self._send_content(request.req, request.bytes, 0, "", None)
            return
        if isinstance(request, messages.GetManifest):
            self._cached = await self._cache.context(self._context)
            content, offset = self._cached.content, 0
        else:
            content = await self._cache.chunk(self._cached, f"{request.chunk}/{request.level}")
            offset = request.offset
        await self._send_content(request.req, len(content.data), offset, content.sha256, memoryview(content.data))

    async def _send_content(self, req: int, total: int, offset: int, sha256: str, data: memoryview | None) -> None:
        """Send header and frames; without data, zeros."""
        if req not in self._cancelled:
            await self._send(messages.pack_answer(messages.Answer(req, total, offset, sha256)))
        usual = messages.frame_bytes(total)
        unsent = 0
        while offset < total and req not in self._cancelled:
            step = self._frames.next(usual)
            if step != unsent:
                # two frames, so that the link has one while the next is made; half a large frame lasts as long
                _limit_unsent(self._socket, max(step, min(2 * step, 2 * messages.FRAME_BYTES)))
                unsent = step
            stop = min(offset + step, total)
            await self._send(_ZEROS[: stop - offset] if data is None else data[offset:stop])
            offset = stop
            # A fast connection takes frame after frame at once: requests and other streams have their turns between.
            await asyncio.sleep(0)
        if offset < total:
            await self._send(messages.pack_answer(messages.Cancelled(req)))

    async def _send(self, message: str | memoryview) -> None:
        async with asyncio.timeout(STALL_S):
            if isinstance(message, str):
                await self._ws.send_str(message)
            else:
                await self._ws.send_bytes(message)  # type: ignore[arg-type]  # aiohttp takes any buffer
        if self._transport.is_closing():
            raise ConnectionResetError("the client has gone")


def _limit_unsent(socket_: socket.socket | None, unsent_bytes: int) -> None:
    """Let the kernel hold at most `unsent_bytes` that it has not sent.

    What is in the kernel cannot be cancelled, and on a slow link it delays the next answer. TCP_NOTSENT_LOWAT
    bounds exactly that and leaves the bytes in flight to congestion control; a bound on SO_SNDBUF would count both and
    cap the rate at SO_SNDBUF / RTT.
    """
    if socket_ is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
        socket_.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, unsent_bytes)
