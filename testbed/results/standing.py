"""Which schemes are shown to be better than others: the Pareto set, and the winner under a target.

Two things count: deadlines met and distortion, over the same units. That a difference is not significant shows nothing,
least of all with few units; a scheme is behind another only where intervals say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvstream.testbed.results import stats
from kvstream.testbed.results.paired import Json, Row, is_significant, versus
from kvstream.testbed.results.words import ROUNDING, many, or_inf

MARGIN: Final = 0.02
"""Non-inferiority: a share of deadlines met that is lower by less than this counts as kept."""
DISTORTION_MARGIN: Final = 0.05
"""The same of distortion, relative to the other scheme's."""


@dataclass(frozen=True)
class Standing:
    """What the intervals show about the schemes that are not clairvoyant."""

    pareto: tuple[str, ...]
    """Schemes that no other one dominates, most deadlines met first."""
    dominated: Mapping[str, str]
    """[scheme]: one that meets no fewer deadlines at no more distortion, and is better in one of the two."""
    keeping: tuple[str, ...]
    """Schemes shown to meet the target over feasible units, least distortion first."""
    winner: str | None
    """The one scheme that dominates all others, or else has the least distortion of those that keep the target."""

    def to_json(self) -> Json:
        return {
            "pareto": list(self.pareto),
            "dominated": dict(self.dominated),
            "keeping": list(self.keeping),
            "winner": self.winner,
        }


def standing(entries: Sequence[Mapping[str, Any]], counted: Sequence[Mapping[str, Row]], target: float) -> Standing:
    """`entries` are the summary's, of schemes to be judged; `counted` holds the rows of each unit by scheme.

    With fewer traces than intervals need, nothing is shown: every scheme is in the Pareto set and none wins.
    """
    entries = sorted(entries, key=lambda entry: (-entry["met"], or_inf(entry["distortion"])))
    names = [str(entry["scheme"]) for entry in entries]
    of = dict(zip(names, entries, strict=True))
    pairs: dict[tuple[str, str], Json] = {}
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            pairs[one, other] = versus(counted, one, other)
            pairs[other, one] = _mirrored(pairs[one, other])
    dominated: dict[str, str] = {}
    for name in names:
        better = [one for one in names if one != name and _dominates(pairs[one, name], of[name])]
        if better:
            dominated[name] = better[0]
    pareto = tuple(name for name in names if name not in dominated)
    keeping = tuple(
        sorted(
            (name for name in names if _end(of[name], "low", 0.0) >= target - MARGIN),
            key=lambda name: or_inf(of[name]["distortion"]),
        )
    )
    winner = None
    if len(names) > 1 and len(pareto) == 1 and len(dominated) == len(names) - 1:
        winner = pareto[0]
    elif len(names) > 1 and keeping:
        first = keeping[0]
        rivals = [name for name in names if name != first and _end(of[name], "high", 1.0) >= target - MARGIN]
        if all(_is_no_more_distorted(pairs[first, name], of[name]) for name in rivals):
            winner = first
    return Standing(pareto, dominated, keeping, winner)


def few(summary: Json) -> str:
    """Why there are no intervals, in words; empty where there are."""
    if not any(entry["n"] and entry["met_low"] is None for entry in summary["schemes"]):
        return ""
    traces = f"{many(summary['traces'], 'trace')} {'is' if summary['traces'] == 1 else 'are'}"
    return f"{traces} too few for intervals, which need at least {stats.MIN_TRACES}"


def _end(entry: Mapping[str, Any], end: str, unknown: float) -> float:
    """An end of the interval of the share of feasible units whose deadline was met."""
    value = entry[f"feasible_{end}"]
    return unknown if value is None else float(value)


def _dominates(pair: Json, other: Mapping[str, Any]) -> bool:
    """Whether the first scheme of a pair is shown to be no worse than the other one in both, and better in one."""
    if pair["met_low"] is None or pair["met_low"] < -MARGIN or not _is_no_more_distorted(pair, other):
        return False
    more_met = pair["met"] > 0.0 and is_significant(pair)
    return more_met or (pair["distortion_high"] is not None and pair["distortion_high"] < -ROUNDING)


def _is_no_more_distorted(pair: Json, other: Mapping[str, Any]) -> bool:
    if other["distortion"] is None:
        return True
    high = pair["distortion_high"]
    return high is not None and high <= DISTORTION_MARGIN * other["distortion"] + ROUNDING


def _mirrored(pair: Json) -> Json:
    """The same difference seen from the other scheme."""
    seen = dict(pair)
    for key in ("met", "distortion"):
        value, low, high = (pair[f"{key}{end}"] for end in ("", "_low", "_high"))
        for end, was in (("", value), ("_low", high), ("_high", low)):
            seen[f"{key}{end}"] = None if was is None else -was
    return seen
