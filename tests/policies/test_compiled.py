"""When a process loads the compiled loops of the optimum."""

from __future__ import annotations

import pytest

from kvstream.policies import compiled
from kvstream.policies.optimum import BEAM, least_distortion
from tests.policies.test_optimum import random_line


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many lines had been solved each time the loops were loaded."""
    loads: list[int] = []
    monkeypatch.setattr(compiled, "_solved", 0)
    monkeypatch.setattr(compiled, "load", lambda: loads.append(compiled._solved))
    monkeypatch.setattr(compiled, "find_spec", lambda name: name)
    return loads


def test_loops_are_loaded_once_many_lines_have_been_solved(loaded: list[int]) -> None:
    for _ in range(2 * compiled.COMPILED_FROM):
        least_distortion(random_line(1), 1.0)
    assert loaded == [compiled.COMPILED_FROM]


def test_a_choice_never_waits_for_them(loaded: list[int]) -> None:
    for _ in range(2 * compiled.COMPILED_FROM):
        least_distortion(random_line(1), 1.0, widest=BEAM)
    assert loaded == []


def test_without_numba_they_are_left_alone(loaded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    for _ in range(2 * compiled.COMPILED_FROM):
        least_distortion(random_line(1), 1.0)
    assert loaded == []
