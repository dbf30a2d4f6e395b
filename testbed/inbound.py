"""The receiving end of a sender's stream: requests go out, bytes land in the caller's memory, connections come and go.

A connection that ends, or brings no byte for `stall_s` while something is outstanding, is made anew, and what is
outstanding is asked for from where it stopped; after `reconnects` such times the session has failed. What arrives is
checked against what was asked for: a sender that answers anything else fails the session at once.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from policies.api import LevelOrText
from testbed import wire
from testbed.client import Client, StreamConnection
from testbed.errors import SpecError
from testbed.frames import Closed
from testbed.session import SessionFailed

RETRY_S = 0.1
REFUSED = 1008
"""The code of a WebSocket that is closed because of what its peer did."""
PADDING_REST_S = 0.1
"""Padding is cut short so long before the start: what is queued on the way must have drained by then."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a session may wait for."""

    stall_s: float = 5.0
    """Without a byte for so long, with something outstanding, the connection is given up."""
    reconnects: int = 3
    session_s: float = 120.0


@dataclass(slots=True)
class Arrival:
    """A request and what has come of its answer."""

    get: wire.GetManifest | wire.GetChunk
    target: memoryview
    """Where the bytes land; a manifest's is made when its size is known."""
    received: int = 0
    sha256: str = ""
    is_open: bool = False
    is_cancelled: bool = False

    @property
    def is_complete(self) -> bool:
        return self.is_open and self.received == len(self.target)


class Listener(Protocol):
    """Who is told. Both may raise SpecError for contents that cannot be meant."""

    def on_answer(self, arrival: Arrival) -> None:
        """The header is here: the first byte."""

    def on_bytes(self, arrival: Arrival) -> None:
        """More bytes are here, perhaps the last."""

    def on_waste(self, nbytes: int) -> None:
        """Bytes came of a chunk that was cancelled."""


class Inbound:
    """One session's requests to one sender, answered in their order. Everything runs on the event loop's thread."""

    def __init__(self, client: Client, context: str, listener: Listener, limits: Limits) -> None:
        self._client = client
        self._context = context
        self._listener = listener
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._connection: StreamConnection | None = None
        self._outstanding: deque[Arrival] = deque()
        self._next_req = 1  # request 0 is the padding before the session
        self._touched_s = 0.0
        self._watcher: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.bytes = 0
        """Payload that arrived in all."""
        self.reconnects = 0

    # --- requests

    def get_manifest(self) -> None:
        self._ask(Arrival(wire.GetManifest(self._take_req()), memoryview(b"")))

    def get_chunk(self, chunk: int, level: LevelOrText, target: memoryview) -> None:
        """Ask for exactly as many bytes as `target` has."""
        self._ask(Arrival(wire.GetChunk(self._take_req(), chunk, level, 0), target))

    def cancel(self, chunk: int) -> None:
        """Nothing of what is outstanding for a chunk is wanted any more."""
        for arrival in self._outstanding:
            if isinstance(arrival.get, wire.GetChunk) and arrival.get.chunk == chunk and not arrival.is_cancelled:
                arrival.is_cancelled = True
                self._send(wire.CancelRequest(arrival.get.req))

    def _take_req(self) -> int:
        self._next_req += 1
        return self._next_req - 1

    def _ask(self, arrival: Arrival) -> None:
        self._outstanding.append(arrival)
        self._touch()
        self._send(arrival.get)

    def _send(self, request: wire.Request) -> None:
        """Without a connection nothing is sent: making one asks for everything outstanding."""
        if self._connection is not None:
            task = asyncio.create_task(_quietly(self._connection.request(request)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    # --- connections

    async def warm_up(self, padding_bytes: int, start_s: float | None) -> None:
        """Connect ahead of the session and open the congestion window.

        Raises SessionFailed for what the sender refuses, ConnectionError if it cannot be reached.
        """
        self._connection = await self._connect()
        if padding_bytes:
            await _pad(self._connection, padding_bytes, self._limits.stall_s, start_s)

    async def run(self) -> None:
        """Receive, over as many connections as the limits allow, until cancelled. Raises SessionFailed."""
        while True:
            try:
                if self._connection is None:
                    self._connection = await self._connect()
                    self._resume()
                await self._receive(self._connection)
            except TimeoutError:
                why = f"no byte for {self._limits.stall_s:g} s"
            except (OSError, aiohttp.ClientError) as error:
                why = str(error) or type(error).__name__
            except SpecError as error:
                raise SessionFailed(f"the sender answers wrongly: {error}") from error
            await self._drop()
            if self.reconnects >= self._limits.reconnects:
                raise SessionFailed(f"the sender is lost after {self.reconnects} reconnections: {why}")
            self.reconnects += 1

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._drop()

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.drop()

    async def _connect(self) -> StreamConnection:
        """Connect, trying again while the sender is not there, for at most `stall_s`."""
        last: Exception | None = None
        try:
            async with asyncio.timeout(self._limits.stall_s):
                while True:
                    try:
                        return await self._client.open_stream(self._context)
                    except SpecError as error:
                        raise SessionFailed(str(error)) from error
                    except (OSError, aiohttp.ClientError) as error:
                        last = error
                        await asyncio.sleep(RETRY_S)
        except TimeoutError:
            raise ConnectionError(str(last) if last else f"no connection within {self._limits.stall_s:g} s") from last

    def _resume(self) -> None:
        """Ask for what is outstanding, from where it stopped."""
        self._outstanding = deque(arrival for arrival in self._outstanding if not arrival.is_cancelled)
        for arrival in self._outstanding:
            arrival.is_open = False
            if isinstance(arrival.get, wire.GetChunk):
                old = arrival.get
                arrival.get = wire.GetChunk(old.req, old.chunk, old.level, arrival.received)
            else:
                arrival.received = 0
            self._send(arrival.get)

    async def _receive(self, connection: StreamConnection) -> None:
        """Handle what arrives until the connection ends; raises when it does."""
        self._touch()
        self._watch(connection)
        try:
            await connection.frames.serve(self)
        except Closed as closed:
            if closed.code == REFUSED:
                raise SessionFailed(f"the sender refuses: {closed.reason}") from None
            raise
        finally:
            if self._watcher is not None:
                self._watcher.cancel()

    def _touch(self) -> None:
        """Something arrived, or something new is awaited: the stall clock starts again."""
        self._touched_s = self._loop.time()

    def _watch(self, connection: StreamConnection) -> None:
        """Give the connection up when nothing has come for too long although something is outstanding."""
        now_s = self._loop.time()
        end_s = self._touched_s + self._limits.stall_s
        if self._outstanding and now_s >= end_s:
            connection.frames.fail(TimeoutError())
            return
        self._watcher = self._loop.call_at(max(end_s, now_s + RETRY_S), self._watch, connection)

    # --- answers

    def on_text(self, text: str) -> None:
        self._on_answer(wire.parse_answer(text))
        self._touch()

    def _on_answer(self, answer: wire.Answer | wire.Cancelled) -> None:
        arrival = self._outstanding[0] if self._outstanding else None
        if arrival is None or answer.req != arrival.get.req:
            raise SpecError(f"an answer to request {answer.req} came out of turn")
        if isinstance(answer, wire.Cancelled):
            if not arrival.is_cancelled:
                raise SpecError(f"request {answer.req} was ended without being cancelled")
            self._outstanding.popleft()
            return
        if arrival.is_open:
            raise SpecError(f"request {answer.req} was answered twice")
        if isinstance(arrival.get, wire.GetManifest):
            if not 0 < answer.bytes <= wire.MAX_MANIFEST_BYTES or answer.offset:
                raise SpecError(f"a manifest of {answer.bytes} bytes")
            arrival.target = memoryview(bytearray(answer.bytes))
        elif answer.bytes != len(arrival.target) or answer.offset != arrival.received:
            raise SpecError(
                f"chunk {arrival.get.chunk}: bytes {answer.offset} to {answer.bytes} came, "
                f"{arrival.received} to {len(arrival.target)} were asked for"
            )
        elif arrival.received and arrival.sha256 != answer.sha256:
            raise SpecError(f"chunk {arrival.get.chunk} changed while it was fetched")
        arrival.is_open = True
        arrival.sha256 = answer.sha256
        if not arrival.is_cancelled:
            self._listener.on_answer(arrival)

    def on_frame(self, nbytes: int) -> None:
        arrival = self._outstanding[0] if self._outstanding else None
        if arrival is None or not arrival.is_open or nbytes > len(arrival.target) - arrival.received:
            raise SpecError("bytes came that nobody asked for")

    def place(self) -> memoryview | None:
        arrival = self._outstanding[0]
        # a cancelled chunk's memory may already belong to its successor
        return None if arrival.is_cancelled else arrival.target[arrival.received :]

    def on_landed(self, nbytes: int) -> None:
        arrival = self._outstanding[0]
        arrival.received += nbytes
        self.bytes += nbytes
        if arrival.is_complete:
            self._outstanding.popleft()
        if arrival.is_cancelled:
            self._listener.on_waste(nbytes)
        else:
            self._listener.on_bytes(arrival)
        self._touch()  # after what was done about them: meanwhile nothing could be seen to arrive


async def _quietly(request: Coroutine[Any, Any, None]) -> None:
    # the reading side sees a lost connection, and resumes
    with suppress(OSError, aiohttp.ClientError):
        await request


class _Padding:
    """Takes padding in, and stops it when the session is near."""

    def __init__(self, connection: StreamConnection, nbytes: int, start_s: float | None) -> None:
        self._connection, self._nbytes, self._start_s = connection, nbytes, start_s
        self.received = -1
        self._cancelling: asyncio.Task[None] | None = None

    def on_text(self, text: str) -> None:
        if self.received < 0:
            self.received = 0
        elif self._cancelling is not None:
            self._connection.frames.finish()
        else:
            raise SessionFailed("the sender does not send padding (TEXT)")

    def on_frame(self, nbytes: int) -> None:
        if self.received < 0 or nbytes > self._nbytes - self.received:
            raise SessionFailed("the sender does not send the padding that was asked for (BINARY)")

    def place(self) -> memoryview | None:
        return None

    def on_landed(self, nbytes: int) -> None:
        self.received += nbytes
        if self.received >= self._nbytes:
            self._connection.frames.finish()
        elif self._cancelling is None and self._is_near():
            self._cancelling = asyncio.create_task(_quietly(self._connection.request(wire.CancelRequest(0))))

    def _is_near(self) -> bool:
        return self._start_s is not None and time.monotonic() > self._start_s - PADDING_REST_S


async def _pad(connection: StreamConnection, padding_bytes: int, stall_s: float, start_s: float | None) -> None:
    """Carry padding over a fresh connection until its congestion window has grown, but not into the session."""
    padding = _Padding(connection, padding_bytes, start_s)
    await connection.request(wire.GetPadding(0, padding_bytes))
    serving = asyncio.create_task(connection.frames.serve(padding))
    before = -2
    try:
        while not serving.done():
            await asyncio.wait([serving], timeout=stall_s)
            if not serving.done() and padding.received == before:
                raise SessionFailed(f"no byte for {stall_s:g} s before the session")
            before = padding.received
        await serving
    except Closed:
        raise SessionFailed("the sender does not send padding (CLOSE)") from None
    finally:
        serving.cancel()
