"""When requests come: `poisson`, `bursts`, or as a trace says, at any mean rate.

With one seed, arrivals at two rates are the same but for the scale of time, so that curves over the rate compare like
with like.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstream.testbed.config import specs
from kvstream.testbed.errors import SpecError
from kvstream.testbed.workloads.request_trace import RequestTrace
from kvstream.traces.grammar import brief

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Poisson:
    """Independent of each other."""

    def unit(self, trace: RequestTrace, rng: np.random.Generator) -> Floats:
        """[requests]: when they come at a rate of 1 per second."""
        found: Floats = np.cumsum(rng.exponential(size=len(trace)))
        return found


@dataclass(frozen=True)
class Bursts:
    """Bursts come as Poisson arrivals; the requests of one come at once. Their number is geometric."""

    size: float = 8.0
    """Requests of a burst, on average."""

    def __post_init__(self) -> None:
        if not 1.0 <= self.size < np.inf:
            raise SpecError(f"bursts: size={self.size:g}; give at least 1 request")

    def unit(self, trace: RequestTrace, rng: np.random.Generator) -> Floats:
        """As of Poisson."""
        sizes = rng.geometric(1.0 / self.size, size=len(trace))
        times = np.cumsum(rng.exponential(self.size, size=len(trace)))
        found: Floats = np.repeat(times, sizes)[: len(trace)]
        return found


@dataclass(frozen=True)
class Traced:
    """As in the trace, faster or slower."""

    def unit(self, trace: RequestTrace, rng: np.random.Generator) -> Floats:
        """As of Poisson; nothing is drawn. Raises SpecError where all requests come at once."""
        if trace.rate == 0.0:
            raise SpecError(f"{trace.name}: all requests come at once, at no rate; choose poisson or bursts")
        found: Floats = trace.arrivals_s * trace.rate
        return found


KINDS = {"poisson": Poisson, "bursts": Bursts, "trace": Traced}


def parse(text: str) -> Poisson | Bursts | Traced:
    """`poisson`, `bursts,size=4` or `trace`. Raises SpecError."""
    spec = specs.parse(text, "arrivals")
    if spec.name not in KINDS:
        raise SpecError(f"unknown arrivals {brief(spec.name)}; choose from {', '.join(KINDS)}")
    found: Poisson | Bursts | Traced = specs.build(KINDS[spec.name], spec.settings, f"arrivals {spec.name}")
    return found


def times_s(kind: Poisson | Bursts | Traced, trace: RequestTrace, rate: float, seed: int) -> Floats:
    """[request]: arrivals at a mean of `rate` requests per second."""
    return kind.unit(trace, np.random.default_rng(seed)) / rate
