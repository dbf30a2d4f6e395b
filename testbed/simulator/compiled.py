"""Sessions under built-in policies in a compiled loop: the results of `simulator.simulate`, some hundred times as fast.

Compiled are `fixed`, `lowest`, `highest`, `text`, `cachegen`, `cachegen+compute`, `throughput` (with the estimators of
ESTIMATORS), `buffer-based` and `kvstream`, at either depth, on warm connections. `Context.rule_of` says whether a
policy is one of them; all others take `simulate`. Needs numba (the extra [run]), which is imported with the first
session.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvstream.policies.api import TEXT, LevelOrText, Policy
from kvstream.policies.buffer_based import BufferBased
from kvstream.policies.cachegen import CacheGen, CacheGenCompute
from kvstream.policies.errors import PolicyError
from kvstream.policies.fixed import Fixed, Highest, Lowest, Text
from kvstream.policies.kvstream import KVStream
from kvstream.policies.measures import named_level
from kvstream.policies.throughput import Throughput
from kvstream.testbed.session.costs import Costs, Spread
from kvstream.testbed.session.record import ChunkRecord, SessionFailed, SessionRecord
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.simulator.noise import ComputeFactors
from kvstream.testbed.store.manifest import Manifest
from kvstream.traces.trace import Trace

Floats: TypeAlias = NDArray[np.float64]

ESTIMATORS: Final = {"last": 0, "arithmetic": 1, "harmonic": 2, "sliding-min": 3}
"""Of `throughput`: those that are compiled, by their numbers in `_rules`."""
_ENDS: Final = {"loop": 0, "hold": 1, "stop": 2}
_BUFFERS: Final = {"pace": 0, "slack": 1, "backlog": 2}
_FIXED, _CACHEGEN, _THROUGHPUT, _BUFFER, _KVSTREAM = range(5)
_REASONS: Final = {
    _FIXED: (),
    _CACHEGEN: ("left_s", "text_s", "expected_s", "rate_bps"),
    _THROUGHPUT: ("estimate_bps", "expected_s"),
    _BUFFER: ("buffer_s", "budget_bytes"),
    _KVSTREAM: ("estimate_bps", "spread", "texts", "in_time"),
}
"""What a choice shows, by kind of rule; the kernel leaves nan where it shows nothing."""
_EXACT: Final = 2**53
"""Larger products of two sizes are rounded by the compiled loop and not by Python."""


@dataclass(frozen=True)
class Rule:
    """A policy with its settings, in the order in which the kernel takes them."""

    kind: int
    level: int = 0
    """Of every chunk, or of the first one."""
    told: bool = False
    """Algorithm 1 knows decoding and prefill."""
    reserve_s: float = 0.0
    """Of Algorithm 1; `margin_s` of `kvstream`."""
    margin: float = 0.0
    estimator: int = 0
    window: int = 1
    safety: float = 1.0
    buffer: int = 0
    reservoir: float = 0.0
    cushion: float = 1.0
    target: float = 0.95
    memory: float = 0.6
    spread: float = 0.9


class Context:
    """A context as the kernel takes it: what a manifest offers, and what computing with it costs."""

    def __init__(self, manifest: Manifest, costs: Costs) -> None:
        self.manifest = manifest
        chunks, spreads = manifest.chunks, costs.spreads
        sizes = np.array([chunk.sizes_bytes for chunk in chunks], dtype=np.int64)
        text_bytes = np.array([chunk.text_bytes for chunk in chunks], dtype=np.int64)
        self.can_recompute = costs.recompute_s is not None
        recompute_s = np.array(costs.recompute_s or np.zeros(len(chunks)), dtype=float)
        largest = int(max(sizes.max(), text_bytes.max()))
        self.is_exact = min(sizes.min(), text_bytes.min()) >= 1 and largest**2 < _EXACT and sizes.sum() < _EXACT
        lowest_bytes, left = int(sizes[:, 0].sum()), np.ascontiguousarray(sizes[::-1].cumsum(axis=0)[::-1])
        decode_s = np.array(costs.decode_s, dtype=float)
        self.tables = (sizes, text_bytes, decode_s, recompute_s, self.can_recompute, lowest_bytes)
        of_spreads = (_spread(spreads.decode), _spread(spreads.recompute), _spread(spreads.prefill))
        self.costs = (float(costs.prefill_s), *of_spreads, left)

    def rule_of(self, policy: Policy) -> Rule | None:
        """The policy as a compiled rule for this context; None if it has to be asked in Python."""
        try:
            rule = as_rule(policy, len(self.manifest.levels), can_recompute=self.can_recompute)
        except PolicyError:  # the session tells
            return None
        return rule if self.is_exact else None


def as_rule(policy: Policy, n_levels: int, *, can_recompute: bool) -> Rule | None:
    """A policy as a compiled rule; None if it is not one. Raises PolicyError for a level that there is not."""
    kind = type(policy)
    if isinstance(policy, Fixed) and kind is Fixed:
        return Rule(_FIXED, named_level(policy.level, n_levels))
    if kind is Lowest:
        return Rule(_FIXED, 0)
    if kind is Highest:
        return Rule(_FIXED, n_levels - 1)
    if kind is Text:
        return Rule(_FIXED, -1 if can_recompute else 0)
    if isinstance(policy, CacheGen) and kind in (CacheGen, CacheGenCompute):
        first, told = named_level(policy.first, n_levels), isinstance(policy, CacheGenCompute)
        margin = float(policy.margin) if isinstance(policy, CacheGenCompute) else 0.0
        return Rule(_CACHEGEN, first, told, float(policy.reserve_s), margin)
    if isinstance(policy, Throughput) and kind is Throughput:
        if policy.estimator not in ESTIMATORS or policy.window < 1:
            return None
        first, estimator = named_level(policy.first, n_levels), ESTIMATORS[policy.estimator]
        return Rule(_THROUGHPUT, first, estimator=estimator, window=policy.window, safety=float(policy.safety))
    if isinstance(policy, BufferBased) and kind is BufferBased:
        buffer, reservoir, cushion = _BUFFERS[policy.buffer], float(policy.reservoir), float(policy.cushion)
        return Rule(_BUFFER, buffer=buffer, reservoir=reservoir, cushion=cushion)
    if isinstance(policy, KVStream) and kind is KVStream:
        target, memory, spread = float(policy.target), float(policy.memory), float(policy.spread)
        return Rule(_KVSTREAM, reserve_s=float(policy.margin_s), target=target, memory=memory, spread=spread)
    return None


@dataclass(frozen=True, eq=False)
class Sessions:
    """The outcome of many sessions under one policy; -1 stands for text."""

    manifest: Manifest
    rule: Rule
    deadlines_s: Floats
    """[session]."""
    ttft_s: Floats
    """[session]; inf where the link carries nothing more."""
    levels: NDArray[np.int8]
    """[session, chunk]."""
    times_s: Floats
    """[session, chunk, 5]: request, first byte, last byte, start and end of decoding; one session if not asked for."""
    reasons: Floats
    """[session, chunk, 4], likewise."""

    @property
    def met(self) -> NDArray[np.bool_]:
        """[session]: whether the first token was in time."""
        return self.ttft_s <= self.deadlines_s

    @property
    def distortion(self) -> Floats:
        """[session], nats: as `Manifest.distortion`."""
        tokens = np.array([chunk.tokens for chunk in self.manifest.chunks], dtype=float)
        ladder = np.array([*(level.distortion for level in self.manifest.levels), 0.0])
        found: Floats = ladder[self.levels] @ tokens / self.manifest.tokens
        return found

    def record(self, session: int) -> SessionRecord:
        """One session as `simulate` records it. Raises SessionFailed where that does."""
        if self.ttft_s[session] == math.inf:
            raise SessionFailed("the link carries nothing more: the transfer never ends")
        levels: tuple[LevelOrText, ...] = tuple(TEXT if level < 0 else level for level in self.levels[session].tolist())
        names, chunks = _REASONS[self.rule.kind], []
        rows = zip(levels, self.times_s[session].tolist(), self.reasons[session].tolist(), strict=True)
        for number, (level, (request_s, first_s, last_s, start_s, end_s), why) in enumerate(rows):
            info = self.manifest.chunks[number]
            size = info.text_bytes if level == TEXT else info.sizes_bytes[int(level)]
            reason = {name: value for name, value in zip(names, why, strict=False) if value == value}
            chunks.append(
                ChunkRecord(
                    number, level, size, request_s, first_s, last_s, start_s, end_s, reason, None, 1, size, ()
                )
            )  # fmt: skip
        return SessionRecord(
            ttft_s=float(self.ttft_s[session]),
            deadline_s=float(self.deadlines_s[session]),
            distortion=self.manifest.distortion(levels),
            levels=levels,
            bytes=sum(chunk.bytes for chunk in chunks),
            wasted_bytes=0,
            policy_faults=0,
            chunks=tuple(chunks),
        )


def simulate_many(
    context: Context,
    rule: Rule,
    goodputs: Sequence[Trace],
    settings: SessionSettings,
    *,
    factors: ComputeFactors | None = None,
    which: NDArray[np.int64] | None = None,
    deadlines_s: Floats | None = None,
    priors_bps: Floats | None = None,
    rtts_s: Floats | float = 0.0,
    manifest_bytes: int | None = None,
    chunks: bool = True,
) -> Sessions:
    """A session on each of `goodputs`, or, with `which` [session], on the one of that number.

    `deadlines_s`, `priors_bps` and `rtts_s` ([session], nan or 0 for no prior) take the place of what `settings` say.
    `factors` [session, ...] are what steps take over their estimates (`noise.draw`). Without `chunks`, times and
    reasons are not kept. Otherwise as `simulator.simulate`.
    """
    from kvstream.testbed.simulator import _kernel, _rules

    which = np.arange(len(goodputs)) if which is None else which
    n, n_chunks = len(which), len(context.manifest.chunks)
    prior_bps = math.nan if settings.prior_bps is None else settings.prior_bps
    deadlines_s = np.full(n, settings.deadline_s) if deadlines_s is None else deadlines_s
    kept = n if chunks else 1
    found = Sessions(
        context.manifest,
        rule,
        deadlines_s,
        np.empty(n),
        np.empty((n, n_chunks), np.int8),
        np.empty((kept, n_chunks, 5)),
        np.empty((kept, n_chunks, _rules.N_REASONS)),
    )
    one = ComputeFactors(np.ones((1, n_chunks)), np.ones((1, n_chunks)), np.ones(1)) if factors is None else factors
    _kernel.sessions(
        tuple(vars(rule).values()),
        context.tables,
        context.costs,
        joined(goodputs),
        np.ascontiguousarray(which, dtype=np.int64),
        (
            settings.depth,
            settings.overlap,
            settings.concurrent,
            np.full(n, rtts_s, dtype=float),
            len(context.manifest.wire) if manifest_bytes is None else manifest_bytes,
        ),
        deadlines_s,
        np.full(n, prior_bps) if priors_bps is None else np.where(priors_bps > 0.0, priors_bps, math.nan),
        (one.decode, one.recompute, one.prefill),
        (found.ttft_s, found.levels, found.times_s, found.reasons),
    )
    return found


def _spread(spread: Spread) -> tuple[float, float, float, float]:
    """(shared, own variance that one learns with, weight of one step, own), as `ComputeEstimates.learn` has them."""
    own = max(spread.own, 0.01) ** 2
    return float(spread.shared), own, spread.shared**2 / own, float(spread.own)


def joined(traces: Sequence[Trace]) -> tuple[Any, ...]:
    """Traces end to end: (edges, bits, rates, first row of each and the end, ends, per_chunk)."""
    firsts = np.concatenate(([0], np.cumsum([len(trace) for trace in traces]))).astype(np.int64)
    edges, bits = (
        np.concatenate([_padded(getattr(trace, name), len(trace)) for trace in traces]) for name in ("_edges", "_bits")
    )
    rates = np.concatenate([trace.rates_bps for trace in traces])
    ends = np.array([_ENDS[trace.end] for trace in traces], dtype=np.int64)
    return edges, bits, rates, firsts, ends, np.array([trace.per == "chunk" for trace in traces])


def _padded(sums: Sequence[float], rows: int) -> Floats:
    """A value per row and one more; a trace per chunk has no sums."""
    return np.array(sums, dtype=float) if len(sums) == rows + 1 else np.zeros(rows + 1)
