"""The receiver: drives a `Session` in real time over a sender's stream, with compute beside it.

`fetch_session` is one request. Time 0 is the receiver's first action, the request for the manifest; the connection
stands before, unless the session is cold. `python -m testbed.receiver` is a warm process that carries out sessions on
command: see `testbed.worker`.

A sender that dies, a link at zero and a damaged chunk have bounds: after `Limits.stall_s` without a byte the connection
is made anew and everything outstanding is resumed by offset, `Limits.reconnects` times; a session has at most
`Limits.session_s`. Then it is a `SessionFailed`.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import WSMsgType

from codec.errors import CodecError
from policies.api import TEXT, Forecast, Policy
from testbed import wire
from testbed.client import Client, StreamConnection, parse_manifest
from testbed.compute import Compute, Step
from testbed.errors import SpecError
from testbed.manifest import Manifest
from testbed.session import (
    PREFILL,
    Ask,
    Cancel,
    Costs,
    Decode,
    Fetch,
    Recompute,
    Session,
    SessionFailed,
    SessionRecord,
    Work,
    ask_directly,
)

RETRY_S = 0.1
PADDING_REST_S = 0.1
"""Padding is cut short so long before the start: what is queued on the way must have drained by then."""
SPIN_S = 0.002
"""The event loop's timers are good to a millisecond; the rest to the start is spun away."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a session may wait for."""

    stall_s: float = 5.0
    """Without a byte for so long, with something outstanding, the connection is given up."""
    reconnects: int = 3
    session_s: float = 120.0


@dataclass(frozen=True)
class Fetched:
    """A session that reached its first token."""

    record: SessionRecord
    token: int
    """The first output token."""
    zero_s: float
    """CLOCK_MONOTONIC at the session's time 0."""
    late_s: float
    """How much later than asked the session began."""
    rtt_s: float
    stream_bytes: int
    """Payload that arrived in all: manifest, chunks, what was cancelled."""
    reconnects: int
    prefill_start_s: float


@dataclass(slots=True)
class _Outstanding:
    """A request whose answer is not complete."""

    get: wire.Get
    chunk: int
    """-1 for the manifest."""
    size: int
    target: memoryview
    received: int = 0
    is_open: bool = False
    is_cancelled: bool = False
    sha256: str = ""


async def fetch_session(
    client: Client,
    context: str,
    policy: Policy,
    deadline_s: float,
    *,
    compute: Compute,
    costs: Costs,
    prompt_ids: Sequence[int],
    depth: int = 2,
    overlap: bool = True,
    cold: bool = False,
    padding_bytes: int = 0,
    start_s: float | None = None,
    forecast: Forecast | None = None,
    prior_bps: float | None = None,
    concurrent: int = 1,
    seed: int = 0,
    ask: Ask = ask_directly,
    limits: Limits | None = None,
) -> Fetched:
    """One request for one context: its cache in `compute`, and the first token after `prompt_ids`.

    `start_s` is the CLOCK_MONOTONIC at which to begin (None: as soon as the connection stands); `padding_bytes` are
    sent over the connection before, so that its congestion window is open; `cold` connects within the session.
    Raises SessionFailed with the reason, SpecError for settings that cannot be meant.
    """
    if getattr(policy, "clairvoyant", False):
        if forecast is None:
            raise SpecError(f"policy {type(policy).__name__} is clairvoyant; it needs a forecast")
        policy.foresee(forecast)  # type: ignore[attr-defined]
    run = _Run(client, context, compute, costs, tuple(prompt_ids), limits or Limits())
    run.settings = {
        "policy": policy,
        "deadline_s": deadline_s,
        "depth": depth,
        "overlap": overlap,
        "prior_bps": prior_bps,
        "concurrent": concurrent,
        "seed": seed,
        "ask": ask,
    }
    with _no_pauses():
        return await run.run(start_s, cold, padding_bytes)


class _Run:
    """One session. Everything but compute happens on the event loop's thread, so nothing needs a lock."""

    def __init__(
        self,
        client: Client,
        context: str,
        compute: Compute,
        costs: Costs,
        prompt_ids: tuple[int, ...],
        limits: Limits,
    ) -> None:
        self._client = client
        self._context = context
        self._compute = compute
        self._costs = costs
        self._prompt_ids = prompt_ids
        self._limits = limits
        self.settings: dict[str, Any] = {}

        self._loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[Step] = self._loop.create_future()
        self._zero_s = 0.0
        self._rtt_s = 0.0
        self._connection: StreamConnection | None = None
        self._outstanding: deque[_Outstanding] = deque()
        self._next_req = 1
        """Request 0 is the padding before the session."""
        self._stream_bytes = 0
        self._reconnects = 0
        self._stall: asyncio.Timeout | None = None
        self._session: Session | None = None
        self._buffers: list[memoryview] = []
        self._texts: dict[int, str] = {}
        self._wake: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, start_s: float | None, cold: bool, padding_bytes: int) -> Fetched:
        connection: StreamConnection | None = None
        await asyncio.wrap_future(self._compute.submit(self._compute.forget))
        try:
            if not cold:
                connection = await self._connect()
                await _open_window(connection, padding_bytes, self._limits.stall_s, start_s)
            await _sleep_until(start_s)
            self._zero_s = time.monotonic()
            self._ask_manifest()
            self._spawn(self._transfer(connection))
            async with asyncio.timeout(self._limits.session_s):
                step = await self._finished
        except TimeoutError:
            raise SessionFailed(f"no first token within {self._limits.session_s:g} s") from None
        except (OSError, aiohttp.ClientError) as error:
            raise SessionFailed(f"no connection to the sender: {error}") from error
        finally:
            if self._wake is not None:
                self._wake.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if connection is not None:
                await connection.drop()
            # the next session must not find a step of this one in its cache
            await asyncio.wrap_future(self._compute.submit(lambda: None))
        assert self._session is not None
        assert step.token is not None
        return Fetched(
            record=self._session.record(),
            token=step.token,
            zero_s=self._zero_s,
            late_s=0.0 if start_s is None else self._zero_s - start_s,
            rtt_s=self._rtt_s,
            stream_bytes=self._stream_bytes,
            reconnects=self._reconnects,
            prefill_start_s=step.start_s - self._zero_s,
        )

    def _now_s(self) -> float:
        return time.monotonic() - self._zero_s

    def _fail(self, error: BaseException) -> None:
        if not self._finished.done():
            self._finished.set_exception(error)

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- the connection

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

    async def _transfer(self, connection: StreamConnection | None) -> None:
        """Receive until the session is over, over as many connections as the limits allow."""
        why = ""
        try:
            while True:
                try:
                    if connection is None:
                        connection = await self._connect()
                    self._connection = connection
                    self._resume()
                    await self._receive(connection)
                except TimeoutError:
                    why = f"no byte for {self._limits.stall_s:g} s"
                except (OSError, aiohttp.ClientError) as error:
                    why = str(error) or type(error).__name__
                finally:
                    self._connection = None
                    if connection is not None:
                        await connection.drop()
                connection = None
                if self._reconnects >= self._limits.reconnects:
                    raise SessionFailed(f"the sender is lost after {self._reconnects} reconnections: {why}")
                self._reconnects += 1
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._fail(error)

    async def _receive(self, connection: StreamConnection) -> None:
        """Handle messages until the connection ends; raises when it does."""
        async with asyncio.timeout(None) as stall:
            self._stall = stall
            self._touch()
            try:
                while True:
                    message = await connection.socket.receive()
                    if message.type is WSMsgType.BINARY:
                        self._on_frame(message.data)
                    elif message.type is WSMsgType.TEXT:
                        self._on_answer(wire.parse_answer(message.data))
                    elif message.type is WSMsgType.CLOSE and message.data == 1008:
                        raise SessionFailed(f"the sender refuses: {message.extra}")
                    else:
                        raise ConnectionError(f"the sender closed the stream ({message.type.name})")
                    self._touch()
            except SpecError as error:
                raise SessionFailed(f"the sender answers wrongly: {error}") from error
            finally:
                self._stall = None

    def _touch(self) -> None:
        """Something arrived, or something new is awaited: the stall clock starts again."""
        if self._stall is not None and not self._stall.expired():
            awaited = bool(self._outstanding)
            self._stall.reschedule(self._loop.time() + self._limits.stall_s if awaited else None)

    def _resume(self) -> None:
        """Ask for what is outstanding, from where it stopped."""
        waiting = [request for request in self._outstanding if not request.is_cancelled]
        self._outstanding.clear()
        for request in waiting:
            request.is_open = False
            if isinstance(request.get, wire.GetChunk):
                request.get = wire.GetChunk(request.get.req, request.chunk, request.get.level, request.received)
            else:
                request.received = 0
            self._outstanding.append(request)
            self._send(request.get)

    def _send(self, request: wire.Request) -> None:
        if self._connection is not None:
            self._spawn(self._send_quietly(self._connection, request))

    async def _send_quietly(self, connection: StreamConnection, request: wire.Request) -> None:
        # the reading side sees a lost connection, and resumes
        with suppress(OSError, aiohttp.ClientError):
            await connection.request(request)

    # --- answers

    def _ask_manifest(self) -> None:
        self._outstanding.append(_Outstanding(wire.GetManifest(self._take_req()), -1, 0, memoryview(b"")))

    def _take_req(self) -> int:
        self._next_req += 1
        return self._next_req - 1

    def _on_answer(self, answer: wire.Answer | wire.Cancelled) -> None:
        request = self._outstanding[0] if self._outstanding else None
        if request is None or answer.req != request.get.req:
            raise SpecError(f"an answer to request {answer.req} came out of turn")
        if isinstance(answer, wire.Cancelled):
            if not request.is_cancelled:
                raise SpecError(f"request {answer.req} was ended without being cancelled")
            self._outstanding.popleft()
            return
        if request.is_open:
            raise SpecError(f"request {answer.req} was answered twice")
        if isinstance(request.get, wire.GetManifest):
            if not 0 < answer.bytes <= wire.MAX_MANIFEST_BYTES:
                raise SpecError(f"a manifest of {answer.bytes} bytes")
            self._rtt_s = self._now_s()
            request.size = answer.bytes
            request.target = memoryview(bytearray(answer.bytes))
        elif answer.bytes != request.size or answer.offset != request.received:
            raise SpecError(
                f"chunk {request.chunk}: bytes {answer.offset} to {answer.bytes} came, "
                f"{request.received} to {request.size} were asked for"
            )
        elif request.received and request.sha256 != answer.sha256:
            raise SpecError(f"chunk {request.chunk} changed while it was fetched")
        request.is_open = True
        request.sha256 = answer.sha256
        if self._session is not None and not request.is_cancelled:
            self._session.on_first_byte(request.chunk, self._now_s())

    def _on_frame(self, data: bytes) -> None:
        request = self._outstanding[0] if self._outstanding else None
        if request is None or not request.is_open or len(data) > request.size - request.received:
            raise SpecError("bytes came that nobody asked for")
        stop = request.received + len(data)
        if not request.is_cancelled:
            # a cancelled chunk's buffer may already belong to its successor
            request.target[request.received : stop] = data
        request.received = stop
        self._stream_bytes += len(data)
        is_complete = stop == request.size
        if is_complete:
            self._outstanding.popleft()
        if self._session is None:
            if is_complete:
                self._on_manifest(request.target)
        elif not request.is_cancelled:
            now_s = self._now_s()
            self._session.on_bytes(request.chunk, stop, now_s)
            if is_complete:
                if isinstance(request.get, wire.GetChunk) and request.get.level == TEXT:
                    self._texts[request.chunk] = request.sha256
                self._session.on_last_byte(request.chunk, now_s)
            self._step()

    def _on_manifest(self, data: memoryview) -> None:
        manifest = parse_manifest(data)
        if manifest.context != self._context:
            raise SpecError(f"asked for context {self._context!r}, got {manifest.context!r}")
        if self._compute.lacks_profile(manifest):
            self._spawn(self._begin_with_profile(manifest))
        else:
            self._begin(manifest)

    async def _begin_with_profile(self, manifest: Manifest) -> None:
        """The profile travels now, within the session, because nobody fetched it before."""
        assert manifest.profile is not None
        try:
            if self._compute.add_profile(await self._client.profile(manifest.profile)) != manifest.profile:
                raise SpecError(f"the sender's profile does not have the hash {manifest.profile}")
            self._begin(manifest)
        except (SpecError, CodecError, OSError, aiohttp.ClientError) as error:
            self._fail(SessionFailed(str(error)))

    def _begin(self, manifest: Manifest) -> None:
        try:
            self._compute.open(manifest, len(self._prompt_ids))
        except CodecError as error:
            raise SpecError(str(error)) from error
        self._buffers = self._compute.buffers(manifest)
        self._session = Session(manifest, costs=self._costs, rtt_s=self._rtt_s, **self.settings)
        self._step()

    # --- work

    def _step(self) -> None:
        """Let the session decide what begins now."""
        session = self._session
        assert session is not None
        for work in session.poll(self._now_s()):
            self._begin_work(work)
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        wake_s = session.wake_s()
        if wake_s is not None:
            self._wake = self._loop.call_at(self._zero_s + wake_s, self._on_wake)

    def _on_wake(self) -> None:
        self._wake = None
        self._guarded(self._step)

    def _guarded(self, step: Any, *arguments: Any) -> None:
        """For callbacks of the event loop, where an exception would otherwise only be logged."""
        try:
            step(*arguments)
        except Exception as error:
            self._fail(error)

    def _begin_work(self, work: Work) -> None:
        match work:
            case Fetch(chunk, level, size):
                get = wire.GetChunk(self._take_req(), chunk, level, 0)
                self._outstanding.append(_Outstanding(get, chunk, size, self._buffers[chunk][:size]))
                self._touch()
                self._send(get)
            case Cancel(chunk):
                for request in self._outstanding:
                    if request.chunk == chunk and not request.is_cancelled:
                        request.is_cancelled = True
                        self._send(wire.CancelRequest(request.get.req))
            case Decode(chunk, level):
                self._compute_step(work, self._compute.decode, chunk, level, self._data(chunk, level))
            case Recompute(chunk):
                self._compute_step(work, self._recompute, chunk, self._data(chunk, TEXT))
            case _:
                self._compute_step(work, self._compute.prefill, self._prompt_ids)

    def _data(self, chunk: int, level: int | str) -> memoryview:
        assert self._session is not None
        info = self._session.manifest.chunks[chunk]
        size = info.sizes_bytes[level] if isinstance(level, int) else info.text_bytes
        return self._buffers[chunk][:size]

    def _recompute(self, chunk: int, data: memoryview) -> Step:
        # encoded chunks carry checksums, text has only this
        if hashlib.sha256(data).hexdigest() != self._texts[chunk]:
            raise CodecError(f"text of chunk {chunk} is damaged (hash)")
        return self._compute.recompute(chunk, data)

    def _compute_step(self, work: Decode | Recompute | Any, step: Any, *arguments: Any) -> None:
        future = self._compute.submit(step, *arguments)

        def done(finished: Future[Step]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._guarded, self._on_computed, work, finished)

        future.add_done_callback(done)

    def _on_computed(self, work: Any, finished: Future[Step]) -> None:
        if self._finished.done() or self._session is None:
            return
        chunk = work.chunk if isinstance(work, Decode | Recompute) else PREFILL
        try:
            step = finished.result()
        except CodecError as error:
            self._session.on_failed(chunk, str(error), self._now_s())
        else:
            self._session.on_computed(chunk, step.start_s - self._zero_s, step.end_s - self._zero_s)
            if self._session.done:
                self._finished.set_result(step)
                return
        self._step()


async def _open_window(connection: StreamConnection, padding_bytes: int, stall_s: float, start_s: float | None) -> None:
    """Carry padding over a fresh connection until its congestion window has grown, but not into the session."""
    if not padding_bytes:
        return
    await connection.request(wire.GetPadding(0, padding_bytes))
    received = -1
    is_cancelled = False
    while received < padding_bytes:
        try:
            async with asyncio.timeout(stall_s):
                message = await connection.socket.receive()
        except TimeoutError:
            raise SessionFailed(f"no byte for {stall_s:g} s before the session") from None
        if message.type is WSMsgType.BINARY and received >= 0:
            received += len(message.data)
            if not is_cancelled and start_s is not None and time.monotonic() > start_s - PADDING_REST_S:
                is_cancelled = True
                await connection.request(wire.CancelRequest(0))
        elif message.type is WSMsgType.TEXT and received < 0:
            received = 0
        elif message.type is WSMsgType.TEXT and is_cancelled:
            return
        else:
            raise SessionFailed(f"the sender does not send padding ({message.type.name})")


async def _sleep_until(start_s: float | None) -> None:
    if start_s is None:
        return
    await asyncio.sleep(max(0.0, start_s - time.monotonic() - SPIN_S))
    while time.monotonic() < start_s:
        pass


@contextmanager
def _no_pauses() -> Iterator[None]:
    """No garbage collection while a session is timed."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


if __name__ == "__main__":
    import sys

    from testbed.worker import main

    sys.exit(main())
