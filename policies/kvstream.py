"""Our default: keep the deadline in at least `target` of the sessions that can keep it, then lose least.

Three ideas, each from a weakness of CacheGen's Algorithm 1.

Algorithm 1 sends text only when everything left fits as text, so either the receiver's compute or the link stands idle.
Here both work all the time, as in Cake (arXiv 2410.03065): text is recomputed from the front while encoded chunks are
loaded from the back, as long as recomputing still ends before the deadline. Text is lossless, and every chunk of it
takes bytes off the link.

Algorithm 1 trusts the last chunk's throughput for all that is left, and compute not at all. Here both are
distributions. The throughput of the rest of the transfer is log-normal around a discounted mean over the link's recent
time, with the spread of this session's own errors; compute takes its estimates times exp(spread * z), with a Gumbel z,
the long upper tail of measured times. So every plan has a probability of being in time: that its bytes come soon enough
for what is computed after the last of them, and that all computing together fits before the deadline.

Algorithm 1 takes the best level at which the rest fits if nothing changes. Here a level is judged by what it leaves to
later choices, a chance constraint with recourse (Charnes, Cooper, Management Science 1959): with the rest at its lowest
level, the session must still be in time with at least `target` times the probability of a plan that has the lowest
level throughout. A session that cannot be saved thus spends nothing, and one that can spends at most 1 - `target` of
its chance on a choice. So that quality is spent evenly, the rest at the same level must be in time with FAIR times that
probability. The best level that satisfies both is taken, and as many texts as satisfy the first.

Before any throughput is known, the link is taken to be GUESS times as fast as the session needs it to be at the lowest
level. So a first choice risks little where there is little to spare.

Where N_c requests share the receiver, its compute is not idle when this one's is: recomputing and prefill count N_c
times, and text is sent only where all that is left fits as text, as in Algorithm 1.

Without a model to recompute with, chunks go out in order. The settings were chosen on the `tune` halves of the trace
families; `benchmarks/adaptation.py` reports on the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from kvstream.policies.api import TEXT, Choice, Observation
from kvstream.policies.errors import PolicyError
from kvstream.policies.estimators import link_samples
from kvstream.policies.measures import bytes_in_flight

PRIOR_WEIGHT = 16.0
"""Chunks whose errors weigh as much as the prior spread."""
MOST_SPREAD = 10.0
"""Of a logarithm: a throughput that may be 20,000 times what is estimated."""
FAIR = 0.7
"""Part of the chance of being in time that the rest at the same level must have."""
GUESS = 4.0
"""Median of an unknown link's throughput, over what the session needs at least."""
ROOT_2 = math.sqrt(2.0)
WEIGHTS = (0.4, 0.4, 0.15, 0.05)
"""Compute is fast, usual, slow or very slow with these probabilities: the middles of such parts of a Gumbel
distribution with median 0 and standard deviation 1, its median first."""
SLOWNESS = tuple(
    (math.log(math.log(2.0)) - math.log(-math.log(q))) * math.sqrt(6.0) / math.pi for q in (0.2, 0.6, 0.875, 0.975)
)


# Named tuples, here and below: dozens are made and taken apart for a choice, and dataclasses take thrice the time.
class Case(NamedTuple):
    """One of a few speeds of compute."""

    weight: float
    texts: int
    """Chunks, from the front, that can be recomputed before the deadline."""
    left_s: float
    """Until prefill must begin."""
    slower: float
    """Times its estimate that decoding takes."""


class Plan(NamedTuple):
    """What is still to come and to compute, texts apart."""

    nbytes: int
    """All of them."""
    chunks: tuple[tuple[int, float], ...]
    """(number, mean bytes) of those that are still to be asked for, smaller ones first."""
    compute_s: float
    """Estimate of all computing but prefill, that of texts included."""
    last_s: float
    """Estimate of what is decoded after the last byte."""


@dataclass
class KVStream:
    """Text from the front, levels from the back that keep the deadline with enough probability."""

    target: float = 0.95
    """Share of the feasible sessions that should meet the deadline."""
    memory: float = 0.6
    """Half-life of the throughput estimate, as a fraction of the deadline."""
    spread: float = 0.9
    """Spread of log(actual / estimated) throughput before any error has been observed."""
    margin_s: float = 0.01
    """Kept free for what no estimate knows: threads that wait for a processor."""

    def __post_init__(self) -> None:
        if not 0.0 < self.target < 1.0:
            raise PolicyError(f"kvstream: target={self.target}; give a share between 0 and 1")
        if not self.memory > 0.0:
            raise PolicyError(f"kvstream: memory={self.memory}; give a fraction of the deadline above 0")
        if not 0.0 < self.spread <= MOST_SPREAD:
            raise PolicyError(f"kvstream: spread={self.spread}; give a number above 0, at most {MOST_SPREAD:g}")

    def choose(self, obs: Observation) -> Choice:
        cases = self._cases(obs)
        belief = self._belief(obs)
        texts, chance = self._texts(obs, belief, cases)
        if texts and (texts == len(obs.remaining) or _compute_runs_dry(obs, belief)):
            return Choice(TEXT, chunk=obs.remaining[0], reason={"texts": texts, "in_time": chance})
        back = -1 if obs.recompute_s is not None else 0
        if belief is None:
            needed = needed_bps(lowest(obs, 0), cases[(len(cases) - 1) // 2], obs.rtt_s or 0.0, not obs.in_flight)
            if needed == math.inf:
                return Choice(0, chunk=obs.remaining[back], reason={"texts": texts})
            belief = GUESS * needed, self.spread
        level, chance = self._level(obs, belief, cases, texts, back)
        reason = {"estimate_bps": belief[0], "spread": belief[1], "texts": texts, "in_time": chance}
        return Choice(level, chunk=obs.remaining[back], reason=reason)

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
            fade = math.exp2(-some_s / keep_s)
            bits, seconds = bits * fade + some_bits, seconds * fade + some_s
        spread = math.sqrt((PRIOR_WEIGHT * self.spread**2 + squares) / (PRIOR_WEIGHT + len(samples) - 1))
        return bits / seconds, spread

    def _cases(self, obs: Observation) -> list[Case]:
        """What compute leaves, from the fastest case to the slowest."""
        left_s = obs.left_s - self.margin_s
        texts = 0
        if obs.recompute_s is not None:
            texts = len(obs.remaining)
            recompute_s = [0.0, *accumulate(obs.recompute_s)]
            decode_s = [0.0, *accumulate([row[-1] for row in obs.decode_s])]
        cases = []
        for weight, decode, recompute, prefill in _speeds(obs.decode_spread, obs.recompute_spread, obs.prefill_spread):
            recompute *= obs.concurrent
            case_s = left_s - obs.concurrent * prefill * obs.prefill_s
            free_s = case_s - max(recompute * obs.compute_backlog_s / obs.concurrent, obs.rtt_s or 0.0)
            while texts and recompute * recompute_s[texts] + decode * (decode_s[-1] - decode_s[texts]) > free_s:
                texts -= 1
            if obs.concurrent > 1 and texts < len(obs.remaining):
                texts = 0
            cases.append(Case(weight, texts, case_s, decode))
        return cases

    def _texts(self, obs: Observation, belief: tuple[float, float] | None, cases: Sequence[Case]) -> tuple[int, float]:
        """Most chunks that can come as text, from the front, at no more risk than allowed; the chance of being in time
        with them and the rest at its lowest level, as far as compute goes where nothing is known of the link."""
        if obs.recompute_s is None:
            return 0, 0.0
        most, *fewer = sorted({0, *[case.texts for case in cases]}, reverse=True)
        if not most:
            return 0, 0.0

        def chance_with(texts: int) -> float:
            if belief is None:
                return sum([case.weight for case in cases if case.texts >= texts])
            return in_time(lowest(obs, texts), belief, cases, obs, texts)

        chances = {most: chance_with(most)}
        if chances[most] < self.target:  # else no other chance is so much higher
            chances |= {texts: chance_with(texts) for texts in fewer}
        enough = self.target * max(chances.values())
        return next((texts, chance) for texts, chance in chances.items() if chance >= enough)

    def _level(
        self, obs: Observation, belief: tuple[float, float], cases: Sequence[Case], texts: int, back: int
    ) -> tuple[int, float]:
        """The best level for the next encoded chunk, and the chance of being in time with the rest at its lowest."""
        n = len(obs.remaining)
        texts = min(texts, n - 1)
        rest = slice(texts, n - 1) if back else slice(1, n)
        text_s = sum(obs.recompute_s[:texts]) if obs.recompute_s else 0.0
        flying, busy_s = bytes_in_flight(obs), obs.compute_backlog_s + text_s
        own, own_s = obs.sizes_bytes[back], obs.decode_s[back]
        sizes, decode_s = obs.sizes_bytes[rest], obs.decode_s[rest]
        last_s = decode_s[0 if back else -1] if sizes else None

        def chance_of(level: int, others: int) -> float:
            size, compute_s = own[level], busy_s + own_s[level]
            if last_s is None:
                plan = Plan(flying + size, ((1, size),), compute_s, own_s[level])
            else:
                more = sum([row[others] for row in sizes])
                one, many = (1, size), (len(sizes), more / len(sizes))
                chunks = (one, many) if size < many[1] else (many, one)
                compute_s += sum([row[others] for row in decode_s])
                plan = Plan(flying + size + more, chunks, compute_s, last_s[others])
            return in_time(plan, belief, cases, obs, texts)

        least = chance_of(0, 0)
        for level in range(obs.n_levels - 1, 0, -1):
            chance = chance_of(level, 0)
            if chance > 0.0 and chance >= self.target * least and chance_of(level, level) >= FAIR * least:
                return level, chance
        return 0, least


@lru_cache(maxsize=64)
def _speeds(decode: float, recompute: float, prefill: float) -> tuple[tuple[float, float, float, float], ...]:
    """(weight, times its estimate that decoding, recomputing and prefill take) of each case, the fastest first; one
    case where nothing varies."""
    if decode == recompute == prefill == 0.0:
        return ((1.0, 1.0, 1.0, 1.0),)
    return tuple(
        (weight, math.exp(z * decode), math.exp(z * recompute), math.exp(z * prefill))
        for weight, z in zip(WEIGHTS, SLOWNESS, strict=True)
    )


def lowest(obs: Observation, texts: int) -> Plan:
    """So many texts from the front, and the rest at its lowest level."""
    sizes, decode_s = [row[0] for row in obs.sizes_bytes[texts:]], [row[0] for row in obs.decode_s[texts:]]
    compute_s = obs.compute_backlog_s + sum(decode_s) + (sum(obs.recompute_s[:texts]) if obs.recompute_s else 0.0)
    if not sizes:
        return Plan(bytes_in_flight(obs), (), compute_s, 0.0)
    nbytes = sum(sizes)
    return Plan(bytes_in_flight(obs) + nbytes, ((len(sizes), nbytes / len(sizes)),), compute_s, decode_s[-1])


def _compute_runs_dry(obs: Observation, belief: tuple[float, float] | None) -> bool:
    """Whether compute would be idle before text asked for at the next choice could arrive."""
    if belief is None:
        return obs.compute_backlog_s <= (obs.rtt_s or 0.0)
    size = bytes_in_flight(obs) + obs.sizes_bytes[-1][-1]
    return obs.compute_backlog_s < (obs.rtt_s or 0.0) + size * 8.0 / belief[0]


def in_time(plan: Plan, belief: tuple[float, float], cases: Sequence[Case], obs: Observation, texts: int) -> float:
    """The probability that a plan and `texts` texts are here and computed in time."""
    median_bps, spread = belief
    scale = 1.0 / (spread * ROOT_2)
    rtt_s, waits, compute_s = obs.rtt_s or 0.0, texts + (not obs.in_flight), plan.compute_s
    found = 0.0
    for case in cases:
        weight, most, left_s, slower = case
        if most >= texts and slower * compute_s <= left_s:
            needed = needed_bps(plan, case, rtt_s, waits)
            if needed < math.inf:
                found += 0.5 * weight * math.erfc(scale * math.log(needed / median_bps))
    return found


def needed_bps(plan: Plan, case: Case, rtt_s: float, waits: int) -> float:
    """The least throughput (bit/s) at which a plan's bytes come in time; inf where none is enough.

    In so many round trips (`waits`) nothing of the plan arrives: one for each text, and one with nothing in flight. A
    chunk takes a round trip at least: the one after it is not asked for before it begins to arrive.
    """
    _, _, left_s, slower = case
    nbytes: float
    nbytes, chunks, _, last_s = plan
    left_s = left_s - slower * last_s - waits * rtt_s
    for count, size in chunks:
        if left_s <= 0.0 or size * left_s >= rtt_s * nbytes:
            break
        left_s -= count * rtt_s
        nbytes -= count * size
    return 8.0 * max(nbytes, 1.0) / left_s if left_s > 0.0 else math.inf
