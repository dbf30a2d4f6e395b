"""Exercise 5: the best levels for a known number of bytes, by exhaustive search and by a table. Not a policy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

Table = Sequence[Sequence[float]]


def try_everything(sizes: Table, distortion: Table, budget: float) -> tuple[float, tuple[int, ...]]:
    """(least distortion, levels) of all combinations that fit; n_levels ** n_chunks of them."""
    chunks = range(len(sizes))
    fitting = [
        (sum(distortion[i][levels[i]] for i in chunks), levels)
        for levels in product(*(range(len(row)) for row in sizes))
        if sum(sizes[i][levels[i]] for i in chunks) <= budget
    ]
    return min(fitting)


def by_table(sizes: Table, distortion: Table, budget: float) -> tuple[float, tuple[int, ...]]:
    """The same from a front that holds, after each chunk, only (bytes, distortion) pairs that no other dominates."""
    front: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for row, losses in zip(sizes, distortion, strict=True):
        grown = sorted(
            (used + size, lost + loss, (*levels, level))
            for used, lost, levels in front
            for level, (size, loss) in enumerate(zip(row, losses, strict=True))
            if used + size <= budget
        )
        front, least = [], float("inf")
        for used, lost, levels in grown:
            if lost < least:
                front.append((used, lost, levels))
                least = lost
    _, lost, levels = front[-1]
    return lost, levels
