"""The least distortion with which a transfer can meet a deadline, exactly, on a link whose future is known.

A transfer is a flow line of two machines: the link carries the chunks in order, then the receiver decodes or recomputes
them in order, then comes prefill. Chunk k with option o (a level, or text) ends its transfer at e_k, and its compute
ends at f_k = max(e_k, f_{k-1}) + c_ko; the first token comes at f_K + prefill. After a prefix of chunks only three
numbers matter: when the next answer can begin, when the compute machine is free, and the distortion so far; less of
each is never worse, because bytes that start earlier never end later. So a forward dynamic programme over chunks that
keeps undominated triples is exact. Two things make it fast: states that cannot reach the deadline, or cannot beat a
plan already known, are dropped, by a Lagrangian bound on what the rest can still achieve with the bytes and the
compute time left (weak duality, so the bound never errs); and all states of a stage are handled as arrays.

Order: chunks go out in order. Policies that reorder them (`cake`, `kvstream`) play another game and may in corner cases
win it. Slow start is left out, so with it the result is a bound that may be out of reach, never one that can be beaten.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.errors import PolicyError
from policies.line import Floats, Line, TrueLink
from policies.relaxation import Prices, Terms, ascend, suffix_sums

__all__ = ["BEAM", "TOLERANCE_S", "Line", "Plan", "least_distortion", "least_ttft"]

BEAM = 48
"""States a stage keeps in the first search, which finds a plan to beat."""
WIDER = 64
"""Each further search keeps so many times as many: what a search in between finds is seldom worth its time."""

TOLERANCE_S = 1e-9
"""A plan may be later than the deadline by this: sums in another order differ by rounding."""


@dataclass(frozen=True)
class Plan:
    """One option for every chunk of a Line."""

    options: tuple[int, ...]
    distortion: float
    ttft_s: float


def least_distortion(line: Line, deadline_s: float, *, widest: int | None = None) -> Plan | None:
    """The plan of least distortion with TTFT <= `deadline_s`, or None if there is none.

    Searches with ever more states a stage until none had to be left out, which proves the plan best. `widest` stops
    earlier: the plan is then feasible whenever any is, and usually the best.
    """
    known = least_ttft(line)
    if not known.ttft_s <= deadline_s + TOLERANCE_S:
        return None
    search = _Search(line, deadline_s, known)
    width = BEAM
    while True:
        found, complete = search.run(known, width)
        known = found or known
        if complete or width == widest:
            return known
        width = width * WIDER if widest is None else min(width * WIDER, widest)


def least_ttft(line: Line) -> Plan:
    """A plan with the earliest first token; its TTFT is inf on a link that dies before."""
    n, m = line.bits.shape
    candidates = [tuple(int(o) for o in line.bits.argmin(1)), (0,) * n, (m - 1,) * n]
    horizon_s, simple = min((line.ttft_s(options), options) for options in candidates)
    if horizon_s == math.inf:
        return Plan(simple, _total(line, simple), math.inf)
    link = TrueLink(line, horizon_s)
    stages: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    start, pos = np.array([line.start_s]), np.array([link.at(np.array([line.start_s]))[0]])
    free, loss = np.array([line.compute_free_s]), np.array([0.0])
    for k in range(n):
        parent, option = np.divmod(np.arange(len(start) * m), m)
        end, end_pos = link.send(start[parent], pos[parent], line.bits[k, option], k)
        new_free = np.maximum(end, free[parent]) + line.compute[k, option]
        new_loss = loss[parent] + line.loss[k, option]
        alive = np.flatnonzero(np.isfinite(new_free))
        if k == n - 1:
            best = alive[np.lexsort((new_loss[alive], new_free[alive]))[:1]]
            if len(best) == 0 or new_free[best[0]] + line.prefill_s > horizon_s:
                return Plan(simple, _total(line, simple), horizon_s)
            stages.append((parent[best], option[best]))
            options = _trace_back(stages)
            return Plan(options, _total(line, options), float(new_free[best[0]]) + line.prefill_s)
        parent, option = parent[alive], option[alive]
        new_free, new_loss = new_free[alive], new_loss[alive]
        new_start, new_pos = link.next_start(
            start[parent], pos[parent], line.bits[k, option], end[alive], end_pos[alive], k
        )
        order = np.lexsort((new_loss, new_free, new_start))
        best_before = np.concatenate(([np.inf], np.minimum.accumulate(new_free[order])[:-1]))
        keep = order[new_free[order] < best_before]
        start, pos, free, loss = new_start[keep], new_pos[keep], new_free[keep], new_loss[keep]
        stages.append((parent[keep], option[keep]))
    raise PolicyError("a plan needs at least one chunk")


def _total(line: Line, options: tuple[int, ...]) -> float:
    return float(sum(line.loss[k, o] for k, o in enumerate(options)))


def _trace_back(stages: list[tuple[NDArray[np.intp], NDArray[np.intp]]]) -> tuple[int, ...]:
    state, options = 0, []
    for parent, option in reversed(stages):
        options.append(int(option[state]))
        state = int(parent[state])
    return tuple(reversed(options))


class _Search:
    """The dynamic programme for one line and one deadline."""

    def __init__(self, line: Line, deadline_s: float, known: Plan) -> None:
        """`known` is a plan to beat: it says about where chunks arrive, and how good the bounds must be."""
        self.line, self.link = line, TrueLink(line, deadline_s)
        self.end_s = deadline_s - line.prefill_s + TOLERANCE_S
        self.compute_after = suffix_sums(line.compute.min(1))
        """[k]: least compute of chunks k and later."""
        self._first_pos = float(self.link.at(np.array([line.start_s]))[0])
        compute = line.compute[np.arange(len(line.bits)), np.array(known.options)]
        terms = Terms.of(line, self.link, self.end_s, self.end_s - suffix_sums(compute)[:-1])
        self.prices = Prices(terms, ascend(terms, known.distortion))

    def _position(self, end: Floats, end_pos: Floats) -> Floats:
        """What the link has spent since the first answer could begin, in the unit of `cost`."""
        return end - self.line.start_s if self.link.per_chunk else end_pos - self._first_pos

    def run(self, known: Plan, width: int) -> tuple[Plan | None, bool]:
        """The best plan below `known` that it finds, and whether it looked at all: a stage keeps `width` states."""
        line, link = self.line, self.link
        n, m = line.bits.shape
        below = known.distortion - 1e-11 * float(line.loss.max(1).sum())
        stages: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
        start, free, loss = np.array([line.start_s]), np.array([line.compute_free_s]), np.array([0.0])
        pos, complete = link.at(start), True
        for k in range(n):
            parent, option = np.divmod(np.arange(len(start) * m), m)
            new_loss = loss[parent] + line.loss[k, option]
            alive = np.flatnonzero(new_loss < below)
            parent, option, new_loss = parent[alive], option[alive], new_loss[alive]
            end, end_pos = link.send(start[parent], pos[parent], line.bits[k, option], k)
            new_free = np.maximum(end, free[parent]) + line.compute[k, option]
            alive = np.flatnonzero(new_free + self.compute_after[k + 1] <= self.end_s)
            if len(alive) == 0:
                return None, complete
            if k == n - 1:
                best = alive[np.lexsort((new_free[alive], new_loss[alive]))[:1]]
                stages.append((parent[best], option[best]))
                options = _trace_back(stages)
                ttft_s = float(new_free[best[0]]) + line.prefill_s
                return Plan(options, float(new_loss[best[0]]), ttft_s), complete
            parent, option, end, end_pos = parent[alive], option[alive], end[alive], end_pos[alive]
            new_free, new_loss = new_free[alive], new_loss[alive]
            new_start, new_pos = link.next_start(start[parent], pos[parent], line.bits[k, option], end, end_pos, k)
            bound = new_loss + self.prices.rest(k + 1, self.end_s - new_free, self._position(new_start, new_pos))
            alive = np.flatnonzero(bound < below)
            if len(alive) == 0:
                return None, complete
            earliest, _ = link.send(
                new_start[alive], new_pos[alive], np.full(len(alive), line.bits[k + 1].min()), k + 1
            )
            free = np.maximum(new_free[alive], earliest)  # the machine waits until then anyway
            reach = np.flatnonzero(free + self.compute_after[k + 1] <= self.end_s)
            if len(reach) == 0:
                return None, complete
            alive, earliest, free, bound = alive[reach], earliest[reach], free[reach], bound[alive[reach]]
            start, pos, loss = new_start[alive], new_pos[alive], new_loss[alive]
            keep = _undominated(start, free, loss, earliest)
            if len(keep) > width:
                complete = False
                keep = keep[np.argpartition(bound[keep], width)[:width]]
            start, pos, free, loss = start[keep], pos[keep], free[keep], loss[keep]
            stages.append((parent[alive][keep], option[alive][keep]))
        raise PolicyError("a plan needs at least one chunk")


def _undominated(start: Floats, free: Floats, loss: Floats, earliest: Floats) -> NDArray[np.intp]:
    """Indices of the states that no other state equals or beats in all three numbers.

    Sorted by start, a state whose machine waits for the next chunk (`free == earliest`) is free no later than any that
    starts later, so a running least loss over those drops most. The rest meets a staircase of (free, loss), in which
    free rises and loss falls.
    """
    order = np.lexsort((loss, free, start))
    waits = np.where(free[order] <= earliest[order], loss[order], np.inf)
    before = np.concatenate(([np.inf], np.minimum.accumulate(waits)[:-1]))
    order = order[loss[order] < before]
    if len(order) < 3:
        return order
    frees: list[float] = []
    losses: list[float] = []
    keep: list[bool] = []
    for f, d in zip(free[order].tolist(), loss[order].tolist(), strict=True):
        at = bisect_right(frees, f)
        if at and losses[at - 1] <= d:
            keep.append(False)
            continue
        keep.append(True)
        end, size = at, len(frees)
        while end < size and losses[end] >= d:
            end += 1
        frees[at:end] = (f,)
        losses[at:end] = (d,)
    return order[keep]
