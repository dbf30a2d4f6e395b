"""What is possible in a unit: the oracle's distortion, and the shortest deadline that any plan meets.

`oracle_distortion` in the results comes from here: exact over plans that send the chunks in order on the
simulator's own link (`kvstream.policies.optimum` names the two cases in which it is only a bound).
"""

from __future__ import annotations

from kvstream.policies.optimum import Line, Plan, least_distortion, least_ttft
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.store.manifest import Manifest
from kvstream.traces.fluid import FluidLink
from kvstream.traces.trace import Trace


def line_of(
    manifest: Manifest,
    goodput: Trace,
    *,
    costs: Costs,
    depth: int = 2,
    rtt_s: float = 0.0,
    manifest_bytes: int = 0,
) -> Line:
    """The whole transfer of a context as a flow line; text, where it can be recomputed, is the last option."""
    arrived_s = FluidLink(goodput, rtt_s).transfer(0.0, manifest_bytes)[1] if manifest_bytes else rtt_s
    ladder = tuple(level.distortion for level in manifest.levels)
    sizes: list[tuple[float, ...]] = [tuple(map(float, chunk.sizes_bytes)) for chunk in manifest.chunks]
    compute: list[tuple[float, ...]] = list(costs.decode_s)
    if costs.recompute_s is not None:
        ladder = (*ladder, 0.0)
        sizes = [(*row, float(chunk.text_bytes)) for row, chunk in zip(sizes, manifest.chunks, strict=True)]
        compute = [(*row, cost) for row, cost in zip(compute, costs.recompute_s, strict=True)]
    return Line(
        goodput=goodput,
        rtt_s=rtt_s,
        depth=depth,
        start_s=arrived_s + rtt_s,
        compute_free_s=0.0,
        prefill_s=costs.prefill_s,
        sizes_bytes=tuple(sizes),
        compute_s=tuple(compute),
        distortion=tuple(tuple(c.tokens / manifest.tokens * nats for nats in ladder) for c in manifest.chunks),
    )


def oracle_plan(line: Line, deadline_s: float) -> Plan | None:
    """The plan of least distortion that meets the deadline; None if none does."""
    return least_distortion(line, deadline_s)


def least_deadline_s(line: Line) -> float:
    """The shortest deadline that can be met; inf on a link that dies before."""
    return least_ttft(line).ttft_s
