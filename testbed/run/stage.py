"""One session at a time over one emulated path, between a warm sender and a warm receiver.

A session begins at a moment of CLOCK_MONOTONIC that path and receiver are told beforehand, so the trace's time zero is
the session's. Path and session are judged after it; a session over the fidelity limits is invalid, and is repeated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from kvstream.testbed import events
from kvstream.testbed.config import build
from kvstream.testbed.config.experiment import Scheme, Unit
from kvstream.testbed.emulator import analysis, fidelity
from kvstream.testbed.emulator.capture import Capture, capture
from kvstream.testbed.emulator.link import LinkSettings
from kvstream.testbed.emulator.path import LinkPath, open_path
from kvstream.testbed.emulator.probe import Estimate, Prober
from kvstream.testbed.emulator.record import LinkRecord
from kvstream.testbed.encoding.prepare import Prepared
from kvstream.testbed.errors import MachineError
from kvstream.testbed.host.process import Process
from kvstream.testbed.results.folder import Json
from kvstream.testbed.run import rows
from kvstream.testbed.run.rows import Bound, Outcome
from kvstream.testbed.session.costs import Costs, Slowdown
from kvstream.testbed.simulator import link_model
from kvstream.testbed.store.manifest import Manifest
from kvstream.traces.trace import Trace

PORT: Final = 8700
LEAD_S: Final = 0.05
"""From when the receiver is ready to a session's time zero: the path is armed in it."""
PADDING_BYTES: Final = 1 << 20
"""Sent before a session over its connection, so that it is as warm as one that has been in use."""
PADDING_S: Final = 0.05
PADDING_ROUND_TRIPS: Final = 10
"""Connecting and padding take no longer: two round trips, and then one for each doubling of the window."""
SESSION_LIMIT_S: Final = 120.0
ANSWER_S: Final = 30.0
"""After a session at its limit, the receiver answers within this."""
COVERED_S: Final = SESSION_LIMIT_S + ANSWER_S
"""A trace is scheduled for so long; no session lasts longer."""
ANNOUNCED_DEADLINES: Final = 5
"""So many deadlines of its link are shown ahead while a session runs."""


@dataclass(frozen=True)
class Measured:
    """One session over the path, judged."""

    outcome: Outcome
    chunks: list[Json]
    """One row per chunk, for `chunks.jsonl`; empty for a session that failed."""
    link: list[Json]
    """One row per sample of the bottleneck, for `link.jsonl`."""


class Stage:
    """A path with its sender and receiver, warm and ready for sessions: made by `open_stage`."""

    def __init__(
        self,
        path: LinkPath,
        receiver: Process,
        prepared: Prepared,
        folder: Path,
        costs_json: Mapping[str, Any],
        *,
        prober: Prober | None = None,
        packets: bool = False,
    ) -> None:
        """`costs_json`: [context id], what each step of computing takes here by itself, as the receiver measured it.
        `prober` looks for `prior_bps` before each session; with `packets`, captures go to `folder/packets`."""
        self.path = path
        self.receiver = receiver
        self.costs_json = costs_json
        self.overhead_s = 0.0
        """What sender and receiver add to a round trip."""
        self._prepared = prepared
        self._folder = folder
        self._prober = prober
        self._packets = packets
        self._link = path.network.link
        self._unslowed = {pair: Costs.from_json(costs_json[key]) for pair, key in prepared.ids.items()}
        self.costs = dict(self._unslowed)
        """[context, codec]: what computing takes here, in the light of the last sessions."""
        self._bounds: dict[tuple[str, str, int], Bound] = {}
        self._unjudged: Callable[[Json], None] | None = None
        """Waits for what the last session's cache is worth."""

    def bound(self, unit: Unit, scheme: Scheme, trace: Trace) -> Bound:
        """The oracle's plan for a unit, computed once per codec and depth."""
        key = (unit.unit_id, scheme.codec, scheme.depth)
        if key not in self._bounds:
            self._bounds[key] = rows.bound_of(
                self._manifest(unit, scheme),
                link_model.goodput(trace, self._link),
                unit,
                scheme.depth,
                self.costs[unit.context, scheme.codec],
                self._round_trip_s(trace),
            )
        return self._bounds[key]

    def settled(
        self,
        unit: Unit,
        scheme: Scheme,
        trace: Trace,
        limits: fidelity.Limits,
        log: Path | None,
        max_repeats: int,
        prior_bps: float | None = None,
    ) -> Measured:
        """One session, repeated at most `max_repeats` times while the path deviates from its traces."""
        measured = self.session(unit, scheme, trace, limits, log, prior_bps)
        repeats = 0
        while measured.outcome.status == "invalid" and not _is_unjudged(measured) and repeats < max_repeats:
            repeats += 1
            measured = self.session(unit, scheme, trace, limits, log, prior_bps)
        return replace(measured, outcome=replace(measured.outcome, repeats=repeats))

    def session(
        self,
        unit: Unit,
        scheme: Scheme,
        trace: Trace,
        limits: fidelity.Limits,
        log: Path | None,
        prior_bps: float | None = None,
    ) -> Measured:
        """One session. Events go to `log`, if given, for a dashboard to follow. Policies see what the probe found, or
        else `prior_bps`."""
        probed = self._prior(trace)
        prior_bps = prior_bps if probed is None else probed.goodput_bps
        with ExitStack() as stack:
            captures = None
            if self._packets:
                name = f"{unit.unit_id}-{scheme.name}"
                captures = stack.enter_context(capture(self.path.network, self._folder / "packets", name))
            self.path.size_packets(trace)
            command = self._command(unit, scheme, trace, prior_bps, log)
            answer = self.receiver.ask(command | {"judge": self._unjudged is not None}, SESSION_LIMIT_S)
            self._hear(answer)
            if answer["status"] == "failed":
                return Measured(Outcome("failed", answer["error"]), [], [])
            if log is not None:
                self._announce(unit, scheme, trace, log)
            zero_s = time.monotonic() + LEAD_S
            self.path.arm(trace, zero_s, COVERED_S, chunks=len(self._manifest(unit, scheme).chunks))
            answer = self.receiver.ask({"cmd": "start", "start_s": zero_s}, SESSION_LIMIT_S + ANSWER_S)
            end_s = time.monotonic()
            if answer["status"] == "ok":
                end_s = zero_s + answer["late_s"] + answer["record"]["ttft_s"]
            record = self.path.finish(end_s)
        verdict = record.judge(trace, limits)
        link = record.down.rows()
        if answer["status"] == "failed":
            return Measured(Outcome("failed", answer["error"], fidelity=verdict.to_json()), [], link)
        self.slow_down((unit.context, scheme.codec), answer["slowdown"])
        measured = Measured(_outcome(answer, verdict, prior_bps, probed), answer["record"]["chunks"], link)
        return measured if captures is None else self._with_packets(measured, record.down, captures)

    def judge(self, measured: Measured, then: Callable[[Measured], object]) -> None:
        """Call `then` with the last session and what its cache is worth, as soon as that is known: it is judged while
        the next session gets ready, or by `finish`."""

        def judged(judgement: Json) -> None:
            then(replace(measured, outcome=replace(measured.outcome, **judgement)))

        if measured.outcome.record is None or self._prepared.workload:
            judged({})
        else:
            self._unjudged = judged

    def finish(self) -> None:
        """Judge the last session, if that is still to be done."""
        if self._unjudged is not None:
            self._hear(self.receiver.ask({"cmd": "judge"}, SESSION_LIMIT_S))

    def _hear(self, answer: Json) -> None:
        """Pass on the judgement that the receiver's answer brings."""
        if self._unjudged is not None:
            unjudged, self._unjudged = self._unjudged, None
            unjudged(answer["judgement"])

    def senders(self) -> Json:
        """Where the chunks are, as the receiver is told."""
        url, *others = [f"http://{ip}:{PORT}" for ip in self.path.network.sender_ips]
        return {"url": url, "others": others}

    def slow_down(self, pair: tuple[str, str], slowdown: Mapping[str, float]) -> None:
        """Reckon from now on with the slowdown that the receiver reports for a (context, codec)."""
        self.costs[pair] = Slowdown(**slowdown).on(self._unslowed[pair])

    def _round_trip_s(self, trace: Trace) -> float:
        """From a request to its first byte."""
        return link_model.round_trip_s(trace, self._link) + self.overhead_s

    def _manifest(self, unit: Unit, scheme: Scheme) -> Manifest:
        return self._prepared.manifests[unit.context, scheme.codec]

    def _with_packets(self, measured: Measured, record: LinkRecord, captures: Mapping[str, Capture]) -> Measured:
        """The session with what its packets say."""
        found = analysis.analyse(captures, self.path.network.sender_ips, self._link.mtu)
        outcome = replace(
            measured.outcome,
            capture=found.summary(record, alone=not self._link.crossed),
            packets=found.windows(record.t0_s, record.t0_s + record.length_s),
        )
        return replace(measured, outcome=outcome, chunks=found.chunks(measured.chunks, record.t0_s))

    def _prior(self, trace: Trace) -> Estimate | None:
        """What trains of packets find of the link at the session's start; None where nothing comes through."""
        if self._prober is None or not trace.rates_bps[0]:
            return None
        with self.path.held(float(trace.rates_bps[0]), COVERED_S):
            try:
                return self._prober.measure()
            except MachineError:
                return None

    def _command(self, unit: Unit, scheme: Scheme, trace: Trace, prior_bps: float | None, log: Path | None) -> Json:
        padding_s = PADDING_S + PADDING_ROUND_TRIPS * link_model.round_trip_s(trace, self._link)
        command: Json = {
            "cmd": "ready",
            **self.senders(),
            "context": self._prepared.ids[unit.context, scheme.codec],
            "policy": scheme.policy,
            "deadline_s": unit.deadline_s,
            "depth": scheme.depth,
            "overlap": scheme.overlap,
            "question": unit.seed + unit.index,
            "seed": unit.seed,
            "padding_bytes": PADDING_BYTES,
            "padding_until_s": time.monotonic() + padding_s,
            "limits": {"session_s": SESSION_LIMIT_S},
            "prior_bps": prior_bps,
        }
        if trace.per == "chunk":
            command["steps"] = str(self.path.down.steps)
        if log is not None:
            command["events"] = {"file": str(log), "unit_id": unit.unit_id, "scheme": scheme.name}
        if build.is_clairvoyant(scheme.policy):
            goodput = link_model.goodput(trace, self._link)
            command["forecast"] = {
                "per": goodput.per,
                "durations_s": goodput.durations_s.tolist(),
                "rates_bps": goodput.rates_bps.tolist(),
                "end": goodput.end,
                "rtt_s": self._round_trip_s(trace),
                "initial_window_bytes": None,
            }
        return command

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
                clairvoyant=build.is_clairvoyant(scheme.policy),
                depth=scheme.depth,
                overlap=scheme.overlap,
            ),
        )


@contextmanager
def open_stage(
    link: LinkSettings,
    traces: Sequence[Trace],
    prepared: Prepared,
    folder: Path,
    *,
    device: str = "cpu",
    packets: bool = False,
    probe: bool = False,
) -> Iterator[Stage]:
    """Build a path for `traces` and warm up a sender on each sending host and the receiver; all end with the context.

    Their logs go to `folder`. With `packets`, those of every session are captured at both ends; with `probe`, the link
    is probed for `prior_bps` before each. Must be called inside a sandbox. Raises MachineError for what the machine
    lacks, SpecError for what the receiver refuses.
    """
    with ExitStack() as stack:
        path = stack.enter_context(open_path(link, traces, senders=link.senders))
        prober = stack.enter_context(Prober(path.network)) if probe else None

        def start(name: str, host: Any, module: str, *options: str) -> Process:
            argv = ["-m", module, "--store", str(prepared.path), *options]
            log = folder / f"{module.rpartition('.')[2]}.log"
            return stack.enter_context(closing(Process(name, partial(path.network.popen, host), argv, log)))

        address = ("--host", "0.0.0.0", "--port", str(PORT))
        senders = [
            start(host.name, host, "kvstream.testbed.net.sender", *address, "--sandbox")
            for host in path.network.sender_hosts
        ]
        # A model on a GPU must hold its cache in the type that was encoded.
        dtype = next(iter(prepared.manifests.values())).kv.dtype
        compute = (*prepared.receiver_arguments, "--device", device, "--dtype", dtype)
        receiver = start("receiver", path.network.receiver, "kvstream.testbed.receiver", *compute)
        for process in (*senders, receiver):
            process.await_ready()
        ids = list(dict.fromkeys(prepared.ids.values()))
        costs_json = receiver.ask({"cmd": "prepare", "contexts": ids}, SESSION_LIMIT_S)["costs"]
        stage = Stage(path, receiver, prepared, folder, costs_json, prober=prober, packets=packets)
        warmed_up = receiver.ask({"cmd": "warm_up", "contexts": ids} | stage.senders(), SESSION_LIMIT_S)
        if warmed_up["round_trip_s"] is not None:
            stage.overhead_s = max(0.0, warmed_up["round_trip_s"] - 2.0 * link.delay_s)
        for pair, key in prepared.ids.items():
            stage.slow_down(pair, warmed_up["slowdown"][key])
        yield stage


def _is_unjudged(measured: Measured) -> bool:
    """Whether too little of a session could be judged: of a repetition it would be as little."""
    return measured.outcome.fidelity.get("state") == "unjudged"


def _outcome(answer: Json, verdict: fidelity.Fidelity, prior_bps: float | None, probed: Estimate | None) -> Outcome:
    """A session that came to its first token."""
    return Outcome(
        "ok" if verdict.ok else "invalid",
        "; ".join(verdict.reasons),
        answer["record"],
        fidelity=verdict.to_json(),
        slowdown=answer["slowdown"],
        prior_bps=prior_bps,
        prior_rtt_s=None if probed is None else probed.rtt_s,
    )
