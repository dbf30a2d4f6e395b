"""The receiver: drives a `Session` in real time over a sender's stream, with compute beside it.

`fetch_session` is one request. Time 0 is the receiver's first action, the request for the manifest; the connection
stands before, unless the session is cold. `python -m testbed.receiver` is a warm process that carries out sessions on
command: see `testbed.worker`.

A sender that dies, a link at zero and a damaged chunk have bounds (`Limits`, `testbed.session.MAX_ATTEMPTS`); beyond
them the session is a `SessionFailed`.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import aiohttp

from codec.errors import CodecError
from policies.api import TEXT, Forecast, Policy
from testbed import wire
from testbed.client import Client, parse_manifest
from testbed.compute import Compute, Step
from testbed.errors import SpecError
from testbed.inbound import Arrival, Inbound, Limits
from testbed.landing import Inflow
from testbed.manifest import Manifest
from testbed.session import (
    PREFILL,
    PROGRESS_S,
    Ask,
    Cancel,
    ChunkRecord,
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
from testbed.spread import Spread

STEP_S = 0.001
"""While bytes come, the session is asked so often what to do, and at its own times: not with each of the 47,000 frames
that come in a second at 25 Gbit/s."""
SPIN_S = 0.002
"""The event loop's timers are good to a millisecond; the rest to the start is spun away."""

TELL_EVERY_S = 0.05

Tell: TypeAlias = Callable[[Sequence[ChunkRecord], float], None]
"""Who is told how the chunks get on, and when: seconds since the request."""


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
    on_chunk: Callable[[int], object] | None = None,
    others: Sequence[Client] = (),
    tell: Tell | None = None,
) -> Fetched:
    """One request for one context: its cache in `compute`, and the first token after `prompt_ids`.

    `start_s` is the CLOCK_MONOTONIC at which to begin (None: as soon as the connection stands); `padding_bytes` are
    sent over the connection before, so that its congestion window is open; `cold` connects within the session.
    `on_chunk` hears of each chunk's first byte at once. With `others` the chunks lie on several senders: chunk i on the
    one that is i modulo their number, `client` being number 0. `tell` is called on the event loop's thread every
    TELL_EVERY_S; what it takes, the session waits for.
    Raises SessionFailed with the reason, SpecError for settings that cannot be meant.
    """
    if getattr(policy, "clairvoyant", False):
        if forecast is None:
            raise SpecError(f"policy {type(policy).__name__} is clairvoyant; it needs a forecast")
        policy.foresee(forecast)  # type: ignore[attr-defined]
    run = _Run(client, context, compute, costs, tuple(prompt_ids), limits or Limits(), others, tell)
    run.on_chunk = on_chunk
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
        others: Sequence[Client],
        tell: Tell | None,
    ) -> None:
        self._client = client
        self._context = context
        self._compute = compute
        self._costs = costs
        self._prompt_ids = prompt_ids
        self._limits = limits
        self._tell = tell
        self.settings: dict[str, Any] = {}
        self.on_chunk: Callable[[int], object] | None = None

        self._loop = asyncio.get_running_loop()
        self._inbound: Inbound | Spread = (
            Spread([client, *others], context, self, limits) if others else Inbound(client, context, self, limits)
        )
        self._finished: asyncio.Future[Step] = self._loop.create_future()
        self._zero_s = 0.0
        self._rtt_s = 0.0
        self._session: Session | None = None
        self._inflows: dict[int, Inflow] = {}
        """[chunk]: what was asked for and is not in the cache yet."""
        self._texts: dict[int, str] = {}
        """[chunk]: SHA-256 of its text as the sender says."""
        self._wake: asyncio.TimerHandle | None = None
        self._telling: asyncio.TimerHandle | None = None
        self._asking: asyncio.TimerHandle | None = None
        self._profile: asyncio.Task[None] | None = None
        self._decodes_pieces = False
        self._stepped_s = 0.0

    async def run(self, start_s: float | None, cold: bool, padding_bytes: int) -> Fetched:
        await asyncio.wrap_future(self._compute.submit(self._compute.forget))
        tasks: list[asyncio.Task[None]] = []
        try:
            if not cold:
                await self._inbound.warm_up(padding_bytes, start_s)
            await _sleep_until(start_s)
            self._zero_s = time.monotonic()
            self._inbound.get_manifest()
            tasks.append(asyncio.create_task(self._receive()))
            async with asyncio.timeout(self._limits.session_s):
                step = await self._finished
        except TimeoutError:
            raise SessionFailed(f"no first token within {self._limits.session_s:g} s") from None
        except (OSError, aiohttp.ClientError) as error:
            raise SessionFailed(f"no connection to the sender: {error}") from error
        finally:
            for timer in (self._wake, self._telling, self._asking):
                if timer is not None:
                    timer.cancel()
            if self._profile is not None:
                tasks.append(self._profile)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._inbound.close()
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
        """A header: the manifest's tells the round trip, a chunk's is its first byte."""
        if isinstance(arrival.get, wire.GetManifest):
            self._rtt_s = self._now_s()
        elif self._session is not None:
            if self.on_chunk is not None:
                self.on_chunk(arrival.get.chunk)
            self._session.on_first_byte(arrival.get.chunk, self._now_s())

    def on_waste(self, nbytes: int) -> None:
        if self._session is not None:
            self._session.on_waste(nbytes)

    def on_bytes(self, arrival: Arrival) -> None:
        if isinstance(arrival.get, wire.GetManifest):
            if arrival.is_complete:
                self._on_manifest(parse_manifest(arrival.target))
            return
        assert self._session is not None
        chunk, now_s = arrival.get.chunk, self._now_s()
        self._session.on_bytes(chunk, arrival.received, now_s)
        inflow = self._inflows[chunk]
        if self._compute.landing.landed(inflow, arrival.received) and self._decodes_pieces and inflow.level != TEXT:
            self._compute.submit(self._compute.feed, inflow)
        if arrival.is_complete:
            if arrival.get.level == TEXT:
                self._texts[chunk] = arrival.sha256
            self._session.on_last_byte(chunk, now_s)
        elif now_s < self._stepped_s + STEP_S:
            return
        self._step()

    def _on_manifest(self, manifest: Manifest) -> None:
        if manifest.context != self._context:
            raise SpecError(f"asked for context {self._context!r}, got {manifest.context!r}")
        if self._compute.lacks_profile(manifest):
            self._profile = asyncio.create_task(self._begin_with_profile(manifest))
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
        except Exception as error:
            self._fail(error)

    def _begin(self, manifest: Manifest) -> None:
        try:
            self._compute.open(manifest, len(self._prompt_ids), overlap=self.settings["overlap"])
        except CodecError as error:
            raise SpecError(str(error)) from error
        self._decodes_pieces = self._compute.decodes_pieces and self.settings["overlap"]
        self._session = Session(
            manifest, costs=self._costs, rtt_s=self._rtt_s, places=self._compute.places, **self.settings
        )
        self._step()
        if self._tell is not None:
            self._tell_on(self._tell)
        if self._session.has_progress:
            self._ask_on()

    # --- work

    def _step(self) -> None:
        """Let the session decide what begins now."""
        session = self._session
        assert session is not None
        self._stepped_s = self._now_s()
        for work in session.poll(self._stepped_s):
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

    def _tell_on(self, tell: Tell) -> None:
        assert self._session is not None
        tell(self._session.chunks, self._now_s())
        self._telling = self._loop.call_later(TELL_EVERY_S, self._guarded, self._tell_on, tell)

    def _ask_on(self) -> None:
        """Let the policy's progress hook be asked also while no byte comes."""
        assert self._session is not None
        self._session.on_time()
        self._step()
        self._asking = self._loop.call_later(PROGRESS_S, self._guarded, self._ask_on)

    def _guarded(self, step: Any, *arguments: Any) -> None:
        """For callbacks of the event loop, where an exception would otherwise only be logged."""
        try:
            step(*arguments)
        except Exception as error:
            self._fail(error)

    def _begin_work(self, work: Work) -> None:
        match work:
            case Fetch(chunk, level, size):
                inflow = self._inflows[chunk] = self._compute.landing.take(chunk, level, size)
                self._inbound.get_chunk(chunk, level, inflow.view)
            case Cancel(chunk):
                self._inbound.cancel(chunk)
                self._release(chunk)
            case Decode(chunk):
                self._compute_step(work, self._compute.decode, self._inflows[chunk])
            case Recompute(chunk):
                self._compute_step(work, self._recompute, chunk, self._inflows[chunk].view)
            case _:
                self._compute_step(work, self._compute.prefill, self._prompt_ids)

    def _release(self, chunk: int) -> None:
        self._compute.landing.release(self._inflows.pop(chunk))

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
                copies_s=self._since_zero(step.copies),
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
