"""Pass or fail, exercise by exercise. Those with a policy to hand in; what is argued on paper, a teacher marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from kvstream.policies import registry
from kvstream.policies.api import TEXT
from kvstream.testbed.lab.explain import best_outcome
from kvstream.testbed.lab.sessions import Tried
from kvstream.testbed.lab.situation import Situation, short_name

FIRST_MAX: Final = 0.005
"""What the first choice may give away at most, as a part of the smallest level's distortion."""

MARKS: Final[Mapping[int, tuple[str, float]]] = {
    3: ("the clock alone", 0.25),
    4: ("one budget", 0.33),
    5: ("which mean", 0.4),
    7: ("the sample that lies", 0.45),
    9: ("a promise", 0.55),
}
"""[exercise]: its title, and the part of the way from the peer's score to the oracle's, 100, from which it is passed.

Parts of a way, because seeds differ in difficulty: a little less than what the solutions cover on the hardest of 13.
"""

PROMISE: Final = 0.1
"""The share of missed deadlines from which on exercise 9 is failed, whatever the score."""


@dataclass(frozen=True)
class Result:
    """One exercise."""

    number: int
    title: str
    passed: bool
    why: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"Exercise {self.number} ({self.title}): {'passed' if self.passed else 'FAILED'}, {self.why}"


def of_links(tried: Sequence[Tried], situation: Situation) -> list[Result]:
    """Exercises 1 and 2, from the sessions over the six links."""
    return [_steady(tried[0], situation), _first_choice(tried, situation)]


def of_grade(result: Mapping[str, Any]) -> list[Result]:
    """The exercises with a mark, from the score and the violations on unseen links."""
    found = []
    peer = result["buffer_based_score"]
    for number, (title, mark) in MARKS.items():
        needed = peer + mark * (100.0 - peer)
        passed, why = result["score"] >= needed, f"score {result['score']:.1f} of {needed:.1f} needed"
        if number == max(MARKS):
            passed = passed and result["violations"] <= PROMISE
            why += f", {100 * result['violations']:.1f} % of the deadlines missed ({100 * PROMISE:g} % allowed)"
        found.append(Result(number, title, passed, why))
    return found


def _steady(one: Tried, situation: Situation) -> Result:
    """On the constant link: at least as good as the best single level, which can be computed by hand."""
    levels = range(situation.n_levels)
    records = [situation.run(registry.make("fixed", {"level": level}), one.trace) for level in levels]
    best = max(level for level, record in enumerate(records) if record is not None and record.met)
    limit = situation.manifest.levels[best].distortion
    title = short_name(one.trace)
    if one.mine is None or not one.met:
        return Result(1, title, False, "deadline missed")
    why = f"distortion {one.mine.distortion:.2g}; the best single level has {limit:.2g}"
    return Result(1, title, one.mine.distortion <= limit + 1e-12, why)


def _first_choice(tried: Sequence[Tried], situation: Situation) -> Result:
    """On every link: after the first encoded chunk, with the best possible choices from then on."""
    title, worst, where = "the first choice", 0.0, ""
    for one in tried:
        first = next((asked for asked in one.watch.asked if asked.level != TEXT), None)
        if first is None:
            continue
        chosen = best_outcome(situation, one.trace, first.observation, first.level)
        best = best_outcome(situation, one.trace, first.observation)
        if best is None:
            continue
        if chosen is None:
            return Result(2, title, False, f"level {first.level} loses the deadline on {short_name(one.trace)}")
        lost = (chosen - best) / situation.worst
        if lost > worst:
            worst, where = lost, f" (level {first.level} on {short_name(one.trace)})"
    why = f"gives away {100 * worst:.1f} % of what is possible{where}; {100 * FIRST_MAX:g} % allowed"
    return Result(2, title, worst <= FIRST_MAX, why)
