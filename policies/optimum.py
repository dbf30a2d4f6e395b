"""The least distortion with which a transfer can meet a deadline, exactly, on a link whose future is known.

A transfer is a flow shop of two machines: the link carries the chunks in order, then the receiver decodes or recomputes
them in order, then comes prefill. Chunk k with option o (a level, or text) ends its transfer at e_k, and its compute
ends at f_k = max(e_k, f_{k-1}) + c_ko; the first token comes at f_K + prefill. After a prefix of chunks only three
numbers matter: when the next answer can begin, when the receiver is free, and the distortion so far; less of each is
never worse, because bytes that start earlier never end later. So a forward dynamic programme over chunks that keeps
undominated triples (`kvstream.policies.states`) is exact. Two things make it fast: states that cannot reach the
deadline, or cannot beat a plan already known, are dropped, by a Lagrangian bound on what the rest can still achieve
(`kvstream.policies.relaxation`); and all states of a stage are handled as arrays.

Order: chunks are sent in order. Policies that reorder them (`cake`, `kvstream`) solve a different problem and can do
slightly better in corner cases. Slow start is left out; with it the result is a bound that may be unattainable, but can
never be beaten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np

from kvstream.policies import compiled
from kvstream.policies.line import Floats, Line, TrueLink
from kvstream.policies.relaxation import Bound, Terms, ascend, suffix_sums
from kvstream.policies.states import Indices, States, expand, soonest, undominated

__all__ = ["BEAM", "TOLERANCE_S", "Line", "Plan", "least_distortion", "least_ttft"]

BEAM = 48
"""States per stage in the first search, which finds a plan to beat."""
WIDER = 64
"""Each further search keeps this many times as many: searches in between seldom find enough to pay for their time."""

TOLERANCE_S = 1e-9
"""A plan may be later than the deadline by this: sums in a different order differ by rounding."""

Step: TypeAlias = tuple[Indices, Indices]
"""Parent and option of the states of one stage: all that tracing a plan back needs."""


@dataclass(frozen=True)
class Plan:
    """One option for every chunk of a Line."""

    options: tuple[int, ...]
    distortion: float
    ttft_s: float


def least_distortion(line: Line, deadline_s: float, *, widest: int | None = None) -> Plan | None:
    """The plan of least distortion with TTFT <= `deadline_s`, or None if there is none.

    Searches with ever more states per stage until none had to be left out, which proves the plan optimal. `widest`, the
    width of one of these searches, makes it the last: the plan is then feasible whenever any is, and usually optimal.
    """
    if widest is None:
        compiled.count_line()
    width = BEAM
    while True:
        plan, proven = _best(line, deadline_s, width)
        if proven or width == widest:
            return plan
        width *= WIDER


@lru_cache(maxsize=8)
def _best(line: Line, deadline_s: float, width: int) -> tuple[Plan | None, bool]:
    """What the searches up to this width find, and whether that is proven to be the optimum.

    Remembered, because the oracle of a unit asks what its bound asks.
    """
    search = _search(line, deadline_s)
    if search is None:
        return None, True
    known = None if width == BEAM else _best(line, deadline_s, width // WIDER)[0]
    known = known or search.soonest
    found, complete = search.run(known, width)
    return found or known, complete


@lru_cache(maxsize=2)
def _search(line: Line, deadline_s: float) -> _Search | None:
    """What searches of any width share; None if no plan meets the deadline."""
    soonest = least_ttft(line)
    return _Search(line, deadline_s, soonest) if soonest.ttft_s <= deadline_s + TOLERANCE_S else None


def least_ttft(line: Line) -> Plan:
    """A plan with the earliest first token; its TTFT is inf on a link that dies before."""
    n, m = line.bits.shape
    candidates = [tuple(int(o) for o in line.bits.argmin(1)), (0,) * n, (m - 1,) * n]
    horizon_s, simple = min((line.ttft_s(options), options) for options in candidates)
    if horizon_s == math.inf:
        return Plan(simple, _total(line, simple), math.inf)
    link, kernel = TrueLink(line, horizon_s), compiled.kernel()
    if kernel:
        found, free_s = kernel.soonest(line.tables, link.tables)
        options = tuple(found.tolist())
    else:
        options, free_s = _soonest(line, link)
    if not options or free_s + line.prefill_s > horizon_s:
        return Plan(simple, _total(line, simple), horizon_s)
    return Plan(options, _total(line, options), free_s + line.prefill_s)


def _soonest(line: Line, link: TrueLink) -> tuple[tuple[int, ...], float]:
    """The options with which the last compute ends earliest, and when; none if the link does not carry any plan."""
    states = States.first(line, link)
    steps: list[Step] = []
    for k in range(len(line.bits)):
        states = expand(line, link, states, k)
        if k < len(line.bits) - 1:
            states = soonest(states)
        steps.append((states.parent, states.option))
    if len(states) == 0:
        return (), math.inf
    best = int(np.lexsort((states.loss, states.free_s))[0])
    return _trace_back(steps, best), float(states.free_s[best])


def _total(line: Line, options: tuple[int, ...]) -> float:
    return float(sum(line.loss[k, o] for k, o in enumerate(options)))


def _trace_back(steps: list[Step], state: int) -> tuple[int, ...]:
    """The options that led to a state of the last stage."""
    options = []
    for parent, option in reversed(steps):
        options.append(int(option[state]))
        state = int(parent[state])
    return tuple(reversed(options))


class _Search:
    """The dynamic programme for one line and one deadline."""

    def __init__(self, line: Line, deadline_s: float, soonest: Plan) -> None:
        """`soonest` is a plan to beat: it says about when chunks arrive, and how tight the bounds must be."""
        self.line, self.link, self.soonest = line, TrueLink(line, deadline_s), soonest
        self.end_s = deadline_s - line.prefill_s + TOLERANCE_S
        self.free_by_s = self.end_s - suffix_sums(line.compute.min(1))
        """[k]: when the receiver must be able to begin to compute chunk k."""
        compute = line.compute[np.arange(len(line.bits)), np.array(soonest.options)]
        terms = Terms.of(line, self.link, self.end_s, self.end_s - suffix_sums(compute)[:-1])
        self.bound = Bound(terms, ascend(terms, soonest.distortion))

    def run(self, known: Plan, width: int) -> tuple[Plan | None, bool]:
        """The best plan found that beats `known`, and whether the search was exhaustive.

        A stage keeps at most `width` states.
        """
        below = known.distortion - 1e-11 * float(self.line.loss.max(1).sum())
        kernel = compiled.kernel()
        if kernel:
            tables = self.line.tables, self.link.tables, self.bound.tables
            options, loss, free_s, complete = kernel.search(*tables, self.end_s, self.free_by_s, below, width)
            options = tuple(options.tolist())
        else:
            options, loss, free_s, complete = self._run(below, width)
        return Plan(options, loss, free_s + self.line.prefill_s) if options else None, complete

    def _run(self, below: float, width: int) -> tuple[tuple[int, ...], float, float, bool]:
        """(options, loss, when the last compute ends, whether the search was exhaustive); no options if none is found.

        The compiled loop does the same, with the same order among equals.
        """
        line, n = self.line, len(self.line.bits)
        states, complete = States.first(line, self.link), True
        steps: list[Step] = []
        for k in range(n):
            states = expand(line, self.link, states, k, below=below, free_by_s=float(self.free_by_s[k + 1]))
            if k < n - 1 and len(states):
                states, bound = self._promising(states, k + 1, below)
                if len(states) > width:
                    complete = False
                    states = states.take(np.sort(np.argsort(bound, kind="stable")[:width]))
            if len(states) == 0:
                return (), math.inf, math.inf, complete
            steps.append((states.parent, states.option))
        best = int(np.lexsort((states.free_s, states.loss))[0])
        return _trace_back(steps, best), float(states.loss[best]), float(states.free_s[best]), complete

    def _promising(self, states: States, k: int, below: float) -> tuple[States, Floats]:
        """The undominated states before chunk k that may still meet the deadline with a loss below `below`, and the
        lower bound on the total loss of each."""
        bound = states.loss + self.bound.rest(k, self.end_s - states.free_s, self._position(states))
        alive = np.flatnonzero(bound < below)
        states, bound = states.take(alive), bound[alive]
        least_bits = np.full(len(states), self.line.bits[k].min())
        arrival_s, _ = self.link.send(states.start_s, states.position_bits, least_bits, k)
        states = states.free_from(arrival_s)  # the receiver waits until then anyway
        alive = np.flatnonzero(states.free_s <= self.free_by_s[k])
        keep = alive[undominated(states.take(alive), arrival_s[alive])]
        return states.take(keep), bound[keep]

    def _position(self, states: States) -> Floats:
        """How far the link has moved since the first answer could begin, in the unit of `Terms`."""
        return (states.start_s if self.link.per_chunk else states.position_bits) - self.link.origin
