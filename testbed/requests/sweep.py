"""Carries out a `RequestsSpec` in the simulator: every scheme at every rate, on the same requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import fsum
from pathlib import Path
from typing import Any

from kvstream.testbed.config import build, specs
from kvstream.testbed.config.experiment import Scheme
from kvstream.testbed.config.requests import SAMPLE_NAME, RequestsSpec
from kvstream.testbed.host import machine
from kvstream.testbed.requests import goodput
from kvstream.testbed.requests.goodput import Goodput
from kvstream.testbed.results import stats
from kvstream.testbed.results.folder import write_whole
from kvstream.testbed.results.words import nats, percent, seconds
from kvstream.testbed.simulator import link_model, orders
from kvstream.testbed.simulator.requests import Fleet, Outcome, Serving, simulate
from kvstream.testbed.workloads import arrivals, request_trace, synthetic
from kvstream.traces.resolve import open_trace

Json = dict[str, Any]
FILE = "requests.json"


@dataclass(frozen=True)
class Point:
    """One scheme at one rate."""

    scheme: str
    rate: float
    """Requests per second."""
    met_rate: float
    """Share of the requests that met the deadline; one turned away did not."""
    low: float | None
    high: float | None
    """Its 95 % interval."""
    met_rates: tuple[float, ...]
    """Of each repetition."""
    ttft_s: dict[str, float | None]
    """p50, p90, p95, p99; inf for what was turned away."""
    link_utilisation: float
    compute_utilisation: float
    distortion: float
    """Mean over the tokens that came from the store, nats."""
    bytes_per_request: float
    cached: float
    stored: float
    """Shares of all prompt tokens: held by the receiver, fetched from the store (or recomputed chunk by chunk)."""
    turned_away: int
    policy_faults: int


@dataclass(frozen=True)
class Curve:
    """A scheme's points, by rising rate, and what they come to."""

    scheme: Scheme
    points: tuple[Point, ...]
    goodputs: tuple[Goodput, ...]


@dataclass(frozen=True)
class Sweep:
    """A spec, opened: everything named in it has been found. Raises SpecError, TraceError or PolicyError."""

    spec: RequestsSpec

    def __post_init__(self) -> None:
        for scheme in self.spec.schemes:
            self.serving(scheme)
        for trace in self.requests:
            arrivals.times_s(arrivals.parse(self.spec.arrivals), trace, 1.0, self.spec.seed)

    def serving(self, scheme: Scheme) -> Serving:
        spec = self.spec
        link, trace = build.make_link(spec.link), open_trace(spec.trace)
        workload = synthetic.parse(spec.workload)
        build.check_levels(scheme.policy, len(workload.ladder(scheme.codec)))
        return Serving(
            workload,
            scheme.codec,
            lambda: build.make_policy(scheme.policy),
            link_model.goodput(trace, link),
            spec.deadline_s,
            scheme.depth,
            link_model.round_trip_s(trace, link),
            specs.build(Fleet, specs.parse_settings(spec.fleet, "fleet"), "fleet"),
            orders.parse(spec.order),
        )

    @cached_property
    def requests(self) -> tuple[request_trace.RequestTrace, ...]:
        """Of each repetition."""
        spec = self.spec
        trace = request_trace.read(request_trace.SAMPLE if spec.requests == SAMPLE_NAME else spec.requests)
        starts = [number * len(trace) // spec.repetitions for number in range(spec.repetitions)]
        return tuple(trace.repeated(spec.count, start) for start in starts)

    def at(self, serving: Serving, rate: float) -> list[Outcome]:
        """What becomes of the requests of each repetition at a rate."""
        kind, seed = arrivals.parse(self.spec.arrivals), self.spec.seed
        return [
            simulate(trace, arrivals.times_s(kind, trace, rate, seed + number), serving)
            for number, trace in enumerate(self.requests)
        ]

    def curve(
        self, scheme: Scheme, say: Callable[[Point], None],
        serve: Callable[[Scheme, float], list[Outcome]] | None = None,
    ) -> Curve:  # fmt: skip
        """A scheme's points, at the spec's rates or those that are found; `say` is told of each. Served by `serve`, or
        in the simulator."""
        serving, points = self.serving(scheme), {}

        def measure(rate: float) -> Point:
            points[rate] = point_of(scheme.name, rate, serve(scheme, rate) if serve else self.at(serving, rate))
            say(points[rate])
            return points[rate]

        if self.spec.rates:
            for rate in sorted(set(self.spec.rates)):
                measure(rate)
        else:
            goodput.search(measure, self.spec.targets)
        found = tuple(points[rate] for rate in sorted(points))
        return Curve(scheme, found, tuple(goodput.goodput(found, target) for target in self.spec.targets))


def point_of(scheme: str, rate: float, found: Sequence[Outcome]) -> Point:
    """What became of the requests at a rate, in figures: of all repetitions together."""
    met_rates = tuple(float(one.met.mean()) for one in found)
    met_rate, low, high = goodput.attainment(met_rates)
    tokens = sum(int(one.tokens.sum()) for one in found)

    def mean(values: Iterable[float]) -> float:
        return fsum(values) / len(found)

    return Point(
        scheme=scheme,
        rate=rate,
        met_rate=met_rate,
        low=low,
        high=high,
        met_rates=met_rates,
        ttft_s=stats.ttft_quantiles([ttft_s for one in found for ttft_s in one.ttft_s.tolist()]),
        link_utilisation=mean(one.link_utilisation for one in found),
        compute_utilisation=mean(one.compute_utilisation for one in found),
        distortion=mean(one.distortion for one in found),
        bytes_per_request=mean(float(one.bytes.mean()) for one in found),
        cached=sum(int(one.cached_tokens.sum()) for one in found) / tokens,
        stored=sum(int(one.stored_tokens.sum()) for one in found) / tokens,
        turned_away=sum(int(one.turned_away.sum()) for one in found),
        policy_faults=sum(one.policy_faults for one in found),
    )


def to_json(sweep: Sweep, curves: Sequence[Curve]) -> Json:
    """Everything of a run."""
    trace, spec = sweep.requests[0], sweep.spec
    serving = sweep.serving(spec.schemes[0])
    body = {
        "spec": spec.to_json(),
        "backend": "simulator",
        "synthetic": True,
        "workload": serving.workload.name,
        "fleet": asdict(serving.fleet),
        "requests": {
            "trace": trace.name, "count": len(trace), "tokens": float(trace.tokens.mean()),
            "reusable": trace.reusable,
        },
        "simplified": link_model.left_out([open_trace(spec.trace)], [build.make_link(spec.link)]),
        "curves": curves_json(curves),
        "command": machine.command(),
    }  # fmt: skip
    return body | machine.describe()


def curves_json(curves: Sequence[Curve]) -> list[Json]:
    return [
        {
            "scheme": curve.scheme.name,
            "policy": curve.scheme.policy,
            "codec": curve.scheme.codec,
            "depth": curve.scheme.depth,
            "goodput": [asdict(one) for one in curve.goodputs],
            "points": [asdict(point) for point in curve.points],
        }
        for curve in curves
    ]


def write(folder: Path, body: Json) -> Path:
    """Write a run's results; numbers that are infinite become null."""
    write_whole(folder / FILE, body)
    return folder / FILE


def table(body: Json) -> str:
    """Goodput by scheme, and what a scheme's requests see at its first goodput, or at the lowest rate."""
    targets = [one["target"] for one in body["curves"][0]["goodput"]]
    receivers = body["fleet"]["receivers"]
    goals = [f"goodput at {percent(target)}" for target in targets]
    heads = ["scheme", *goals, "per receiver", "at", "TTFT p50/p90/p99", "link", "compute", "distortion"]
    rows = [heads]
    for curve in body["curves"]:
        goodputs = curve["goodput"]
        rate = goodputs[0]["rate"]
        points = curve["points"]
        there = max((p for p in points if p["rate"] <= (rate or 0.0)), key=lambda p: p["rate"], default=points[0])
        ttft_s = "/".join(seconds(_finite(there["ttft_s"][name])) for name in ("p50", "p90", "p99"))
        per = "-" if rate is None else f"{rate / receivers:.3g}"
        rows.append([
            curve["scheme"], *map(_goodput, goodputs), per, f"{there['rate']:.3g}/s", f"{ttft_s} s",
            percent(there["link_utilisation"]), percent(there["compute_utilisation"]), nats(there["distortion"]),
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def verdict(body: Json) -> str:
    """The last scheme beside the first that has a goodput at the first target, and the best of the others."""
    rates = {curve["scheme"]: curve["goodput"][0] for curve in body["curves"] if curve["goodput"][0]["rate"]}
    if not rates:
        return "No scheme reaches the first target at any of these rates."
    best = max(rates, key=lambda name: rates[name]["rate"])
    said = f"{best} serves {rates[best]['rate']:.3g} requests/s at {percent(rates[best]['target'])} attainment"
    others = sorted((one["rate"], name) for name, one in rates.items() if name != best)
    compared = ", ".join(f"{stats.times(rates[best]['rate'] / rate)} as many as {name}" for rate, name in others)
    return f"{said}: {compared}." if compared else f"{said}."


def _goodput(found: Json) -> str:
    """`12.3 [11.9, 12.6]/s`."""
    if found["rate"] is None:
        return "-"
    low, high = (f"{found[end]:.3g}" if found[end] else "-" for end in ("low", "high"))
    return f"{'>' if found['is_open'] else ''}{found['rate']:.3g} [{low}, {high}]/s"


def _finite(value: float | None) -> float | None:
    return None if value is None or value == float("inf") else value
