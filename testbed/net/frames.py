"""The receiving side of a client's WebSocket after the handshake: payload goes straight from the kernel to its buffer.

aiohttp makes the connection, sends, and closes. It would copy what arrives three times on its way to a chunk's memory,
which at 10 Gbit/s takes all of one core; here the socket is read straight into that memory (RFC 6455, section
5.2: a server's frames are not masked, so their payload is the bytes themselves). A `Handler` is called on
the event loop's thread. A protocol error of the peer ends the stream with a SpecError.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, Final, Protocol

import aiohttp

from kvstream.testbed.errors import SpecError
from kvstream.testbed.net.messages import FRAME_BYTES
from kvstream.testbed.net.rcvlowat import LowWater

MAX_TEXT_BYTES: Final = 4096
HEADER_BYTES: Final = 10
"""The longest header of an unmasked frame. Read while waiting for one: more would be payload that has to be copied."""
SINK_BYTES: Final = 1 << 16
READ_BYTES: Final = 1 << 20
"""Bytes of one read at most: a dozen frames, whose headers are then squeezed out in memory. That costs less than two
reads per frame, one for the header and one for the payload. A frame larger than FRAME_BYTES is read alone, with the
next header: then nothing has to be moved."""
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class Handler(Protocol):
    """Receives what arrives. What it raises ends `Frames.serve`."""

    def on_text(self, text: str) -> None:
        """A text message arrived."""

    def on_frame(self, nbytes: int) -> None:
        """A binary frame begins; the buffers must have room for all of it."""

    def next_buffer(self) -> memoryview | None:
        """Where the frame's next bytes go, and those of the frames after it; None to discard them."""

    def on_received(self, nbytes: int) -> None:
        """`nbytes` more are in their buffer now (or discarded)."""


class Closed(ConnectionError):
    """The peer closed the stream properly."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__("the sender closed the stream")
        self.code, self.reason = code, reason


class Frames(asyncio.BufferedProtocol):
    """Takes over a connection's arriving bytes from aiohttp; call `hand_back` before closing properly."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._response = socket._response
        connection = self._response.connection
        assert connection is not None
        assert connection.transport is not None
        self._socket = socket
        self._transport: Any = connection.transport
        self._before: Any = self._transport.get_protocol()
        self._handler: Handler | None = None
        self._ended: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
        self._sink = memoryview(bytearray(SINK_BYTES))
        self._head = memoryview(bytearray(HEADER_BYTES))
        self._have = 0
        """Bytes of a header that have arrived."""
        self._opcode = 0
        self._size = 0
        """Payload bytes of the frame."""
        self._rest = 0
        """Payload bytes still to come."""
        self._message = bytearray()
        self._target: memoryview | None = None
        """The handler's buffer that is read into."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._low_water = LowWater(self._transport.get_extra_info("socket"))
        self._transport.set_protocol(self)

    async def serve(self, handler: Handler) -> None:
        """Pass what arrives to `handler` until it calls `finish`. Raises what ends the stream."""
        if self._error is not None:
            raise self._error
        self._handler = handler
        self._ended = asyncio.get_running_loop().create_future()
        try:
            await self._ended
        finally:
            self._handler = self._ended = None

    def finish(self) -> None:
        """End `serve`; the stream goes on."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def fail(self, error: BaseException) -> None:
        """End the stream."""
        if self._error is None:
            self._error = error
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(error)

    def hand_back(self) -> bool:
        """Return the connection to aiohttp. False, and nothing done, in the middle of a frame."""
        whole = self._error is None and self._rest == self._have == 0
        if whole:
            self._low_water.close()
            self._transport.set_protocol(self._before)
        return whole

    def abort(self) -> None:
        """End the connection at once."""
        self._response.close()
        self._transport.abort()

    # --- from the event loop

    def get_buffer(self, sizehint: int) -> memoryview:
        self._target = None
        if self._error is not None:
            return self._sink
        if not self._rest:
            return self._head[self._have :]
        if self._opcode == BINARY and self._handler is not None:
            self._target = self._handler.next_buffer()
        if self._target is None:
            return self._sink[: self._rest]
        # the buffer ends with the answer, while the rest on its way also has frame headers: this never reads beyond it
        return self._target[: self._rest + HEADER_BYTES if self._size > FRAME_BYTES else READ_BYTES]

    def buffer_updated(self, nbytes: int) -> None:
        if self._error is not None:
            return
        try:
            if not self._rest:
                begun, self._have = bytes(self._head[: self._have + nbytes]), 0
                self._take(memoryview(begun))
            elif self._target is None or self._handler is None:
                self._take(self._sink[:nbytes])
            else:
                data, received = self._target[:nbytes], min(nbytes, self._rest)
                self._rest -= received
                self._handler.on_received(received)
                self._take(data[received:])
            self._low_water.after_read(nbytes, self._awaited())
        except Exception as error:
            self.fail(error)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._low_water.close()
        self.fail(error if isinstance(error, OSError) else ConnectionError("the connection is gone"))
        self._before.connection_lost(error)

    def pause_writing(self) -> None:
        self._before.pause_writing()

    def resume_writing(self) -> None:
        self._before.resume_writing()

    # --- frames

    def _awaited(self) -> int:
        """Bytes best read at once: the rest of a large frame that is not discarded, and the next header. A sender that
        ends an answer finishes the frame and says so, in more than a header's bytes."""
        if not self._rest or self._size <= FRAME_BYTES or self._handler is None:
            return 0
        buffer = self._handler.next_buffer()
        return 0 if buffer is None else min(self._rest + HEADER_BYTES, len(buffer))

    def _take(self, data: memoryview) -> None:
        """Process bytes that are not in their buffer yet; they may lie further on in the handler's memory."""
        while len(data):
            if self._rest:
                part = data[: self._rest]
                self._on_payload(part)
                data = data[len(part) :]
                continue
            old, new = self._have, min(HEADER_BYTES - self._have, len(data))
            self._head[old : old + new] = data[:new]
            self._have += new
            length = self._parse_head()
            if length is None:
                return
            self._have = 0
            data = data[length - old :]

    def _parse_head(self) -> int | None:
        """Begin a frame; returns the length of its header, or None while that is incomplete."""
        if self._have < 2:
            return None
        first, second = self._head[0], self._head[1]
        length = 2 + {126: 2, 127: 8}.get(second, 0)
        if first & 0x70 or second & 0x80 or not first & 0x80 or first & 0x0F not in (TEXT, BINARY, CLOSE, PING, PONG):
            raise SpecError(f"invalid frame header {first:#04x} {second:#04x}")
        if self._have < length:
            return None
        size = second if length == 2 else int.from_bytes(self._head[2:length], "big")
        self._opcode, self._size, self._rest = first & 0x0F, size, size
        self._message.clear()
        if self._opcode == BINARY:
            if self._handler is None:
                raise SpecError("unsolicited data")
            self._handler.on_frame(size)
        elif size > MAX_TEXT_BYTES:
            raise SpecError(f"a message of {size} bytes is longer than {MAX_TEXT_BYTES}")
        if not size:
            self._on_message()
        return length

    def _on_payload(self, data: memoryview) -> None:
        self._rest -= len(data)
        if self._opcode != BINARY:
            self._message += data
            if not self._rest:
                self._on_message()
        elif self._handler is not None:
            buffer = self._handler.next_buffer()
            if buffer is not None:
                buffer[: len(data)] = data
            self._handler.on_received(len(data))

    def _on_message(self) -> None:
        data = bytes(self._message)
        if self._opcode == TEXT:
            if self._handler is None:
                raise SpecError("unsolicited message")
            try:
                text = data.decode()
            except UnicodeDecodeError as error:
                raise SpecError("a text message is not UTF-8") from error
            self._handler.on_text(text)
        elif self._opcode == CLOSE:
            raise Closed(int.from_bytes(data[:2], "big"), data[2:].decode(errors="replace"))
        elif self._opcode == PING:
            task = asyncio.ensure_future(self._pong(data))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pong(self, data: bytes) -> None:
        with suppress(OSError, aiohttp.ClientError):
            await self._socket.pong(data)
