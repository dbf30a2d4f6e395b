"""The receiver: drives a `Session` in real time over a sender's stream, and an engine.

`fetch_session` is one request. Time 0 is the receiver's first action, the request for the manifest; the connection
exists before, unless the session is cold. `python -m kvstream.testbed.receiver` is a warm process that carries out
sessions on command: see `kvstream.testbed.receiver.worker`.

A sender that dies, a link at zero and a damaged chunk have bounds (`Limits`,
`kvstream.testbed.session.session.MAX_ATTEMPTS`); beyond them the session is a `SessionFailed`.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import aiohttp

from kvstream.codec.errors import CodecError
from kvstream.policies.api import TEXT, Forecast, Policy
from kvstream.testbed.engine.api import Engine, Step
from kvstream.testbed.engine.buffers import IncomingChunk
from kvstream.testbed.errors import SpecError
from kvstream.testbed.net import messages
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.inbound import PADDING_REST_S, Arrival, Limits
from kvstream.testbed.net.multi_sender import AnyInbound, inbound_from
from kvstream.testbed.net.network_process import NetworkProcess, RemoteInbound
from kvstream.testbed.session.ask import ASK_DIRECTLY, Ask, give_forecast
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.session.record import ChunkRecord, SessionFailed, SessionRecord
from kvstream.testbed.session.session import PROGRESS_S, Session
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.session.work import PREFILL, Cancel, Decode, Fetch, Prefill, Recompute, Work
from kvstream.testbed.store.manifest import Manifest

STEP_S: Final = 0.001
"""While bytes arrive, the session is polled this often, and at its own times: not with each of the 47,000 frames a
second at 25 Gbit/s. News of a process that receives are rarer, and each is looked at: a chunk's first frame says that
the next one can be requested."""
SPIN_S: Final = 0.002
"""The event loop's timers are good to a millisecond; the rest until the start is spun away."""
EVENT_INTERVAL_S: Final = 0.05

OnFirstByte: TypeAlias = Callable[[int], object]
"""Called with a chunk as its first byte arrives."""
OnChunks: TypeAlias = Callable[[Sequence[ChunkRecord], float], None]
"""Called with the state of every chunk, and the time: seconds since the request."""
OnReady: TypeAlias = Callable[[], Awaitable[float]]
"""Called when a session is ready; gives the CLOCK_MONOTONIC at which it begins."""


@dataclass(frozen=True)
class Fetched:
    """A session that reached its first token."""

    record: SessionRecord
    token: int | None
    """The first output token; None from an engine that leaves the prompt to others."""
    zero_s: float
    """CLOCK_MONOTONIC at the session's time 0."""
    late_s: float
    """How much later than requested the session began."""
    rtt_s: float
    stream_bytes: int
    """All payload that arrived: manifest, chunks, what was cancelled."""
    reconnects: int
    prefill_start_s: float


@dataclass(frozen=True)
class _Request:
    """What is fetched, and how."""

    context: str
    policy: Policy
    settings: SessionSettings
    costs: Costs
    prompt_ids: tuple[int, ...]
    ask: Ask
    limits: Limits


async def fetch_session(
    client: Client,
    context: str,
    policy: Policy,
    settings: SessionSettings,
    *,
    engine: Engine,
    costs: Costs,
    prompt_ids: Sequence[int],
    cold: bool = False,
    padding_bytes: int = 0,
    padding_until_s: float | None = None,
    start_s: float | None = None,
    on_ready: OnReady | None = None,
    forecast: Forecast | None = None,
    ask: Ask = ASK_DIRECTLY,
    limits: Limits | None = None,
    others: Sequence[Client] = (),
    network: NetworkProcess | None = None,
    on_first_byte: OnFirstByte | None = None,
    on_chunks: OnChunks | None = None,
) -> Fetched:
    """One request for one context: its cache in `engine`, and the first token after `prompt_ids`.

    `start_s` is the CLOCK_MONOTONIC at which to begin (None: when everything is ready, or when `on_ready` then says);
    `padding_bytes` are sent over the connection before, so that its congestion window is open, but not after
    `padding_until_s` (None: PADDING_REST_S before `start_s`); `cold` connects within the session. With `others` the
    chunks lie on several senders: chunk i on number i modulo their count, `client` being number 0. With `network` that
    process receives, into the memory that it shares with `engine`. `on_chunks` is called every EVENT_INTERVAL_S; it and
    `on_first_byte` run on the event loop's thread and hold up the session.

    Raises SessionFailed with the reason, SpecError for a clairvoyant policy without a forecast.
    """
    give_forecast(policy, forecast)
    request = _Request(context, policy, settings, costs, tuple(prompt_ids), ask, limits or Limits())
    run = _Run(request, engine, [client, *others], network, on_first_byte, on_chunks)
    if padding_until_s is None and start_s is not None:
        padding_until_s = start_s - PADDING_REST_S
    return await run.run(start_s, on_ready, cold, padding_bytes, padding_until_s)


class _Run:
    """One session. Everything but compute happens on the event loop's thread, so nothing needs a lock."""

    def __init__(
        self,
        request: _Request,
        engine: Engine,
        clients: Sequence[Client],
        network: NetworkProcess | None,
        on_first_byte: OnFirstByte | None,
        on_chunks: OnChunks | None,
    ) -> None:
        self._request = request
        self._engine = engine
        self._client = clients[0]
        self._on_first_byte = on_first_byte
        self._on_chunks = on_chunks
        context, limits = request.context, request.limits
        self._inbound: AnyInbound | RemoteInbound = (
            inbound_from(clients, context, self, limits)
            if network is None
            else network.inbound(clients, context, self, limits)
        )
        self._loop = asyncio.get_running_loop()
        self._finished: asyncio.Future[Step] = self._loop.create_future()
        self._zero_s = 0.0
        self._rtt_s = 0.0
        self._session: Session | None = None
        self._incoming: dict[int, IncomingChunk] = {}
        """[chunk]: what was requested and is not in the cache yet."""
        self._text_hashes: dict[int, str] = {}
        """[chunk]: SHA-256 of its text as the sender states it."""
        self._wake: asyncio.TimerHandle | None = None
        self._repeating: dict[Callable[[], None], asyncio.TimerHandle] = {}
        """[callback]: the timer of its next call."""
        self._profile: asyncio.Task[None] | None = None
        self._polled_s = 0.0
        self._step_s = STEP_S if network is None else 0.0

    async def run(
        self,
        start_s: float | None,
        on_ready: OnReady | None,
        cold: bool,
        padding_bytes: int,
        padding_until_s: float | None,
    ) -> Fetched:
        # the engine may still be busy with the cache of the session before
        forgotten = asyncio.wrap_future(self._engine.submit(self._engine.forget))
        tasks: list[asyncio.Task[None]] = []
        try:
            if not cold:
                await self._inbound.warm_up(padding_bytes, padding_until_s)
            await forgotten
            if on_ready is not None:
                start_s = await on_ready()
            await _sleep_until(start_s)
            self._zero_s = time.monotonic()
            self._inbound.get_manifest()
            tasks.append(asyncio.create_task(self._receive()))
            async with asyncio.timeout(self._request.limits.session_s):
                step = await self._finished
        except TimeoutError:
            raise SessionFailed(f"no first token within {self._request.limits.session_s:g} s") from None
        except (OSError, aiohttp.ClientError) as error:
            raise SessionFailed(f"no connection to the sender: {error}") from error
        finally:
            for timer in (self._wake, *self._repeating.values()):
                if timer is not None:
                    timer.cancel()
            if self._profile is not None:
                tasks.append(self._profile)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._inbound.close()
            # the next session must not find a step of this one in its cache
            await asyncio.wrap_future(self._engine.submit(lambda: None))
        assert self._session is not None
        return Fetched(
            record=self._session.record(),
            token=step.token,
            zero_s=self._zero_s,
            late_s=0.0 if start_s is None else self._zero_s - start_s,
            rtt_s=self._rtt_s,
            stream_bytes=self._inbound.bytes,
            reconnects=self._inbound.reconnects,
            prefill_start_s=step.start_s - self._zero_s,
        )

    async def _receive(self) -> None:
        try:
            await self._inbound.run()
        except Exception as error:
            self._fail(error)

    def _now_s(self) -> float:
        return time.monotonic() - self._zero_s

    def _since_zero(self, spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(start_s - self._zero_s, end_s - self._zero_s) for start_s, end_s in spans]

    def _fail(self, error: BaseException) -> None:
        if not self._finished.done():
            self._finished.set_exception(error)

    # --- what arrives

    def on_answer(self, arrival: Arrival) -> None:
        """A header: the manifest's gives the round trip, a chunk's is its first byte."""
        if isinstance(arrival.get, messages.GetManifest):
            self._rtt_s = arrival.at_s - self._zero_s
        elif self._session is not None:
            if self._on_first_byte is not None:
                self._on_first_byte(arrival.get.chunk)
            self._session.on_first_byte(arrival.get.chunk, arrival.at_s - self._zero_s)

    def on_waste(self, nbytes: int) -> None:
        if self._session is not None:
            self._session.on_waste(nbytes)

    def on_bytes(self, arrival: Arrival) -> None:
        if isinstance(arrival.get, messages.GetManifest):
            if arrival.is_complete:
                self._on_manifest(Manifest.from_bytes(arrival.target))
            return
        assert self._session is not None
        chunk, at_s = arrival.get.chunk, arrival.at_s - self._zero_s
        self._session.on_bytes(chunk, arrival.received, at_s)
        self._engine.on_bytes(self._incoming[chunk], arrival.received)
        if arrival.is_complete:
            if arrival.get.level == TEXT:
                self._text_hashes[chunk] = arrival.sha256
            self._session.on_last_byte(chunk, at_s)
        elif self._now_s() < self._polled_s + self._step_s:
            return
        self._step()

    def _on_manifest(self, manifest: Manifest) -> None:
        if manifest.context != self._request.context:
            raise SpecError(f"requested context {self._request.context!r}, got {manifest.context!r}")
        if self._engine.lacks_profile(manifest):
            self._profile = asyncio.create_task(self._begin_with_profile(manifest))
        else:
            self._begin(manifest)

    async def _begin_with_profile(self, manifest: Manifest) -> None:
        """The profile travels now, within the session, because it was not fetched before."""
        assert manifest.profile is not None
        try:
            if self._engine.add_profile(await self._client.profile(manifest.profile)) != manifest.profile:
                raise SpecError(f"the sender's profile does not have the hash {manifest.profile}")
            self._begin(manifest)
        except (SpecError, CodecError, OSError, aiohttp.ClientError) as error:
            self._fail(SessionFailed(str(error)))
        except Exception as error:
            self._fail(error)

    def _begin(self, manifest: Manifest) -> None:
        request = self._request
        try:
            self._engine.open(manifest, len(request.prompt_ids), overlap=request.settings.overlap)
        except CodecError as error:
            raise SpecError(str(error)) from error
        self._session = Session(
            manifest,
            request.policy,
            request.settings,
            request.costs,
            rtt_s=self._rtt_s,
            slots=self._engine.slots,
            ask=request.ask,
        )
        self._step()
        if self._on_chunks is not None:
            self._repeat(EVENT_INTERVAL_S, self._report_chunks)
        if self._session.has_progress:
            self._repeat(PROGRESS_S, self._check_progress)

    # --- work

    def _step(self) -> None:
        """Let the session decide what begins now, and when to ask it again."""
        session = self._session
        assert session is not None
        self._polled_s = self._now_s()
        for work in session.poll(self._polled_s):
            self._begin_work(work)
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        wake_s = session.wake_s()
        if wake_s is not None:
            self._wake = self._loop.call_at(self._zero_s + wake_s, self._guarded, self._step)

    def _repeat(self, interval_s: float, callback: Callable[[], None]) -> None:
        """Call now, and again until the session ends."""
        callback()
        self._repeating[callback] = self._loop.call_later(interval_s, self._guarded, self._repeat, interval_s, callback)

    def _report_chunks(self) -> None:
        assert self._session is not None
        assert self._on_chunks is not None
        self._on_chunks(self._session.chunks, self._now_s())

    def _check_progress(self) -> None:
        """Have the policy's progress hook called even while no bytes arrive."""
        assert self._session is not None
        self._session.on_time()
        self._step()

    def _guarded(self, step: Any, *arguments: Any) -> None:
        """For callbacks of the event loop, where an exception would otherwise only be logged."""
        try:
            step(*arguments)
        except Exception as error:
            self._fail(error)

    def _begin_work(self, work: Work) -> None:
        match work:
            case Fetch(chunk, level, size):
                incoming = self._incoming[chunk] = self._engine.take(chunk, level, size)
                self._inbound.get_chunk(chunk, level, incoming.view)
            case Cancel(chunk):
                self._inbound.cancel(chunk)
                self._release(chunk)
            case Decode(chunk):
                self._compute(chunk, self._engine.decode, self._incoming[chunk])
            case Recompute(chunk):
                self._compute(chunk, self._recompute, chunk, self._incoming[chunk].view)
            case Prefill():
                self._compute(PREFILL, self._engine.prefill, self._request.prompt_ids)

    def _release(self, chunk: int) -> None:
        self._incoming.pop(chunk).release()

    def _recompute(self, chunk: int, data: memoryview) -> Step:
        # encoded chunks carry checksums, text has only this
        if hashlib.sha256(data).hexdigest() != self._text_hashes[chunk]:
            raise CodecError(f"text of chunk {chunk} is damaged (hash)")
        return self._engine.recompute(chunk, data)

    def _compute(self, chunk: int, step: Callable[..., Step], *arguments: Any) -> None:
        """Submit a step; PREFILL is the chunk of the prompt's."""
        future = self._engine.submit(step, *arguments)

        def done(finished: Future[Step]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nothing waits for the step
                self._loop.call_soon_threadsafe(self._guarded, self._on_computed, chunk, finished)

        future.add_done_callback(done)

    def _on_computed(self, chunk: int, finished: Future[Step]) -> None:
        if self._finished.done() or self._session is None:
            return
        if chunk != PREFILL:
            self._release(chunk)
        try:
            step = finished.result()
        except CodecError as error:
            self._session.on_failed(chunk, str(error), self._now_s())
        else:
            self._session.on_computed(
                chunk,
                step.start_s - self._zero_s,
                step.end_s - self._zero_s,
                pieces_s=self._since_zero(step.pieces),
            )
            if self._session.done:
                self._finished.set_result(step)
                return
        self._step()


async def _sleep_until(start_s: float | None) -> None:
    if start_s is None:
        return
    await asyncio.sleep(max(0.0, start_s - time.monotonic() - SPIN_S))
    while time.monotonic() < start_s:
        pass
