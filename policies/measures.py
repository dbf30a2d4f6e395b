"""Quantities that several policies compute from an observation; pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from kvstream.policies.api import Observation
from kvstream.policies.errors import PolicyError
from kvstream.policies.estimators import goodputs


def named_level(level: int | str, n_levels: int) -> int:
    """`lowest`, `medium`, `highest` or a number, as a level; of an even ladder, medium is the lower middle."""
    if level == "lowest":
        return 0
    if level == "medium":
        return (n_levels - 1) // 2
    if level == "highest":
        return n_levels - 1
    try:
        number = int(level)
    except ValueError:
        raise PolicyError(f"unknown level {level!r}; choose lowest, medium, highest or 0 to {n_levels - 1}") from None
    if not 0 <= number < n_levels:
        raise PolicyError(f"level {number} is out of range; give 0 to {n_levels - 1}")
    return number


def bytes_left(obs: Observation, level: int) -> int:
    """Bytes of all remaining chunks at one level."""
    return sum([sizes[level] for sizes in obs.sizes_bytes])


def bytes_in_flight(obs: Observation) -> int:
    """Bytes of the chunks in flight that have not arrived."""
    return sum([flight.bytes - flight.received_bytes for flight in obs.in_flight])


def recompute_left_s(obs: Observation) -> float | None:
    """Seconds to recompute all remaining chunks; None where the receiver cannot."""
    return None if obs.recompute_s is None else sum(obs.recompute_s)


def last_bps(obs: Observation) -> float | None:
    """Goodput of the newest encoded chunk that arrived, else of the one in flight, else the prior, else None; text is
    too small to measure a link."""
    rates = goodputs(obs)
    return rates[-1] if rates else None


def tail_s(obs: Observation, level: int) -> float:
    """Seconds of compute that no transfer hides: decoding the last chunk, then prefill."""
    return obs.decode_s[-1][level] + obs.prefill_s


class Pace:
    """The pace lead: how far a transfer is ahead of a straight line from the request to the deadline.

    The line would have delivered what has arrived at some time; the lead is that time minus now, in seconds. It needs
    no estimate of the link. Chunks count with their bytes at the lowest level, so that the lead does not depend on the
    levels chosen; one instance serves one session.
    """

    def __init__(self) -> None:
        self._reference: tuple[int, ...] = ()

    def lead_s(self, obs: Observation) -> float:
        if not self._reference:  # first asked in mid-transfer: all chunks count alike
            whole = len(obs.remaining) == obs.n_chunks
            self._reference = tuple([sizes[0] for sizes in obs.sizes_bytes]) if whole else (1,) * obs.n_chunks
        arrived = sum([self._reference[done.chunk] for done in obs.transfers])
        partly = sum([self._reference[flight.chunk] * flight.received_bytes / flight.bytes for flight in obs.in_flight])
        share = min((arrived + partly) / sum(self._reference), 1.0)
        return share * (obs.deadline_s - obs.prefill_s) - obs.now_s


def spend(sizes: Sequence[Sequence[float]], loss: Sequence[Sequence[float]], budget: float) -> list[int] | None:
    """Levels of least total loss whose sizes sum to at most `budget`; None if the smallest ones do not fit.

    `sizes` and `loss` run over [chunk][level]. Steps along each chunk's convex hull are bought in the order of what
    they save per byte (the greedy rule for the multiple-choice knapsack, Zemel 1980), which is at most one step
    short of the best. Of equal steps those of later chunks come first: what is bought late can still be given up.
    """
    levels = [0] * len(sizes)
    left = budget - sum([row[0] for row in sizes])
    if left < 0.0:
        return None
    steps: list[tuple[float, int, int, float]] = []
    for chunk in range(len(sizes) - 1, -1, -1):
        row, lost = sizes[chunk], loss[chunk]
        level, top = 0, len(row) - 1
        while level < top:
            best, to = 0.0, level
            for above in range(level + 1, top + 1):
                gain = (lost[level] - lost[above]) / max(row[above] - row[level], 1e-9)
                if gain > best:
                    best, to = gain, above
            if to == level:
                break
            steps.append((-best, chunk, to, row[to] - row[level]))
            level = to
    steps.sort(key=_gain)
    stopped: set[int] = set()
    for _, chunk, to, more in steps:
        if chunk not in stopped and more <= left:
            levels[chunk], left = to, left - more
        else:
            stopped.add(chunk)
    return levels


def _gain(step: tuple[float, int, int, float]) -> float:
    return step[0]
