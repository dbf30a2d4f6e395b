"""Several requests that share one link and one decoder, in virtual time: batched as in the paper, or independent.

`simulate_batched` is CacheGen's way (SIGCOMM 2024, section 5.3): requests that arrive within a window form a batch of
bounded size, and the batch is streamed by chunk index: chunk 0 of each, then chunk 1 of each. For index i the N_c
requests that have a chunk i count on N_c times the delay of one (`Observation.concurrent`), and these chunks are
decoded together, padded to the longest. `simulate_shared` gives every request a connection of its own: the link is
shared evenly among those with bytes to send, as by equal TCP flows, and the decoder serves in order of arrival.

Times of a record count from its request's arrival, waiting for the batch included.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from kvstream.policies.api import Policy
from kvstream.testbed.errors import SpecError
from kvstream.testbed.session.arrival_rate import RATE_WINDOW_S
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.session.record import SessionFailed, SessionRecord
from kvstream.testbed.session.session import Session
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.session.work import PREFILL, Decode, Fetch, Prefill, Recompute, Work
from kvstream.testbed.store.manifest import Manifest
from kvstream.traces.fluid import FluidLink, frame_bytes
from kvstream.traces.trace import Trace

EPSILON_S: Final = 1e-6
"""Time advances by at least this between two reports about a transfer."""
LAST_BIT: Final = 1e-3
"""What is left of a transfer below this has arrived: rounding of sums of times."""


@dataclass(frozen=True)
class Request:
    """A request for a context, from its arrival (seconds of the link's time) to its deadline."""

    manifest: Manifest
    policy: Policy
    costs: Costs
    deadline_s: float
    arrival_s: float = 0.0
    seed: int = 0

    def settings(self, depth: int, concurrent: int = 1) -> SessionSettings:
        """The settings of its session."""
        return SessionSettings(self.deadline_s, depth=depth, concurrent=concurrent, seed=self.seed)


@dataclass(frozen=True)
class Served:
    """A request's outcome."""

    record: SessionRecord
    arrival_s: float
    batch: int
    """Number of its batch; its own number where there are no batches."""

    @property
    def done_s(self) -> float:
        """The first token, on the link's clock."""
        return self.arrival_s + self.record.ttft_s


def totals(served: Sequence[Served]) -> dict[str, float]:
    """Figures over all requests."""
    ttft_s = [one.record.ttft_s for one in served]
    return {
        "requests": len(served),
        "ttft_mean_s": float(np.mean(ttft_s)),
        "ttft_p95_s": float(np.percentile(ttft_s, 95)),
        "all_done_s": max(one.done_s for one in served) - min(one.arrival_s for one in served),
        "violations": sum(not one.record.met for one in served) / len(served),
        "bytes": float(sum(one.record.bytes for one in served)),
        "distortion": float(np.mean([one.record.distortion for one in served])),
    }


# --- the paper's batches


def batches(arrivals_s: Sequence[float], window_s: float, max_batch: int) -> list[tuple[float, list[int]]]:
    """(when it closes, members) of each batch: it opens with its first request and closes after `window_s`, or as
    soon as it has `max_batch` members. Raises SpecError for a negative window and an empty batch.
    """
    if not window_s >= 0.0:
        raise SpecError(f"window is {window_s:g} s; give at least 0")
    if max_batch < 1:
        raise SpecError(f"max_batch is {max_batch}; give at least 1")
    found: list[tuple[float, list[int]]] = []
    for index in sorted(range(len(arrivals_s)), key=lambda i: arrivals_s[i]):
        arrival_s = arrivals_s[index]
        if found and len(found[-1][1]) < max_batch and arrival_s <= found[-1][0]:
            found[-1][1].append(index)
            if len(found[-1][1]) == max_batch:
                found[-1] = (arrival_s, found[-1][1])
        else:
            found.append((arrival_s + window_s if max_batch > 1 else arrival_s, [index]))
    return found


def simulate_batched(
    requests: Sequence[Request], goodput: Trace, *, window_s: float = 0.0, max_batch: int = 10, rtt_s: float = 0.0
) -> list[Served]:
    """Every request, in the order given. A batch has the link when the one before has been sent.

    Raises SessionFailed when the link carries nothing more, SpecError for impossible settings.
    """
    link, decoder_free_s = FluidLink(goodput, rtt_s), 0.0
    served: dict[int, Served] = {}
    for number, (close_s, members) in enumerate(batches([r.arrival_s for r in requests], window_s, max_batch)):
        batch = [Member(requests[i], rtt_s, len(members)) for i in members]
        for member in batch:
            request_s = max(close_s, link.free_at_s - rtt_s)
            _, member.free_s = link.transfer(request_s, len(member.request.manifest.wire))
        for index in range(max(member.n_chunks for member in batch)):
            present = [member for member in batch if index < member.n_chunks]
            for member in present:
                member.session.concurrent = len(present)
                # chosen so that the link does not wait for it
                now_s = max(member.free_s, link.free_at_s - link.rtt_s)
                fetch = member.choose(now_s)
                first_s, last_s = link.transfer(now_s, fetch.bytes, fetch.chunk)
                if last_s == math.inf:
                    raise SessionFailed("the link carries nothing more: the transfer never ends")
                member.on_arrived(first_s, last_s)
            decoder_free_s = max(decoder_free_s, max(member.free_s for member in present))
            for group, chunk, seconds in batch_steps(index, present):
                for member in group:
                    member.computed.append((chunk, decoder_free_s, decoder_free_s + seconds))
                decoder_free_s += seconds
        for i, member in zip(members, batch, strict=True):
            served[i] = Served(member.finish(), member.request.arrival_s, number)
    return [served[i] for i in range(len(requests))]


def batch_steps(index: int, present: Sequence[Member]) -> Iterator[tuple[list[Member], int, float]]:
    """What one machine computes for chunk `index` of a batch once all have arrived: (members, chunk, seconds) each.

    Encoded chunks together, then texts together, then the prompts of those that are complete (chunk PREFILL). Decoding
    and recomputing are bound by throughput: a padded batch takes the longest member's time once per member.
    The prefill of a short prompt is bound by reading the weights, which a batch reads once.
    """
    for kind in (Decode, Recompute):
        group = [member for member in present if member.kind(index) is kind]
        if group:
            yield group, index, len(group) * max(member.cost_s(index) for member in group)
    ending = [member for member in present if index == member.n_chunks - 1]
    if ending:
        yield ending, PREFILL, max(member.request.costs.prefill_s for member in ending)


class Member:
    """A request in a batch: its session, and what the link and the decoder did for it. Times are the link's."""

    def __init__(self, request: Request, rtt_s: float, members: int) -> None:
        self.request = request
        self.n_chunks = len(request.manifest.chunks)
        self.session = Session(
            request.manifest, request.policy, request.settings(1, members), request.costs, rtt_s=rtt_s
        )
        self.free_s = 0.0
        """When its last transfer arrived."""
        self.computed: deque[tuple[int, float, float]] = deque()
        """(chunk, start, end) of steps that were not reported to the session yet."""
        self._fetches: dict[int, Fetch] = {}
        self._newest: Fetch | None = None

    def choose(self, now_s: float) -> Fetch:
        """Let the policy choose the next chunk; nothing of this request may be in flight. Raises SpecError for a
        policy that picks another chunk."""
        work = self.session.poll(now_s - self.request.arrival_s)
        self._newest = next(one for one in work if isinstance(one, Fetch))
        if self._newest.chunk != len(self._fetches):
            name = type(self.request.policy).__name__
            raise SpecError(f"policy {name} reorders chunks; a batch goes by chunk index: serve it without batches")
        self._fetches[self._newest.chunk] = self._newest
        return self._newest

    def on_arrived(self, first_s: float, last_s: float) -> None:
        """The chunk chosen last has arrived."""
        assert self._newest is not None
        self.free_s = last_s
        self._report(last_s)
        self.session.on_first_byte(self._newest.chunk, first_s - self.request.arrival_s)
        self.session.on_last_byte(self._newest.chunk, last_s - self.request.arrival_s)

    def kind(self, chunk: int) -> type[Decode] | type[Recompute]:
        return Decode if isinstance(self._fetches[chunk].level, int) else Recompute

    def cost_s(self, chunk: int) -> float:
        level = self._fetches[chunk].level
        return _cost_s(self.request.costs, Decode(chunk, level) if isinstance(level, int) else Recompute(chunk))

    def finish(self) -> SessionRecord:
        """The outcome, once every chunk was fetched and computed."""
        self._report(math.inf)
        return self.session.record()

    def _report(self, until_s: float) -> None:
        """Report the steps that end by then; the session has a chunk in flight, or nothing left to fetch."""
        while self.computed and self.computed[0][2] <= until_s:
            chunk, start_s, end_s = self.computed.popleft()
            self.session.poll(start_s - self.request.arrival_s)  # it begins the step
            self.session.on_computed(chunk, start_s - self.request.arrival_s, end_s - self.request.arrival_s)


# --- independent requests


def simulate_shared(requests: Sequence[Request], goodput: Trace, *, depth: int = 2, rtt_s: float = 0.0) -> list[Served]:
    """Every request on its own connection, the link shared evenly, one decoder for all, first come first served.

    Needs a trace over time. Raises SessionFailed when the link carries nothing more.
    """
    return _Shared(requests, goodput, depth, rtt_s).run()


@dataclass(slots=True)
class _Flow:
    """An answer that is in flight or waits for the one before it on its connection."""

    chunk: int
    """PREFILL stands for the manifest."""
    bits: float
    begin_s: float
    done: float = 0.0
    seen: bool = False

    def next_mark(self) -> float:
        """Bits until a receiver sees something: the first frame, then the end."""
        frame = 8.0 * frame_bytes(int(self.bits / 8.0))
        return (frame if self.done < frame - LAST_BIT and frame < self.bits else self.bits) - self.done


@dataclass(slots=True)
class _Client:
    request: Request
    session: Session | None = None
    line: deque[_Flow] = field(default_factory=deque)


class _Shared:
    """The event loop over the link, compute and the sessions' wake-up times."""

    def __init__(self, requests: Sequence[Request], goodput: Trace, depth: int, rtt_s: float) -> None:
        self._goodput, self._depth, self._rtt_s = goodput, depth, rtt_s
        self._clients = [_Client(request) for request in requests]
        self._now_s = 0.0
        self._jobs: deque[tuple[_Client, Work]] = deque()
        self._running: tuple[_Client, Work, float] | None = None
        self._compute_end_s = math.inf

    def run(self) -> list[Served]:
        for client in self._clients:
            size = len(client.request.manifest.wire)
            client.line.append(_Flow(PREFILL, 8.0 * size, client.request.arrival_s + self._rtt_s))
        while not all(client.session and client.session.done for client in self._clients):
            self._advance(self._next_s())
        return [
            Served(client.session.record(), client.request.arrival_s, number)
            for number, client in enumerate(self._clients)
            if client.session
        ]

    def _active(self) -> list[tuple[_Client, _Flow]]:
        """The flows that have bytes on the link now: the first of each connection, once it has begun."""
        heads = [(client, client.line[0]) for client in self._clients if client.line]
        return [(client, flow) for client, flow in heads if flow.begin_s <= self._now_s]

    def _next_s(self) -> float:
        """When something happens next. Raises SessionFailed if nothing ever does."""
        active = self._active()
        times = [self._compute_end_s]
        times += [c.line[0].begin_s for c in self._clients if c.line and c.line[0].begin_s > self._now_s]
        if active:
            least = min(flow.next_mark() for _, flow in active)
            times.append(self._now_s + self._goodput.time_for(len(active) * max(least, 0.0), self._now_s))
        for client, flow in active:
            wake_s = client.session.wake_s() if client.session and flow.chunk != PREFILL else None
            if wake_s is not None:  # its estimate of the rest changes while it forgets an old rate
                wanted_s = client.request.arrival_s + wake_s
                times.append(max(min(wanted_s, self._now_s + RATE_WINDOW_S / 4), self._now_s + EPSILON_S))
        next_s = min(times)
        if next_s == math.inf:
            raise SessionFailed("the link carries nothing more: the transfer never ends")
        return next_s

    def _advance(self, then_s: float) -> None:
        """Carry bits until `then_s`, report to the sessions concerned, and start what can begin."""
        active = self._active()
        if active:
            share = (self._goodput.bits_by(then_s) - self._goodput.bits_by(self._now_s)) / len(active)
            for _, flow in active:
                flow.done += share
        self._now_s = then_s
        for client, flow in active:
            self._report(client, flow)
        if self._running is not None and self._compute_end_s <= then_s:
            client, work, start_s = self._running
            self._running, self._compute_end_s = None, math.inf
            assert client.session is not None
            arrival_s = client.request.arrival_s
            chunk = work.chunk if isinstance(work, Decode | Recompute) else PREFILL
            client.session.on_computed(chunk, start_s - arrival_s, then_s - arrival_s)
        for client in self._clients:
            if client.session is not None and not client.session.done:
                self._poll(client)
        if self._running is None and self._jobs:
            client, work = self._jobs.popleft()
            self._running = (client, work, self._now_s)
            self._compute_end_s = self._now_s + _cost_s(client.request.costs, work)

    def _report(self, client: _Client, flow: _Flow) -> None:
        request, now_s = client.request, self._now_s - client.request.arrival_s
        is_complete = flow.done >= flow.bits - LAST_BIT
        if flow.chunk == PREFILL:
            if is_complete:
                client.line.popleft()
                client.session = Session(
                    request.manifest, request.policy, request.settings(self._depth), request.costs, rtt_s=self._rtt_s
                )
            return
        assert client.session is not None
        if not flow.seen:
            client.session.on_first_byte(flow.chunk, flow.begin_s - request.arrival_s)
            flow.seen = True
        if is_complete:
            client.line.popleft()
            client.session.on_last_byte(flow.chunk, now_s)
            if client.line:
                client.line[0].begin_s = max(client.line[0].begin_s, self._now_s)
        else:
            client.session.on_bytes(flow.chunk, int(flow.done / 8.0), now_s)

    def _poll(self, client: _Client) -> None:
        assert client.session is not None
        for work in client.session.poll(self._now_s - client.request.arrival_s):
            if isinstance(work, Fetch):
                client.line.append(_Flow(work.chunk, 8.0 * work.bytes, self._now_s + self._rtt_s))
            elif isinstance(work, Decode | Recompute | Prefill):
                self._jobs.append((client, work))
            else:
                raise SpecError("policies that cancel transfers cannot be simulated on a shared link")


def _cost_s(costs: Costs, work: Any) -> float:
    if isinstance(work, Decode):
        return costs.decode_s[work.chunk][work.level]
    if isinstance(work, Recompute):
        assert costs.recompute_s is not None
        return costs.recompute_s[work.chunk]
    return costs.prefill_s
