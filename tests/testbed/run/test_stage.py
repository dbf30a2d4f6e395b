"""Sessions on a stage: the receiver is a process with answers made beforehand, the kernel's link is made up."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvstream.testbed.config.build import make_policy
from kvstream.testbed.config.experiment import Scheme, Unit
from kvstream.testbed.emulator.fidelity import Limits
from kvstream.testbed.emulator.link import LinkSettings
from kvstream.testbed.emulator.probe import Estimate
from kvstream.testbed.encoding.prepare import Prepared
from kvstream.testbed.errors import MachineError
from kvstream.testbed.host.process import Process
from kvstream.testbed.run import stage as stages
from kvstream.testbed.run.stage import Stage
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.simulator.simulator import simulate
from kvstream.testbed.workloads import precomputed
from kvstream.traces.resolve import open_trace
from kvstream.traces.trace import Trace
from tests.testbed.emulator.made_path import RECORDED_S, MadeShaper, made_path

CODEC = "uniform"
UNIT = Unit(3, "docs", "steady", 0.0, 2.0, "", 1)
SCHEME = Scheme("fixed,level=lowest", CODEC)
STEADY = open_trace("constant,rate=30Mbps")
CHUNK_TRACE = open_trace("uniform,low=7Mbps,high=9Mbps,per=chunk")
LATE_S = 0.25

JUDGEMENT = {"measured_kl": 0.01, "answer_ok": True, "answers_right": 3, "answers": 4}
RECEIVER = f"""
import json, sys
JUDGEMENT = {JUDGEMENT}
"""
RECEIVER += """
answers, heard = json.load(open(sys.argv[1])), open(sys.argv[2], "a", buffering=1)
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    heard.write(line)
    said = {"ok": True, "status": "ready"}
    command = json.loads(line)
    if command["cmd"] == "start":
        said |= answers.pop(0) if len(answers) > 1 else answers[0]
    elif command["cmd"] == "judge" or command["judge"]:
        said["judgement"] = JUDGEMENT
    print(json.dumps(said), flush=True)
"""

measured = precomputed.load("docs", CODEC)
assert measured is not None
MANIFEST, COSTS = measured.manifest, measured.costs


def answer(slowdown: float = 1.0) -> dict[str, Any]:
    """What a receiver answers to a session that came to its first token."""
    done = simulate(MANIFEST, make_policy(SCHEME.policy), STEADY, SessionSettings(2.0), costs=COSTS)
    slow = {"decode": slowdown, "recompute": 1.0, "prefill": 1.0}
    return {"status": "ok", "late_s": LATE_S, "record": asdict(done), "slowdown": slow}


FAILED = {"status": "failed", "error": "the sender closed the stream"}


class Bench:
    """A stage, and what its receiver heard."""

    def __init__(self, stage: Stage, heard: Path) -> None:
        self.stage, self._heard = stage, heard

    @property
    def heard(self) -> list[Mapping[str, Any]]:
        return [json.loads(line) for line in self._heard.read_text().splitlines()]

    @property
    def commands(self) -> list[Mapping[str, Any]]:
        """Those that say what the session is."""
        return [command for command in self.heard if command["cmd"] == "ready"]

    def settled(self, max_repeats: int, trace: Trace = STEADY) -> stages.Measured:
        return self.stage.settled(UNIT, SCHEME, trace, Limits(), None, max_repeats)

    def session(self, trace: Trace = STEADY, scheme: Scheme = SCHEME, log: Path | None = None) -> stages.Measured:
        return self.stage.session(UNIT, scheme, trace, Limits(), log)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Makes a stage on a path of `shapers`, with a receiver that gives `answers` in turn, the last one again."""
    running: list[Process] = []

    def make(
        down: MadeShaper, *answers: Mapping[str, Any], prober: Any = None, link: LinkSettings | None = None
    ) -> Bench:
        script, heard = tmp_path / "answers.json", tmp_path / "heard.jsonl"
        script.write_text(json.dumps(answers or [answer()]))
        receiver = Process(
            "receiver", subprocess.Popen, ["-c", RECEIVER, str(script), str(heard)], tmp_path / "receiver.log"
        )
        running.append(receiver)
        pair = "docs", CODEC
        prepared = Prepared(tmp_path, "bundled", "made", {pair: "docs-1"}, {pair: MANIFEST}, {})
        path = made_path(down, link=link, sender_ips=["10.1.0.1", "10.1.1.1"])
        return Bench(Stage(path, receiver, prepared, tmp_path, {"docs-1": asdict(COSTS)}, prober=prober), heard)

    yield make
    for receiver in running:
        receiver.close()


def test_a_session_gives_its_outcome_its_chunks_and_its_link(bench):
    down = MadeShaper()
    done = bench(down).session()
    assert done.outcome.status == "ok"
    assert done.outcome.record is not None
    assert [chunk["chunk"] for chunk in done.chunks] == list(range(len(MANIFEST.chunks)))
    assert len(done.link) == RECORDED_S * 100 + 1
    (_, trace, zero_s, chunks), (_, end_s) = down.calls
    assert (trace, chunks) == (STEADY, len(MANIFEST.chunks))
    # the link is recorded until the first token, whose time counts from when the receiver really began
    assert end_s == pytest.approx(zero_s + LATE_S + done.outcome.record["ttft_s"])


@pytest.mark.parametrize(
    ("factors", "max_repeats", "status", "repeats"),
    [
        ((1.0,), 2, "ok", 0),
        ((0.5, 0.5, 1.0), 2, "ok", 2),
        ((0.5, 1.0), 5, "ok", 1),
        ((0.5, 0.5, 1.0), 1, "invalid", 1),
        ((0.5,), 0, "invalid", 0),
    ],
)
def test_a_session_is_repeated_while_the_link_deviates(bench, factors, max_repeats, status, repeats):
    down = MadeShaper(*factors)
    done = bench(down).settled(max_repeats)
    assert (done.outcome.status, done.outcome.repeats) == (status, repeats)
    assert len(down.named("arm")) == len(down.named("finish")) == repeats + 1
    assert ("bytes per window: median error 50.0%" in done.outcome.why) == (status == "invalid")


def test_a_session_of_which_too_little_can_be_judged_is_invalid_and_not_repeated(bench):
    down = MadeShaper()
    done = bench(down).settled(3, trace=open_trace("constant,rate=100kbps"))
    assert (done.outcome.status, done.outcome.repeats) == ("invalid", 0)
    assert done.outcome.why.startswith("unjudged: 0% of the session could be judged")
    assert done.outcome.fidelity["state"] == "unjudged"
    assert done.outcome.record is not None, "its numbers stay"
    assert len(down.named("arm")) == 1


def test_a_session_that_failed_is_not_repeated_here(bench):
    down = MadeShaper(0.5)
    done = bench(down, FAILED).settled(3)
    assert (done.outcome.status, done.outcome.why, done.outcome.repeats) == ("failed", FAILED["error"], 0)
    assert done.outcome.fidelity["ok"] is False
    assert done.chunks == []
    assert done.link, "what the link did is kept"
    assert len(down.named("arm")) == 1


def test_costs_follow_the_slowdown_of_the_last_session(bench):
    bench = bench(MadeShaper(), answer(3.0), FAILED, answer(1.0))
    costs = bench.stage.costs
    assert costs["docs", CODEC] == COSTS
    for wanted in (3.0, 3.0, 1.0):
        bench.session()
        assert costs["docs", CODEC].decode_s[0][0] == pytest.approx(wanted * COSTS.decode_s[0][0])
        assert costs["docs", CODEC].prefill_s == COSTS.prefill_s


def test_the_oracle_plans_once_per_unit_codec_and_depth(bench, monkeypatch):
    stage = bench(MadeShaper()).stage
    asked = []
    monkeypatch.setattr(stages.rows, "bound_of", lambda *given: asked.append(given) or len(asked))
    bounds = [stage.bound(UNIT, Scheme(policy, CODEC, depth), STEADY) for policy, depth in
              (("text", 2), ("cachegen", 2), ("cachegen", 1))]  # fmt: skip
    assert bounds == [1, 1, 2]
    assert asked[0][0] is MANIFEST


class Prober:
    """Finds a link of 12 Mbit/s, unless nothing comes through."""

    def __init__(self, works: bool = True) -> None:
        self.works, self.calls = works, 0

    def measure(self) -> Estimate:
        self.calls += 1
        if not self.works:
            raise MachineError("the probe found no bandwidth")
        return Estimate(12.5e6, 12e6, 0.02, 64)


def test_a_probe_goes_before_the_session_over_the_first_rate(bench):
    down, prober = MadeShaper(), Prober()
    bench = bench(down, prober=prober)
    done = bench.session()
    assert (done.outcome.prior_bps, done.outcome.prior_rtt_s) == (12e6, 0.02)
    assert bench.commands[-1]["prior_bps"] == 12e6
    assert [call[0] for call in down.calls] == ["arm", "rate", "finish", "arm", "finish"]
    assert down.named("rate") == [("rate", 30e6)]


def test_a_probe_that_finds_nothing_leaves_no_prior(bench):
    down = MadeShaper()
    made = bench(down, prober=Prober(works=False))
    assert made.session().outcome.prior_bps is None
    assert made.commands[-1]["prior_bps"] is None
    assert len(down.named("finish")) == 2, "a probe that fails ends its hold on the link"


def test_what_is_known_of_the_link_is_told_unless_the_probe_knows_better(bench):
    known, probed = bench(MadeShaper()), bench(MadeShaper(), prober=Prober())
    for made, prior_bps in ((known, 7e6), (probed, 12e6)):
        done = made.stage.session(UNIT, SCHEME, STEADY, Limits(), None, 7e6)
        assert (done.outcome.prior_bps, made.commands[-1]["prior_bps"]) == (prior_bps, prior_bps)


def test_an_outage_is_not_probed(bench):
    prober = Prober()
    done = bench(MadeShaper(), prober=prober).session(Trace("closed", [1.0, 1.0], [0.0, 30e6]))
    assert (done.outcome.prior_bps, prober.calls) == (None, 0)


def test_the_receiver_is_told_what_a_session_needs(bench, tmp_path):
    bench = bench(MadeShaper())
    bench.session(log=tmp_path / "events.jsonl")
    bench.session(trace=CHUNK_TRACE, scheme=Scheme("oracle", CODEC, depth=1, overlap=False))
    plain, clairvoyant = bench.commands
    assert (plain["url"], plain["others"]) == ("http://10.1.0.1:8700", ["http://10.1.1.1:8700"])
    assert (plain["context"], plain["depth"], plain["overlap"], plain["question"]) == ("docs-1", 2, True, 4)
    assert "steps" not in plain
    assert "forecast" not in plain
    assert (clairvoyant["depth"], clairvoyant["overlap"]) == (1, False)
    assert clairvoyant["steps"] == "/run/made.steps"
    assert clairvoyant["forecast"]["per"] == "chunk"
    assert clairvoyant["forecast"]["rates_bps"][0] < CHUNK_TRACE.rates_bps[0], "goodput, not capacity"
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["scheme"], event["n_chunks"]) == (SCHEME.name, len(MANIFEST.chunks))


def test_padding_may_take_round_trips_and_time_zero_comes_after_it(bench, monkeypatch):
    monkeypatch.setattr(stages, "time", SimpleNamespace(monotonic=lambda: 100.0))
    near, far = MadeShaper(), MadeShaper()
    bench(near).session()
    last = bench(far, link=LinkSettings(delay_s=0.05))
    last.session()
    assert [command["padding_until_s"] for command in last.commands] == pytest.approx([100.05, 101.05])
    assert [down.calls[0][2] for down in (near, far)] == pytest.approx([100.05, 100.05])
    assert last.heard[-1] == {"cmd": "start", "start_s": pytest.approx(100.05)}


def test_a_cache_is_judged_while_the_next_session_gets_ready(bench):
    bench = bench(MadeShaper())
    judged: list[stages.Measured] = []
    first = bench.session()
    bench.stage.judge(first, judged.append)
    assert judged == []
    second = bench.session()
    assert [command["judge"] for command in bench.commands] == [False, True]
    assert judged == [replace(first, outcome=replace(first.outcome, **JUDGEMENT))]
    bench.stage.judge(second, judged.append)
    bench.stage.finish()
    bench.stage.finish()
    assert [command["cmd"] for command in bench.heard] == ["ready", "start"] * 2 + ["judge"]
    assert [one.outcome.measured_kl for one in judged] == [0.01, 0.01]


def test_what_left_no_cache_is_not_judged(bench):
    bench = bench(MadeShaper(), FAILED)
    judged: list[stages.Measured] = []
    done = bench.session()
    bench.stage.judge(done, judged.append)
    assert judged == [done]


def test_a_repeated_session_is_judged_once(bench):
    bench = bench(MadeShaper(0.5, 0.5, 1.0))
    bench.stage.judge(bench.settled(2), lambda _: None)
    bench.stage.finish()
    assert [command["cmd"] for command in bench.heard] == ["ready", "start"] * 3 + ["judge"]


def test_a_session_that_cannot_get_ready_leaves_the_path_alone(bench, monkeypatch):
    down = MadeShaper()
    made = bench(down)
    monkeypatch.setattr(made.stage.receiver, "ask", lambda *_: {"ok": True} | FAILED)
    done = made.session()
    assert (done.outcome.status, done.outcome.why) == ("failed", FAILED["error"])
    assert down.named("arm") == []
