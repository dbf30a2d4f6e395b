"""Families of traces: one generator each, its settings drawn from a range by the member's number.

Both halves of a family in `FAMILIES` come from the same ranges with different seeds, so the held-out half asks whether
a policy learned the kind of link, not the links. The families in `UNSEEN` are other kinds of links, made after our
policies had their settings: they ask what those are worth elsewhere. Settings are rounded, so that a member's
provenance is a spec that can be typed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvstream.traces.generators import (
    gilbert_elliott,
    histogram,
    lognormal,
    markov,
    outage,
    sine,
    square,
    step,
    uniform,
)
from kvstream.traces.trace import Trace

LENGTH_S = 30.0
Draw = Callable[[float, float], float]
"""A draw from a range, uniform in the logarithm, with three digits."""


def _markov(draw: Draw, seed: int) -> Trace:
    low = draw(3e6, 12e6)
    return markov(low=low, high=round(low * draw(4, 15)), stay=draw(0.4, 0.9), hold=0.1, seed=seed, length=LENGTH_S)


def _walk(draw: Draw, seed: int) -> Trace:
    median = draw(15e6, 50e6)
    return lognormal(median=median, sigma=draw(0.3, 1.0), memory=draw(0.3, 4.0), seed=seed, length=LENGTH_S)


def _bursty(draw: Draw, seed: int) -> Trace:
    good = draw(25e6, 70e6)
    bad, good_time, bad_time = round(good * draw(0.05, 0.3)), draw(0.2, 1.5), draw(0.05, 0.5)
    return gilbert_elliott(good=good, bad=bad, good_time=good_time, bad_time=bad_time, seed=seed, length=LENGTH_S)


def _uniform(draw: Draw, seed: int) -> Trace:
    low = draw(2e6, 15e6)
    return uniform(low=low, high=round(low * draw(3, 12)), hold=draw(0.1, 0.5), seed=seed, length=LENGTH_S)


def _wave(draw: Draw, seed: int) -> Trace:
    mean = draw(15e6, 50e6)
    return sine(
        mean=mean,
        amplitude=round(mean * draw(0.3, 0.95)),
        period=draw(0.4, 4.0),
        phase=draw(0.01, 1.0),
        hold=0.05,
        length=LENGTH_S,
    )


def _drop(draw: Draw, seed: int) -> Trace:
    """Even numbers have an outage, odd ones step down to a low rate and part of the way up again."""
    rate, first, down = draw(25e6, 60e6), draw(0.15, 0.8), draw(0.1, 0.6)
    if seed % 2 == 0:
        return outage(rate=rate, first=first, down=down, length=draw(2.0, 4.0))
    low, after = round(rate * draw(0.05, 0.3)), round(rate * draw(0.4, 1.0))
    return step(rates=(rate, low, after), hold=(first, down, draw(0.5, 2.0))).with_end("loop")


FAMILIES: dict[str, Callable[[Draw, int], Trace]] = {
    "markov": _markov,
    "walk": _walk,
    "bursty": _bursty,
    "uniform": _uniform,
    "wave": _wave,
    "drop": _drop,
}


def _ramp(draw: Draw, seed: int) -> Trace:
    """Away from the antenna and back: ten steps down by the same factor each, and up again."""
    top, factor, hold = draw(40e6, 90e6), draw(0.65, 0.85), draw(0.05, 0.3)
    down = [round(top * factor**i) for i in range(10)]
    return step(rates=(*down, *down[-2:0:-1]), hold=(hold,)).with_end("loop")


def _contention(draw: Draw, seed: int) -> Trace:
    """Someone else comes and goes: the whole link, or a share of it."""
    high = draw(30e6, 70e6)
    low, period, duty = round(high / round(draw(2, 6))), draw(0.3, 3.0), draw(0.3, 0.8)
    return square(high=high, low=low, period=period, duty=duty, length=LENGTH_S)


def _mmwave(draw: Draw, seed: int) -> Trace:
    """Mostly blocked, at times in sight: two far peaks, and little between."""
    low, hold = draw(4e6, 12e6), draw(0.05, 0.4)
    edges = (low, round(low * 2), round(low * 8), round(low * draw(12, 25)))
    return histogram(edges=edges, weights=(draw(3, 6), 1.0, draw(2, 5)), hold=hold, seed=seed, length=LENGTH_S)


def _spikes(draw: Draw, seed: int) -> Trace:
    """A slow link with short fast spells, the other way round than `bursty`."""
    bad = draw(8e6, 20e6)
    good, good_time, bad_time = round(bad * draw(3, 10)), draw(0.05, 0.3), draw(0.3, 1.5)
    return gilbert_elliott(good=good, bad=bad, good_time=good_time, bad_time=bad_time, seed=seed, length=LENGTH_S)


UNSEEN: dict[str, Callable[[Draw, int], Trace]] = {
    "ramp": _ramp,
    "contention": _contention,
    "mmwave": _mmwave,
    "spikes": _spikes,
}


def member(family: str, number: int) -> Trace:
    """One trace of a family: settings drawn by (family, number), the generator seeded with the number."""
    every = [*FAMILIES, *UNSEEN]
    random = np.random.default_rng([every.index(family), number])

    def draw(low: float, high: float) -> float:
        return float(f"{low * (high / low) ** random.random():.3g}")

    return (FAMILIES | UNSEEN)[family](draw, number)
