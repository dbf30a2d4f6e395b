"""Carries out a `RequestsSpec` over an emulated link, and beside it in the simulator, on the same requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstream.testbed.config import build
from kvstream.testbed.config.experiment import Scheme, about
from kvstream.testbed.errors import SpecError
from kvstream.testbed.requests import fleet, sweep
from kvstream.testbed.requests.sweep import Json, Point, Sweep
from kvstream.testbed.simulator.requests import Outcome
from kvstream.testbed.workloads import arrivals
from kvstream.testbed.workloads.request_trace import BLOCK_TOKENS, RequestTrace
from kvstream.traces.resolve import open_trace

REPEATS: Final = 2
"""A row of requests over the fidelity limits is served so often again."""


def check(given: Sweep) -> None:
    """Raises SpecError for what real receivers cannot do."""
    fleet.check(given.serving(given.spec.schemes[0]).fleet)
    if not given.spec.rates:
        raise SpecError("over an emulated link every rate takes its time; give the rates, such as --rate 2 --rate 4")
    longest_s = given.spec.count / min(given.spec.rates)
    if longest_s > fleet.COVERED_S / 2:
        raise SpecError(
            f"{given.spec.count} requests take {about(longest_s)} at the lowest rate; give a smaller --count"
        )
    for scheme in given.spec.schemes:
        if build.is_clairvoyant(scheme.policy):
            raise SpecError(f"scheme {scheme.name} sees the future, which nobody knows where requests share a link")


def predicted_s(given: Sweep) -> float:
    """About how long the requests take."""
    spec = given.spec
    return len(spec.schemes) * spec.repetitions * sum(spec.count / rate for rate in set(spec.rates))


def run(given: Sweep, folder: Path, say: Callable[[Point], None]) -> Json:
    """The results, as `sweep.to_json` gives them, with the simulator's curves and the parity. Must be called inside a
    sandbox."""
    spec = given.spec
    most = max(int(_whole_blocks(trace).max()) for trace in given.requests)
    link, trace = build.make_link(spec.link), open_trace(spec.trace)
    codecs = list(dict.fromkeys(scheme.codec for scheme in spec.schemes))
    measured: dict[tuple[str, float], list[Outcome]] = {}
    invalid: list[Json] = []
    folder.mkdir(parents=True, exist_ok=True)
    with fleet.open_crew(
        given.serving(spec.schemes[0]), codecs, spec.workload, trace, link, max(most, 1), folder
    ) as crew:

        def serve(scheme: Scheme, rate: float) -> list[Outcome]:
            found = []
            kind = arrivals.parse(spec.arrivals)
            for number, requests in enumerate(given.requests):
                times_s = arrivals.times_s(kind, requests, rate, spec.seed + number)
                for _ in range(1 + REPEATS):
                    served = crew.serve(requests, times_s, scheme.policy, given.serving(scheme))
                    if served.verdict.ok:
                        break
                else:
                    why = list(served.verdict.reasons)
                    invalid.append({"scheme": scheme.name, "rate": rate, "repetition": number, "why": why})
                found.append(served.outcome)
            measured[scheme.name, rate] = found
            return found

        curves = [given.curve(scheme, say, serve) for scheme in spec.schemes]
        settings = crew.settings
    simulated = [given.curve(scheme, lambda point: None) for scheme in spec.schemes]
    body = sweep.to_json(given, curves) | {"backend": "mininet", "network": settings, "invalid": invalid}
    body["simulated"] = sweep.curves_json(simulated)
    body["parity"] = [
        {"scheme": scheme.name, "rate": rate}
        | parity(measured[scheme.name, rate], given.at(given.serving(scheme), rate))
        for scheme in spec.schemes
        for rate in sorted(set(spec.rates))
    ]
    return body


def parity(emulated: Sequence[Outcome], simulated: Sequence[Outcome]) -> Json:
    """How far the two are apart, request by request and as a whole; of requests that both served."""
    apart = np.concatenate([np.abs(a.ttft_s - b.ttft_s) for a, b in zip(emulated, simulated, strict=True)])
    apart = apart[np.isfinite(apart)]
    met = [float(np.mean([one.met.mean() for one in side])) for side in (emulated, simulated)]
    halves = np.quantile(apart, [0.5, 0.95]).tolist() if len(apart) else [None, None]
    return {"ttft_p50_s": halves[0], "ttft_p95_s": halves[1], "met_rate": met[0], "simulated_met_rate": met[1]}


def verdict(body: Json) -> str:
    """One line on the parity, one on what the link did."""
    rows = body["parity"]
    share = max(abs(row["met_rate"] - row["simulated_met_rate"]) for row in rows)
    known = [row["ttft_p50_s"] for row in rows if row["ttft_p50_s"] is not None]
    middle = f"TTFTs differ by {1e3 * float(np.median(known)):.0f} ms in the middle, " if known else ""
    said = f"Against the simulator: {middle}attainment by at most {100 * share:.0f} points."
    total = len(rows) * body["spec"]["repetitions"]
    if body["invalid"]:
        said += f" {len(body['invalid'])} of {total} rows of requests are over the fidelity limits: see requests.json."
    return said


def _whole_blocks(trace: RequestTrace) -> NDArray[np.int64]:
    return np.minimum(np.diff(trace.firsts), (trace.tokens - 1) // BLOCK_TOKENS)
