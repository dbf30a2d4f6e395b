"""Several requests that share one emulated link and one decoder: `kvstream.testbed.simulator.concurrent` with real
connections.

Every request has a connection of its own to the sender; one receiver process represents the server that all of them
ask, so they share its decoder: the thread of a `TimedEngine`, first come first served. `fetch_batched` is the paper's
way (SIGCOMM 2024, section 5.3), by chunk index in batches; with `fetch_shared` requests are independent. They are the
counterparts of `simulate_batched` and `simulate_shared`, take the same requests and give the same records; the times
of a record count from its request's arrival.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from kvstream.testbed.engine.threads import ComputeThread
from kvstream.testbed.engine.timed_engine import TimedEngine, wait_until
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.inbound import PADDING_REST_S, Arrival, Inbound, Limits
from kvstream.testbed.net.messages import GetManifest
from kvstream.testbed.receiver.driver import fetch_session
from kvstream.testbed.session.record import SessionFailed
from kvstream.testbed.session.session import LOOKAHEAD_MARGIN_S
from kvstream.testbed.simulator.concurrent import Member, Request, Served, batch_steps, batches
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.workloads.synthetic import Workload


async def fetch_shared(
    client: Client, requests: Sequence[Request], workload: Workload, start_s: float, *, depth: int = 2,
    padding_bytes: int = 0, limits: Limits | None = None,
) -> list[Served]:  # fmt: skip
    """Every request on its own. `start_s` is the link's time 0 on CLOCK_MONOTONIC. Raises SessionFailed."""
    decoder = ComputeThread()
    try:
        fetched = await asyncio.gather(*(
            fetch_session(
                client, request.manifest.context, request.policy, request.settings(depth),
                engine=TimedEngine(workload, decoder), costs=request.costs, prompt_ids=(0,) * workload.prompt,
                padding_bytes=padding_bytes, start_s=start_s + request.arrival_s, limits=limits,
            )
            for request in requests
        ))  # fmt: skip
    finally:
        decoder.close()
    return [
        Served(one.record, request.arrival_s + one.late_s, number)
        for number, (one, request) in enumerate(zip(fetched, requests, strict=True))
    ]


async def fetch_batched(
    client: Client, requests: Sequence[Request], workload: Workload, start_s: float, *, window_s: float = 0.0,
    max_batch: int = 10, rtt_s: float = 0.0, padding_bytes: int = 0, limits: Limits | None = None,
) -> list[Served]:  # fmt: skip
    """In batches, by chunk index: a batch has the link when the one before has been sent. Raises SessionFailed."""
    limits = limits or Limits()
    link = _Turns(start_s, rtt_s)
    decoder = ComputeThread()
    formed = batches([request.arrival_s for request in requests], window_s, max_batch)
    members = [[_Remote(requests[i], rtt_s, len(chosen), link, client, workload, limits, decoder) for i in chosen]
               for _, chosen in formed]  # fmt: skip
    every = [one for batch in members for one in batch]
    running: list[asyncio.Task[None]] = []
    try:
        await asyncio.gather(*(one.inbound.warm_up(padding_bytes, start_s - PADDING_REST_S) for one in every))
        await asyncio.sleep(max(0.0, start_s - time.monotonic()))
        running = [asyncio.create_task(one.receive()) for one in every]
        async with asyncio.timeout(limits.session_s):
            decoding: list[asyncio.Task[None]] = []
            for (close_s, _), batch in zip(formed, members, strict=True):
                await asyncio.sleep(max(0.0, close_s - link.now_s()))
                decoding += await _stream(batch, link, decoder)
            await asyncio.gather(*decoding)
    except TimeoutError:
        raise SessionFailed(f"not every first token within {limits.session_s:g} s") from None
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await asyncio.gather(*(one.inbound.close() for one in every))
        decoder.close()
    served: dict[int, Served] = {}
    for number, ((_, chosen), batch) in enumerate(zip(formed, members, strict=True)):
        for i, one in zip(chosen, batch, strict=True):
            served[i] = Served(one.member.finish(), requests[i].arrival_s, number)
    return [served[i] for i in range(len(requests))]


async def _stream(batch: Sequence[_Remote], link: _Turns, decoder: ComputeThread) -> list[asyncio.Task[None]]:
    """Fetch a batch's chunks in turn; returns what is still being decoded when all have arrived."""
    decoding = []
    for one in batch:
        await link.turn(one, one.get_manifest)
    for one in batch:
        await one.complete()
    for index in range(max(one.member.n_chunks for one in batch)):
        present = [one for one in batch if index < one.member.n_chunks]
        for one in present:
            one.member.session.concurrent = len(present)
            await one.complete()
            await link.turn(one, one.get_next)
        decoding.append(asyncio.create_task(_decode(index, present, link, decoder)))
    await link.idle()
    return decoding


async def _decode(index: int, present: Sequence[_Remote], link: _Turns, decoder: ComputeThread) -> None:
    """Compute what a batch needs for one index once all of it has arrived; in the order of indices."""
    for one in present:
        await one.has(index)

    def work() -> list[tuple[list[Member], int, float, float]]:
        done = []
        end_s = link.now_s()
        for group, chunk, seconds in batch_steps(index, [one.member for one in present]):
            start_s, end_s = end_s, end_s + seconds
            wait_until(link.zero_s + end_s)
            done.append((group, chunk, start_s, end_s))
        return done

    for group, chunk, start_s, end_s in await asyncio.wrap_future(decoder.submit(work)):
        for member in group:
            member.computed.append((chunk, start_s, end_s))


class _Turns:
    """Whose turn it is on the link: the next answer is requested when the rest of this one takes a round trip."""

    def __init__(self, zero_s: float, rtt_s: float) -> None:
        self.zero_s = zero_s
        self._lead_s = rtt_s + LOOKAHEAD_MARGIN_S
        self._free = asyncio.Event()
        self._free.set()
        self._holder: _Remote | None = None

    def now_s(self) -> float:
        """Seconds since the link's time 0."""
        return time.monotonic() - self.zero_s

    async def turn(self, one: _Remote, ask: Any) -> None:
        """Wait until the link is almost free, then ask."""
        await self._free.wait()
        self._free.clear()
        self._holder = one
        ask()

    async def idle(self) -> None:
        """Wait until the last answer is here."""
        if self._holder is not None:
            await self._holder.complete()

    def on_bytes(self, one: _Remote, elapsed_s: float, received: int, total: int) -> None:
        if one is self._holder and (total - received) * elapsed_s <= self._lead_s * max(received, 1):
            self._free.set()


class _Remote:
    """A member of a batch and its connection."""

    def __init__(
        self, request: Request, rtt_s: float, members: int, link: _Turns, client: Client, workload: Workload,
        limits: Limits, decoder: ComputeThread,
    ) -> None:  # fmt: skip
        self.member = Member(request, rtt_s, members)
        self.inbound = Inbound(client, request.manifest.context, self, limits)
        self._link = link
        self._engine = TimedEngine(workload, decoder)
        self._engine.open(request.manifest, workload.prompt)
        self._arrivals: list[asyncio.Future[None]] = []
        """The manifest's, then every chunk's."""
        self._first_s = 0.0

    async def receive(self) -> None:
        """Receive what arrives; a failure is passed to all that wait for a chunk."""
        try:
            await self.inbound.run()
        except Exception as error:
            for arrival in self._arrivals:
                if not arrival.done():
                    arrival.set_exception(error)

    def get_manifest(self) -> None:
        self._expect()
        self.inbound.get_manifest()

    def get_next(self) -> None:
        """Choose and ask for the next chunk."""
        fetch = self.member.choose(self._link.now_s())
        self._expect()
        self.inbound.get_chunk(fetch.chunk, fetch.level, self._engine.take(fetch.chunk, fetch.level, fetch.bytes).view)

    async def complete(self) -> None:
        """Wait for the answer to the last request. Raises what went wrong with the connection."""
        if self._arrivals:
            await self._arrivals[-1]

    async def has(self, chunk: int) -> None:
        await self._arrivals[chunk + 1]

    def on_answer(self, arrival: Arrival) -> None:
        self._first_s = self._link.now_s()

    def on_waste(self, nbytes: int) -> None:
        self.member.session.on_waste(nbytes)

    def on_bytes(self, arrival: Arrival) -> None:
        now_s = self._link.now_s()
        if arrival.is_complete:
            if isinstance(arrival.get, GetManifest):
                Manifest.from_bytes(arrival.target)
                self.member.free_s = now_s
            else:
                self.member.on_arrived(self._first_s, now_s)
            if not self._arrivals[-1].done():
                self._arrivals[-1].set_result(None)
        self._link.on_bytes(self, now_s - self._first_s, arrival.received, len(arrival.target))

    def _expect(self) -> None:
        self._arrivals.append(asyncio.get_running_loop().create_future())
