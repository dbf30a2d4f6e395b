"""The receiving end of a sender's stream: requests go out, bytes arrive in the caller's memory, losses are resumed.

A connection that ends, or brings no byte for `stall_s` with requests outstanding, is replaced, and the outstanding
requests are repeated from where they stopped; after `reconnects` replacements in a row that brought nothing the
session fails. What arrives is checked against the requests: a sender that violates the protocol twice fails the
session.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from kvstream.policies.api import LevelOrText
from kvstream.testbed.errors import SpecError
from kvstream.testbed.net import messages
from kvstream.testbed.net.client import Client, StreamConnection
from kvstream.testbed.net.frames import Closed
from kvstream.testbed.net.pace import LEAST_BYTES_PER_S, Pace
from kvstream.testbed.session.record import SessionFailed

RETRY_S = 0.1
LONGEST_RETRY_S = 2.0
PROGRESS_BYTES = 1 << 14
"""A connection that brought this much was worth its reconnection."""
PADDING_REST_S = 0.1
"""Before a session whose start is fixed, padding ends this much earlier, so that the queues on the path drain."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a session waits, and how often it reconnects."""

    stall_s: float = 5.0
    """A connection without a byte for this long, with requests outstanding, is given up; one that trickles
    (`kvstream.testbed.net.pace`) after twice as long."""
    reconnects: int = 3
    """Of connections that brought nothing, one after the other."""
    session_s: float = 120.0


@dataclass(slots=True, eq=False)
class Arrival:
    """A request and how much of its answer has arrived."""

    get: messages.GetManifest | messages.GetChunk
    target: memoryview
    """Where the bytes go; a manifest's is allocated when its size is known."""
    received: int = 0
    sha256: str = ""
    is_open: bool = False
    is_cancelled: bool = False
    at_s: float = 0.0
    """CLOCK_MONOTONIC at which the last of what has arrived was read."""

    @property
    def is_complete(self) -> bool:
        return self.is_open and self.received == len(self.target)


class Listener(Protocol):
    """Receives what happens. The first two may raise SpecError for invalid content."""

    def on_answer(self, arrival: Arrival) -> None:
        """The header of the answer arrived: its first byte."""

    def on_bytes(self, arrival: Arrival) -> None:
        """More bytes arrived, perhaps the last."""

    def on_waste(self, nbytes: int) -> None:
        """Bytes of a cancelled chunk arrived."""


class Inbound:
    """One session's requests to one sender, answered in order. Everything runs on the event loop's thread."""

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
        self._pace = Pace(2.0 * limits.stall_s)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.bytes = 0
        """Payload that has arrived in total."""
        self.reconnects = 0

    # --- requests

    def get_manifest(self) -> Arrival:
        return self._ask(Arrival(messages.GetManifest(self._take_req()), memoryview(b"")))

    def get_chunk(self, chunk: int, level: LevelOrText, target: memoryview) -> Arrival:
        """Request exactly as many bytes as `target` has."""
        return self._ask(Arrival(messages.GetChunk(self._take_req(), chunk, level, 0), target))

    def cancel(self, chunk: int) -> None:
        """Cancel all outstanding requests for a chunk."""
        for arrival in self._outstanding:
            if isinstance(arrival.get, messages.GetChunk) and arrival.get.chunk == chunk and not arrival.is_cancelled:
                arrival.is_cancelled = True
                self._send(messages.CancelRequest(arrival.get.req))

    def _take_req(self) -> int:
        self._next_req += 1
        return self._next_req - 1

    def _ask(self, arrival: Arrival) -> Arrival:
        if not self._outstanding:
            self._pace.restart(self._loop.time(), self.bytes)
        self._outstanding.append(arrival)
        self._touch()
        self._send(arrival.get)
        return arrival

    def _send(self, request: messages.Request) -> None:
        """Send, unless there is no connection: a new one repeats everything outstanding."""
        if self._connection is not None:
            task = asyncio.create_task(_quietly(self._connection.request(request)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    # --- connections

    async def warm_up(self, padding_bytes: int, until_s: float | None) -> None:
        """Connect ahead of the session and open the congestion window with padding, which is cancelled at `until_s`
        (CLOCK_MONOTONIC). All that was sent has then arrived.

        Raises SessionFailed if the sender refuses, ConnectionError if it cannot be reached.
        """
        self._connection = await self._connect()
        if padding_bytes:
            await _pad(self._connection, padding_bytes, self._limits.stall_s, until_s)

    async def run(self) -> None:
        """Receive, over as many connections as the limits allow, until cancelled. Raises SessionFailed."""
        in_vain = violations = 0
        while True:
            before = self.bytes
            try:
                if self._connection is None:
                    self._connection = await self._connect()
                    self._resume()
                await self._receive(self._connection)
            except TimeoutError as error:
                why = str(error) or f"no byte for {self._limits.stall_s:g} s"
            except (OSError, aiohttp.ClientError) as error:
                why = " ".join(str(error).split())[:200] or type(error).__name__
            except SpecError as error:
                # once, it may have been the path: bytes lost or doubled on their way
                if violations:
                    raise SessionFailed(f"protocol error of the sender: {error}") from error
                violations, why = 1, str(error)
            await self._drop()
            if self.bytes - before >= PROGRESS_BYTES:
                in_vain = 0
            if in_vain >= self._limits.reconnects:
                raise SessionFailed(f"connection to the sender lost after {self.reconnects} reconnections: {why}")
            if in_vain:
                await asyncio.sleep(min(RETRY_S * 2.0**in_vain, LONGEST_RETRY_S))
            in_vain += 1
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
        """Connect; while the sender cannot be reached, retry for at most `stall_s`."""
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
        """Repeat the outstanding requests from where they stopped."""
        self._outstanding = deque(arrival for arrival in self._outstanding if not arrival.is_cancelled)
        for arrival in self._outstanding:
            arrival.is_open = False
            if isinstance(arrival.get, messages.GetChunk):
                old = arrival.get
                arrival.get = messages.GetChunk(old.req, old.chunk, old.level, arrival.received)
            else:
                arrival.received = 0
            self._send(arrival.get)

    async def _receive(self, connection: StreamConnection) -> None:
        """Handle what arrives until the connection ends; raises when it does."""
        self._touch()
        self._pace.restart(self._loop.time(), self.bytes)
        self._watch(connection)
        try:
            await connection.frames.serve(self)
        except Closed as closed:
            if closed.code in (messages.REFUSED, messages.FAILED):
                raise SessionFailed(f"request refused by the sender: {closed.reason}") from None
            raise
        finally:
            if self._watcher is not None:
                self._watcher.cancel()

    def _touch(self) -> None:
        """Something arrived or was requested: restart the stall clock."""
        self._touched_s = self._loop.time()

    def _watch(self, connection: StreamConnection) -> None:
        """Give the connection up when requests are outstanding and nothing has arrived for too long."""
        now_s = self._loop.time()
        end_s = self._touched_s + self._limits.stall_s
        if self._outstanding and now_s >= end_s:
            connection.frames.fail(TimeoutError())
            return
        if self._outstanding and self._pace.is_too_slow(now_s, self.bytes):
            connection.frames.fail(TimeoutError(f"less than {LEAST_BYTES_PER_S:g} bytes a second"))
            return
        self._watcher = self._loop.call_at(max(end_s, now_s + RETRY_S), self._watch, connection)

    # --- answers

    def on_text(self, text: str) -> None:
        self._on_answer(messages.parse_answer(text))
        self._touch()

    def _on_answer(self, answer: messages.Answer | messages.Cancelled) -> None:
        arrival = self._outstanding[0] if self._outstanding else None
        if arrival is None or answer.req != arrival.get.req:
            raise SpecError(f"out-of-order answer to request {answer.req}")
        if isinstance(answer, messages.Cancelled):
            if not arrival.is_cancelled:
                raise SpecError(f"request {answer.req} ended without being cancelled")
            self._outstanding.popleft()
            return
        if arrival.is_open:
            raise SpecError(f"request {answer.req} was answered twice")
        if isinstance(arrival.get, messages.GetManifest):
            if not 0 < answer.bytes <= messages.MAX_MANIFEST_BYTES or answer.offset:
                raise SpecError(f"invalid manifest size of {answer.bytes} bytes at offset {answer.offset}")
            arrival.target = memoryview(bytearray(answer.bytes))
        elif answer.bytes != len(arrival.target) or answer.offset != arrival.received:
            raise SpecError(
                f"chunk {arrival.get.chunk}: got bytes {answer.offset} to {answer.bytes}, "
                f"requested {arrival.received} to {len(arrival.target)}"
            )
        elif arrival.received and arrival.sha256 != answer.sha256:
            raise SpecError(f"chunk {arrival.get.chunk} changed during the transfer")
        arrival.is_open, arrival.at_s = True, time.monotonic()
        arrival.sha256 = answer.sha256
        if not arrival.is_cancelled:
            self._listener.on_answer(arrival)

    def on_frame(self, nbytes: int) -> None:
        arrival = self._outstanding[0] if self._outstanding else None
        if arrival is None or not arrival.is_open or nbytes > len(arrival.target) - arrival.received:
            raise SpecError("unsolicited data")

    def next_buffer(self) -> memoryview | None:
        arrival = self._outstanding[0]
        # a cancelled chunk's memory may already belong to its successor
        return None if arrival.is_cancelled else arrival.target[arrival.received :]

    def on_received(self, nbytes: int) -> None:
        arrival = self._outstanding[0]
        arrival.received += nbytes
        arrival.at_s = time.monotonic()
        self.bytes += nbytes
        if arrival.is_complete:
            is_manifest = isinstance(arrival.get, messages.GetManifest)
            if is_manifest and hashlib.sha256(arrival.target).hexdigest() != arrival.sha256:
                raise SpecError(f"the manifest of {self._context!r} is damaged (hash)")
            self._outstanding.popleft()
        if arrival.is_cancelled:
            self._listener.on_waste(nbytes)
        else:
            try:
                self._listener.on_bytes(arrival)
            except SpecError as error:  # what it means, not how it came: asking again changes nothing
                raise SessionFailed(f"protocol error of the sender: {error}") from error
        self._touch()  # last: while the listener worked, no arrival could be seen


async def _quietly(request: Coroutine[Any, Any, None]) -> None:
    # the reading side notices a lost connection and resumes
    with suppress(OSError, aiohttp.ClientError):
        await request


class _Padding:
    """Receives padding, and cancels it when its time is over."""

    def __init__(self, connection: StreamConnection, nbytes: int, until_s: float | None) -> None:
        self._connection, self._nbytes, self._until_s = connection, nbytes, until_s
        self.received = -1
        self._cancelling: asyncio.Task[None] | None = None

    def on_text(self, text: str) -> None:
        if self.received < 0:
            self.received = 0
        elif self._cancelling is not None:
            self._connection.frames.finish()
        else:
            raise SessionFailed("protocol error of the sender: text instead of padding")

    def on_frame(self, nbytes: int) -> None:
        if self.received < 0 or nbytes > self._nbytes - self.received:
            raise SessionFailed("protocol error of the sender: more padding than requested")

    def next_buffer(self) -> memoryview | None:
        return None

    def on_received(self, nbytes: int) -> None:
        self.received += nbytes
        if self.received >= self._nbytes:
            self._connection.frames.finish()
        elif self._cancelling is None and self._is_over():
            self._cancelling = asyncio.create_task(_quietly(self._connection.request(messages.CancelRequest(0))))

    def _is_over(self) -> bool:
        return self._until_s is not None and time.monotonic() > self._until_s


async def _pad(connection: StreamConnection, padding_bytes: int, stall_s: float, until_s: float | None) -> None:
    """Receive padding on a fresh connection to open its congestion window."""
    padding = _Padding(connection, padding_bytes, until_s)
    await connection.request(messages.GetPadding(0, padding_bytes))
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
        raise SessionFailed("the sender closed the connection instead of sending padding") from None
    finally:
        serving.cancel()
