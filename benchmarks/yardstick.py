"""A causal yardstick: what a policy would do that knows the statistics of a family of traces.

A dynamic program over (chunk, time left, rate so far), as in the stochastic form of MPC, for contexts that go in order
and without text. It knows what no policy can know: how fast chunks of every size came over all traces of the very
family it is tried on, from moments at which the link had been as fast as it was just now; the distribution of compute;
and, of the costs of a miss in COSTS, the one that is best on the very units. It does not see the future, and of the
past only the mean rate of the last WINDOW_S. So it is no bound: a policy that learns more from a session's past can
beat it. What `oracle` saves beyond it, nobody who does not see the future should hope for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstream.policies.api import Choice, Observation
from kvstream.policies.estimators import link_samples
from kvstream.testbed.session.costs import IN_SESSIONS, Costs
from kvstream.testbed.simulator import noise
from kvstream.testbed.store.manifest import Manifest
from kvstream.traces.trace import Trace

Floats = NDArray[np.float64]
WINDOW_S = 0.1
STEP_S = 0.01
"""Grid of the time left."""
BINS = 12
"""Of the rate so far, equally likely in the family; one more stands for no rate yet."""
STARTS = 3_000
"""Moments of the family's traces that chunks are sent from."""
DRAWS = 2_000
"""Of what compute takes."""
COSTS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0)
"""Of a miss, in distortions of the smallest level."""


@dataclass(frozen=True, eq=False)
class Family:
    """How long chunks take on a family's links, by level."""

    edges_bps: Floats
    """[BINS - 1], between the bins of the rate so far."""
    before: NDArray[np.intp]
    """[start]: the bin that the chunk is sent from."""
    seconds: Floats
    """[start, level]."""
    after: NDArray[np.intp]
    """[start, level]: the bin when it is here."""

    @classmethod
    def of(cls, goodputs: Sequence[Trace], manifest: Manifest) -> Family:
        """Chunks of mean size from random moments of the traces."""
        rng = np.random.default_rng(1)
        sizes = np.array([chunk.sizes_bytes for chunk in manifest.chunks]).mean(axis=0)
        starts = [
            (goodputs[i], float(rng.uniform(0.0, goodputs[i].duration_s)))
            for i in rng.integers(0, len(goodputs), STARTS)
        ]
        seconds = np.array([[trace.time_for(8.0 * size, at_s) for size in sizes] for trace, at_s in starts])
        rates = np.array([_recent_bps(trace, at_s) for trace, at_s in starts])
        edges = np.quantile(rates, np.arange(1, BINS) / BINS)
        ends = np.array(
            [[_recent_bps(trace, at_s + s) for s in row] for (trace, at_s), row in zip(starts, seconds, strict=True)]
        )
        return cls(edges, np.searchsorted(edges, rates), seconds, np.searchsorted(edges, ends))


def _recent_bps(trace: Trace, at_s: float) -> float:
    begin_s = max(at_s - WINDOW_S, 0.0)
    return (trace.bits_by(at_s) - trace.bits_by(begin_s)) / (at_s - begin_s) if at_s > begin_s else 0.0


def solve(family: Family, manifest: Manifest, costs: Costs, miss: float, horizon_s: float) -> NDArray[np.int8]:
    """The best level for each [chunk, bin, steps of time left]; the last bin knows no rate. `miss` is the cost of a
    miss in distortions of the smallest level. What is late costs the smallest level for all that is left: there is
    nothing to gain by giving up."""
    n, steps = len(manifest.chunks), round(horizon_s / STEP_S) + 1
    ladder = np.array([level.distortion for level in manifest.levels])
    share = np.array([chunk.tokens for chunk in manifest.chunks]) / manifest.tokens
    varying = noise.draw(np.arange(DRAWS), n, IN_SESSIONS)
    tail_s = np.sort(varying.decode[:, -1] * costs.decode_s[-1][0] + varying.prefill * costs.prefill_s)
    in_time = np.searchsorted(tail_s, np.arange(steps) * STEP_S, side="right") / DRAWS
    value = np.repeat(miss * ladder[0] * (1.0 - in_time)[None], BINS + 1, axis=0)
    best = np.zeros((n, BINS + 1, steps), dtype=np.int8)
    of_bin = (np.arange(BINS)[:, None] == family.before).astype(float)
    of_bin /= of_bin.sum(axis=1, keepdims=True)
    for k in range(n - 1, -1, -1):
        late = (miss + share[k + 1 :].sum()) * ladder[0]
        expected = np.empty((len(ladder), BINS + 1, steps))
        for level in range(len(ladder)):
            left = np.arange(steps)[None] - np.ceil(family.seconds[:, level, None] / STEP_S)
            row = family.after[:, level, None]
            then = np.where(left >= 0, value[row, np.maximum(left, 0).astype(np.intp)], late)
            expected[level, :BINS] = share[k] * ladder[level] + of_bin @ then
            expected[level, BINS] = share[k] * ladder[level] + then.mean(axis=0)
        best[k], value = expected.argmin(axis=0), expected.min(axis=0)
    return best


@dataclass
class Yardstick:
    """Carries out what `solve` has found; one instance per session."""

    family: Family
    best: NDArray[np.int8]

    def choose(self, obs: Observation) -> Choice:
        bits = seconds = 0.0
        for some_bits, some_s in reversed(link_samples(obs)):
            if seconds < WINDOW_S:
                bits, seconds = bits + some_bits, seconds + some_s
        row, wait_s = BINS, obs.rtt_s or 0.0
        if seconds > 0.0:
            row = int(np.searchsorted(self.family.edges_bps, bits / seconds))
        if obs.in_flight:
            flight = obs.in_flight[-1]
            rest = 8.0 * (flight.bytes - flight.received_bytes)
            wait_s = rest * seconds / bits if bits > 0.0 else wait_s
        step = int(max(obs.left_s - wait_s, 0.0) / STEP_S)
        return Choice(int(self.best[obs.chunk, row, min(step, self.best.shape[2] - 1)]))
