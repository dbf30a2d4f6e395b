"""Runs an experiment in the simulator: the same sessions, units and files as over emulated links, in virtual time.

Contexts and codecs that come with kvstream have their manifests and compute times shipped (`offers/`), and synthetic
workloads compute theirs, so nothing but numpy is needed. Others are encoded first, which takes the extra [run].
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Final

import numpy as np

from kvstream.testbed.config import build
from kvstream.testbed.config.experiment import Experiment, Scheme, Unit
from kvstream.testbed.emulator.link import LinkSettings
from kvstream.testbed.host import machine
from kvstream.testbed.results.folder import Json, Row, Run
from kvstream.testbed.run import check_inputs, ray_executor, rows
from kvstream.testbed.run import jobs as parallel
from kvstream.testbed.run.progress import Progress
from kvstream.testbed.run.ray_executor import Ray
from kvstream.testbed.run.rows import Outcome
from kvstream.testbed.run.shards import WHOLE, Shard
from kvstream.testbed.session.ask import ask_for
from kvstream.testbed.session.costs import EXACT, IN_SESSIONS, Costs
from kvstream.testbed.session.record import SessionFailed
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.simulator import link_model, noise
from kvstream.testbed.simulator.compiled import Context, simulate_many
from kvstream.testbed.simulator.simulator import simulate
from kvstream.testbed.store import shift
from kvstream.testbed.store.manifest import Manifest, ladder
from kvstream.testbed.workloads import precomputed, synthetic
from kvstream.traces.trace import Trace

COMPILED_FROM: Final = 20_000
"""Sessions of a process from which on compiling, some 10 s where it has not been done before, pays."""
Offers = Mapping[tuple[str, str], tuple[Manifest, Costs]]
"""(context, codec) -> what a sender would offer, and what computing with it costs."""


def run_simulated(
    experiment: Experiment,
    run: Run,
    *,
    quiet: bool,
    offers: Offers | None = None,
    overhead_s: Mapping[str, float] | None = None,
    shard: Shard = WHOLE,
    jobs: int = 1,
    on: Ray | None = None,
) -> None:
    """Run every session of the shard that has no cell yet, in virtual time, in `jobs` processes or `on` a cluster.

    `offers` are those of an emulated run, if any, and `overhead_s` what the ends add there to a round trip, by link.
    """
    progress = Progress(quiet)
    units = experiment.units()
    traces = {name: named.trace for name, named in experiment.opened.every.items()}
    links = {text: build.make_link(text) for text in experiment.links}
    if offers is None:
        offers, source = _offers(experiment, progress)
    else:
        source = "sizes, distortions and compute times of the emulated sessions"
    if experiment.noise and not experiment.workload:
        offers = {pair: (manifest, costs.varying(IN_SESSIONS)) for pair, (manifest, costs) in offers.items()}
        source += "; compute varies as in real sessions"
    for scheme in experiment.schemes:
        build.check_levels(scheme.policy, len(offers[experiment.contexts[0], scheme.codec][0].levels))
    simplified = link_model.left_out(traces.values(), links.values())
    run.create(_describe(experiment, units, offers, source, simplified))
    sessions = shard.sessions(experiment)
    todo = [(unit, scheme) for unit, scheme in sessions if not run.has(unit.unit_id, scheme.name)]
    says = "SIMULATOR: virtual links and clock, no model; " + (f"it {simplified}; " if simplified else "")
    progress.place(says + source)
    progress.begin(experiment, len(sessions), [unit for unit, _ in todo], emulated=False, part=shard.words)
    by_unit = [
        (unit, tuple(scheme for _, scheme in pairs)) for unit, pairs in itertools.groupby(todo, lambda pair: pair[0])
    ]
    with ray_executor.cluster(on, check_inputs.files(experiment)) if on else nullcontext(jobs) as workers:
        compiled = len(todo) >= workers * COMPILED_FROM and find_spec("numba") is not None
        simulation = Simulation(experiment, run, offers, traces, links, overhead_s or {}, compiled)
        if on is None:
            for rows_of_unit in parallel.results(simulation, by_unit, jobs):
                for row in rows_of_unit:
                    progress.step(row)
        else:
            for cells in ray_executor.results(simulation.sessions, by_unit, workers):
                run.save_unit(cells)
                for row, _ in cells:
                    progress.step(row)


@dataclass(frozen=True)
class Simulation:
    """All that the sessions of a unit need; called with one, it runs them and writes their cells."""

    experiment: Experiment
    run: Run
    offers: Offers
    traces: Mapping[str, Trace]
    links: Mapping[str, LinkSettings]
    overhead_s: Mapping[str, float]
    """[link]: what the ends add to a round trip."""
    compiled: bool = False
    """Take the compiled loop for the policies that it knows; the results are the same."""

    def __call__(self, sessions: tuple[Unit, Sequence[Scheme]]) -> list[Row]:
        cells = self.sessions(sessions)
        self.run.save_unit(cells)
        return [row for row, _ in cells]

    def sessions(self, sessions: tuple[Unit, Sequence[Scheme]]) -> list[tuple[Row, list[Json]]]:
        """(row, chunks) of each, which are not written."""
        unit, schemes = sessions
        workload = self.experiment.workload
        model = synthetic.parse(workload).name if workload else "none"
        goodput, rtt_s = self._link_of(unit)
        prior_bps = self._prior_bps(unit, goodput)
        bounds: dict[tuple[str, int], rows.Bound] = {}
        cells = []
        for scheme in schemes:
            pair = (unit.context, scheme.codec)
            manifest, costs = self.offers[pair]
            context = self._contexts[pair] if self.compiled else None
            actual = _actual(unit, costs)
            result = _session(unit, scheme, manifest, costs, actual, goodput, rtt_s, prior_bps, context)
            kind = (scheme.codec, scheme.depth)
            if kind not in bounds:
                bounds[kind] = rows.bound_of(manifest, goodput, unit, scheme.depth, actual, rtt_s)
            row = rows.row_of(unit, scheme, model, "simulator", result, bounds[kind])
            cells.append((row, [] if result.record is None else list(result.record["chunks"])))
        return cells

    @cached_property
    def _contexts(self) -> Mapping[tuple[str, str], Context]:
        return {pair: Context(manifest, costs) for pair, (manifest, costs) in self.offers.items()}

    def _prior_bps(self, unit: Unit, goodput: Trace) -> float | None:
        if self.experiment.probe:
            return float(goodput.rates_bps[0]) or None
        if self.experiment.carry_over:
            link = self.links[unit.link]
            return link_model.carried_bps(self.traces[unit.trace], link, unit.offset_s, unit.deadline_s)
        return None

    def _link_of(self, unit: Unit) -> tuple[Trace, float]:
        """What a session of the unit gets from its start: goodput and round trip. The fluid link knows nothing else."""
        trace, link = self.traces[unit.trace], self.links[unit.link]
        trace = trace.shifted(unit.offset_s) if unit.offset_s else trace
        rtt_s = link_model.round_trip_s(trace, link) + self.overhead_s.get(unit.link, 0.0)
        return link_model.goodput(trace, link), rtt_s


def _actual(unit: Unit, costs: Costs) -> Costs:
    """What the steps of a unit's sessions take."""
    if costs.spreads == EXACT:
        return costs
    return noise.draw(noise.seed_of(unit.unit_id), len(costs.decode_s), costs.spreads).on(costs)


def _session(
    unit: Unit,
    scheme: Scheme,
    manifest: Manifest,
    costs: Costs,
    actual: Costs,
    goodput: Trace,
    rtt_s: float,
    prior_bps: float | None = None,
    fast: Context | None = None,
) -> Outcome:
    """The policy is shown `costs`; steps take `actual`. With `fast`, in the compiled loop where it knows the policy."""
    policy = build.make_policy(scheme.policy)
    settings = SessionSettings(unit.deadline_s, scheme.depth, scheme.overlap, prior_bps, seed=unit.seed)
    rule = None if fast is None else fast.rule_of(policy)
    try:
        if fast is not None and rule is not None:
            seeds = np.array([noise.seed_of(unit.unit_id)])
            factors = noise.draw(seeds, len(costs.decode_s), costs.spreads)
            record = simulate_many(fast, rule, [goodput], settings, factors=factors, rtts_s=rtt_s).record(0)
        else:
            record = simulate(
                manifest, policy, goodput, settings, costs=costs, actual=actual, rtt_s=rtt_s, ask=ask_for(policy)
            )
    except SessionFailed as error:
        return Outcome("failed", str(error))
    return Outcome("ok", record=record.to_json(), prior_bps=prior_bps)


def _offers(experiment: Experiment, progress: Progress) -> tuple[Offers, str]:
    """Manifests and costs of every (context, codec), and in words where they are from."""
    pairs = [(context, codec) for context in experiment.contexts for codec in experiment.codecs]
    if experiment.workload:
        workload = synthetic.parse(experiment.workload)
        manifests = {pair: workload.manifest(*pair, experiment.chunk_tokens) for pair in pairs}
        facts = workload.describe(experiment.contexts, experiment.codecs, experiment.chunk_tokens)
        return {pair: (m, workload.costs(m)) for pair, m in manifests.items()}, "\n" + synthetic.text(facts)
    if experiment.model == "bundled" and experiment.chunk_tokens == precomputed.CHUNK_TOKENS:
        found = {pair: precomputed.load(*pair) for pair in pairs}
        if all(found.values()):
            offers = {pair: (offer.manifest, offer.costs) for pair, offer in found.items() if offer is not None}
            return offers, "sizes, distortions and compute times as shipped"
    from kvstream.testbed.run import measured_costs

    return measured_costs.offers(experiment, progress.say), "sizes, distortions and compute times measured here"


def _describe(
    experiment: Experiment,
    units: Sequence[Unit],
    offers: Offers,
    source: str,
    simplified: str,
) -> Json:
    by_codec: dict[str, list[Manifest]] = {}
    for (_, codec), (manifest, _) in offers.items():
        by_codec.setdefault(codec, []).append(manifest)
    return (
        {
            "experiment": experiment.to_json(),
            "backend": "simulator",
            "schemes": [asdict(scheme) | {"name": scheme.name} for scheme in experiment.schemes],
            "units": [asdict(unit) | {"unit_id": unit.unit_id} for unit in units],
            "levels": {codec: ladder(manifests) for codec, manifests in by_codec.items()},
            "costs": source.strip(),
            "shift": shift.facts({pair: manifest for pair, (manifest, _) in offers.items()}),
            "profiles": {codec: manifest.profile for (_, codec), (manifest, _) in offers.items()},
            "simplified": f"the simulator {simplified}" if simplified else "",
            "files": check_inputs.files(experiment),
            "command": machine.command(),
        }
        | experiment.opened.describe()
        | _origin(experiment, offers)
        | machine.describe()
    )


def _origin(experiment: Experiment, offers: Offers) -> Json:
    """The model whose caches have these sizes, or the workload."""
    if not experiment.workload:
        return {"model": {"fingerprint": next(iter(offers.values()))[0].model}}
    workload = synthetic.parse(experiment.workload)
    return {"workload": workload.describe(experiment.contexts, experiment.codecs, experiment.chunk_tokens)}
