"""When a process loads the compiled loops of the optimum."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from kvstream.policies import compiled
from kvstream.policies.api import Forecast
from kvstream.policies.optimum import BEAM, least_distortion
from kvstream.policies.oracle import Oracle
from kvstream.traces.trace import Trace
from tests.policies.test_optimum import random_line
from tests.policies.test_policies import observation


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many lines had been solved each time the loops were loaded."""
    loads: list[int] = []
    monkeypatch.setattr(compiled, "_solved", 0)
    monkeypatch.setattr(compiled, "_kernel", None)
    monkeypatch.setattr(compiled, "find_spec", lambda name: name)
    importing = SimpleNamespace(import_module=lambda name: loads.append(compiled._solved))
    monkeypatch.setattr(compiled, "importlib", importing)
    return loads


def test_loops_are_loaded_once_many_lines_have_been_solved(loaded: list[int]) -> None:
    for _ in range(2 * compiled.COMPILED_FROM):
        least_distortion(random_line(1), 1.0)
    assert loaded == [compiled.COMPILED_FROM]


def test_a_choice_never_waits_for_them(loaded: list[int]) -> None:
    for _ in range(2 * compiled.COMPILED_FROM):
        least_distortion(random_line(1), 1.0, widest=BEAM)
    assert loaded == []


def test_the_oracle_loads_them_before_a_clock_that_is_real(loaded: list[int]) -> None:
    forecast = Forecast(Trace("t", [1.0], [8e6]), 0.01, 1)
    Oracle().foresee(forecast)
    assert loaded == []
    Oracle().foresee(replace(forecast, first=observation(2)))
    assert loaded == [0]


def test_without_numba_they_are_left_alone(loaded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    for _ in range(2 * compiled.COMPILED_FROM):
        least_distortion(random_line(1), 1.0)
    assert loaded == []
