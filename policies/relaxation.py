r"""Lower bounds on the distortion of what is left of a transfer, by Lagrangian relaxation.

A plan picks an option for every chunk k: loss d_k, compute c_k, and on the link s_k (by how much its position moves
until the chunk has arrived) and w_k >= s_k (at least, until the next answer can begin). Every plan that meets the
deadline satisfies (`Terms`), for every chunk m,

    sum_{k<m} w_k + s_m + a_m * sum_{k>=m} c_k <= b_m       it arrives in time for its compute and all later compute
    sum_k c_k <= C                                          all compute fits

With prices mu_m >= 0 and lambda >= 0 on these constraints the chunks separate, and every plan that satisfies them costs
at least (weak duality)

    L(lambda, mu) = sum_k min_o [ d_ko + w_ko * sum_{m>k} mu_m + s_ko * mu_k + c_ko * (lambda + sum_{m<=k} a_m * mu_m) ]
                    - lambda * C - sum_m mu_m * b_m

Good prices make the bound tight; any prices keep it valid. For a state before chunk k, with compute time T left and the
link at position p, the same prices bound the chunks from k on: their constraints have b_m - p in place of b_m, and
those of earlier chunks still charge the compute that is left, which is at most T:

    sum_{j>=k} (min_o [...]_j - mu_j * b_j) + p * sum_{m>=k} mu_m - T * (lambda + sum_{m<k} a_m * mu_m)

Where one option takes far longer to compute than the others of its chunk (text), a state has a second bound. Time for
3.9 texts is time for 3: with x_j = 1 where chunk j takes that option, sum_{j>=k} x_j <= N(T), the most of them whose
extra compute fits. This constraint, at what a text's extra compute costs above, takes the place of sum_{j>=k} c_j <= T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kvstream.policies import compiled
from kvstream.policies.line import Floats, Line, TrueLink

ASCENT_STEPS = 150
"""Steps spent on the prices before a search."""

HEAVY = 2.0
"""An option is counted if it adds more than so many times the compute that any other of its chunk adds."""

SAMPLE = 100
"""With many states, only those sets of prices are tried that bound one of so many of them best."""

AROUND = (0.5, 0.75, 0.9, 1.0, 1.1, 1.33, 2.0)
"""Prices are spread around the best ones by these factors: states with other budgets are bounded by other prices."""


def suffix_sums(values: Floats) -> Floats:
    """[..., k]: sum of entries k and later along the last axis; one entry more than `values`."""
    sums = np.cumsum(values[..., ::-1], -1)[..., ::-1]
    return np.concatenate((sums, np.zeros((*values.shape[:-1], 1))), -1)


@dataclass(frozen=True, eq=False)
class Prices:
    """Prices on the constraints: one set of them, or with a leading axis, many."""

    compute: Floats
    """lambda, [...]: of a second of compute."""
    arrival: Floats
    """mu, [..., chunk]: of a unit of the link's position on the arrival of a chunk."""


@dataclass(frozen=True, eq=False)
class Terms:
    """The constraints of the module docstring for one line and one deadline.

    Positions of the link are counted from where the first answer can begin (`TrueLink.origin`), in bits, or in seconds
    where each chunk has its own rate.
    """

    line: Line
    sent: Floats
    """s, [chunk, option]."""
    cost: Floats
    """w, [chunk, option]."""
    slope: Floats
    """a, [chunk]: with `limit`, a line above the bits of the link."""
    limit: Floats
    """b, [chunk]."""
    compute_left: float
    """C, seconds."""

    @classmethod
    def of(cls, line: Line, link: TrueLink, end_s: float, arrive_by: Floats) -> Terms:
        """`end_s` is when all compute must be done; the lines touch the link's bits about where chunks arrive."""
        sent, cost = _moves(line, link, end_s)
        n = len(cost)
        if link.per_chunk:
            slope, limit = np.ones(n), np.full(n, end_s)
        else:
            # a chunk has arrived when what it sends has passed: a round trip that its `cost` may hold comes later
            least = cost.min(1)
            earliest = link.when(link.origin + np.cumsum(least) - least + sent.min(1))
            latest = end_s - suffix_sums(line.compute.min(1))[:-1]
            slope, limit = link.above(earliest, latest, arrive_by, end_s)
        return cls(line, sent, cost, slope, limit - link.origin, end_s - line.compute_free_s)

    def priced(self, prices: Prices) -> Floats:
        """[..., chunk, option]: loss, link and compute of each option at these prices (the brackets of L)."""
        mu = prices.arrival
        later = np.cumsum(mu[..., ::-1], -1)[..., ::-1] - mu
        compute = prices.compute[..., None] + np.cumsum(mu * self.slope, -1)
        priced: Floats = (
            self.line.loss
            + self.cost * later[..., None]
            + self.sent * mu[..., None]
            + self.line.compute * compute[..., None]
        )
        return priced


def _moves(line: Line, link: TrueLink, end_s: float) -> tuple[Floats, Floats]:
    """`sent` and `cost` of the terms.

    The next answer waits for a round trip, during which the link carries no less than in the worst stretch of that
    length between the earliest start and the latest end of the chunk.
    """
    sent, frame = line.bits, line.frames
    if link.per_chunk:
        seconds = np.array([link.seconds_per_bit(k) for k in range(len(sent))])
        seconds = np.where(np.isfinite(seconds), seconds, 1e30)[:, None]
        sent, frame = sent * seconds, frame * seconds
    if line.rtt_s == 0.0 or len(sent) == 1:
        return sent, sent
    if line.depth == 1:
        frame = sent
    if link.per_chunk:
        cost = np.maximum(sent, frame + line.rtt_s)
        cost[-1] = sent[-1]
        return sent, cost
    cost, idle = sent, np.zeros(len(sent))
    last = float(link.at(np.array([max(end_s - line.compute[-1].min(), 0.0)]))[0])
    for _ in range(3):  # narrower spans make idle bits dearer, which makes the spans narrower
        cost = np.maximum(sent, frame + idle[:, None])
        cost[-1] = sent[-1]
        least = cost.min(1)
        upto = np.cumsum(least)
        begins, ends = link.origin + upto - least, last - (upto[-1] - upto)
        idle = link.least_in(line.rtt_s, link.when(np.maximum(begins, 0.0)), link.when(np.maximum(ends, 0.0)))
    return sent, cost


class Bound:
    """The best bound that several sets of prices give, for many states at once."""

    def __init__(self, terms: Terms, sets: Prices) -> None:
        lam, mu = sets.compute[:, None], sets.arrival
        priced, limits = terms.priced(sets), suffix_sums(mu * terms.limit)
        compute_price = lam + np.concatenate((np.zeros_like(lam), np.cumsum(mu * terms.slope, 1)), 1)
        self._link_price = np.ascontiguousarray(suffix_sums(mu).T)
        """[k, set]: what a unit of the link's position costs when chunk k is next."""
        self._compute_price = np.ascontiguousarray(compute_price.T)
        """[k, set]: what a second of compute costs when chunk k is next."""
        self._rest = np.ascontiguousarray((suffix_sums(priced.min(2)) - limits).T)
        self._counts = _Counts.of(terms.line.compute, priced, compute_price, limits)

    @cached_property
    def tables(self) -> tuple[Floats, ...]:
        """As the compiled loops take it."""
        counts = self._counts
        return self._link_price, self._compute_price, self._rest, counts.price, counts.rest, counts.least, counts.extra

    def rest(self, k: int, compute_left: Floats, position: Floats) -> Floats:
        """Least loss of chunks k and later, for states with this much compute time left and this link position."""
        link_price, counts = self._link_price[k], self._counts
        bound = _highest(self._compute_price[k], link_price, self._rest[k], -compute_left, position)
        if len(counts.price) == 0:
            return bound
        most = counts.most(k, compute_left)
        return np.maximum(bound, _highest(counts.price[k], link_price, counts.rest[k], -most, position))


@dataclass(frozen=True, eq=False)
class _Counts:
    """The constraints on how many of the chunks k and later take the option that is heavy to compute.

    Empty where no option is heavy, or some chunk has none.
    """

    price: Floats
    """[k, set]: of one of them."""
    rest: Floats
    """[k, set]: the bound on these chunks but for the terms in the state."""
    least: Floats
    """[k]: seconds of compute if none does."""
    extra: Floats
    """[k, k + n]: seconds that n + 1 of them add at least."""

    @classmethod
    def of(cls, compute: Floats, priced: Floats, compute_price: Floats, limits: Floats) -> _Counts:
        extra = compute - compute.min(1)[:, None]
        by_size = np.sort(extra, 1)
        if by_size.shape[1] < 2 or not (by_size[:, -1] > HEAVY * by_size[:, -2]).all():
            return cls(np.zeros((0, 0)), np.zeros((0, 0)), np.zeros(0), np.zeros((0, 0)))
        n, heavy, added = len(compute), extra == by_size[:, -1:], by_size[:, -1]
        adds = np.zeros((n, n))
        for k in range(n):
            adds[k, k:] = np.sort(added[k:])
        price = np.ascontiguousarray((compute_price[:, :n] * adds.diagonal()).T)
        count = (compiled.kernel() or cls).count_rests
        rest = count(priced, compute, compute_price, price, heavy) - limits[:, :n].T
        return cls(price, rest, suffix_sums(compute.min(1))[:-1], np.cumsum(adds, 1) * (1.0 - 1e-9))

    @staticmethod
    def count_rests(priced: Floats, compute: Floats, compute_price: Floats, price: Floats, heavy: Floats) -> Floats:
        """[k, set]: sum of the cheapest options of the chunks from k on, where compute is no longer charged for chunks
        before k, and each heavy option is."""
        rest = np.empty_like(price)
        for k in range(len(compute)):
            own = priced[:, k:] - compute_price[:, k, None, None] * compute[k:] + price[k][:, None, None] * heavy[k:]
            rest[k] = np.cumsum(own.min(2), 1)[:, -1]
        return rest

    def most(self, k: int, compute_left: Floats) -> Floats:
        """How many fit at most."""
        return np.searchsorted(self.extra[k, k:], compute_left - self.least[k], side="right").astype(np.float64)


def _highest(a: Floats, b: Floats, c: Floats, x: Floats, y: Floats) -> Floats:
    """For each (x, y), about the highest of a x + b y + c, and never above it."""
    if len(x) > 4 * SAMPLE:
        some = np.arange(SAMPLE) * (len(x) - 1) // (SAMPLE - 1)
        best = np.unique(_planes(a, b, c, x[some], y[some]).argmax(0))
        a, b, c = a[best], b[best], c[best]
    highest: Floats = _planes(a, b, c, x, y).max(0)
    return highest


def _planes(a: Floats, b: Floats, c: Floats, x: Floats, y: Floats) -> Floats:
    """[plane, point]: a x + b y + c; not as a matrix product, which rounds as the machine's library does."""
    heights: Floats = np.multiply.outer(a, x)
    heights += np.multiply.outer(b, y)
    heights += c[:, None]
    return heights


def ascend(terms: Terms, to_beat: float) -> Prices:
    """Sets of prices that bound the whole line well, by subgradient ascent of L, and others around them.

    The steps are Polyak's, (to_beat - L) / |g|^2 along the subgradient g, which holds by how much the minimising
    options violate each constraint; halved after eight steps without progress. Compute and link have different units,
    so g is scaled by what a unit of each can save at most.
    """
    line, cost = terms.line, terms.cost
    spread = float(line.loss.max(1).sum() - line.loss.min(1).sum())
    unit_c = spread / max(float(line.compute.max(1).sum() - line.compute.min(1).sum()), 1e-12)
    unit_b = spread / max(float(cost.max(1).sum() - cost.min(1).sum()), 1e-12)
    kernel = compiled.kernel()
    if kernel:
        tables = line.tables, terms.sent, cost, terms.slope, terms.limit, terms.compute_left
        lam, mu = kernel.ascent(*tables, to_beat, unit_c, unit_b)
    else:
        lam, mu = _ascent(terms, to_beat, unit_c, unit_b)
    last = np.append(np.zeros(len(mu) - 1), mu.sum())
    around = [(c, b * mu) for c in AROUND for b in AROUND] + [(b, b * last) for b in AROUND] + [(0.0, 0.0 * mu)]
    return Prices(np.array([c * lam for c, _ in around]), np.array([arrival for _, arrival in around]))


def _ascent(terms: Terms, to_beat: float, unit_c: float, unit_b: float) -> tuple[float, Floats]:
    """The best prices found. Sums are running sums, which the compiled loop can repeat to the last bit."""
    line, cost, sent, slope, limit = terms.line, terms.cost, terms.sent, terms.slope, terms.limit
    n = len(cost)
    rows = np.arange(n)
    lam, mu = 0.0, np.append(np.zeros(n - 1), unit_b)
    best, best_bound = (lam, mu), -math.inf
    pace, stalled = 1.0, 0
    for _ in range(ASCENT_STEPS):
        priced = terms.priced(Prices(np.array(lam), mu))
        pick = priced.argmin(1)
        bound = float(np.cumsum(priced[rows, pick] - mu * limit)[-1]) - lam * terms.compute_left
        if bound > best_bound:
            best, best_bound, stalled = (lam, mu), bound, 0
        else:
            stalled += 1
            if stalled == 8:
                (lam, mu), pace, stalled = best, pace / 2.0, 0
                continue
        left, costs = np.cumsum(line.compute[rows, pick][::-1])[::-1], cost[rows, pick]
        over_c = float(left[0]) - terms.compute_left
        over_b = np.cumsum(costs) - costs + sent[rows, pick] + slope * left - limit
        over_c = 0.0 if lam == 0.0 and over_c < 0.0 else over_c
        over_b = np.where((mu == 0.0) & (over_b < 0.0), 0.0, over_b)
        length = float(np.cumsum(over_b * unit_b * (over_b * unit_b))[-1]) + over_c * unit_c * (over_c * unit_c)
        if length == 0.0:
            break
        step = pace * max(to_beat - bound, 0.01 * abs(to_beat)) / length
        lam = max(lam + step * over_c * (unit_c * unit_c), 0.0)
        mu = np.maximum(mu + step * over_b * (unit_b * unit_b), 0.0)
    return best
