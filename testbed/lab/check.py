"""`kvstream lab check`: a policy on the six teaching links, on one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvstream.testbed.lab import exercises, submission
from kvstream.testbed.lab.explain import costliest_chunk
from kvstream.testbed.lab.sessions import PEER, Tried, try_all
from kvstream.testbed.lab.situation import Situation, load, short_name
from kvstream.testbed.lab.timeline import WIDTH, link_line, session_line
from kvstream.testbed.terminal import many

if TYPE_CHECKING:
    from rich.console import Console

LIMIT_S = 0.05
"""Time limit of a choice on the emulated link, where a real clock runs. What a choice takes by itself is held against
it: a busy machine is not the policy's fault."""


def check(spec: str, situation: Situation | None = None) -> list[Tried]:
    """Run a policy spec on every teaching link. Raises PolicyError for a file that cannot be used."""
    return try_all(lambda: submission.make(spec), situation or load())


def to_json(tried: list[Tried]) -> list[dict[str, Any]]:
    return [
        {
            "trace": one.trace.name,
            "met": one.met,
            "ttft_s": one.mine.ttft_s if one.mine else None,
            "distortion": one.mine.distortion if one.mine else None,
            "levels": list(one.mine.levels) if one.mine else [],
            "faults": one.mine.policy_faults if one.mine else 0,
            "oracle_distortion": one.plan.distortion if one.plan else None,
            "buffer_based_met": bool(one.peer and one.peer.met),
            "buffer_based_distortion": one.peer.distortion if one.peer else None,
        }
        for one in tried
    ]


def show(typed: str, tried: list[Tried], situation: Situation, console: Console) -> None:
    """Print one screen: six links with their timelines, then a summary. `typed` is the policy as the user gave it."""
    from rich.text import Text

    label = " " * 10
    deadline_s = situation.deadline_s
    width = min(WIDTH, console.width - len(label) - 10)  # a name before it, the deadline's mark in it
    for problem in _problems(typed, tried):
        console.print(Text(problem, "red"), soft_wrap=not console.is_terminal)
    for one in tried:
        name = f"{short_name(one.trace):<9} "
        console.print(Text.assemble(_mark(one.met), (name, "bold"), _outcome(one, situation)))
        console.print(Text(label + "link    ") + link_line(one.trace, deadline_s, width), overflow="crop", no_wrap=True)
        for who, record in (("you", one.mine), ("oracle", one.oracle)):
            if record is None and who == "oracle":
                continue
            line = session_line(record, situation.n_levels, deadline_s, width)
            console.print(Text(f"{label}{who:<8}") + line, overflow="crop", no_wrap=True)
    console.print()
    for remark in _remarks(typed, tried, situation):
        mark = _mark(remark.passed) if isinstance(remark, exercises.Result) else ""
        console.print(Text.assemble(mark, str(remark)), soft_wrap=not console.is_terminal)


def _mark(good: bool) -> tuple[str, str]:
    """What is seen first, passed or not, and its style."""
    return ("✓ ", "bold green") if good else ("✗ ", "bold red")


def _outcome(one: Tried, situation: Situation) -> str:
    if one.mine is None:
        return "the transfer never finished"
    late_s = one.mine.ttft_s - situation.deadline_s
    words = f"first token {one.mine.ttft_s:.2f} s, " + (
        "deadline met" if late_s <= 0 else f"deadline MISSED by {late_s:.2f} s"
    )
    words += f"; distortion {one.mine.distortion:.2g}"
    words += f" (oracle {one.plan.distortion:.2g})" if one.plan else " (no policy could meet this deadline)"
    return words


def _remarks(typed: str, tried: list[Tried], situation: Situation) -> list[str | exercises.Result]:
    n = len(tried)
    met, peer_met = sum(one.met for one in tried), sum(bool(one.peer and one.peer.met) for one in tried)
    first = f"Deadlines met: {met} of {n} ({PEER}: {peer_met})."
    both = [one for one in tried if one.met and one.mine and one.peer and one.peer.met and one.plan]
    if both:
        mine = sum(one.mine.distortion for one in both if one.mine) / len(both)
        peer = sum(one.peer.distortion for one in both if one.peer) / len(both)
        best = sum(one.plan.distortion for one in both if one.plan) / len(both)
        first += f" Distortion where both met it: {mine:.2g} ({PEER} {peer:.2g}, oracle {best:.2g})."
    lines: list[str | exercises.Result] = [first, *exercises.of_links(tried, situation)]
    worst = costliest(tried, situation)
    if worst is not None:
        lines.append(
            f"Look closer: kvstream lab explain {worst[0]} {worst[1]}" + ("" if typed == "policy.py" else f" {typed}")
        )
    return lines


def _problems(typed: str, tried: list[Tried]) -> list[str]:
    """What is wrong with the policy itself, and is read first: faults, slow choices, too many lines."""
    lines = []
    faults = sum(one.mine.policy_faults for one in tried if one.mine)
    if faults:
        why = next(chunk.fault for one in tried if one.mine for chunk in one.mine.chunks if chunk.fault)
        trace = next((one.watch.first_fault for one in tried if one.watch.first_fault), "")
        were = "was" if faults == 1 else "were"
        lines.append(f"{many(faults, 'invalid choice')} {were} replaced by level 0. The first:")
        lines.append(trace.rstrip() or why)
    slowest_s = max((asked.seconds for one in tried for asked in one.watch.asked), default=0.0)
    if slowest_s > LIMIT_S:
        lines.append(f"A choice took {slowest_s * 1000:.0f} ms; the limit over a real link is {LIMIT_S * 1000:.0f} ms.")
    length = submission.lines_in(typed)
    if length is not None and length > submission.MAX_LINES:
        lines.append(f"The file has {length} lines; the lab allows {submission.MAX_LINES}.")
    return [*lines, ""] if lines else []


def costliest(tried: list[Tried], situation: Situation) -> tuple[str, int] | None:
    """(trace, chunk) of the costliest choice, on the link with the largest loss; None if there is none."""

    def lost(one: Tried) -> float:
        if one.plan is None or one.mine is None:
            return -1.0
        return (situation.worst if not one.met else 0.0) + one.mine.distortion - one.plan.distortion

    one = max(tried, key=lost)
    if lost(one) <= 1e-9:
        return None
    chunk = costliest_chunk(situation, one.trace, one.watch.asked)
    return None if chunk is None else (short_name(one.trace), chunk)
