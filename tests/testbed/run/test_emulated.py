"""What a run over emulated links keeps and resumes; sessions over real links are in tests/emulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kvstream.testbed.config import experiment
from kvstream.testbed.config.experiment import Scheme, Unit
from kvstream.testbed.encoding.prepare import Prepared
from kvstream.testbed.results.folder import Run
from kvstream.testbed.run import emulated
from kvstream.testbed.run.rows import Bound, Outcome
from kvstream.testbed.run.stage import Measured
from kvstream.testbed.session.costs import Slowdown
from kvstream.testbed.workloads import precomputed
from tests.testbed.emulator.made_path import MadeShaper, made_path

CODEC = "uniform"
LINKS = ("", "delay=1ms")
EXPERIMENT = experiment.from_dict(
    {
        "name": "made",
        "contexts": ["docs"],
        "traces": ["steady"],
        "deadlines_s": [1.0, 2.0],
        "links": LINKS,
        "schemes": [{"policy": policy, "codec": CODEC} for policy in ("text", "cachegen")],
    }
)
BEGUN = {"experiment": {"name": "x"}, "backend": "mininet", "schemes": [], "units": [], "kernel": "6.1"}


@dataclass
class MadeStage:
    """Sessions of one link, all of them `status`; the `breaks`-th is interrupted."""

    done: list[tuple[Unit, Scheme]]
    status: Any = "ok"
    breaks: int | None = None
    path: Any = field(default_factory=lambda: made_path(MadeShaper()))
    overhead_s: float = 0.002
    costs_json: dict[str, Any] = field(default_factory=lambda: {"docs-1": {"prefill_s": 1.0}})
    unjudged: list[Callable[[], object]] = field(default_factory=list)

    def settled(self, unit: Unit, scheme: Scheme, *_: Any) -> Measured:
        self.finish()
        if len(self.done) == self.breaks:
            raise KeyboardInterrupt
        self.done.append((unit, scheme))
        return Measured(Outcome(self.status, "made"), [{"chunk": 0}], [{"t_s": 0.0}])

    def bound(self, *_: Any) -> Bound:
        return Bound(None, ())

    def judge(self, measured: Measured, then: Callable[[Measured], object]) -> None:
        self.unjudged.append(partial(then, measured))

    def finish(self) -> None:
        while self.unjudged:
            self.unjudged.pop()()


def carry_out(
    monkeypatch: pytest.MonkeyPatch, run: Run, status: str = "ok", breaks: int | None = None, *, quiet: bool = True
) -> tuple[list[tuple[Unit, Scheme]], list[float]]:
    """Run what is left of the experiment: the sessions that ran, and the delay of each path that was opened."""
    offer = precomputed.load("docs", CODEC)
    assert offer is not None
    pair = "docs", CODEC
    prepared = Prepared(Path("store"), "bundled", "made", {pair: "docs-1"}, {pair: offer.manifest}, {})
    done: list[tuple[Unit, Scheme]] = []
    delays_s = []

    @contextmanager
    def open_stage(link: Any, *_: Any, **settings: Any) -> Iterator[MadeStage]:
        delays_s.append(link.delay_s)
        yield MadeStage(done, status, breaks)

    monkeypatch.setattr(emulated, "open_stage", open_stage)
    monkeypatch.setattr(emulated, "_prepared", lambda *_: prepared)
    try:
        emulated.run_emulated(EXPERIMENT, run, quiet=quiet)
    except KeyboardInterrupt:
        assert breaks is not None
    return done, delays_s


def test_one_path_per_link_and_one_cell_per_session(tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    done, delays_s = carry_out(monkeypatch, run)
    assert delays_s == [0.0, 0.001]
    assert [unit.link for unit, _ in done] == [LINKS[0]] * 4 + [LINKS[1]] * 4
    assert len(run.rebuild()) == 8
    assert run.manifest["networks"] == {link: {"kernel": "6.12", "shaper": {"interface": "made"}} for link in LINKS}
    assert run.manifest["costs"] == {"docs-1": {"prefill_s": 1.0}}


def test_an_interrupted_run_is_resumed_where_it_stopped(tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    first, delays_s = carry_out(monkeypatch, run, breaks=5)
    assert (len(first), delays_s) == (5, [0.0, 0.001])
    second, delays_s = carry_out(monkeypatch, run)
    assert (len(second), delays_s) == (3, [0.001])
    assert len({(unit.unit_id, scheme.name) for unit, scheme in first + second}) == 8
    assert set(run.manifest["networks"]) == set(LINKS), "the first part's network stays"
    assert carry_out(monkeypatch, run) == ([], []), "a finished run opens no path"


@pytest.mark.parametrize(("status", "again"), [("failed", 8), ("invalid", 0)])
def test_failed_sessions_are_retried_and_invalid_ones_kept(status, again, tmp_path, monkeypatch):
    run = Run(tmp_path / "run")
    carry_out(monkeypatch, run, status=status)
    done, _ = carry_out(monkeypatch, run)
    assert len(done) == again


def test_a_run_that_goes_on_keeps_what_its_networks_said(tmp_path):
    run = Run(tmp_path / "run")
    assert emulated._of_earlier_parts(run) == {"networks": {}, "overhead_s": {}}
    run.create(BEGUN | {"networks": {"delay=1ms": {"impairments": {}}}, "costs": {"docs": 1}, "overhead_s": {}})
    assert emulated._of_earlier_parts(run) == {
        "networks": {"delay=1ms": {"impairments": {}}},
        "costs": {"docs": 1},
        "overhead_s": {},
    }


def test_the_simulator_beside_takes_what_compute_took_in_sessions():
    rows = [
        {"context": "docs", "codec": "a", "slowdown": {"decode": decode, "recompute": 1.0, "prefill": 1.1}}
        for decode in (1.2, 1.4, 9.0)
    ]
    rows += [{"context": "docs", "codec": "b", "slowdown": None}]
    assert emulated._slowdowns(rows) == {("docs", "a"): Slowdown(decode=1.4, recompute=1.0, prefill=1.1)}


def test_repeats_end_where_they_never_help_and_come_back_with_a_valid_session() -> None:
    patience = emulated.Patience(5)
    for _ in range(emulated.FRUITLESS):
        assert patience.repeats == 5
        patience.learn(Outcome("invalid", "CPU contention", repeats=5))
    assert patience.ended
    patience.learn(Outcome("invalid", "CPU contention", repeats=0))
    assert patience.repeats == 0
    patience.learn(Outcome("ok"))
    assert patience.repeats == 5


def test_what_was_not_repeated_or_helped_by_repeating_costs_no_patience() -> None:
    patience = emulated.Patience(2)
    for _ in range(2 * emulated.FRUITLESS):
        patience.learn(Outcome("invalid", "the link was never full", repeats=0))
        patience.learn(Outcome("ok", repeats=1))
        patience.learn(Outcome("invalid", "CPU contention", repeats=2))
    assert patience.repeats == 2
    assert not emulated.Patience(0).ended


def test_the_user_is_told_once_that_repeating_does_not_help(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(emulated, "FRUITLESS", 2)
    monkeypatch.setattr(MadeStage, "settled", lambda self, *_: Measured(Outcome("invalid", "made", repeats=2), [], []))
    carry_out(monkeypatch, Run(tmp_path / "run"), quiet=False)
    assert capsys.readouterr().out.count("2 sessions in a row stayed invalid, however often repeated (made)") == 1
