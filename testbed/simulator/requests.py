"""Many requests in time, in virtual time: which come when, who serves them, from which caches, over which links.

A request waits until a receiver has a free slot, in the order of `orders`. It goes to the receiver that holds most of
its prompt's beginning. What the store holds beyond that is streamed, chunk by chunk, at the levels that the request's
policy chooses, or recomputed; the rest is computed (prefill), and the first token is out. The prompt's full blocks are
then cached at that receiver and in the store; the caches keep what was used last.

Links carry their flows in equal shares, as equal TCP flows do. A receiver computes one step at a time, in the order in
which its requests have them ready. Output tokens take no time here: prefill and decoding are on different machines, as
in DistServe (OSDI 2024) and Mooncake (FAST 2025), and what fills the store takes no time of the links.

The event loop is compiled (`_requests_loop`), and so are the policies that `compiled` knows. Other
policies are asked in Python, from the same observations. Needs numba (the extra [run]).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from kvstream.policies.api import TEXT, Policy
from kvstream.testbed.errors import SpecError
from kvstream.testbed.session.ask import check_choice
from kvstream.testbed.simulator.compiled import Rule, as_rule, joined
from kvstream.testbed.simulator.observing import observe
from kvstream.testbed.simulator.orders import AnyOrder, Fcfs, Shortest, Waiting
from kvstream.testbed.workloads import synthetic
from kvstream.testbed.workloads.request_trace import BLOCK_TOKENS, RequestTrace
from kvstream.testbed.workloads.synthetic import Workload
from kvstream.traces.trace import Trace

Floats = NDArray[np.float64]
MAX_CELLS: Final = 200_000_000
"""Receivers times blocks of a workload, 4 bytes each."""
MAX_CHUNKS: Final = 5_000_000
"""Slots times chunks of a request, some 300 bytes each."""
MAX_RECEIVERS: Final = 1024


@dataclass(frozen=True)
class Fleet:
    """The receivers: engines with a cache each, in front of one store."""

    receivers: int = 8
    slots: int = 2
    """Requests that a receiver serves at once: while one is computed, another's cache is fetched."""
    link: Literal["shared", "own"] = "shared"
    """`own`: the link of the trace for each receiver."""
    cache: int = 200_000
    """Tokens that each receiver's own cache holds."""
    store: int | None = None
    """Tokens that the store holds; none: any number."""
    chunk: int = 3 * BLOCK_TOKENS
    """Tokens of a chunk: a multiple of 512."""

    def __post_init__(self) -> None:
        if not 1 <= self.receivers <= MAX_RECEIVERS or not 1 <= self.slots <= MAX_RECEIVERS:
            raise SpecError(f"fleet: receivers={self.receivers}, slots={self.slots}; give 1 to {MAX_RECEIVERS} of each")
        if self.cache < 0 or (self.store is not None and self.store < 0):
            raise SpecError("fleet: cache and store must be 0 tokens or more")
        if self.chunk < BLOCK_TOKENS or self.chunk % BLOCK_TOKENS or self.chunk > synthetic.MAX_TOKENS:
            raise SpecError(f"fleet: chunk={self.chunk}; give a multiple of {BLOCK_TOKENS} tokens")


@dataclass(frozen=True)
class Serving:
    """How requests are served: all but their arrivals."""

    workload: Workload
    codec: str
    policy: Callable[[], Policy]
    """Makes a fresh one for each request."""
    goodput: Trace
    """Of each link, application bits per second over the time of the workload."""
    deadline_s: float
    depth: int = 2
    rtt_s: float = 0.0
    fleet: Fleet = Fleet()
    order: AnyOrder = field(default_factory=Fcfs)

    def __post_init__(self) -> None:
        if not self.deadline_s > 0.0:
            raise SpecError(f"deadline is {self.deadline_s:g} s; give a time above 0")
        if self.goodput.per == "chunk":
            raise SpecError(f"trace {self.goodput.name} has a rate for each chunk; requests share a link over time")
        policy = self.policy()
        if getattr(policy, "clairvoyant", False) or hasattr(policy, "progress"):
            raise SpecError(f"policy {type(policy).__name__} sees the future or cancels transfers, which cannot be "
                            "simulated where requests share a link")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of the requests; arrays run over them, in the order of arrival."""

    arrivals_s: Floats
    tokens: NDArray[np.int64]
    begin_s: Floats
    """When a receiver took it; 0 where none did."""
    ttft_s: Floats
    """From its arrival, waiting included; inf for one turned away, or left behind by a link that carries nothing."""
    deadline_s: float
    receiver: NDArray[np.int64]
    cached_tokens: NDArray[np.int64]
    """Held by the receiver itself."""
    stored_tokens: NDArray[np.int64]
    """Streamed, or recomputed chunk by chunk."""
    bytes: NDArray[np.int64]
    """Of its chunks."""
    loss: Floats
    """Distortion (nats) times tokens of the chunks that were streamed."""
    turned_away: NDArray[np.bool_]
    delivered_bits: Floats
    """[link], manifests included."""
    capacity_bits: float
    """What one link could have carried from the first arrival to the last first token."""
    busy_s: Floats
    """[receiver]."""
    span_s: float
    policy_faults: int = 0
    """Choices that a policy failed to make; the smallest level took their place."""

    @property
    def met(self) -> NDArray[np.bool_]:
        """[request]: whether its first token was in time."""
        return self.ttft_s <= self.deadline_s

    @property
    def distortion(self) -> float:
        """Mean over the tokens that came from the store, nats; 0 without any."""
        return float(self.loss.sum() / max(self.stored_tokens.sum(), 1))

    @property
    def link_utilisation(self) -> float:
        return float(self.delivered_bits.mean() / self.capacity_bits) if self.capacity_bits > 0.0 else 0.0

    @property
    def compute_utilisation(self) -> float:
        return float(self.busy_s.mean() / self.span_s) if self.span_s > 0.0 else 0.0


def simulate(trace: RequestTrace, arrivals_s: Floats, serving: Serving) -> Outcome:
    """Serve all requests of `trace`, which arrive at `arrivals_s` (never falling). Raises SpecError."""
    return _Run(trace, arrivals_s, serving).run()


class _Run:
    """The arrays of the compiled loop, and the answers to what it asks."""

    def __init__(self, trace: RequestTrace, arrivals_s: Floats, serving: Serving) -> None:
        from kvstream.testbed.simulator import _requests_loop as loop

        self.loop, self.trace, self.serving = loop, trace, serving
        fleet, n = serving.fleet, len(trace)
        self.arrivals_s = np.ascontiguousarray(arrivals_s, dtype=float)
        reusable = np.minimum(np.diff(trace.firsts), (trace.tokens - 1) // BLOCK_TOKENS)
        self.most = max(1, -(-int(reusable.max()) * BLOCK_TOKENS // fleet.chunk))
        n_slots = fleet.receivers * fleet.slots
        if (fleet.receivers + 1) * trace.n_blocks > MAX_CELLS or n_slots * self.most > MAX_CHUNKS:
            raise SpecError(
                f"{fleet.receivers} receivers, {fleet.slots} slots each, {trace.n_blocks} blocks, {self.most} chunks "
                "per request are too many; take fewer requests or receivers"
            )
        self.costs = _costs(serving, self.most)
        n_levels = self.costs[0].shape[1]
        n_links = 1 if fleet.link == "shared" else fleet.receivers
        shape = (n_slots, self.most)
        self.slots, self.chunks = _records(n_slots, loop.SLOT), _records(shape, loop.CHUNK)
        self.slots["request"] = loop.NONE
        self.transfers = _records(shape, loop.TRANSFER)
        self.links, self.engines = _records(n_links, loop.LINK), _records(fleet.receivers, loop.ENGINE)
        self.links["due_s"] = math.inf
        self.engines["slot"], self.engines["end_s"] = loop.NONE, math.inf
        self.outcomes = _records(n, loop.OUTCOME)
        self.tables = (
            np.zeros((*shape, n_levels), np.int64),
            np.zeros(shape, np.int64),
            np.zeros((*shape, n_levels)),
            np.zeros(shape),
            np.zeros((*shape, n_levels), np.int64),
            np.zeros(shape, np.int64),
        )
        caches = (
            np.zeros((fleet.receivers + 1, trace.n_blocks), np.int32),
            np.zeros(fleet.receivers + 1, np.int64),
            np.array([fleet.cache // BLOCK_TOKENS] * fleet.receivers + [_blocks_of(fleet.store)]),
            np.full(fleet.receivers + 1, loop.NONE),
            np.full(fleet.receivers + 1, loop.NONE),
            np.zeros((2 * len(trace.blocks) + 1, 3), np.int32),
        )
        self.keys, self.keyed, self.verdicts = np.zeros(n), np.zeros(n, np.int8), np.zeros(n, np.int8)
        self.clock, self.counters = np.zeros(1), np.zeros(6, np.int64)
        self.counters[loop.LEFT] = n
        rates, points = np.zeros((n_slots, 8)), np.zeros((n_slots, loop.N_POINTS, 2))
        self.caches = caches
        queue = self.keys, np.zeros(n + 1, np.int64), self.keyed, self.verdicts
        self.state = (
            self.slots, self.chunks, self.transfers, rates, points, self.links, self.engines, caches, queue,
            self.outcomes, self.clock, self.counters,
        )  # fmt: skip
        self.policies: dict[int, tuple[int, Policy]] = {}
        self.faults = 0

    def run(self) -> Outcome:
        loop, serving = self.loop, self.serving
        rule = _rule(serving, len(self.costs[1]))
        arguments = (
            self.state, (self.arrivals_s, self.trace.tokens, self.trace.firsts, self.trace.blocks), self.tables,
            rule, _model(serving.workload), self.costs, _setting(serving), _link_of(serving.goodput),
        )  # fmt: skip
        while True:
            why, which = loop.advance(*arguments)
            if why == loop.FINISHED:
                return self._outcome()
            if why == loop.CHOOSE:
                self._choose(which)
            elif why == loop.KEY:
                order = serving.order
                assert not isinstance(order, Fcfs | Shortest)
                self.keys[which], self.keyed[which] = float(order.key(self._waiting(which))), 1
            else:
                admitted = serving.order.admit(self._waiting(which), float(self.clock[0]))  # type: ignore[union-attr, operator]
                self.verdicts[which] = 1 if admitted else 2

    def _outcome(self) -> Outcome:
        found, loop = self.outcomes, self.loop
        served = found["state"] == loop.SERVED
        ttft_s = np.where(served, found["done_s"] - self.arrivals_s, math.inf)
        first_s = float(self.arrivals_s[0])
        last_s = float(found["done_s"].max()) if served.any() else float(self.clock[0])
        return Outcome(
            arrivals_s=self.arrivals_s,
            tokens=self.trace.tokens,
            begin_s=found["begin_s"].copy(),
            ttft_s=ttft_s,
            deadline_s=self.serving.deadline_s,
            receiver=found["engine"].copy(),
            cached_tokens=found["cached"].copy(),
            stored_tokens=found["stored"].copy(),
            bytes=found["bytes"].copy(),
            loss=found["loss"].copy(),
            turned_away=found["state"] == loop.TURNED_AWAY,
            delivered_bits=self.links["delivered_bits"].copy(),
            capacity_bits=self.serving.goodput.bits_by(last_s) - self.serving.goodput.bits_by(first_s),
            busy_s=self.engines["busy_s"].copy(),
            span_s=last_s - first_s,
            policy_faults=self.faults,
        )

    def _waiting(self, request: int) -> Waiting:
        trace, loop = self.trace, self.loop
        tokens = int(trace.tokens[request])
        mine = trace.blocks[trace.firsts[request] : trace.firsts[request + 1]][: (tokens - 1) // BLOCK_TOKENS]
        held = self.caches[0][-1, mine] > 0
        stored = BLOCK_TOKENS * (len(mine) if held.all() else int(held.argmin()))
        prefill_s = loop.forward_s(_model(self.serving.workload), stored, tokens)
        return Waiting(
            request, float(self.arrivals_s[request]), self.serving.deadline_s, tokens, stored, float(prefill_s)
        )

    def _choose(self, s: int) -> None:
        """Ask the policy of the request in slot `s`, in Python. One that raises or answers nonsense gets the smallest
        level, as in `Session`."""
        now_s, serving = float(self.clock[0]), self.serving
        request = int(self.slots[s]["request"])
        if s not in self.policies or self.policies[s][0] != request:
            self.policies[s] = (request, serving.policy())
        ladder = tuple(self.costs[1].tolist())
        observation = observe(self.state, self.tables, ladder, s, now_s, serving.deadline_s, serving.rtt_s)
        try:
            level, chunk = check_choice(self.policies[s][1].choose(observation), observation)
        except Exception:  # a policy may raise anything
            self.faults += 1
            level, chunk = 0, observation.chunk
        number = self.loop.TEXT if level == TEXT else int(level)
        self.loop.answer(self.state, self.tables, s, chunk, number, now_s, serving.rtt_s)


# --- what the loop takes


def _records(shape: int | tuple[int, int], kind: np.dtype[Any]) -> Any:
    """Zeros, with fields as attributes, as compiled code takes them: so it runs uncompiled, too."""
    return np.zeros(shape, kind).view(np.recarray)


def _blocks_of(tokens: int | None) -> int:
    return np.iinfo(np.int64).max if tokens is None else tokens // BLOCK_TOKENS


def _rule(serving: Serving, n_levels: int) -> tuple[float, ...]:
    """The policy as the loop takes it."""
    from kvstream.testbed.simulator import _requests_loop as loop

    rule = as_rule(serving.policy(), n_levels, can_recompute=True) or Rule(loop.PYTHON)
    return tuple(vars(rule).values())


def _costs(serving: Serving, most: int) -> tuple[NDArray[np.int64], Floats, NDArray[np.int64]]:
    """(bytes by number of blocks and level, distortion of each level, bytes of a manifest by number of chunks)."""
    workload, chunk = serving.workload, serving.fleet.chunk
    ladder, elements = workload.ladder(serving.codec), workload.kv.elements_per_token
    sizes = [
        [round(n * BLOCK_TOKENS * elements * rung.bits_per_element / 8.0) for rung in ladder]
        for n in range(chunk // BLOCK_TOKENS + 1)
    ]
    manifest = workload.manifest(str(min(most * chunk, synthetic.MAX_TOKENS)), serving.codec, chunk)
    empty = len(replace(manifest, chunks=()).wire)
    lengths = [len(json.dumps([c.start, c.stop, c.text_bytes, c.sizes_bytes], separators=(",", ":"))) + 1
               for c in manifest.chunks]  # fmt: skip
    manifest_bytes = np.concatenate(([empty], empty - 1 + np.cumsum(lengths)))
    return np.array(sizes, np.int64), np.array([rung.distortion for rung in ladder]), manifest_bytes.astype(np.int64)


def _model(workload: Workload) -> tuple[float, ...]:
    """What `Workload.forward_s` computes with."""
    kv = workload.kv
    numbers = (
        workload.parameters, 4.0 * kv.layers * workload.hidden, synthetic.ELEMENT_BYTES, kv.elements_per_token,
        workload.flops, workload.memory_bytes_per_s,
    )  # fmt: skip
    return tuple(map(float, numbers))


def _setting(serving: Serving) -> tuple[float | int, ...]:
    from kvstream.testbed.simulator import _requests_loop as loop

    workload, fleet, order = serving.workload, serving.fleet, serving.order
    if isinstance(order, Fcfs | Shortest):
        which = loop.FCFS if isinstance(order, Fcfs) else loop.SHORTEST
        admission = loop.FEASIBLE if order.admit == "feasible" else loop.ALL
    else:
        which, admission = loop.ASK, loop.ASK if hasattr(order, "admit") else loop.ALL
    decode = synthetic.decode_bytes_per_s(serving.codec, workload.compute)
    decode_s = synthetic.ELEMENT_BYTES * workload.kv.elements_per_token / (workload.gpus * decode)
    return (
        float(serving.deadline_s), float(serving.rtt_s), serving.depth, which, admission, fleet.chunk, fleet.slots,
        fleet.link == "shared", synthetic.TEXT_BYTES_PER_TOKEN, decode_s,
    )  # fmt: skip


def _link_of(goodput: Trace) -> tuple[Any, ...]:
    edges, bits, rates, _, ends, _ = joined([goodput])
    return edges, bits, rates, int(ends[0]), False
