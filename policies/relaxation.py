"""Lower bounds on the distortion that the rest of a transfer must cost, by prices on its two machines.

Lagrangian relaxation: every plan that meets the deadline satisfies some sums over chunks. Put a price on each; then
every chunk can choose alone, and what it chooses costs, less what the sums allow, is never above the best plan (weak
duality). Good prices make the bound tight; bad ones keep it valid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from policies.line import Floats, Line, TrueLink, news_bits

ASCENT_STEPS = 150
"""Steps spent on the prices before a search."""

AROUND = (0.5, 0.75, 0.9, 1.0, 1.1, 1.33, 2.0)
"""Price sets are spread around the best one by these factors: states with other budgets are bounded by other prices."""


def suffix_sums(values: Floats) -> Floats:
    """[k]: sum of entries k and later; one entry more than `values`."""
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)


@dataclass(frozen=True)
class Terms:
    """What every plan that meets the deadline satisfies.

    For every chunk m: it arrives early enough for the compute of m and all later ones,
    sum(cost of chunks < m) + sent of m + slope_m * sum(compute of chunks >= m) <= limit_m, where (slope, limit) is a
    line above the bits of the link. And all compute fits.

    `sent` and `cost` are [k, option]: by how much the link's position moves until the chunk has arrived, and at least
    until the next answer can begin; in bits, or in seconds where each chunk has its own rate.
    """

    line: Line
    sent: Floats
    cost: Floats
    slope: Floats
    limit: Floats
    compute_left: float

    @classmethod
    def of(cls, line: Line, link: TrueLink, end_s: float, arrive_by: Floats) -> Terms:
        """`end_s` is when all compute must be done; the lines touch the link's bits about where chunks arrive."""
        first = line.start_s if link.per_chunk else float(link.at(np.array([line.start_s]))[0])
        sent, cost = _moves(line, link, end_s)
        n = len(cost)
        if link.per_chunk:
            slope, limit = np.ones(n), np.full(n, end_s)
        else:
            earliest = link.when(first + np.cumsum(cost.min(1)))
            latest = end_s - suffix_sums(line.compute.min(1))[:-1]
            slope, limit = link.above(earliest, latest, arrive_by, end_s)
        return cls(line, sent, cost, slope, limit - first, end_s - line.compute_free_s)


def _moves(line: Line, link: TrueLink, end_s: float) -> tuple[Floats, Floats]:
    """`sent` and `cost` of the terms.

    The next answer waits for a round trip, during which the link carries no less than in the worst stretch of that
    length between the earliest start and the latest end of the chunk.
    """
    sent, news = line.bits, news_bits(line.bits)
    if link.per_chunk:
        seconds = np.array([link.seconds_a_bit(k) for k in range(len(sent))])
        seconds = np.where(np.isfinite(seconds), seconds, 1e30)[:, None]
        sent, news = sent * seconds, news * seconds
    if line.rtt_s == 0.0 or len(sent) == 1:
        return sent, sent
    if line.depth == 1:
        news = sent
    if link.per_chunk:
        cost = np.maximum(sent, news + line.rtt_s)
        cost[-1] = sent[-1]
        return sent, cost
    cost, idle = sent, np.zeros(len(sent))
    first = float(link.at(np.array([line.start_s]))[0])
    last = float(link.at(np.array([max(end_s - line.compute[-1].min(), 0.0)]))[0])
    for _ in range(3):  # narrower spans make idle bits dearer, which makes the spans narrower
        cost = np.maximum(sent, news + idle[:, None])
        cost[-1] = sent[-1]
        least = cost.min(1)
        upto = np.cumsum(least)
        begins, ends = first + upto - least, last - (upto[-1] - upto)
        idle = link.least_in(line.rtt_s, link.when(np.maximum(begins, 0.0)), link.when(np.maximum(ends, 0.0)))
    return sent, cost


@dataclass(frozen=True)
class PriceSet:
    """A price on compute and on each chunk's arrival."""

    compute: float
    arrival: Floats


class Prices:
    """The bound of several price sets at once, for many states.

    Chunk i pays for its cost (the arrivals of later chunks), for what it sends (its own arrival) and for its compute
    (all of it, and the arrivals of chunks up to i).
    """

    def __init__(self, terms: Terms, sets: list[PriceSet]) -> None:
        line = terms.line
        mu = np.array([prices.arrival for prices in sets])
        zero = np.zeros((len(sets), 1))
        self._link_price = np.concatenate((np.cumsum(mu[:, ::-1], 1)[:, ::-1], zero), 1)
        """[set, k]: what a unit of the link's position costs when chunk k is next."""
        self._compute_price = np.array([[prices.compute] for prices in sets]) + np.concatenate(
            (zero, np.cumsum(mu * terms.slope, 1)), 1
        )
        """[set, k]: what a second of compute costs when chunk k is next, and in chunk k - 1."""
        priced = (
            line.loss
            + terms.cost * self._link_price[:, 1:, None]
            + terms.sent * mu[:, :, None]
            + line.compute * self._compute_price[:, 1:, None]
        )  # [set, chunk, option]
        least = priced.min(2) - mu * terms.limit
        self._rest = np.concatenate((np.cumsum(least[:, ::-1], 1)[:, ::-1], zero), 1)

    def rest(self, k: int, compute_left: Floats, position: Floats) -> Floats:
        """Least loss of chunks k and later, for states with so much compute time left at so far a link position."""
        prices = np.stack((self._compute_price[:, k], self._link_price[:, k]), 1)
        return (prices @ np.stack((-compute_left, position)) + self._rest[:, k, None]).max(0)


def ascend(terms: Terms, to_beat: float) -> list[PriceSet]:
    """Raise the bound of the whole line by subgradient steps (Polyak's rule); the best prices, and others around."""
    line, cost, sent, slope, limit = terms.line, terms.cost, terms.sent, terms.slope, terms.limit
    n = len(cost)
    rows = np.arange(n)
    spread = float(line.loss.max(1).sum() - line.loss.min(1).sum())
    unit_c = spread / max(float(line.compute.max(1).sum() - line.compute.min(1).sum()), 1e-12)
    unit_b = spread / max(float(cost.max(1).sum() - cost.min(1).sum()), 1e-12)
    lam, mu = 0.0, np.zeros(n)
    mu[-1] = unit_b
    best, best_at = -math.inf, (lam, mu)
    pace, stalled = 1.0, 0
    for _ in range(ASCENT_STEPS):
        link_price = np.cumsum(mu[::-1])[::-1] - mu
        compute_price = lam + np.cumsum(mu * slope)
        priced = line.loss + cost * link_price[:, None] + sent * mu[:, None] + line.compute * compute_price[:, None]
        pick = priced.argmin(1)
        bound = float(priced[rows, pick].sum() - lam * terms.compute_left - (mu * limit).sum())
        if bound > best:
            best, best_at, stalled = bound, (lam, mu), 0
        else:
            stalled += 1
            if stalled == 8:
                pace, stalled = pace / 2.0, 0
                lam, mu = best_at
                continue
        compute, costs = line.compute[rows, pick], cost[rows, pick]
        over_c = float(compute.sum()) - terms.compute_left
        over_b = np.cumsum(costs) - costs + sent[rows, pick] + slope * np.cumsum(compute[::-1])[::-1] - limit
        over_c = 0.0 if lam == 0.0 and over_c < 0.0 else over_c
        over_b = np.where((mu == 0.0) & (over_b < 0.0), 0.0, over_b)
        length = (over_c * unit_c) ** 2 + float(((over_b * unit_b) ** 2).sum())
        if length == 0.0:
            break
        step = pace * max(to_beat - bound, 0.01 * abs(to_beat)) / length
        lam = max(lam + step * over_c * unit_c**2, 0.0)
        mu = np.maximum(mu + step * over_b * unit_b**2, 0.0)
    lam, mu = best_at
    last = np.append(np.zeros(n - 1), mu.sum())
    return [
        *(PriceSet(lam * c, mu * b) for c in AROUND for b in AROUND),
        *(PriceSet(lam * b, last * b) for b in AROUND),
        PriceSet(0.0, np.zeros(n)),
    ]
