"""The solutions of the exercises do what their text says."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.lab import grade, situation, submission
from traces.trace import Trace

SOLUTIONS = Path(__file__).parents[2] / "docs" / "lab" / "solutions"
POLICIES = ("slice", "budget", "pace", "estimator", "lookahead", "chance")


@pytest.fixture(scope="module")
def lab() -> situation.Situation:
    return situation.load()


def spec(name: str) -> str:
    return submission.spec_of(str(SOLUTIONS / f"{name}.py"))


def knapsack() -> ModuleType:
    import importlib.util

    found = importlib.util.spec_from_file_location("knapsack", SOLUTIONS / "knapsack.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def worth(name: str, lab: situation.Situation, links: list[Trace]) -> dict[str, float]:
    """Mean worth and share missed, as grading counts them, without a process of its own."""
    total, missed, n = 0.0, 0, 0
    for link in links:
        plan = lab.best(link)
        if plan is None:
            continue
        record = lab.run(submission.make(spec(name) if name in POLICIES else name), link)
        row: dict[str, Any] = grade._row("mine", link, 0.0, record, plan.distortion, lab)
        total, missed, n = total + grade._worth(row, lab), missed + (not row["met"]), n + 1
    return {"score": 100 * total / n, "missed": missed / n}


@pytest.fixture(scope="module")
def scores(lab: situation.Situation) -> dict[str, dict[str, float]]:
    links = [link.shifted(at_s) for link in grade.held_out("the test's own seed", 5) for at_s in grade.OFFSETS_S]
    return {name: worth(name, lab, links) for name in (*POLICIES, "buffer-based", "lowest", "highest")}


@pytest.mark.parametrize("name", POLICIES)
def test_a_solution_fits_the_rules_and_makes_no_fault(name: str, lab: situation.Situation) -> None:
    assert len((SOLUTIONS / f"{name}.py").read_text().splitlines()) <= submission.MOST_LINES
    for link in situation.teaching_traces():
        record = lab.run(submission.make(spec(name)), link)
        assert record is not None
        assert [chunk.fault for chunk in record.chunks if chunk.fault] == []


def test_one_budget_beats_equal_slices_on_the_steady_link(lab: situation.Situation) -> None:
    steady = situation.teaching_traces()[0]
    sliced, budget = (lab.run(submission.make(spec(name)), steady) for name in ("slice", "budget"))
    assert sliced is not None
    assert budget is not None
    assert sliced.met
    assert budget.met
    assert budget.distortion < sliced.distortion


def test_planning_ahead_beats_estimating_and_both_beat_the_ends_of_the_ladder(scores: Any) -> None:
    ordered = [scores[name]["score"] for name in ("lowest", "highest", "estimator", "lookahead")]
    assert ordered == sorted(ordered)


def test_the_promise_is_kept_at_a_price_far_below_the_lowest_levels(scores: Any) -> None:
    assert scores["chance"]["missed"] <= 0.15
    assert scores["chance"]["missed"] <= min(scores["estimator"]["missed"], scores["lookahead"]["missed"])
    assert scores["chance"]["score"] > scores["buffer-based"]["score"]


def test_a_larger_epsilon_misses_more(lab: situation.Situation) -> None:
    links = grade.held_out("the test's own seed", 3)

    def missed(epsilon: float) -> int:
        records = [lab.run(submission.make(f"{spec('chance')},epsilon={epsilon}"), link) for link in links]
        return sum(record is None or not record.met for record in records)

    assert missed(0.05) <= missed(0.5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 30), min_size=3, max_size=3), st.lists(st.integers(0, 9), min_size=3, max_size=3)
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(5, 90),
)
def test_the_table_finds_what_trying_everything_finds(chunks: list[tuple[list[int], list[int]]], budget: int) -> None:
    module = knapsack()
    sizes = [sorted(row) for row, _ in chunks]
    distortion = [sorted(row, reverse=True) for _, row in chunks]
    if sum(row[0] for row in sizes) > budget:
        return
    assert module.by_table(sizes, distortion, budget)[0] == module.try_everything(sizes, distortion, budget)[0]


def test_the_numbers_of_exercise_5() -> None:
    sizes, distortion = [(2, 4, 8), (2, 4, 8), (3, 5, 9)], [(8, 3, 1)] * 3
    module = knapsack()
    assert module.by_table(sizes, distortion, 14) == module.try_everything(sizes, distortion, 14) == (9, (1, 1, 1))
    assert "knapsack" not in sys.modules
