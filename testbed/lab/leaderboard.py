"""`kvstream lab leaderboard`: the results of a class, ranked, and drawn on the plane of violations and distortion."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from kvstream.testbed.config import type_check
from kvstream.testbed.errors import SpecError
from kvstream.testbed.files import parse_json
from kvstream.testbed.lab.sessions import PEER

Json: TypeAlias = dict[str, Any]

_RESULT: Final[Json] = {
    "name": str,
    "score": float,
    "sessions": int,
    "practice": bool,
    "links": str,
    "violations": float,
    "violations_buffer_based": float,
    "distortion": float | None,
    "distortion_buffer_based": float | None,
    "gain": float,
    "gain_low": float | None,
    "gain_high": float | None,
}
"""Fields of a result that the leaderboard reads."""


def save(result: Mapping[str, Any], name: str, file: Path) -> None:
    """Write a result with the submission's name, as `board` reads it."""
    file.write_text(json.dumps({"name": name, **result}, indent=1) + "\n", encoding="utf-8")


def board(files: Sequence[Path]) -> list[Json]:
    """Results of `save`, best score first, with `hull`: whether some price of a violation makes it the best.

    Raises SpecError for a file that is not a result, and for results over different links: scores of different seeds
    say nothing about each other.
    """
    results: list[Json] = []
    for file in files:
        try:
            result = parse_json(file.read_bytes(), "its content")
            if not isinstance(result, dict) or not _RESULT.keys() <= result.keys():
                raise ValueError(f"it lacks one of {', '.join(_RESULT)}")
            type_check.check(result, _RESULT)
        except (ValueError, OSError) as error:  # a SpecError is a ValueError
            raise SpecError(f"{file}: not a result of kvstream lab grade --output ({error})") from None
        if results and result["links"] != results[0]["links"]:
            raise SpecError(f"{file} was graded with another seed than {files[0]}: grade both with the same one")
        results.append(result)
    on_hull = hull(results)
    ranked = sorted(results, key=lambda one: (-one["score"], one["name"]))
    return [one | {"hull": any(one is corner for corner in on_hull)} for one in ranked]


def hull(results: Sequence[Json]) -> list[Json]:
    """The lower left corner of the convex hull over (violations, distortion), by rising violations: those that are
    best at some price of a violation in distortion."""
    points = sorted(
        (one for one in results if one["distortion"] is not None),
        key=lambda one: (one["violations"], one["distortion"]),
    )
    corners: list[Json] = []
    for one in points:
        if corners and one["distortion"] >= corners[-1]["distortion"]:
            continue
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-2], one):
            corners.pop()
        corners.append(one)
    return corners


def _slope(one: Json, other: Json) -> float:
    across = other["violations"] - one["violations"]
    return (other["distortion"] - one["distortion"]) / across if across > 0.0 else -math.inf


def text(results: Sequence[Mapping[str, Any]]) -> str:
    """A table, best first. Results within the interval of the first one of a rank share that rank."""
    lines = [f"{'rank':>4}  {'name':<24}{'score':>7}  {'vs ' + PEER:<26}{'violations':>10}{'distortion':>12}  hull"]
    rank, floor = 0, math.inf
    for place, one in enumerate(results, start=1):
        half = 0.0 if one["gain_low"] is None else (one["gain_high"] - one["gain_low"]) / 2
        if one["score"] < floor:
            rank, floor = place, one["score"] - half
        low_high = "" if one["gain_low"] is None else f" [{one['gain_low']:+.1f}, {one['gain_high']:+.1f}]"
        gain = f"{one['gain']:+.1f}{low_high}"
        distortion = "-" if one["distortion"] is None else f"{one['distortion']:.2g}"
        marks = ("  yes" if one["hull"] else "") + ("  practice links" if one["practice"] else "")
        lines.append(
            f"{rank:>4}  {one['name'][:23]:<24}{one['score']:>7.1f}  {gain:<26}{100 * one['violations']:>8.0f} %"
            f"{distortion:>12}{marks}"
        )
    return "\n".join(lines)


def draw(results: Sequence[Json], file: Path) -> None:
    """The class on the plane of violations and distortion, with its hull, as SVG or PNG by the file's ending.

    Raises SpecError for another ending, ModuleNotFoundError without seaborn.
    """
    if file.suffix not in (".svg", ".png"):
        raise SpecError(f"{file}: give a name that ends in .svg or .png")
    from kvstream.testbed.report import axes as look
    from kvstream.testbed.report.figures import theme

    points = {one["name"]: (100 * one["violations"], one["distortion"]) for one in results if one["distortion"]}
    corners = [(100 * one["violations"], one["distortion"]) for one in hull(results)]
    peer = (100 * results[0]["violations_buffer_based"], results[0]["distortion_buffer_based"])
    with theme():
        from matplotlib import pyplot

        figure, axes = look.new()
        axes.plot(*zip(*corners, strict=True), color="#d9480f")
        for name, at in {**points, PEER: peer}.items():
            axes.plot(*at, "s" if name == PEER else "o", color="#c97a00" if name == PEER else "#0b7abf")
            axes.annotate(name, at, xytext=(5, 5), textcoords="offset points", fontsize="small")
        axes.set_xlim(left=0)
        look.distortion_axis(axes, [distortion for _, distortion in (*points.values(), peer)])
        axes.set_xlabel("SLO violations (% of sessions)")
        axes.grid()
        figure.savefig(file, dpi=160)
        pyplot.close(figure)
