"""The solutions of the exercises do what their text says."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvstream.testbed.lab import check, exercises, grade, sessions, situation, submission
from kvstream.traces.trace import Trace

SOLUTIONS = Path(__file__).parents[3] / "docs" / "lab" / "solutions"
POLICIES = ("slice", "pace", "budget", "estimator", "lookahead", "chance")
"""In the order of the exercises."""
DEFAULT = "kvstream"
SECRETS = ("one secret", "another", "a third")


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


@pytest.fixture(scope="module")
def climb(lab: situation.Situation) -> dict[str, tuple[float, float]]:
    """Scores over the practice links, and over those of three secret seeds together."""
    found = {}
    links = {seed: [link.shifted(at_s) for link in grade.held_out(seed) for at_s in grade.OFFSETS_S]
             for seed in (grade.PRACTICE, *SECRETS)}  # fmt: skip
    plans = {seed: [lab.best(link) for link in those] for seed, those in links.items()}
    for name in (*POLICIES, DEFAULT, sessions.PEER, "fixed,level=1", "fixed,level=2", "fixed,level=3"):
        worths: dict[str, list[float]] = {}
        for seed, those in links.items():
            for link, plan in zip(those, plans[seed], strict=True):
                if plan is not None:
                    policy = submission.make(spec(name) if name in POLICIES else name)
                    row = grade._row("mine", link, 0.0, lab.run(policy, link), plan.distortion, lab)
                    worths.setdefault("practice" if seed == grade.PRACTICE else "secret", []).append(
                        grade._worth(row, lab)
                    )
        practice, secret = (100 * sum(worths[key]) / len(worths[key]) for key in ("practice", "secret"))
        found[name] = practice, secret
    return found


@pytest.mark.parametrize("where", [0, 1], ids=["practice", "secret"])
def test_each_solution_is_better_than_the_one_before(climb: Any, where: int) -> None:
    scores = [climb[name][where] for name in POLICIES]
    assert scores == sorted(scores)
    assert all(after - before > 0.3 for before, after in itertools.pairwise(scores))
    assert climb[POLICIES[0]][where] > climb[sessions.PEER][where]


@pytest.mark.parametrize("where", [0, 1], ids=["practice", "secret"])
def test_the_last_solution_is_at_the_default_policy_s_level(climb: Any, where: int) -> None:
    assert climb[POLICIES[-1]][where] > climb[DEFAULT][where] - 2.0


@pytest.mark.parametrize("where", [0, 1], ids=["practice", "secret"])
def test_no_single_level_comes_far(climb: Any, where: int) -> None:
    best = max(climb[f"fixed,level={level}"][where] for level in (1, 2, 3))
    assert best < climb["budget"][where] - 3.0
    assert best < climb["chance"][where] - 10.0


@pytest.mark.parametrize("where", [0, 1], ids=["practice", "secret"])
def test_each_solution_passes_its_exercise_and_those_before(climb: Any, where: int) -> None:
    numbers = dict(zip(POLICIES, (2, 3, 4, 5, 7, 9), strict=True))
    for name, number in numbers.items():
        result = {"score": climb[name][where], "buffer_based_score": climb[sessions.PEER][where], "violations": 0.0}
        passed = {one.number: one.passed for one in exercises.of_grade(result)}
        assert all(passed[other] for other in passed if other <= number), (name, passed)
    fixed = {
        "score": climb["fixed,level=2"][where],
        "buffer_based_score": climb[sessions.PEER][where],
        "violations": 0.0,
    }
    assert not any(one.passed for one in exercises.of_grade(fixed) if one.number > 3)


def test_the_table_of_solutions_has_their_practice_scores(climb: Any) -> None:
    page = (SOLUTIONS / "README.md").read_text()
    for name in POLICIES:
        assert f"[{name}.py]" in page
        line = next(line for line in page.splitlines() if f"[{name}.py]" in line)
        assert line.endswith(f"| {climb[name][0]:.1f} |")


def test_the_first_choice_of_every_solution_is_sane(lab: situation.Situation) -> None:
    for name in POLICIES:
        tried = sessions.try_all(lambda name=name: submission.make(spec(name)), lab)  # type: ignore[misc]
        assert exercises.of_links(tried, lab)[1].passed, name
    assert not exercises.of_links(check.check("lowest", lab), lab)[1].passed


def test_exercise_1_is_passed_by_the_level_that_is_computed_by_hand(lab: situation.Situation) -> None:
    passed = [
        exercises.of_links(check.check(f"fixed,level={level}", lab), lab)[0].passed for level in range(lab.n_levels)
    ]
    assert passed == [False, False, False, True, False, False]


@pytest.mark.parametrize("name", POLICIES)
def test_a_solution_fits_the_rules_and_makes_no_fault(name: str, lab: situation.Situation) -> None:
    assert len((SOLUTIONS / f"{name}.py").read_text().splitlines()) <= submission.MAX_LINES
    for link in situation.teaching_traces():
        record = lab.run(submission.make(spec(name)), link)
        assert record is not None
        assert [chunk.fault for chunk in record.chunks if chunk.fault] == []


def test_one_budget_beats_equal_slices_on_the_steady_link(lab: situation.Situation) -> None:
    steady = situation.teaching_traces()[0]
    whole = f"{spec('budget')},careful=1,reserve_s=0"  # there is nothing to insure against
    sliced, budget = (lab.run(submission.make(one), steady) for one in (spec("slice"), whole))
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
def test_the_table_finds_the_exhaustive_optimum(chunks: list[tuple[list[int], list[int]]], budget: int) -> None:
    module = knapsack()
    sizes = [sorted(row) for row, _ in chunks]
    distortion = [sorted(row, reverse=True) for _, row in chunks]
    assume(sum(row[0] for row in sizes) <= budget)
    assert module.by_table(sizes, distortion, budget)[0] == module.try_everything(sizes, distortion, budget)[0]


def test_the_numbers_of_exercise_5() -> None:
    sizes, distortion = [(2, 4, 8), (2, 4, 8), (3, 5, 9)], [(8, 3, 1)] * 3
    module = knapsack()
    assert module.by_table(sizes, distortion, 14) == module.try_everything(sizes, distortion, 14) == (9, (1, 1, 1))
    assert "knapsack" not in sys.modules
