"""Partial plans of a line, many at once: how they are extended by a chunk, and which of them can be dropped.

A state is a plan for the first chunks, reduced to what the rest of the transfer depends on. All states of a stage are
arrays of one length, so that a stage costs a handful of array operations.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvstream.policies.line import Floats, Line, TrueLink

Indices = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """Plans for the chunks before chunk k, one per entry; every array is [state].

    A state with a smaller or equal `start_s`, `free_s` and `loss` is never worse: bytes that start earlier never end
    later. `position_bits` follows from `start_s`.
    """

    start_s: Floats
    """When the answer for chunk k can begin; after the last chunk, when that chunk has arrived."""
    position_bits: Floats
    """Bits that the link has carried by then (`TrueLink.at`)."""
    free_s: Floats
    """When the receiver can begin to compute chunk k."""
    loss: Floats
    """Distortion so far."""
    parent: Indices
    """The state of the previous stage that this one extends."""
    option: Indices
    """What it chose for chunk k - 1."""

    @classmethod
    def first(cls, line: Line, link: TrueLink) -> States:
        """The one state before the first chunk."""
        start_s, none = np.array([line.start_s]), np.zeros(1, dtype=np.intp)
        return cls(start_s, link.at(start_s), np.array([line.compute_free_s]), np.zeros(1), none, none)

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, index: Indices) -> States:
        """The states at these indices, in this order."""
        return States(
            self.start_s.take(index),
            self.position_bits.take(index),
            self.free_s.take(index),
            self.loss.take(index),
            self.parent.take(index),
            self.option.take(index),
        )

    def free_from(self, earliest_s: Floats) -> States:
        """The same states, with compute that begins at `earliest_s` at the earliest."""
        return replace(self, free_s=np.maximum(self.free_s, earliest_s))


def expand(
    line: Line, link: TrueLink, states: States, k: int, *, below: float = math.inf, free_by_s: float = math.inf
) -> States:
    """Every state extended by every option of chunk k that arrives, costs less than `below` and is computed in time.

    e = end of the transfer; compute ends at max(e, free) + c (module docstring of `kvstream.policies.optimum`).
    """
    m = line.bits.shape[1]
    parent, option = np.divmod(np.arange(len(states) * m), m)
    loss = states.loss[parent] + line.loss[k, option]
    alive = np.flatnonzero(loss < below)
    parent, option, loss = parent[alive], option[alive], loss[alive]

    start_s, position, bits = states.start_s[parent], states.position_bits[parent], line.bits[k, option]
    end_s, end_position = link.send(start_s, position, bits, k)
    free_s = np.maximum(end_s, states.free_s[parent]) + line.compute[k, option]
    alive = np.flatnonzero((free_s <= free_by_s) & (free_s < math.inf))
    ended = States(end_s, end_position, free_s, loss, parent, option).take(alive)
    if k == len(line.bits) - 1:
        return ended
    next_s, next_position = link.next_start(
        start_s[alive], position[alive], line.frames[k, ended.option], ended.start_s, ended.position_bits, k
    )
    return replace(ended, start_s=next_s, position_bits=next_position)


def soonest(states: States) -> States:
    """The states that no other equals or beats in both times, whatever they cost."""
    order = np.lexsort((states.loss, states.free_s, states.start_s))
    free_s = states.free_s[order]
    return states.take(order[free_s < _least_before(free_s)])


def undominated(states: States, arrival_s: Floats) -> Indices:
    """Indices of the states that no other state equals or beats in both times and in loss.

    `arrival_s` is when the next chunk can arrive at the earliest; no state's compute is free before. Sorted by start, a
    state whose receiver waits for that chunk is free no later than any that starts later, so a running least loss over
    those drops most. The rest meets a staircase of (free, loss), in which free rises and loss falls.
    """
    order = np.lexsort((states.loss, states.free_s, states.start_s))
    free_s, loss = states.free_s[order], states.loss[order]
    waiting = np.where(free_s <= arrival_s[order], loss, np.inf)
    left = np.flatnonzero(loss < _least_before(waiting))
    order, free_s, loss = order[left], free_s[left], loss[left]
    if len(order) < 3:
        return order
    stair_free: list[float] = []
    stair_loss: list[float] = []
    keep: list[bool] = []
    for free, lost in zip(free_s.tolist(), loss.tolist(), strict=True):
        at = bisect_right(stair_free, free)
        if at and stair_loss[at - 1] <= lost:
            keep.append(False)
            continue
        keep.append(True)
        end, size = at, len(stair_free)
        while end < size and stair_loss[end] >= lost:
            end += 1
        stair_free[at:end] = (free,)
        stair_loss[at:end] = (lost,)
    return order[keep]


def _least_before(values: Floats) -> Floats:
    """[i]: the least of the entries before i; inf for the first."""
    return np.concatenate(([np.inf], np.minimum.accumulate(values)[:-1]))
