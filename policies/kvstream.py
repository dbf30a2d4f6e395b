"""Our default: compute and link work towards each other, and levels are hedged against what the link may do.

Two ideas, each from a weakness of CacheGen's Algorithm 1.

Algorithm 1 sends text only when everything left fits as text, so either the receiver's compute or the link stands idle.
Here both work all the time, as in Cake (arXiv 2410.03065): text is recomputed from the front while encoded chunks are
loaded from the back, as long as recomputing still ends before the deadline. Text is lossless, and every chunk of it
takes bytes off the link.

Algorithm 1 trusts the last chunk's throughput for all that is left. Here the throughput of the rest of the transfer is
log-normal around a discounted mean over the link's recent time, with the spread of this session's own errors. For
each level of the next chunk, the rest is planned in hindsight under each of a few equally likely throughputs (hindsight
optimisation, Chong, Givan, Chang, CDC 2000): the least distortion that fits, or a miss. The level of least mean cost is
taken, a miss costing `miss` times the distortion of the smallest level. Levels of the rest mix two neighbours
of the ladder's convex hull, the LP bound of the knapsack.

Without a model to recompute with, chunks go out in order. Before any throughput is known, `first` is taken. The
settings were chosen on the `tune` halves of the trace families; `benchmarks/adaptation.py` reports on the others.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from statistics import NormalDist

from policies.api import TEXT, Choice, Observation
from policies.errors import PolicyError
from policies.estimators import link_samples
from policies.measures import bytes_in_flight, named_level

PRIOR_WEIGHT = 8.0
"""Chunks whose errors weigh as much as the prior spread."""

SCENARIOS = 9
"""Equally likely throughputs that a level is judged by."""
Z_SCORES = tuple(NormalDist().inv_cdf((i + 0.5) / SCENARIOS) for i in range(SCENARIOS))


@dataclass
class KVStream:
    """Text from the front, hedged levels from the back."""

    miss: float = 0.7
    """Cost of a missed deadline, in distortions of the smallest level."""
    memory: float = 0.6
    """Half-life of the throughput estimate, as a fraction of the deadline."""
    spread: float = 0.5
    """Spread of log(actual / estimated) throughput before any error was seen."""
    slower: float = 1.15
    """Recomputing is reckoned to take this many times its estimate: it shares the machine with decoding."""
    margin: float = 0.01
    """Fraction of the deadline kept free."""
    first: int | str = "medium"
    """Level of the first encoded chunk when no throughput is known: lowest, medium, highest or a number."""

    def __post_init__(self) -> None:
        if not self.memory > 0.0:
            raise PolicyError(f"kvstream: memory={self.memory}; give a fraction of the deadline above 0")

    def choose(self, obs: Observation) -> Choice:
        belief = self._belief(obs)
        room = self._text_room(obs)
        back = -1 if obs.recompute_s is not None else 0
        if room and (room == len(obs.remaining) or self._compute_runs_dry(obs, belief)):
            return Choice(TEXT, chunk=obs.remaining[0], reason={"text_room": room})
        chunk = obs.remaining[back]
        if belief is None:
            return Choice(named_level(self.first, obs.n_levels), chunk=chunk, reason={"text_room": room})
        level, cost = self._hedge(obs, belief, room, back)
        reason = {"estimate_bps": belief[0], "spread": belief[1], "text_room": room, "cost": cost}
        return Choice(level, chunk=chunk, reason=reason)

    def _belief(self, obs: Observation) -> tuple[float, float] | None:
        """Median throughput of the rest of the transfer (bit/s), and the spread of its logarithm."""
        samples = link_samples(obs)
        if not samples:
            return None if obs.prior_bps is None else (obs.prior_bps, self.spread)
        keep_s = self.memory * obs.deadline_s
        bits = seconds = squares = 0.0
        for index, (some_bits, some_s) in enumerate(samples):
            if index:
                squares += math.log(some_bits * seconds / (some_s * bits)) ** 2
            fade = 0.5 ** (some_s / keep_s)
            bits, seconds = bits * fade + some_bits, seconds * fade + some_s
        spread = math.sqrt((PRIOR_WEIGHT * self.spread**2 + squares) / (PRIOR_WEIGHT + len(samples) - 1))
        return bits / seconds, spread

    def _text_room(self, obs: Observation) -> int:
        """How many of the remaining chunks can still be recomputed before the deadline, from the front."""
        if obs.recompute_s is None:
            return 0
        left_s = obs.left_s - self.margin * obs.deadline_s - obs.prefill_s
        left_s -= max(obs.compute_backlog_s, obs.rtt_s or 0.0)
        decode_s = sum([row[-1] for row in obs.decode_s])
        room = 0
        for recompute_s, row in zip(obs.recompute_s, obs.decode_s, strict=True):
            decode_s -= row[-1]
            left_s -= recompute_s * self.slower
            if left_s < decode_s:
                break
            room += 1
        return room

    def _compute_runs_dry(self, obs: Observation, belief: tuple[float, float] | None) -> bool:
        """Whether compute would be idle before text asked for at the next choice could arrive."""
        if belief is None:
            return obs.compute_backlog_s <= (obs.rtt_s or 0.0)
        size = bytes_in_flight(obs) + obs.sizes_bytes[-1][-1]
        return obs.compute_backlog_s < (obs.rtt_s or 0.0) + size * 8.0 / belief[0]

    def _hedge(self, obs: Observation, belief: tuple[float, float], room: int, back: int) -> tuple[int, float]:
        """The level of least expected cost for the next encoded chunk, and that cost."""
        n, rtt_s = len(obs.remaining), obs.rtt_s or 0.0
        others = range(n - 1) if back else range(1, n)
        total = sum(obs.tokens)
        hulls = []
        for texts in sorted({0, min(room, n - 1) // 2, min(room, n - 1)}):
            rest = others[texts:]
            sizes = [sum([obs.sizes_bytes[i][level] for i in rest]) for level in range(obs.n_levels)]
            loss = [sum([obs.tokens[i] * obs.distortion[i][level] for i in rest]) for level in range(obs.n_levels)]
            hulls.append((texts * rtt_s, _hull(sizes, loss)))
        own = [obs.tokens[back] * nats for nats in obs.distortion[back]]
        miss = self.miss * total * obs.distortion[back][0]
        tail_s = obs.decode_s[back][-1] + obs.prefill_s + self.margin * obs.deadline_s
        time_s = obs.left_s - tail_s - (0.0 if obs.in_flight else rtt_s)
        waiting = bytes_in_flight(obs)
        costs = [0.0] * obs.n_levels
        for z in Z_SCORES:
            bytes_a_second = belief[0] * math.exp(z * belief[1]) / 8.0
            for level in range(obs.n_levels):
                spent = waiting + obs.sizes_bytes[back][level]
                best = miss
                for idle_s, hull in hulls:
                    best = min(best, _least(hull, (time_s - idle_s) * bytes_a_second - spent) + own[level])
                costs[level] += best
        cost = min(costs)
        return costs.index(cost), cost / (SCENARIOS * total)


def _hull(sizes: list[int], loss: list[float]) -> tuple[list[float], list[float]]:
    """The lower convex hull of (size, loss), by rising size."""
    at: list[float] = []
    value: list[float] = []
    for size, lost in zip(sizes, loss, strict=True):
        if at and lost >= value[-1]:
            continue
        while len(at) > 1 and (value[-1] - value[-2]) * (size - at[-2]) >= (lost - value[-2]) * (at[-1] - at[-2]):
            at.pop()
            value.pop()
        if at and size <= at[-1]:
            at.pop()
            value.pop()
        at.append(float(size))
        value.append(lost)
    return at, value


def _least(hull: tuple[list[float], list[float]], budget: float) -> float:
    """Least loss within a budget of bytes; inf if nothing fits."""
    at, value = hull
    index = bisect_right(at, budget)
    if index == 0:
        return math.inf
    if index == len(at):
        return value[-1]
    share = (budget - at[index - 1]) / (at[index] - at[index - 1])
    return value[index - 1] + share * (value[index] - value[index - 1])
