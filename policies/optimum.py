"""The least distortion with which a transfer can meet a deadline, exactly, on a link whose future is known.

A transfer is a flow line of two machines: the link carries the chunks in order, then the receiver decodes or recomputes
them in order, then comes prefill. Chunk k with option o (a level, or text) ends its transfer at e_k, and its compute
ends at f_k = max(e_k, f_{k-1}) + c_ko; the first token comes at f_K + prefill. After a prefix of chunks only three
numbers matter: when the next answer can begin, when the compute machine is free, and the distortion so far; less of
each is never worse, because bytes that start earlier never end later. So a forward dynamic programme over chunks that
keeps undominated triples is exact. Two things make it fast: states that cannot reach the deadline, or cannot beat a
plan already known, are dropped, by a Lagrangian bound on what the rest can still achieve with the bytes and the
compute time left (weak duality, so the bound never errs); and all states of a stage are handled as arrays.

Order: chunks go out in order. A policy that reorders them (`cake`) plays another game and may in corner cases win
it. Slow start is left out, so with it the result is a bound that may be out of reach, never one that can be beaten.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from policies.errors import PolicyError
from traces.fluid import FRAME_BYTES
from traces.trace import Trace

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

BEAM = 48
"""States a stage keeps in the first search; each further one keeps eight times as many."""

ASCENT_STEPS = 150
"""Steps spent on the bound before the search."""

TOLERANCE_S = 1e-9
"""A plan may be later than the deadline by this: sums in another order differ by rounding."""

NEWS_BITS = 8.0 * FRAME_BYTES
"""With depth 2 the next chunk is requested when the first frame of this one is here, at the earliest."""


@dataclass(frozen=True)
class Line:
    """What is left of a transfer. The tables run over [chunk][option]; every chunk has the same number of options.

    `distortion` is weighted already: a plan's distortion is the sum over its chunks. `start_s` is the earliest moment
    at which the first chunk's answer can begin, `compute_free_s` when the receiver can begin to compute.
    `first_chunk` is the index of the first chunk, for traces with one rate a chunk.
    """

    goodput: Trace
    rtt_s: float
    depth: int
    start_s: float
    compute_free_s: float
    prefill_s: float
    sizes_bytes: tuple[tuple[float, ...], ...]
    compute_s: tuple[tuple[float, ...], ...]
    distortion: tuple[tuple[float, ...], ...]
    first_chunk: int = 0

    def __post_init__(self) -> None:
        shapes = {len(row) for table in (self.sizes_bytes, self.compute_s, self.distortion) for row in table}
        if len({len(self.sizes_bytes), len(self.compute_s), len(self.distortion)}) != 1 or len(shapes) != 1:
            raise PolicyError("sizes, compute times and distortions of a plan must have one shape")

    @cached_property
    def bits(self) -> Floats:
        return np.array(self.sizes_bytes, dtype=np.float64) * 8.0

    @cached_property
    def compute(self) -> Floats:
        return np.array(self.compute_s, dtype=np.float64)

    @cached_property
    def loss(self) -> Floats:
        return np.array(self.distortion, dtype=np.float64)

    def ttft_s(self, options: tuple[int, ...]) -> float:
        """When the first token comes under a plan; inf if it never does. The plain recurrence, one chunk at a time."""
        start_s, free_s = self.start_s, self.compute_free_s
        for k, option in enumerate(options):
            if start_s == math.inf:
                return math.inf
            bits = float(self.bits[k, option])
            end_s = start_s + self._serve_s(bits, start_s, k)
            free_s = max(end_s, free_s) + float(self.compute[k, option])
            if self.depth == 1:
                start_s = end_s + self.rtt_s
            else:
                start_s = max(end_s, start_s + self._serve_s(min(bits, NEWS_BITS), start_s, k) + self.rtt_s)
        return free_s + self.prefill_s

    def _serve_s(self, bits: float, start_s: float, k: int) -> float:
        if self.goodput.per == "time":
            return self.goodput.time_for(bits, start_s)
        rate = self.goodput.chunk_rate(self.first_chunk + k)
        return bits / rate if rate > 0.0 else math.inf


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
    search = _Search(line, deadline_s)
    search.price(known)
    width = BEAM
    while True:
        found, complete = search.run(known, width)
        known = found or known
        width *= 8
        if complete or (widest is not None and width > widest):
            return known


def least_ttft(line: Line) -> Plan:
    """The plan with the earliest first token, and of those one with least distortion; TTFT is inf on a dead link."""
    n, m = line.bits.shape
    candidates = [tuple(int(o) for o in line.bits.argmin(1)), (0,) * n, (m - 1,) * n]
    horizon_s, simple = min((line.ttft_s(options), options) for options in candidates)
    if horizon_s == math.inf:
        return Plan(simple, _total(line, simple), math.inf)
    link = _Link(line, horizon_s)
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


class _Link:
    """The link as arrays: positions in bits since time 0, times in seconds, up to a horizon."""

    def __init__(self, line: Line, horizon_s: float) -> None:
        self.depth, self.rtt_s = line.depth, line.rtt_s
        self.per_chunk = line.goodput.per == "chunk"
        self._line = line
        if not self.per_chunk:
            steps = line.goodput.changes(0.0, max(horizon_s, 1e-9))
            self._edges = np.array([at_s for at_s, _ in steps] + [max(horizon_s, 1e-9)])
            self._rates = np.array([rate for _, rate in steps])
            self._bits = np.concatenate(([0.0], np.cumsum(np.diff(self._edges) * self._rates)))
            self._flows = bool((self._rates > 0.0).all())

    def at(self, t_s: Floats) -> Floats:
        """Bits carried by `t_s`."""
        if self.per_chunk:
            return np.zeros_like(t_s)
        return np.interp(t_s, self._edges, self._bits)

    def least_in(self, span_s: float, low_s: Floats, high_s: Floats) -> Floats:
        """For each [low, high]: fewest bits that a stretch of `span_s` carries that begins therein."""
        horizon_s = float(self._edges[-1])
        low_s = np.minimum(low_s, horizon_s)
        high_s = np.clip(high_s, low_s, horizon_s)
        starts = np.concatenate((self._edges, np.maximum(self._edges - span_s, 0.0), low_s, high_s))
        carried = self.at(starts + span_s) - self.at(starts)
        inside = (starts >= low_s[:, None]) & (starts <= high_s[:, None])
        return np.where(inside, carried, np.inf).min(1)

    def above(self, low_s: Floats, high_s: Floats, at_s: Floats, end_s: float) -> tuple[Floats, Floats]:
        """For each span [low, high] a line above the link's bits, close to them at `at_s`.

        It is bits <= limit - slope * (end - t).
        """
        top = float(self._rates.max())
        slopes = top * np.exp2(-np.arange(0.0, 10.0, 0.25))
        times = np.concatenate((self._edges, np.minimum(low_s, self._edges[-1]), np.maximum(high_s, 0.0)))
        bits = self.at(times)
        inside = (times >= low_s[:, None]) & (times <= high_s[:, None])
        excess = bits - slopes[:, None] * times  # [slope, time]
        beta = np.where(inside[:, None, :], excess, -np.inf).max(2)  # [span, slope]
        beta = np.where(np.isfinite(beta), beta, 0.0)
        best = (beta + slopes * np.clip(at_s, low_s, high_s)[:, None]).argmin(1)
        slope = slopes[best]
        return slope, beta[np.arange(len(best)), best] + slope * end_s

    def when(self, bits: Floats) -> Floats:
        """The first moment by which `bits` have been carried; inf beyond the horizon."""
        if self._flows:
            return np.interp(bits, self._bits, self._edges, right=np.inf)
        row = np.searchsorted(self._bits, bits, side="left") - 1
        late = row >= len(self._rates)
        row = np.clip(row, 0, len(self._rates) - 1)
        rate = self._rates[row]
        t_s = self._edges[row] + (bits - self._bits[row]) / np.where(rate > 0.0, rate, 1.0)
        return np.where(late, np.inf, t_s)

    def send(self, start: Floats, pos: Floats, bits: Floats, k: int) -> tuple[Floats, Floats]:
        """End of the transfer and the position then."""
        if self.per_chunk:
            return start + bits * self.seconds_a_bit(k), pos
        end_pos = pos + bits
        return self.when(end_pos), end_pos

    def next_start(
        self, start: Floats, pos: Floats, bits: Floats, end: Floats, end_pos: Floats, k: int
    ) -> tuple[Floats, Floats]:
        """When the next answer can begin (see `testbed.session` for depth), and the position then."""
        if self.rtt_s == 0.0:
            return end, end_pos
        if self.depth == 1:
            begin = end + self.rtt_s
            return begin, self.at(begin)
        news, _ = self.send(start, pos, np.minimum(bits, NEWS_BITS), k)
        begin = np.maximum(end, news + self.rtt_s)
        return begin, np.where(begin > end, self.at(begin), end_pos)

    def seconds_a_bit(self, k: int) -> float:
        rate = self._line.goodput.chunk_rate(self._line.first_chunk + k)
        return 1.0 / rate if rate > 0.0 else math.inf


class _Search:
    """The dynamic programme for one line and one deadline."""

    def __init__(self, line: Line, deadline_s: float) -> None:
        self.line, self.link = line, _Link(line, deadline_s)
        self.end_s = deadline_s - line.prefill_s + TOLERANCE_S
        self.compute_after = _suffix(line.compute.min(1))
        """[k]: least compute of chunks k and later."""
        self.first_pos = float(self.link.at(np.array([line.start_s]))[0])
        self.cost = self._cost()
        self.prices: _Prices | None = None

    def _cost(self) -> Floats:
        """[k, option]: by how much the link's position moves at least: bits, or seconds where each chunk has a rate.

        The next answer waits for a round trip, during which the link carries at least what it carries in the worst
        stretch of that length between the earliest start and the latest end of the chunk.
        """
        line, link = self.line, self.link
        cost, news = line.bits.copy(), np.minimum(line.bits, NEWS_BITS)
        if link.per_chunk:
            seconds = np.array([link.seconds_a_bit(k) for k in range(len(cost))])
            seconds = np.where(np.isfinite(seconds), seconds, 1e30)[:, None]
            cost, news = cost * seconds, news * seconds
        if line.rtt_s == 0.0 or len(cost) == 1:
            return cost
        if line.depth == 1:
            news = cost
        if link.per_chunk:
            cost[:-1] = np.maximum(cost[:-1], news[:-1] + line.rtt_s)
            return cost
        sent, idle = cost, np.zeros(len(cost))
        last = float(link.at(np.array([max(self.end_s - line.compute[-1].min(), 0.0)]))[0])
        for _ in range(3):  # narrower spans make idle bits dearer, which makes the spans narrower
            cost = np.maximum(sent, news + idle[:, None])
            cost[-1] = sent[-1]
            least = cost.min(1)
            upto = np.cumsum(least)
            begins = self.first_pos + upto - least
            ends = last - (upto[-1] - upto)
            idle = link.least_in(line.rtt_s, link.when(np.maximum(begins, 0.0)), link.when(np.maximum(ends, 0.0)))
        return cost

    def price(self, known: Plan) -> None:
        """Find the prices that bound the whole line best, given a plan to beat."""
        line, link = self.line, self.link
        n = len(line.bits)
        options = np.array(known.options)
        rows = np.arange(n)
        compute = line.compute[rows, options]
        arrive_by = self.end_s - _suffix(compute)[:-1]
        if link.per_chunk:
            slope, limit = np.ones(n), np.full(n, self.end_s)
        else:
            earliest = link.when(self.first_pos + np.cumsum(self.cost.min(1)))
            latest = self.end_s - self.compute_after[:-1]
            slope, limit = link.above(earliest, latest, arrive_by, self.end_s)
        origin = line.start_s if link.per_chunk else self.first_pos
        self.prices = _Prices.ascend(line, self.cost, slope, limit - origin, self.end_s - line.compute_free_s, known)

    def _position(self, end: Floats, end_pos: Floats) -> Floats:
        """What the link has spent since the first answer could begin, in the unit of `cost`."""
        return end - self.line.start_s if self.link.per_chunk else end_pos - self.first_pos

    def run(self, known: Plan, width: int) -> tuple[Plan | None, bool]:
        """The best plan below `known` that it finds, and whether it looked at all: a stage keeps `width` states."""
        line, link = self.line, self.link
        assert self.prices is not None
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


class _Prices:
    """Lower bounds on what the rest of a line costs, by prices on its two machines (Lagrangian relaxation).

    A plan meets the deadline if for every chunk m it arrives early enough for the compute of m and all later ones,
    sum(cost of chunks <= m) + slope_m * sum(compute of chunks >= m) <= limit_m, where (slope, limit) is a line above
    the bits of the link; and if all compute fits. With a price on each, chunk i pays `link_price[i]` (of all m >= i)
    for its cost and `compute_price[i]` (of all m <= i) for its compute, and picks its cheapest option alone.
    """

    def __init__(self, line: Line, cost: Floats, lam: Floats, mu: Floats, slope: Floats, limit: Floats) -> None:
        """`lam` [set], `mu` [set, chunk]: several price sets, each of which gives a valid bound."""
        link_price = np.cumsum(mu[:, ::-1], 1)[:, ::-1]
        self._compute_price = lam[:, None] + np.concatenate((np.zeros((len(mu), 1)), np.cumsum(mu * slope, 1)), 1)
        """[set, k]: price of compute time before chunk k, and of chunk k - 1."""
        priced = (
            line.loss + cost * link_price[:, :, None] + line.compute * self._compute_price[:, 1:, None]
        )  # [set, chunk, option]
        least = priced.min(2)
        self.choices = priced.argmin(2)
        zero = np.zeros((len(mu), 1))
        self._rest = np.concatenate((np.cumsum((least - mu * limit)[:, ::-1], 1)[:, ::-1], zero), 1)
        self._link_price = np.concatenate((link_price, zero), 1)

    def rest(self, k: int, compute_left: Floats, position: Floats) -> Floats:
        """Least loss of chunks k and later, for states given by compute time left and link position."""
        table = self._rest[:, k, None] - np.outer(self._compute_price[:, k], compute_left)
        table += np.outer(self._link_price[:, k], position)
        return table.max(0)

    @classmethod
    def ascend(
        cls, line: Line, cost: Floats, slope: Floats, limit: Floats, compute_left: float, known: Plan
    ) -> _Prices:
        """Raise the bound of the whole line by subgradient steps (Polyak's rule), then spread sets around the best."""
        n = len(cost)
        spread = float(line.loss.max(1).sum() - line.loss.min(1).sum())
        unit_c = spread / max(float(line.compute.max(1).sum() - line.compute.min(1).sum()), 1e-12)
        unit_b = spread / max(float(cost.max(1).sum() - cost.min(1).sum()), 1e-12)
        rows = np.arange(n)
        lam, mu = 0.0, np.zeros(n)
        mu[-1] = unit_b
        best, best_lam, best_mu = -math.inf, lam, mu.copy()
        pace, stalled = 1.0, 0
        for _ in range(ASCENT_STEPS):
            link_price = np.cumsum(mu[::-1])[::-1]
            compute_price = lam + np.cumsum(mu * slope)
            priced = line.loss + cost * link_price[:, None] + line.compute * compute_price[:, None]
            pick = priced.argmin(1)
            bound = float(priced[rows, pick].sum() - lam * compute_left - (mu * limit).sum())
            if bound > best:
                best, best_lam, best_mu, stalled = bound, lam, mu.copy(), 0
            else:
                stalled += 1
                if stalled == 8:
                    pace, stalled, lam, mu = pace / 2.0, 0, best_lam, best_mu.copy()
                    continue
            compute = line.compute[rows, pick]
            over_c = float(compute.sum()) - compute_left
            over_b = np.cumsum(cost[rows, pick]) + slope * np.cumsum(compute[::-1])[::-1] - limit
            over_c = 0.0 if lam == 0.0 and over_c < 0.0 else over_c
            over_b = np.where((mu == 0.0) & (over_b < 0.0), 0.0, over_b)
            length = (over_c * unit_c) ** 2 + float(((over_b * unit_b) ** 2).sum())
            if length == 0.0:
                break
            step = pace * max(known.distortion - bound, 0.01 * abs(known.distortion)) / length
            lam = max(lam + step * over_c * unit_c**2, 0.0)
            mu = np.maximum(mu + step * over_b * unit_b**2, 0.0)
        around = np.array([0.5, 0.75, 0.9, 1.0, 1.1, 1.33, 2.0])
        sets = [(best_lam * c, best_mu * b) for c in around for b in around]
        last = np.zeros(n)
        last[-1] = best_mu.sum()
        sets += [(best_lam * b, last * b) for b in around] + [(0.0, np.zeros(n))]
        return cls(line, cost, np.array([s[0] for s in sets]), np.array([s[1] for s in sets]), slope, limit)


def _suffix(values: Floats) -> Floats:
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)


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
