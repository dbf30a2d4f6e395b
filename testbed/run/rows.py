"""From what a backend observed to a row of results: the same for the emulated link and the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstream.policies.api import TEXT, LevelOrText
from kvstream.testbed.config import build
from kvstream.testbed.config.experiment import Scheme, Unit
from kvstream.testbed.results.folder import Row, Status
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.simulator import oracle_bound
from kvstream.testbed.store.manifest import Manifest
from kvstream.traces.trace import Trace


@dataclass(frozen=True)
class Bound:
    """The oracle's plan for a unit under one codec and depth; None and empty where no plan meets the deadline."""

    distortion: float | None
    levels: tuple[LevelOrText, ...]


@dataclass(frozen=True)
class Outcome:
    """One session as a backend saw it. `record` is None for a session without a first token."""

    status: Status
    why: str = ""
    record: Mapping[str, Any] | None = None
    """`SessionRecord` as a dict."""
    measured_kl: float | None = None
    answer_ok: bool | None = None
    answers_right: int | None = None
    answers: int | None = None
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    repeats: int = 0
    slowdown: Mapping[str, float] | None = None
    prior_bps: float | None = None
    """What the policy was told of the link beforehand."""
    prior_rtt_s: float | None = None
    capture: Mapping[str, Any] | None = None
    """What its packets say, if they were recorded; `packets` are rows of `packets.jsonl`."""
    packets: Sequence[Mapping[str, Any]] = ()


def bound_of(manifest: Manifest, goodput: Trace, unit: Unit, depth: int, costs: Costs, rtt_s: float) -> Bound:
    """What is possible at all: exact over plans that send the chunks in order."""
    line = oracle_bound.line_of(
        manifest, goodput, costs=costs, depth=depth, rtt_s=rtt_s, manifest_bytes=len(manifest.wire)
    )
    plan = oracle_bound.oracle_plan(line, unit.deadline_s)
    if plan is None:
        return Bound(None, ())
    text = len(manifest.levels)
    return Bound(plan.distortion, tuple(TEXT if option == text else option for option in plan.options))


def row_of(unit: Unit, scheme: Scheme, model: str, backend: str, outcome: Outcome, bound: Bound) -> Row:
    """The row of `sessions.jsonl`."""
    record = outcome.record
    ttft_s = None if record is None else float(record["ttft_s"])
    distortion = None if record is None else float(record["distortion"])
    met = ttft_s is not None and ttft_s <= unit.deadline_s
    regret = None
    if met and distortion is not None and bound.distortion is not None:
        regret = distortion - bound.distortion
    return Row(
        unit_id=unit.unit_id,
        scheme=scheme.name,
        policy=scheme.policy,
        codec=scheme.codec,
        clairvoyant=build.is_clairvoyant(scheme.policy),
        model=model,
        backend=backend,
        context=unit.context,
        trace=unit.trace,
        offset_s=unit.offset_s,
        link=unit.link,
        seed=unit.seed,
        depth=scheme.depth,
        overlap=scheme.overlap,
        reference=scheme.reference,
        status=outcome.status,
        why=outcome.why,
        deadline_s=unit.deadline_s,
        ttft_s=ttft_s,
        met=met,
        distortion=distortion,
        measured_kl=outcome.measured_kl,
        answer_ok=outcome.answer_ok,
        answers_right=outcome.answers_right,
        answers=outcome.answers,
        levels=[] if record is None else list(record["levels"]),
        bytes=None if record is None else record["bytes"],
        wasted_bytes=None if record is None else record["wasted_bytes"],
        policy_faults=0 if record is None else record["policy_faults"],
        oracle_distortion=bound.distortion,
        oracle_levels=list(bound.levels),
        regret=regret,
        fidelity=dict(outcome.fidelity),
        repeats=outcome.repeats,
        slowdown=None if outcome.slowdown is None else dict(outcome.slowdown),
        prior_bps=outcome.prior_bps,
        prior_rtt_s=outcome.prior_rtt_s,
        capture=None if outcome.capture is None else dict(outcome.capture),
    )
