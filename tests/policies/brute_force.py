"""Every plan of a flow line, timed with arithmetic of its own: nothing here is shared with the code under test.

`instance` draws lines like those of real use: chunks of 2 kB to 20 MB, 1 Mbit/s to 25 Gbit/s with outages, round trips
up to 200 ms, both depths, with and without text, ladders that do not always fall.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstream.policies.line import Line
from kvstream.traces.trace import Trace

Floats = NDArray[np.float64]
HORIZON_S = 4_000.0


class StepLink:
    """Bits over time on a link of piecewise constant rate, for arrays of times."""

    def __init__(self, trace: Trace) -> None:
        durations, rates = trace.durations_s.tolist(), trace.rates_bps.tolist()
        edges, flows, at = [0.0], [], 0
        while edges[-1] < HORIZON_S:
            if at == len(durations):
                if trace.end == "loop":
                    at = 0
                else:
                    edges.append(HORIZON_S)
                    flows.append(rates[-1] if trace.end == "hold" else 0.0)
                    break
            edges.append(edges[-1] + durations[at])
            flows.append(rates[at])
            at += 1
        self.edges, self.flows = np.array(edges), np.array(flows)
        self.bits = np.concatenate(([0.0], np.cumsum(np.diff(self.edges) * self.flows)))

    def done_s(self, start_s: Floats, bits: float) -> Floats:
        """When `bits` more have passed than by `start_s`; inf if never."""
        never = ~np.isfinite(start_s)
        start_s = np.where(never, HORIZON_S, start_s)
        row = np.clip(np.searchsorted(self.edges, start_s, "right") - 1, 0, len(self.flows) - 1)
        need = self.bits[row] + (start_s - self.edges[row]) * self.flows[row] + bits
        end = np.searchsorted(self.bits, need, "left")
        there = (end < len(self.bits)) & ~never
        row = np.clip(end - 1, 0, len(self.flows) - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            at_s = self.edges[row] + (need - self.bits[row]) / self.flows[row]
        return np.where(there, np.maximum(at_s, start_s), np.inf)


def first_frame_bytes(size: float) -> float:
    """As `docs/method.md` describes frames."""
    whole = int(size)
    return min(size, max(min(65_536, max(4_096, whole // 8)), min(524_288, whole // 32)))


@dataclass(frozen=True)
class Plans:
    """Every plan of a line."""

    options: NDArray[np.intp]
    """[plan, chunk]."""
    ttft_s: Floats
    loss: Floats

    def best(self, deadline_s: float) -> float:
        """Least loss of the plans that meet a deadline; inf if none does."""
        return float(self.loss[self.ttft_s <= deadline_s].min(initial=np.inf))


def every_plan(line: Line) -> Plans:
    link = StepLink(line.goodput)
    start_s, free_s, loss = np.array([line.start_s]), np.array([line.compute_free_s]), np.zeros(1)
    options = np.zeros((1, 0), dtype=np.intp)
    for sizes, costs, losses in zip(line.sizes_bytes, line.compute_s, line.distortion, strict=True):
        grown = []
        for option, size in enumerate(sizes):
            end_s = link.done_s(start_s, size * 8.0)
            if line.depth == 1:
                next_s = end_s + line.rtt_s
            else:
                next_s = np.maximum(end_s, link.done_s(start_s, first_frame_bytes(size) * 8.0) + line.rtt_s)
            taken = np.full((len(start_s), 1), option, dtype=np.intp)
            grown.append(
                (next_s, np.maximum(end_s, free_s) + costs[option], loss + losses[option], np.hstack((options, taken)))
            )
        start_s, free_s, loss = (np.concatenate([part[i] for part in grown]) for i in range(3))
        options = np.concatenate([part[3] for part in grown])
    return Plans(options, free_s + line.prefill_s, loss)


def instance(seed: int, *, most_chunks: int = 6, most_levels: int = 5) -> Line:
    """A random line; the same for the same seed."""
    rng = np.random.default_rng([seed, 20_000])

    def between(low: float, high: float, size: int | None = None) -> Floats:
        found: Floats = np.exp(rng.uniform(np.log(low), np.log(high), size))
        return found

    n, m = int(rng.integers(2, most_chunks + 1)), int(rng.integers(2, most_levels + 1))
    depth, rtt_s = int(rng.integers(1, 3)), float(rng.choice([0.0, 0.0005, 0.005, 0.02, 0.08, 0.2]))
    steps = np.sort(between(1.0, float(between(1.2, 12.0)), m))
    uneven = between(1.0, float(rng.choice([1.01, 1.2, 8.0])), n)
    base = float(between(2e3, 20e6 / steps[-1] / uneven.max()))
    sizes = np.maximum(np.floor(base * steps * uneven[:, None]), 50.0)

    rows = int(rng.integers(1, 12))
    middle = float(between(1e6, 25e9))
    rates = np.clip(middle * between(1 / 6, 6.0, rows), 1e6, 25e9) * (rng.random(rows) > 0.2)
    if not rates.any():
        rates[0] = middle
    end = str(rng.choice(["loop", "hold", "stop"], p=[0.6, 0.3, 0.1]))
    if end == "hold" and rates[-1] == 0.0:
        rates[-1] = middle
    span_s = float(sizes.mean(0).mean() * n * 8.0 / middle) + n * rtt_s  # about what the transfer takes
    durations = np.maximum(between(span_s / 30, span_s * 0.7, rows), 1e-3)

    ladder = -np.sort(-rng.uniform(1e-4, 0.2, m))
    if rng.random() < 0.15:
        ladder[1] = ladder[0] + 0.01
    tokens = rng.integers(50, 2_000, n)
    compute = rng.uniform(0.0, 0.6 * span_s / n, (n, m))
    loss = ladder * (tokens / tokens.sum())[:, None]
    if rng.random() < 0.6:
        sizes = np.hstack((sizes, tokens[:, None] * float(rng.integers(1, 8))))
        compute = np.hstack((compute, rng.uniform(0.1, 3.0, (n, 1)) * span_s / n))
        loss = np.hstack((loss, np.zeros((n, 1))))
    return Line(
        goodput=Trace("instance", durations, rates, end=end),  # type: ignore[arg-type]
        rtt_s=rtt_s,
        depth=depth,
        start_s=2.0 * rtt_s + float(rng.choice([0.0, 1e-4, 0.03])),
        compute_free_s=float(rng.choice([0.0, 0.1 * span_s])),
        prefill_s=float(rng.uniform(0.0, 0.06)),
        sizes_bytes=tuple(map(tuple, sizes.tolist())),
        compute_s=tuple(map(tuple, compute.tolist())),
        distortion=tuple(map(tuple, loss.tolist())),
    )


def differences(seed: int) -> tuple[list[str], int]:
    """What the oracle gets wrong on an instance, in words, and how many deadlines were compared.

    A plan that ends within rounding of the deadline may count or not.
    """
    from kvstream.policies.optimum import least_distortion, least_ttft

    line = instance(seed)
    plans = every_plan(line)
    soonest = float(plans.ttft_s.min())
    found_s = least_ttft(line).ttft_s
    if not (soonest == found_s or abs(soonest - found_s) <= 1e-8 * max(soonest, 1.0)):
        return [f"earliest first token {found_s}, not {soonest}"], 0
    if soonest == np.inf:
        return [] if least_distortion(line, 100.0) is None else ["a plan on a link that dies"], 1
    latest = float(plans.ttft_s[np.isfinite(plans.ttft_s)].max())
    wrong = []
    shares = (-0.05, 1e-6, 0.03, 0.1, 0.35, 0.7)
    for share in shares:
        deadline_s = soonest + share * (latest - soonest)
        rounding_s = 1e-8 * max(deadline_s, 1.0)
        plan = least_distortion(line, deadline_s)
        low, high = plans.best(deadline_s + rounding_s), plans.best(deadline_s - rounding_s)
        if plan is None:
            if high < np.inf:
                wrong.append(f"deadline {deadline_s}: no plan, but {high} is possible")
            continue
        if not low - 1e-12 <= plan.distortion <= high + 1e-12:
            wrong.append(f"deadline {deadline_s}: {plan.distortion}, not {low}")
        row = int(np.flatnonzero((plans.options == np.array(plan.options)).all(1))[0])
        if abs(plans.ttft_s[row] - plan.ttft_s) > rounding_s or plan.ttft_s > deadline_s + rounding_s:
            wrong.append(f"deadline {deadline_s}: the plan takes {plans.ttft_s[row]}, not {plan.ttft_s}")
    return wrong, len(shares)
