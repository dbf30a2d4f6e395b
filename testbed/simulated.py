"""Runs an experiment in the simulator: the same sessions, units and files as over emulated links, in virtual time.

Contexts and codecs that come with kvstream have their manifests and compute times shipped (`offers/`), and synthetic
workloads compute theirs, so nothing but numpy is needed. Others are encoded first, which takes the extra [run].
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache

from testbed import ideal, inputs, machine, outcome, plugs, shipped, synthetic
from testbed.emulator.link import LinkSettings
from testbed.experiment import Experiment, Scheme, Unit
from testbed.guard import ask_for
from testbed.manifest import Manifest
from testbed.outcome import Outcome
from testbed.progress import Progress
from testbed.results import Json, Run
from testbed.session import Costs, SessionFailed
from testbed.simulator import simulate
from traces.resolve import open_trace
from traces.trace import Trace

Offers = Mapping[tuple[str, str], tuple[Manifest, Costs]]
"""(context, codec) -> what a sender would offer, and what computing with it costs."""


def run_simulated(experiment: Experiment, run: Run, *, quiet: bool) -> None:
    """Run every session that has no cell yet, in virtual time."""
    progress = Progress(quiet)
    units = experiment.units()
    traces = {name: open_trace(name) for name in dict.fromkeys(unit.trace for unit in units)}
    links = {text: plugs.make_link(text) for text in experiment.links}
    offers, source = _offers(experiment, progress)
    for scheme in experiment.schemes:
        plugs.check_levels(scheme.policy, len(offers[experiment.contexts[0], scheme.codec][0].levels))
    simplified = ideal.left_out(traces.values(), links.values())
    run.create(_describe(experiment, units, traces, offers, source, simplified))
    todo = [(unit, s) for unit in units for s in experiment.order(unit) if not run.has(unit.unit_id, s.name)]
    says = "SIMULATOR: virtual links and clock, no model; " + (f"it {simplified}; " if simplified else "")
    progress.place(says + source)
    progress.begin(experiment, len(units) * len(experiment.schemes), [unit for unit, _ in todo], emulated=False)
    model = synthetic.parse(experiment.workload).name if experiment.workload else "none"

    @lru_cache(maxsize=64)
    def bound(unit: Unit, codec: str, depth: int) -> outcome.Bound:
        manifest, costs = offers[unit.context, codec]
        goodput, rtt_s = _link_of(unit, traces, links)
        return outcome.bound_of(manifest, goodput, unit, depth, costs, rtt_s)

    for unit, pairs in itertools.groupby(todo, key=lambda pair: pair[0]):
        cells = []
        for _, scheme in pairs:
            manifest, costs = offers[unit.context, scheme.codec]
            link = _link_of(unit, traces, links)
            result = _session(unit, scheme, manifest, costs, *link, probe=experiment.probe)
            row = outcome.row_of(unit, scheme, model, "simulator", result, bound(unit, scheme.codec, scheme.depth))
            cells.append((row, [] if result.record is None else list(result.record["chunks"])))
            progress.step(row)
        run.save_unit(cells)


def _session(
    unit: Unit, scheme: Scheme, manifest: Manifest, costs: Costs, goodput: Trace, rtt_s: float, *, probe: bool
) -> Outcome:
    prior_bps = (float(goodput.rates_bps[0]) or None) if probe else None
    policy = plugs.make_policy(scheme.policy)
    try:
        record = simulate(
            manifest,
            policy,
            goodput,
            deadline_s=unit.deadline_s,
            costs=costs,
            depth=scheme.depth,
            rtt_s=rtt_s,
            overlap=scheme.overlap,
            seed=unit.seed,
            prior_bps=prior_bps,
            ask=ask_for(policy),
        )
    except SessionFailed as error:
        return Outcome("failed", str(error))
    return Outcome("ok", record=asdict(record), prior_bps=prior_bps)


def _link_of(unit: Unit, traces: Mapping[str, Trace], links: Mapping[str, LinkSettings]) -> tuple[Trace, float]:
    """What a session of the unit gets from its start: goodput and round trip. The fluid link knows nothing else."""
    trace, link = traces[unit.trace], links[unit.link]
    trace = trace.shifted(unit.offset_s) if unit.offset_s else trace
    return ideal.goodput(trace, link), ideal.round_trip_s(trace, link)


def _offers(experiment: Experiment, progress: Progress) -> tuple[Offers, str]:
    """Manifests and costs of every (context, codec), and in words where they are from."""
    pairs = [(context, codec) for context in experiment.contexts for codec in experiment.codecs]
    if experiment.workload:
        workload = synthetic.parse(experiment.workload)
        manifests = {pair: workload.manifest(*pair, experiment.chunk_tokens) for pair in pairs}
        facts = workload.describe(experiment.contexts, experiment.codecs, experiment.chunk_tokens)
        return {pair: (m, workload.costs(m)) for pair, m in manifests.items()}, "\n" + synthetic.text(facts)
    if experiment.model == "bundled" and experiment.chunk_tokens == shipped.CHUNK_TOKENS:
        found = {pair: shipped.load(*pair) for pair in pairs}
        if all(found.values()):
            offers = {pair: (offer.manifest, offer.costs) for pair, offer in found.items() if offer is not None}
            return offers, "sizes, distortions and compute times as shipped"
    from testbed import measuring

    return measuring.offers(experiment, progress.say), "sizes, distortions and compute times measured here"


def _describe(
    experiment: Experiment,
    units: Sequence[Unit],
    traces: Mapping[str, Trace],
    offers: Offers,
    source: str,
    simplified: str,
) -> Json:
    ladders: Json = {}
    for (_, codec), (manifest, _) in offers.items():
        ladders.setdefault(codec, [asdict(level) for level in manifest.levels])
    return (
        {
            "experiment": experiment.to_json(),
            "backend": "simulator",
            "schemes": [asdict(scheme) | {"name": scheme.name} for scheme in experiment.schemes],
            "units": [asdict(unit) | {"unit_id": unit.unit_id} for unit in units],
            "levels": ladders,
            "costs": source.strip(),
            "profiles": {codec: manifest.profile for (_, codec), (manifest, _) in offers.items()},
            "traces": {name: trace.sha256 for name, trace in traces.items()},
            "simplified": f"the simulator {simplified}" if simplified else "",
            "files": inputs.files(experiment),
            "command": machine.command(),
        }
        | _origin(experiment, offers)
        | machine.describe()
    )


def _origin(experiment: Experiment, offers: Offers) -> Json:
    """The model whose caches have these sizes, or the workload."""
    if not experiment.workload:
        return {"model": {"fingerprint": next(iter(offers.values()))[0].model}}
    workload = synthetic.parse(experiment.workload)
    return {"workload": workload.describe(experiment.contexts, experiment.codecs, experiment.chunk_tokens)}
