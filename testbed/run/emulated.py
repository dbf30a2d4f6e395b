"""Runs an experiment over emulated links: real processes, real bytes, a real first token.

For each link setting one path is built, with a warm sender and a warm receiver at its ends (`stage`). A session over
the fidelity limits is repeated, then marked invalid. Where that never helps, because something else keeps the machine
busy all the time, the next ones are not repeated.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from kvstream.testbed import events
from kvstream.testbed.config import build
from kvstream.testbed.config.experiment import Experiment, Scheme, Unit
from kvstream.testbed.emulator import fidelity
from kvstream.testbed.encoding import prepare
from kvstream.testbed.host import machine
from kvstream.testbed.results.folder import SIMULATED, Json, Run
from kvstream.testbed.run import check_inputs, rows, simulated
from kvstream.testbed.run.progress import Progress
from kvstream.testbed.run.shards import WHOLE, Shard
from kvstream.testbed.run.stage import Measured, open_stage
from kvstream.testbed.session.costs import Costs, Slowdown
from kvstream.testbed.simulator import link_model
from kvstream.testbed.store import shift

FRUITLESS: Final = 4
"""So many sessions in a row that all their repeats left invalid: the machine is to blame, not a moment."""


GIVEN_UP: Final = (
    "{} sessions in a row stayed invalid, however often repeated ({}); sessions are not repeated until one is valid. "
    "kvstream doctor checks the machine"
)


class Patience:
    """How often the next session may be repeated: `most` times, and not at all once that has been fruitless."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._fruitless = 0

    @property
    def ended(self) -> bool:
        return self._most > 0 and self._fruitless >= FRUITLESS

    @property
    def repeats(self) -> int:
        return 0 if self.ended else self._most

    def learn(self, outcome: rows.Outcome) -> None:
        """From how the last session ended; one that is valid restores it."""
        if outcome.status == "ok":
            self._fruitless = 0
        elif outcome.status == "invalid" and outcome.repeats == self._most:
            self._fruitless += 1


def run_emulated(experiment: Experiment, run: Run, *, quiet: bool, shard: Shard = WHOLE) -> None:
    """Run every session of the shard that has no cell yet. Must be called inside a sandbox."""
    progress = Progress(quiet)
    traces = {name: named.trace for name, named in experiment.opened.every.items()}
    links = {text: build.make_link(text) for text in experiment.links}
    limits = replace(fidelity.Limits(), **experiment.limits)
    simplified = link_model.left_out(traces.values(), links.values())
    prepared = _prepared(experiment, progress, f"; the oracle {simplified}" if simplified else "")
    for scheme in experiment.schemes:
        build.check_levels(scheme.policy, len(prepared.manifests[experiment.contexts[0], scheme.codec].levels))
    sessions = shard.sessions(experiment)
    todo = [(unit, scheme) for unit, scheme in sessions if not run.has(unit.unit_id, scheme.name)]
    todo.sort(key=lambda pair: experiment.links.index(pair[0].link))  # a path is built once for all of its units
    manifest = describe(experiment, prepared, "mininet") | _of_earlier_parts(run)
    manifest["simplified"] = f"the oracle {simplified}" if simplified else ""
    run.create(manifest)
    progress.begin(experiment, len(sessions), [unit for unit, _ in todo], emulated=True, part=shard.words)
    log = (run.path / events.FILE_NAME).absolute()
    names = [scheme.name for scheme in experiment.schemes]
    patience = Patience(experiment.max_repeats)

    def save(unit: Unit, scheme: Scheme, bound: rows.Bound, judged: Measured) -> None:
        row = rows.row_of(unit, scheme, prepared.model_name, "mininet", judged.outcome, bound)
        run.save(row, judged.chunks, judged.link, judged.outcome.packets)
        events.append(log, events.SessionEnd(vars(row)))
        progress.step(row)

    events.append(log, events.RunStart(experiment.name, "mininet", names, len(sessions)))
    for text, part in itertools.groupby(todo, key=lambda pair: pair[0].link):
        with open_stage(
            links[text],
            list(traces.values()),
            prepared,
            run.path,
            device=experiment.device,
            packets=experiment.capture,
            probe=experiment.probe,
        ) as stage:
            manifest["networks"][text] = stage.path.settings
            manifest["costs"] = stage.costs_json
            manifest["overhead_s"][text] = stage.overhead_s
            run.create(manifest)
            for unit, scheme in part:
                whole = traces[unit.trace]
                trace = whole.shifted(unit.offset_s) if unit.offset_s else whole
                prior_bps = None
                if experiment.carry_over:
                    prior_bps = link_model.carried_bps(whole, links[text], unit.offset_s, unit.deadline_s)
                lasting = patience.ended
                measured = stage.settled(unit, scheme, trace, limits, log, patience.repeats, prior_bps)
                patience.learn(measured.outcome)
                if patience.ended and not lasting:
                    progress.say(GIVEN_UP.format(FRUITLESS, measured.outcome.why))
                bound = stage.bound(unit, scheme, trace)
                stage.judge(measured, partial(save, unit, scheme, bound))
            stage.finish()
    if experiment.simulated_repetitions:
        _simulate_beside(experiment, run, prepared, manifest, shard, quiet=quiet)


def _simulate_beside(
    experiment: Experiment, run: Run, prepared: prepare.Prepared, manifest: Json, shard: Shard, *, quiet: bool
) -> None:
    """The experiment in the simulator, with many repetitions and what computing took in this machine's sessions."""
    slower = _slowdowns(run.rows())
    offers = {
        pair: (prepared.manifests[pair], slower.get(pair, Slowdown()).on(Costs.from_json(manifest["costs"][key])))
        for pair, key in prepared.ids.items()
    }
    beside = Run(run.path / SIMULATED)
    jobs = len(os.sched_getaffinity(0))
    overhead_s = manifest["overhead_s"]
    simulated.run_simulated(
        experiment.simulated(), beside, quiet=quiet, offers=offers, overhead_s=overhead_s, shard=shard, jobs=jobs
    )


def _slowdowns(rows: Iterable[Json]) -> dict[tuple[str, str], Slowdown]:
    """[context, codec]: how much longer steps took in the run's sessions than alone, the median over them."""
    found: dict[tuple[str, str], list[Json]] = {}
    for row in rows:
        if row["slowdown"]:
            found.setdefault((row["context"], row["codec"]), []).append(row["slowdown"])
    steps = [field.name for field in fields(Slowdown)]
    return {
        pair: Slowdown(**{step: median(one[step] for one in seen) for step in steps}) for pair, seen in found.items()
    }


def _of_earlier_parts(run: Run) -> Json:
    """What only a network that was up can say: kept from the parts of the run that are done."""
    before = run.manifest if run.exists() else {}
    kept = {key: before[key] for key in ("networks", "costs", "overhead_s") if key in before}
    return {"networks": {}, "overhead_s": {}} | kept


def _prepared(experiment: Experiment, progress: Progress, note: str) -> prepare.Prepared:
    """The store to serve, and in words what is real about it, with a note."""
    place = "Backend mininet: real hosts and links in namespaces of their own; "
    if experiment.workload:
        from kvstream.testbed.encoding import synthetic_store

        progress.place(place + "SYNTHETIC caches as real bytes, compute takes the times of its profile" + note)
        return synthetic_store.prepare(
            experiment.workload, experiment.contexts, experiment.codecs, experiment.chunk_tokens, progress.say
        )
    where = "the CPU" if experiment.device == "cpu" else experiment.device
    progress.place(f"{place}chunks are decoded on {where}{note}")
    return prepare.prepare(
        experiment.model, experiment.contexts, experiment.codecs, experiment.chunk_tokens, progress.say,
        track=progress.track,
    )  # fmt: skip


def describe(experiment: Experiment, prepared: prepare.Prepared, backend: str) -> Json:
    """The run's `manifest.json`: everything that its numbers depend on."""
    return (
        {
            "experiment": experiment.to_json(),
            "backend": backend,
            "schemes": [asdict(scheme) | {"name": scheme.name} for scheme in experiment.schemes],
            "units": [asdict(unit) | {"unit_id": unit.unit_id} for unit in experiment.units()],
            "levels": prepare.describe_levels(prepared, experiment.codecs),
            "shift": shift.facts(prepared.manifests),
            "profiles": {codec: m.profile for (_, codec), m in prepared.manifests.items()},
            "files": check_inputs.files(experiment),
            "model": {
                "name": prepared.model_name,
                "source": Path(prepared.model).name,
                "fingerprint": next(iter(prepared.manifests.values())).model,
            },
            "exact_answers": dict(prepared.exact_right),
            "command": machine.command(),
        }
        | experiment.opened.describe()
        | _workload(experiment, prepared)
        | machine.describe()
    )


def _workload(experiment: Experiment, prepared: prepare.Prepared) -> Json:
    """What a synthetic workload's numbers rest on, with the sizes as encoded."""
    if not experiment.workload:
        return {}
    from kvstream.testbed.encoding import synthetic_store
    from kvstream.testbed.workloads import synthetic

    workload = synthetic.parse(experiment.workload)
    facts = workload.describe(experiment.contexts, experiment.codecs, experiment.chunk_tokens)
    return {"workload": facts | {"kb_per_token": synthetic_store.kb_per_token(prepared), "compute": "by profile"}}
