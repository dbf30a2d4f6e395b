"""Several requests that share one link and one decoder, in virtual time: batched as in the paper, or each for itself.

`simulate_batched` is CacheGen's way (SIGCOMM 2024, section 5.3): requests that arrive within a window form a batch of
at most so many, and the batch is streamed by chunk index: chunk 0 of each, then chunk 1 of each. For index i the N_c
requests that have a chunk i count on N_c times the delay of one (`Observation.concurrent`), and these chunks are
decoded together, padded to the longest. `simulate_shared` lets every request have a connection of its own: the link is
shared evenly among those with bytes to send, as by equal TCP flows, and the decoder serves in order of arrival.

Times of a record count from its request's arrival, waiting for the batch included.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from policies.api import Policy
from testbed.errors import SpecError
from testbed.manifest import Manifest
from testbed.session import (
    PREFILL,
    RATE_WINDOW_S,
    Costs,
    Decode,
    Fetch,
    Prefill,
    Recompute,
    Session,
    SessionFailed,
    SessionRecord,
    Work,
)
from traces.fluid import FluidLink, frame_bytes
from traces.trace import Trace

EPSILON_S: Final = 1e-6
"""Time moves on by at least this between two looks at a transfer."""
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


@dataclass(frozen=True)
class Served:
    """A request's outcome."""

    record: SessionRecord
    arrival_s: float
    batch: int
    """Which batch it was in; its own number where there are none."""

    @property
    def done_s(self) -> float:
        """The first token, on the link's clock."""
        return self.arrival_s + self.record.ttft_s


def totals(served: Sequence[Served]) -> dict[str, float]:
    """What all requests together took."""
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


def batches(arrivals_s: Sequence[float], window_s: float, most: int) -> list[tuple[float, list[int]]]:
    """(when it closes, members) of each batch: it opens with its first request and closes after `window_s`, or as
    soon as it has `most` members. Raises SpecError for a window or a cap that cannot be.
    """
    if not window_s >= 0.0:
        raise SpecError(f"window is {window_s:g} s; give at least 0")
    if most < 1:
        raise SpecError(f"a batch has at most {most} requests; give at least 1")
    found: list[tuple[float, list[int]]] = []
    for index in sorted(range(len(arrivals_s)), key=lambda i: arrivals_s[i]):
        arrival_s = arrivals_s[index]
        if found and len(found[-1][1]) < most and arrival_s <= found[-1][0]:
            found[-1][1].append(index)
            if len(found[-1][1]) == most:
                found[-1] = (arrival_s, found[-1][1])
        else:
            found.append((arrival_s + window_s if most > 1 else arrival_s, [index]))
    return found


def simulate_batched(
    requests: Sequence[Request], goodput: Trace, *, window_s: float = 0.0, most: int = 10, rtt_s: float = 0.0
) -> list[Served]:
    """Every request, in the order given. A batch has the link when the one before has been sent.

    Raises SessionFailed when the link carries nothing more, SpecError for settings that cannot be.
    """
    link, decoder = FluidLink(goodput, rtt_s), _Decoder()
    served: dict[int, Served] = {}
    for number, (close_s, members) in enumerate(batches([r.arrival_s for r in requests], window_s, most)):
        batch = [_Member(requests[i], rtt_s, len(members)) for i in members]
        for member in batch:
            request_s = max(close_s, link.free_at_s - rtt_s)
            _, member.free_s = link.transfer(request_s, len(member.request.manifest.wire))
        for index in range(max(len(member.request.manifest.chunks) for member in batch)):
            present = [member for member in batch if index < len(member.request.manifest.chunks)]
            for member in present:
                member.session.concurrent = len(present)
                member.fetch(link)
            decoder.run(index, present)
        for i, member in zip(members, batch, strict=True):
            served[i] = Served(member.finish(), member.request.arrival_s, number)
    return [served[i] for i in range(len(requests))]


class _Decoder:
    """One machine that computes for a batch: an index's chunks together, texts after encoded ones."""

    def __init__(self) -> None:
        self._free_s = 0.0

    def run(self, index: int, present: Sequence[_Member]) -> None:
        """Decode or recompute chunk `index` of all, when all have arrived; then the prompts of those it completes.

        Decoding and recomputing are bound by throughput: a padded batch takes as often the longest member's time as it
        has members. The prefill of a short prompt is bound by reading the weights, which a batch reads once.
        """
        start_s = max(self._free_s, max(member.free_s for member in present))
        for kind in (Decode, Recompute):
            group = [(member, member.cost_s(index)) for member in present if member.kind(index) is kind]
            if group:
                end_s = start_s + len(group) * max(cost_s for _, cost_s in group)
                for member, _ in group:
                    member.computed.append((index, start_s, end_s))
                start_s = end_s
        ending = [member for member in present if index == len(member.request.manifest.chunks) - 1]
        if ending:
            end_s = start_s + max(member.request.costs.prefill_s for member in ending)
            for member in ending:
                member.computed.append((PREFILL, start_s, end_s))
            start_s = end_s
        self._free_s = start_s


class _Member:
    """A request in a batch: its session, told what the link and the decoder did for it."""

    def __init__(self, request: Request, rtt_s: float, members: int) -> None:
        self.request = request
        self.session = Session(
            request.manifest, request.policy, request.deadline_s, 1, request.costs,
            rtt_s=rtt_s, concurrent=members, seed=request.seed,
        )  # fmt: skip
        self.free_s = 0.0
        """When its last transfer arrived."""
        self.computed: deque[tuple[int, float, float]] = deque()
        """Steps with their begin and end that the session has not been told of."""
        self._fetches: dict[int, Fetch] = {}

    def fetch(self, link: FluidLink) -> None:
        """Choose and transfer the next chunk: the choice is made so that the link does not wait for it."""
        now_s = max(self.free_s, link.free_at_s - link.rtt_s)
        work = self.session.poll(now_s - self.request.arrival_s)
        fetch = next(one for one in work if isinstance(one, Fetch))
        self._fetches[fetch.chunk] = fetch
        first_s, self.free_s = link.transfer(now_s, fetch.bytes, fetch.chunk)
        if self.free_s == math.inf:
            raise SessionFailed("the link carries nothing more: the transfer never ends")
        self._tell(self.free_s)
        self.session.on_first_byte(fetch.chunk, first_s - self.request.arrival_s)
        self.session.on_last_byte(fetch.chunk, self.free_s - self.request.arrival_s)

    def kind(self, chunk: int) -> type[Decode] | type[Recompute]:
        return Decode if isinstance(self._fetches[chunk].level, int) else Recompute

    def cost_s(self, chunk: int) -> float:
        level = self._fetches[chunk].level
        return _cost_s(self.request.costs, Decode(chunk, level) if isinstance(level, int) else Recompute(chunk))

    def finish(self) -> SessionRecord:
        """The outcome, once every chunk was fetched and computed."""
        self._tell(math.inf)
        return self.session.record()

    def _tell(self, until_s: float) -> None:
        """Tell the session of the steps that end until then; it has something in flight, or nothing left to fetch."""
        while self.computed and self.computed[0][2] <= until_s:
            chunk, start_s, end_s = self.computed.popleft()
            self.session.poll(start_s - self.request.arrival_s)  # it begins the step
            self.session.on_computed(chunk, start_s - self.request.arrival_s, end_s - self.request.arrival_s)


# --- each for itself


def simulate_shared(requests: Sequence[Request], goodput: Trace, *, depth: int = 2, rtt_s: float = 0.0) -> list[Served]:
    """Every request on a connection of its own, the link shared evenly, one decoder for all, first come first served.

    Needs a trace over time. Raises SessionFailed when the link carries nothing more.
    """
    return _Shared(requests, goodput, depth, rtt_s).run()


@dataclass(slots=True)
class _Flow:
    """An answer that is on its way or waits for the one before on its connection."""

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
    """The event loop over links, compute and the sessions' own wishes to be asked."""

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
        """Carry bits until `then_s`, tell whom it concerns, and start what can begin."""
        active = self._active()
        if active:
            share = (self._goodput.bits_by(then_s) - self._goodput.bits_by(self._now_s)) / len(active)
            for _, flow in active:
                flow.done += share
        self._now_s = then_s
        for client, flow in active:
            self._tell(client, flow)
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

    def _tell(self, client: _Client, flow: _Flow) -> None:
        request, now_s = client.request, self._now_s - client.request.arrival_s
        is_complete = flow.done >= flow.bits - LAST_BIT
        if flow.chunk == PREFILL:
            if is_complete:
                client.line.popleft()
                client.session = Session(
                    request.manifest, request.policy, request.deadline_s, self._depth, request.costs,
                    rtt_s=self._rtt_s, seed=request.seed,
                )  # fmt: skip
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
                raise SpecError("policies that cancel transfers are not simulated with shared links")


def _cost_s(costs: Costs, work: Any) -> float:
    if isinstance(work, Decode):
        return costs.decode_s[work.chunk][work.level]
    if isinstance(work, Recompute):
        assert costs.recompute_s is not None
        return costs.recompute_s[work.chunk]
    return costs.prefill_s
