"""What a run says while it goes on."""

from __future__ import annotations

import io
from typing import Any

import pytest

from kvstream.testbed.config import experiment
from kvstream.testbed.run.progress import Progress, track
from tests.testbed import made_run

EXPERIMENT = experiment.from_dict(
    {
        "name": "two",
        "contexts": ["docs"],
        "traces": ["steady"],
        "deadlines_s": [1.3, 99.3],
        "schemes": [{"policy": "cachegen", "codec": "kvstream"}],
    }
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(monkeypatch: pytest.MonkeyPatch, out: io.StringIO, done: int) -> str:
    """What is said of the experiment's two sessions, of which `done` are over after a second."""
    clock = iter([0.0, 0.0, 1.0, 1.0])
    monkeypatch.setattr("kvstream.testbed.run.progress.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("sys.stdout", out)
    units = EXPERIMENT.units()
    progress = Progress(quiet=False)
    progress.begin(EXPERIMENT, 2, units, emulated=True)
    for unit in units[:done]:
        row: Any = made_run.session(unit.unit_id, "cachegen", "docs", "steady", lambda t_s: 30e6, made_run._fits)[0]
        progress.step(type("Row", (), row | {"deadline_s": unit.deadline_s}))  # type: ignore[arg-type]
    return out.getvalue()


def test_the_length_is_predicted_from_units_and_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, io.StringIO(), 0) == "two: 2 units x 1 scheme, about 2 min\n"


def test_the_rest_is_predicted_from_the_deadlines_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 of the 102 predicted seconds are over after one: another 50
    assert "1 to go, about 50 s" in told(monkeypatch, Terminal(), 1)


def test_a_pipe_gets_no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(told(monkeypatch, io.StringIO(), 1).splitlines()) == 1


def test_a_pipe_gets_a_line_a_stage_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([10.0, 12.0])
    monkeypatch.setattr("kvstream.testbed.run.progress.time.monotonic", lambda: next(clock))
    assert list(track("abcd", "counting letters")) == list("abcd")
    assert capsys.readouterr().err == "counting letters: 1 of 4 done, about 6 s to go\n"
