"""Runs an experiment over emulated links: real processes, real bytes, a real first token.

For each link setting one network is built, with a warm sender and a warm receiver on its hosts. A session begins at a
moment of CLOCK_MONOTONIC that shaper and receiver are told beforehand, so the trace's time zero is the session's. Link
and session are judged after it; a session over the fidelity limits is repeated, then marked invalid.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from testbed import ideal, inputs, machine, outcome, plugs, prepare
from testbed.dashboard import events
from testbed.emulator import analysis, fidelity
from testbed.emulator.capture import capture
from testbed.emulator.probe import Estimate, Prober
from testbed.emulator.record import LinkRecord
from testbed.emulator.shaper import Shaper
from testbed.emulator.topology import Network
from testbed.errors import MachineError
from testbed.experiment import Experiment, Scheme, Unit
from testbed.manifest import Manifest
from testbed.outcome import Bound, Outcome
from testbed.process import Process
from testbed.progress import Progress
from testbed.rehearsal import Strain
from testbed.results import Json, Run
from testbed.session import Costs
from traces.resolve import open_trace
from traces.trace import Trace

PORT: Final = 8700
LEAD_S: Final = 0.15
LEAD_ROUND_TRIPS: Final = 10
"""From the command to a session's time zero: the connection is made and its window opened in it, which takes two round
trips and then one for each doubling."""
PADDING_BYTES: Final = 1 << 20
"""Sent before a session over its connection, so that it is as warm as one that has been in use."""
COVERED_S: Final = 600.0
"""A trace is scheduled for so long; no session lasts longer."""
SESSION_LIMIT_S: Final = 120.0
ANNOUNCED_DEADLINES: Final = 5
"""So many deadlines of its link are shown ahead while a session runs."""


def run_emulated(experiment: Experiment, run: Run, *, quiet: bool) -> None:
    """Run every session that has no cell yet. Must be called inside a sandbox."""
    progress = Progress(quiet)
    traces = {name: open_trace(name) for name in dict.fromkeys(unit.trace for unit in experiment.units())}
    links = {text: plugs.make_link(text) for text in experiment.links}
    limits = replace(fidelity.Limits(), **experiment.limits)
    simplified = ideal.left_out(traces.values(), links.values())
    prepared = _prepared(experiment, progress, f"; the oracle {simplified}" if simplified else "")
    for scheme in experiment.schemes:
        plugs.check_levels(scheme.policy, len(prepared.manifests[experiment.contexts[0], scheme.codec].levels))
    units = experiment.units()
    todo = [(unit, s) for unit in units for s in experiment.order(unit) if not run.has(unit.unit_id, s.name)]
    manifest = describe(experiment, prepared, "mininet") | _of_earlier_parts(run)
    manifest["simplified"] = f"the oracle {simplified}" if simplified else ""
    run.create(manifest)
    progress.begin(experiment, len(units) * len(experiment.schemes), [unit for unit, _ in todo], emulated=True)
    log = (run.path / events.FILE_NAME).absolute()
    names = [scheme.name for scheme in experiment.schemes]
    events.append(log, events.RunStart(experiment.name, "mininet", names, len(units) * len(names)))
    for text, part in itertools.groupby(todo, key=lambda pair: pair[0].link):
        sessions = list(part)
        with Stage(
            links[text],
            list(traces.values()),
            prepared,
            run.path,
            device=experiment.device,
            packets=experiment.capture,
            probe=experiment.probe,
        ) as stage:
            manifest["networks"][text] = stage.network.settings | {"shaper": stage.shaper.settings}
            manifest["costs"] = stage.costs_json
            run.create(manifest)
            for unit, scheme in sessions:
                trace = traces[unit.trace]
                trace = trace.shifted(unit.offset_s) if unit.offset_s else trace
                result, chunks, link = stage.settled(unit, scheme, trace, limits, log, experiment.most_repeats)
                bound = stage.bound(unit, scheme, trace)
                row = outcome.row_of(unit, scheme, prepared.model_name, "mininet", result, bound)
                run.save(row, chunks, link, result.packets)
                events.append(log, events.SessionEnd(vars(row)))
                progress.step(row)


def _of_earlier_parts(run: Run) -> Json:
    """What only a network that was up can say: kept from the parts of the run that are done."""
    before = run.manifest if run.exists() else {}
    return {"networks": {}} | {key: before[key] for key in ("networks", "costs") if key in before}


def _prepared(experiment: Experiment, progress: Progress, note: str) -> prepare.Prepared:
    """The store to serve, and in words what is real about it, with a note."""
    place = "Backend mininet: real hosts and links in namespaces of their own; "
    if experiment.workload:
        from testbed import synthetic_store

        progress.place(place + "SYNTHETIC caches as real bytes, compute takes the times of its profile" + note)
        return synthetic_store.prepare(
            experiment.workload, experiment.contexts, experiment.codecs, experiment.chunk_tokens, progress.say
        )
    where = "the CPU" if experiment.device == "cpu" else experiment.device
    progress.place(f"{place}chunks are decoded on {where}{note}")
    return prepare.prepare(
        experiment.model, experiment.contexts, experiment.codecs, experiment.chunk_tokens, progress.say
    )


def describe(experiment: Experiment, prepared: prepare.Prepared, backend: str) -> Json:
    """The run's `manifest.json`: everything that its numbers depend on."""
    return (
        {
            "experiment": experiment.to_json(),
            "backend": backend,
            "schemes": [asdict(scheme) | {"name": scheme.name} for scheme in experiment.schemes],
            "units": [asdict(unit) | {"unit_id": unit.unit_id} for unit in experiment.units()],
            "levels": prepare.describe_levels(prepared, experiment.codecs),
            "profiles": {codec: m.profile for (_, codec), m in prepared.manifests.items()},
            "traces": {unit.trace: open_trace(unit.trace).sha256 for unit in experiment.units()},
            "files": inputs.files(experiment),
            "model": {
                "name": prepared.model_name,
                "source": Path(prepared.model).name,
                "fingerprint": next(iter(prepared.manifests.values())).model,
            },
            "exact_answers": dict(prepared.exact_right),
            "command": machine.command(),
        }
        | _workload(experiment, prepared)
        | machine.describe()
    )


def _workload(experiment: Experiment, prepared: prepare.Prepared) -> Json:
    """What a synthetic workload's numbers rest on, with the sizes as encoded."""
    if not experiment.workload:
        return {}
    from testbed import synthetic, synthetic_store

    workload = synthetic.parse(experiment.workload)
    facts = workload.describe(experiment.contexts, experiment.codecs, experiment.chunk_tokens)
    return {"workload": facts | {"kb_per_token": synthetic_store.kb_per_token(prepared), "compute": "by profile"}}


class Stage:
    """A network with its shaper, sender and receiver, warm and ready for sessions."""

    def __init__(
        self,
        link: Any,
        traces: list[Trace],
        prepared: prepare.Prepared,
        folder: Path,
        *,
        device: str = "cpu",
        packets: bool = False,
        probe: bool = False,
    ) -> None:
        """`packets`: record every session's at both ends. `probe`: look for `prior_bps` before each."""
        self._link = link
        self._device = device
        self._packets = packets
        self._probe = probe
        self._traces = traces
        self._prepared = prepared
        self._folder = folder
        self._bounds: dict[tuple[str, str, int], Bound] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Stage:
        with ExitStack() as stack:
            up = [open_trace(self._link.up_trace)] if self._link.up_trace else []
            network = stack.enter_context(Network(self._link, traces=[*self._traces, *up], senders=self._link.senders))
            self.network = network
            self.shaper = stack.enter_context(Shaper(network))
            self._ups = [(stack.enter_context(Shaper(network, "up")), trace) for trace in up]
            """The way back, where it is limited."""
            self._prober = stack.enter_context(Prober(network)) if self._probe else None
            store = str(self._prepared.path)
            for host in network.sender_hosts:
                sender = Process(
                    host.name,
                    partial(network.popen, host),
                    ["-m", "testbed.sender", "--store", store, "--host", "0.0.0.0", "--port", str(PORT), "--sandbox"],
                    self._folder / "sender.log",
                )
                stack.callback(sender.close)
            # a model on a GPU must hold its cache in the type that was encoded
            dtype = next(iter(self._prepared.manifests.values())).kv.dtype
            self.receiver = Process(
                "receiver",
                lambda argv, **options: network.popen(network.receiver, argv, **options),
                [
                    *("-m", "testbed.receiver", "--store", store, *self._prepared.receiver_arguments),
                    *("--device", self._device, "--dtype", dtype),
                ],
                self._folder / "receiver.log",
            )
            stack.callback(self.receiver.close)
            ids = list(dict.fromkeys(self._prepared.ids.values()))
            self.costs_json = self.receiver.ask({"cmd": "prepare", "contexts": ids}, SESSION_LIMIT_S)["costs"]
            self._alone = {pair: _costs(self.costs_json[key]) for pair, key in self._prepared.ids.items()}
            self.costs = dict(self._alone)
            """[context, codec]: what computing takes here, in the light of the last sessions."""
            rehearsed = self.receiver.ask({"cmd": "rehearse", "contexts": ids} | self._senders(), SESSION_LIMIT_S)
            for pair, key in self._prepared.ids.items():
                self._bear(pair, rehearsed["strain"][key])
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def bound(self, unit: Unit, scheme: Scheme, trace: Trace) -> Bound:
        """The oracle's plan for a unit, computed once a codec and depth."""
        key = (unit.unit_id, scheme.codec, scheme.depth)
        if key not in self._bounds:
            pair = unit.context, scheme.codec
            self._bounds[key] = outcome.bound_of(
                self._prepared.manifests[pair],
                ideal.goodput(trace, self._link),
                unit,
                scheme.depth,
                self.costs[pair],
                ideal.round_trip_s(trace, self._link),
            )
        return self._bounds[key]

    def settled(
        self, unit: Unit, scheme: Scheme, trace: Trace, limits: fidelity.Limits, log: Path | None, most_repeats: int
    ) -> tuple[Outcome, list[Json], list[Json]]:
        """One session, again while the link was not what the trace says, at most `most_repeats` times more."""
        repeats = 0
        result, chunks, link = self.session(unit, scheme, trace, limits, log)
        while result.status == "invalid" and repeats < most_repeats:
            repeats += 1
            result, chunks, link = self.session(unit, scheme, trace, limits, log)
        return replace(result, repeats=repeats), chunks, link

    def session(
        self, unit: Unit, scheme: Scheme, trace: Trace, limits: fidelity.Limits, log: Path | None
    ) -> tuple[Outcome, list[Json], list[Json]]:
        """One session on the link, with what the link did. `log` is where it is told how it gets on, if anywhere."""
        prior = self._prior(trace)
        prior_bps, prior_rtt_s = (None, None) if prior is None else (prior.goodput_bps, prior.rtt_s)
        with ExitStack() as stack:
            captures = None
            if self._packets:
                name = f"{unit.unit_id}-{scheme.name}"
                captures = stack.enter_context(capture(self.network, self._folder / "packets", name))
            zero_s = time.monotonic() + LEAD_S + LEAD_ROUND_TRIPS * ideal.round_trip_s(trace, self._link)
            self.shaper.arm(trace, zero_s, COVERED_S, chunks=len(self._manifest(unit, scheme).chunks))
            for shaper, up in self._ups:
                shaper.arm(up, zero_s, COVERED_S)
            if log is not None:
                self._announce(unit, scheme, trace, log)
            command = self._command(unit, scheme, trace, zero_s, log) | {"prior_bps": prior_bps}
            answer = self.receiver.ask(command, SESSION_LIMIT_S + 30.0)
            end_s = time.monotonic()
            if answer["status"] == "ok":
                end_s = zero_s + answer["late_s"] + answer["record"]["ttft_s"]
            measured = self.shaper.finish(end_s)
            back = [fidelity.judge(shaper.finish(end_s), up, limits) for shaper, up in self._ups]
        verdict = fidelity.judge(measured, trace, limits)
        for other in back:
            reasons = (*verdict.reasons, *(f"way back: {why}" for why in other.reasons))
            verdict = replace(verdict, ok=not reasons, reasons=reasons)
        link = measured.rows()
        if answer["status"] == "failed":
            return Outcome("failed", answer["error"], fidelity=verdict.to_json()), [], link
        status, why = ("ok", "") if verdict.ok else ("invalid", "; ".join(verdict.reasons))
        result = Outcome(
            status,  # type: ignore[arg-type]
            why,
            answer["record"],
            measured_kl=answer.get("measured_kl"),
            answer_ok=answer.get("answer_ok"),
            answers_right=answer.get("answers_right"),
            answers=answer.get("answers"),
            fidelity=verdict.to_json(),
            strain=answer["strain"],
            prior_bps=prior_bps,
            prior_rtt_s=prior_rtt_s,
        )
        self._bear((unit.context, scheme.codec), answer["strain"])
        chunks = answer["record"]["chunks"]
        return (result, chunks, link) if captures is None else (*self._joined(result, chunks, measured, captures), link)

    def _joined(
        self, result: Outcome, chunks: list[Json], measured: LinkRecord, captures: Mapping[str, Any]
    ) -> tuple[Outcome, list[Json]]:
        """The session with what its packets say."""
        found = analysis.analyse(captures, self.network.sender_ips, self._link.mtu)
        end_s = measured.t0_s + measured.length_s
        windows = found.windows(measured.t0_s, end_s)
        summary = found.summary(measured, alone=not self._link.crossed)
        return replace(result, capture=summary, packets=windows), found.chunks(chunks, measured.t0_s)

    def _prior(self, trace: Trace) -> Estimate | None:
        """What a train of packets finds of the link at the session's start; None where nothing comes through."""
        if self._prober is None:
            return None
        self.shaper.arm(None, time.monotonic(), COVERED_S)
        self.shaper.set_rate(float(trace.rates_bps[0]))
        try:
            return self._prober.measure() if trace.rates_bps[0] else None
        except MachineError:
            return None
        finally:
            self.shaper.finish()

    def _bear(self, pair: tuple[str, str], strain: Mapping[str, float]) -> None:
        """Reckon with the strain that the receiver reports."""
        self.costs[pair] = Strain(**strain).on(self._alone[pair])

    def _manifest(self, unit: Unit, scheme: Scheme) -> Manifest:
        return self._prepared.manifests[unit.context, scheme.codec]

    def _command(self, unit: Unit, scheme: Scheme, trace: Trace, zero_s: float, log: Path | None) -> Json:
        command: Json = {
            "cmd": "session",
            **self._senders(),
            "context": self._prepared.ids[unit.context, scheme.codec],
            "policy": scheme.policy,
            "deadline_s": unit.deadline_s,
            "depth": scheme.depth,
            "overlap": scheme.overlap,
            "question": unit.seed + unit.index,
            "seed": unit.seed,
            "start_s": zero_s,
            "padding_bytes": PADDING_BYTES,
            "evaluate": not self._prepared.workload,
            "limits": {"session_s": SESSION_LIMIT_S},
        }
        if trace.per == "chunk":
            command["steps"] = str(self.shaper.steps)
        if log is not None:
            command["news"] = {"file": str(log), "unit_id": unit.unit_id, "scheme": scheme.name}
        if plugs.is_clairvoyant(scheme.policy):
            goodput = ideal.goodput(trace, self._link)
            command["forecast"] = {
                "per": goodput.per,
                "durations_s": goodput.durations_s.tolist(),
                "rates_bps": goodput.rates_bps.tolist(),
                "end": goodput.end,
                "rtt_s": ideal.round_trip_s(trace, self._link),
                "initial_window_bytes": None,
            }
        return command

    def _senders(self) -> Json:
        """Where the chunks are, as the receiver is told."""
        url, *others = [f"http://{ip}:{PORT}" for ip in self.network.sender_ips]
        return {"url": url, "others": others}

    def _announce(self, unit: Unit, scheme: Scheme, trace: Trace, log: Path) -> None:
        manifest = self._manifest(unit, scheme)
        events.append(
            log,
            events.SessionStart(
                unit.unit_id,
                scheme.name,
                scheme.policy,
                scheme.codec,
                unit.context,
                unit.trace,
                unit.deadline_s,
                len(manifest.chunks),
                len(manifest.levels),
                capacity=[] if trace.per == "chunk" else trace.changes(0.0, ANNOUNCED_DEADLINES * unit.deadline_s),
                capacity_until_s=ANNOUNCED_DEADLINES * unit.deadline_s,
                clairvoyant=plugs.is_clairvoyant(scheme.policy),
                depth=scheme.depth,
                overlap=scheme.overlap,
            ),
        )


def _costs(value: Mapping[str, Any]) -> Costs:
    recompute = value["recompute_s"]
    return Costs(
        decode_s=tuple(tuple(row) for row in value["decode_s"]),
        recompute_s=None if recompute is None else tuple(recompute),
        prefill_s=float(value["prefill_s"]),
    )
