"""Synthetic traces: plain functions from settings to a Trace.

Every setting is keyword-only and SI: rates in bit/s at layer 2, times in seconds, fractions from 0 to 1. The
annotations say which (`Rate`, `Time`, `Fraction`, `Rates`, `Times`, `Weights`), so that a spec such as
`uniform,low=100Mbps,high=10Gbps,hold=0.2s,seed=7` maps onto them. The same settings always give the same trace: rates
come out as whole bit/s and random durations as whole microseconds, so that the last digit of a platform's logarithm
does not matter. A trace's provenance holds the full spec that makes it again.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, ParamSpec, get_type_hints

import numpy as np
from numpy.typing import ArrayLike

from kvstream.traces.errors import TraceError
from kvstream.traces.trace import MAX_ROWS, End, Floats, Per, Provenance, Trace
from kvstream.traces.units import Fraction, Rate, Time

Rates = Annotated[Sequence[float], "rates"]
"""Several rates in bit/s; `2Gbps:200Mbps:1Gbps` in a spec."""
Times = Annotated[Sequence[float], "times"]
"""Several times in seconds; `0.3s:0.4s` in a spec."""
Weights = Annotated[Sequence[float], "weights"]
"""Several plain numbers; `1:2:1` in a spec."""

P = ParamSpec("P")

GENERATORS: dict[str, Callable[..., Trace]] = {}
"""Generators by the name a spec uses."""
MAX_BINS = 10_000
IDLE = {"chunk": ("hold", "length"), "time": ("chunks",)}
"""Settings without meaning for a trace with one rate per chunk, and for one over time: refused, not ignored."""


def generator(function: Callable[P, Trace]) -> Callable[P, Trace]:
    """Register a generator under its name (with hyphens) and let it note its full spec in the provenance."""
    name = function.__name__.rstrip("_").replace("_", "-")
    signature = inspect.signature(function)
    hints = get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def made(*args: P.args, **kwargs: P.kwargs) -> Trace:
        bound = signature.bind(*args, **kwargs)
        given = _spec(name, bound.arguments, hints)
        bound.apply_defaults()
        idle = IDLE.get(bound.arguments.get("per", ""), ())
        for key in idle:
            if key in kwargs:
                other = "chunk" if bound.arguments["per"] == "time" else "time"
                value = f"{kwargs[key]:g}s" if other == "time" else kwargs[key]
                raise TraceError(f"{key} is for per={other}: write per={other},{key}={value}, or omit {key}")
        full = {key: value for key, value in bound.arguments.items() if key not in idle}
        record = Provenance(source=_spec(name, full, hints), format="generator", licence="Apache-2.0 (generated)")
        return replace(function(*args, **kwargs), name=given, provenance=(record,))

    GENERATORS[name] = made
    return made


_SUFFIX = {"rate": "bps", "rates": "bps", "time": "s", "times": "s"}


def _spec(name: str, settings: Mapping[str, Any], hints: Mapping[str, Any]) -> str:
    def written(value: Any, unit: str) -> str:
        if isinstance(value, (list, tuple)):
            return ":".join(written(one, unit) for one in value)
        return f"{int(value) if isinstance(value, float) and value.is_integer() else value}{unit}"

    units = {key: _SUFFIX.get(getattr(hints.get(key), "__metadata__", ("",))[0], "") for key in settings}
    return ",".join([name, *(f"{key}={written(value, units[key])}" for key, value in settings.items())])


def _at_least(low: float, inclusive: bool = False, **settings: float) -> None:
    for name, value in settings.items():
        if not ((low <= value if inclusive else low < value) and value < math.inf):
            raise TraceError(f"{name}={value}; give a finite value {'of at least' if inclusive else 'above'} {low:g}")


def _holds(length: float, hold: float) -> Floats:
    """Durations of `hold` seconds that fill `length`; the last may be shorter."""
    _at_least(0.0, length=length, hold=hold)
    if length / hold > MAX_ROWS:
        raise TraceError(f"length={length:g} in steps of {hold:g} s: more than {MAX_ROWS} rows; ask for fewer")
    n = max(1, math.ceil(length / hold - 1e-6))
    durations = np.full(n, hold)
    durations[-1] = length - hold * (n - 1)
    return durations


def _random(seed: int) -> np.random.Generator:
    if seed < 0:
        raise TraceError(f"seed={seed}; a seed is 0 or more")
    return np.random.default_rng(seed)


def _made(durations: ArrayLike, rates: ArrayLike, end: End = "loop", per: Per = "time") -> Trace:
    return Trace("generated", np.asarray(durations, float), np.round(np.asarray(rates, float)), end=end, per=per)


@generator
def constant(*, rate: Rate = 30e6, length: Time = 60.0) -> Trace:
    """One rate (bit/s)."""
    return _made([length], [rate])


@generator
def step(*, rates: Rates = (40e6, 10e6, 25e6), hold: Times = (2.0,)) -> Trace:
    """The given rates (bit/s), each for its `hold` (seconds; one for all, or one per rate); the last rate stays."""
    if len(hold) not in (1, len(rates)):
        raise TraceError(f"step: {len(rates)} rates and {len(hold)} holds; give one hold for all, or one per rate")
    return _made(np.resize(np.asarray(hold, float), len(rates)), rates, end="hold")


@generator
def square(
    *, high: Rate = 50e6, low: Rate = 10e6, period: Time = 2.0, duty: Fraction = 0.5, length: Time = 60.0
) -> Trace:
    """`high` for the first `duty` of each `period`, then `low`."""
    _at_least(0.0, period=period, duty=duty, length=length)
    if duty >= 1.0:
        raise TraceError(f"duty={duty}; a square wave is high for less than the whole period")
    n = max(1, round(length / period))
    if n > MAX_ROWS // 2:
        raise TraceError(f"length={length:g} with period={period:g}: too many rows; ask for fewer")
    return _made(np.tile([duty * period, (1.0 - duty) * period], n), np.tile([high, low], n))


@generator
def sine(
    *,
    mean: Rate = 30e6,
    amplitude: Rate = 20e6,
    period: Time = 5.0,
    phase: Fraction = 0.0,
    hold: Time = 0.1,
    length: Time = 60.0,
) -> Trace:
    """A sine around `mean`, its exact mean over every `hold` seconds; `phase` is a fraction of a period."""
    _at_least(0.0, period=period)
    if not 0.0 <= amplitude <= mean:
        raise TraceError(f"amplitude={amplitude:g} must lie between 0 and mean={mean:g}, or rates turn negative")
    durations = _holds(length, hold)
    edges = np.concatenate(([0.0], np.cumsum(durations)))
    integral = -np.cos(2 * np.pi * (edges / period + phase)) * period / (2 * np.pi)
    return _made(durations, mean + amplitude * np.diff(integral) / durations)


@generator
def uniform(
    *,
    low: Rate = 10e6,
    high: Rate = 50e6,
    hold: Time = 0.2,
    per: Literal["time", "chunk"] = "time",
    chunks: int = 64,
    seed: int = 0,
    length: Time = 60.0,
) -> Trace:
    """Independent uniform rates in [low, high].

    `per=time` holds each for `hold` seconds over `length`; `per=chunk` draws one for each of `chunks` chunks, and
    refuses `hold` and `length`. The two are different links: a slow chunk lasts longer than a fast one, so per chunk
    the low rates weigh more in time.
    """
    return _uniform(low, high, hold, per, chunks, seed, length)


def _uniform(low: float, high: float, hold: float, per: Per, chunks: int, seed: int, length: float) -> Trace:
    if not 0.0 <= low <= high:
        raise TraceError(f"low={low:g} and high={high:g} bit/s; low must not exceed high")
    if per == "chunk" and not 1 <= chunks <= MAX_ROWS:
        raise TraceError(f"chunks={chunks}; give 1 to {MAX_ROWS}")
    durations = _holds(length, hold) if per == "time" else np.zeros(0)
    n = chunks if per == "chunk" else len(durations)
    return _made(durations, low + (high - low) * _random(seed).random(n), per=per)


@generator
def markov(
    *,
    low: Rate = 5e6,
    high: Rate = 60e6,
    states: int = 6,
    stay: Fraction = 0.7,
    hold: Time = 0.2,
    seed: int = 0,
    length: Time = 60.0,
) -> Trace:
    """A Markov chain over `states` rates spaced evenly in the logarithm from low to high.

    Every `hold` seconds it stays with probability `stay`, else moves; a move over k states is half as likely as one
    over k - 1 (the shape of the synthetic traces of Pensieve, SIGCOMM 2017). It starts in the chain's middle.
    """
    if not 0.0 < low <= high:
        raise TraceError(f"low={low:g} and high={high:g} bit/s; both above 0 and low not above high")
    if not 2 <= states <= 1000 or not 0.0 <= stay <= 1.0:
        raise TraceError(f"states={states}, stay={stay:g}; give 2 to 1000 states and a probability")
    durations = _holds(length, hold)
    levels = low * (high / low) ** (np.arange(states) / (states - 1))
    distance = np.abs(np.subtract.outer(np.arange(states), np.arange(states)))
    away = np.where(distance > 0, 0.5**distance, 0.0)
    jumps = np.cumsum((1.0 - stay) * away / away.sum(axis=1, keepdims=True) + stay * np.eye(states), axis=1)
    path = np.empty(len(durations), dtype=int)
    state = states // 2
    for i, draw in enumerate(_random(seed).random(len(durations))):
        path[i] = state
        state = min(int(np.searchsorted(jumps[state], draw, side="right")), states - 1)
    return _made(durations, levels[path])


@generator
def gilbert_elliott(
    *,
    good: Rate = 40e6,
    bad: Rate = 5e6,
    good_time: Time = 1.0,
    bad_time: Time = 0.25,
    seed: int = 0,
    length: Time = 60.0,
) -> Trace:
    """Two states with exponential stays of mean `good_time` and `bad_time`: an interfered Wi-Fi channel.

    Gilbert (1960) and Elliott (1963), here for the rate instead of the loss. It starts good; stays last 1 ms or more.
    """
    _at_least(0.001, inclusive=True, good_time=good_time, bad_time=bad_time, length=length)
    if 2.0 * length / (good_time + bad_time) > MAX_ROWS / 4:
        raise TraceError(f"length={length:g} holds too many stays of {good_time:g} and {bad_time:g} s; ask for fewer")
    durations: list[float] = []
    random, left = _random(seed), length
    while left > 0.0005:
        mean = bad_time if len(durations) % 2 else good_time
        durations.append(max(round(-mean * math.log(1.0 - random.random()), 6), 0.001))
        left -= durations[-1]
    durations[-1] += left
    rates = np.where(np.arange(len(durations)) % 2, bad, good)
    return _made(durations, rates)


@generator
def lognormal(
    *,
    median: Rate = 25e6,
    sigma: float = 0.6,
    memory: Time = 2.0,
    low: Rate = 1e6,
    high: Rate = 200e6,
    hold: Time = 0.1,
    seed: int = 0,
    length: Time = 60.0,
) -> Trace:
    """A random walk of the rate's logarithm, pulled back to `median`: an LTE-like link.

    An Ornstein-Uhlenbeck process sampled every `hold` seconds: stationary standard deviation `sigma` (natural log),
    correlation exp(-t / memory), clipped to [low, high].
    """
    if not 0.0 < low <= median <= high:
        raise TraceError(f"low={low:g}, median={median:g}, high={high:g} bit/s; they must be in this order, above 0")
    _at_least(0.0, inclusive=True, sigma=sigma)
    _at_least(0.0, memory=memory)
    durations = _holds(length, hold)
    noise = _random(seed).standard_normal(len(durations))
    keep = math.exp(-hold / memory)
    walk = np.empty(len(durations))
    x = 0.0
    for i, shock in enumerate(noise):
        x = float(shock) if i == 0 else keep * x + math.sqrt(1.0 - keep * keep) * float(shock)
        walk[i] = x
    with np.errstate(over="ignore"):
        rates = median * np.exp(sigma * walk)
    return _made(durations, np.clip(rates, low, high))


@generator
def outage(*, rate: Rate = 40e6, floor: Rate = 0.0, first: Time = 1.0, down: Time = 0.5, length: Time = 10.0) -> Trace:
    """`rate`, but `floor` for `down` seconds from `first` on, once every `length` seconds."""
    _at_least(0.0, first=first, down=down)
    if first + down >= length:
        raise TraceError(f"first={first:g} and down={down:g} fill length={length:g} s; leave time after the outage")
    return _made([first, down, length - first - down], [rate, floor, rate])


@generator
def histogram(
    *,
    edges: Rates = (5e6, 10e6, 20e6, 40e6, 80e6),
    weights: Weights = (1.0, 3.0, 4.0, 2.0),
    hold: Time = 0.2,
    seed: int = 0,
    length: Time = 60.0,
) -> Trace:
    """Independent draws from a histogram: a bin by its weight, then a uniform rate between its edges.

    `edges` are bit/s, one more than `weights`. `histogram_of` takes both from another trace.
    """
    bounds, share = np.asarray(edges, float), np.asarray(weights, float)
    if len(bounds) != len(share) + 1 or len(share) < 1 or np.any(np.diff(bounds) < 0) or not bounds[0] >= 0.0:
        raise TraceError("histogram: give rising edges of at least 0, one more of them than weights")
    if not (np.all(np.isfinite(share)) and np.all(share >= 0.0) and 0.0 < share.sum() < math.inf):
        raise TraceError("histogram: weights are finite, not negative and not all zero")
    durations, random = _holds(length, hold), _random(seed)
    sums = np.cumsum(share / share.sum())
    bins = np.minimum(np.searchsorted(sums, random.random(len(durations)), side="right"), len(share) - 1)
    return _made(durations, bounds[bins] + (bounds[bins + 1] - bounds[bins]) * random.random(len(durations)))


def histogram_of(trace: Trace, bins: int = 20) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(edges in bit/s, weights in seconds) of a trace's rates over time, as `histogram` takes them."""
    if not 1 <= bins <= MAX_BINS:
        raise TraceError(f"bins={bins}; give 1 to {MAX_BINS}")
    weights, edges = np.histogram(
        trace.rates_bps, bins=bins, weights=trace.durations_s if trace.per == "time" else None
    )
    return tuple(map(float, edges)), tuple(map(float, weights))


@generator
def paper_uniform(
    *, per: Literal["time", "chunk"] = "chunk", hold: Time = 0.2, chunks: int = 64, seed: int = 0, length: Time = 60.0
) -> Trace:
    """0.1 to 10 Gbit/s, independent and uniform (CacheGen, SIGCOMM 2024).

    `per=chunk` is what its public code does; `per=time` holds each rate for `hold` seconds. Never mix the two.
    """
    return _uniform(0.1e9, 10e9, hold, per, chunks, seed, length)


@generator
def paper_step(*, hold: Time = 2.0) -> Trace:
    """2, then 0.2, then 1 Gbit/s: the bandwidth drop by which CacheGen (SIGCOMM 2024) explains its adaptation."""
    return step(rates=(2e9, 0.2e9, 1e9), hold=(hold,))


@generator
def paper_constant(*, rate: Rate = 3e9) -> Trace:
    """3 Gbit/s, the default link of CacheGen's evaluation (SIGCOMM 2024)."""
    return constant(rate=rate)
