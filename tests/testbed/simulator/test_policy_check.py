"""The checker passes every policy of ours and the template, and finds each way to break the contract."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstream.policies import registry
from kvstream.policies.api import TEXT, Choice, Observation, Policy
from kvstream.policies.errors import PolicyError
from kvstream.testbed.simulator.policy_check import check, class_name, write_template


def wrong(make: Callable[[], Any]) -> dict[str, str]:
    return {finding.name: finding.detail for finding in check(make) if not finding.ok}


@pytest.mark.parametrize("name", registry.POLICIES)
def test_our_policies_keep_the_contract(name: str) -> None:
    speed = "a choice takes less than 5 ms"
    found = wrong(lambda: registry.make(name))
    if registry.is_clairvoyant(registry.policy_class(name)):
        found.pop(speed, None)  # solving for the optimum is not asked of an ordinary policy
    assert found == {}


def test_the_template_works_as_it_is(tmp_path: Path) -> None:
    path = write_template("my-policy", tmp_path)
    assert path.name == "my_policy.py"
    assert wrong(lambda: registry.make(f"{path}:MyPolicy")) == {}
    with pytest.raises(PolicyError, match="already exists"):
        write_template("my-policy", tmp_path)


@pytest.mark.parametrize("name", ["", "-", "3rd", "naïve", "a b", "x/y"])
def test_an_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(PolicyError, match="letters, digits and dashes"):
        class_name(name)


class Answers:
    def __init__(self, answer: Callable[[Observation], Any]) -> None:
        self.choose = answer


@pytest.mark.parametrize(
    ("answer", "check_name", "words"),
    [
        (lambda obs: Choice(2), "first choice of 1 chunk and 1 level", "level 2"),
        (lambda obs: Choice(TEXT), "no model to recompute with", "no model"),
        (lambda obs: Choice(0, chunk=obs.n_chunks - 1), "chunks out of order", "remaining"),
        (lambda obs: Choice(int(obs.transfers[-1].level)), "a prior goodput and no history", "IndexError"),
        (lambda obs: Choice(int(0 * obs.rtt_s)), "an unmeasured round trip", "TypeError"),
        (lambda obs: 0, "the last chunk", "return Choice"),
        (lambda obs: Choice(0, reason={"why": "because"}), "the last chunk", "not a number"),
        (lambda obs: Choice(0, reason=None), "the last chunk", "dict of names"),  # type: ignore[arg-type]
    ],
)
def test_each_way_to_break_the_contract_is_found(
    answer: Callable[[Observation], Any], check_name: str, words: str
) -> None:
    assert words in wrong(lambda: Answers(answer))[check_name]


def test_chance_without_the_seed_is_found() -> None:
    found = wrong(lambda: Answers(lambda obs: Choice(random.randrange(obs.n_levels))))
    assert "random.Random(obs.seed)" in found["the same choices for the same session and seed"]


def test_a_changed_observation_is_found() -> None:
    def meddle(obs: Observation) -> Choice:
        object.__setattr__(obs, "deadline_s", 99.0)
        return Choice(0)

    assert "read-only" in wrong(lambda: Answers(meddle))["the last chunk"]


def test_a_slow_choice_is_found() -> None:
    def slow(obs: Observation) -> Choice:
        if obs.chunk % 3 == 0:  # most choices are quick
            time.sleep(0.02)
        return Choice(0)

    assert "one in ten takes" in wrong(lambda: Answers(slow))["a choice takes less than 5 ms"]


def test_chunks_in_a_random_order_are_found() -> None:
    found = wrong(lambda: Answers(lambda obs: Choice(0, chunk=random.choice(obs.remaining))))
    assert "random.Random(obs.seed)" in found["the same choices for the same session and seed"]


def test_an_observation_changed_in_a_session_is_found() -> None:
    def meddle(obs: Observation) -> Choice:
        if len(obs.transfers) > 4:
            object.__setattr__(obs, "deadline_s", 99.0)
        return Choice(0)

    assert "read-only" in wrong(lambda: Answers(meddle))["whole simulated sessions"]


def test_a_constructor_that_fails_is_a_finding() -> None:
    def make() -> Policy:
        raise ValueError("no such file")

    found = wrong(make)
    assert all("no such file" in detail or "no choice" in detail for name, detail in found.items() if detail)
    assert len(found) > 10


def test_a_missing_class_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kvstream.testbed.cli import USAGE, main

    (tmp_path / "mine.py").write_text("class Mine:\n    def choose(self, obs): ...\n")
    assert main(["policy", "check", f"{tmp_path / 'mine.py'}:Yours"]) == USAGE
    said = capsys.readouterr()
    assert said.out == ""
    assert "no class 'Yours'; it has Mine" in said.err
