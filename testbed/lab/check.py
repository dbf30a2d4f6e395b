"""`kvstream lab check`: a policy on the six teaching links, on one screen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from policies import registry
from policies.optimum import Plan
from testbed.lab import submission
from testbed.lab.explain import costliest_chunk
from testbed.lab.situation import Situation, load, short_name, teaching_traces
from testbed.lab.timeline import link_line, session_line
from testbed.session import SessionRecord
from traces.trace import Trace

if TYPE_CHECKING:
    from rich.console import Console

PEER = "buffer-based"
"""The policy that a student's is compared with."""

LIMIT_S = 0.05
"""What a choice may take over the emulated link, where a clock runs."""


@dataclass(frozen=True)
class Tried:
    """One link: the student's session, the peer's, and the oracle's. `plan` is the bound that no session can beat."""

    trace: Trace
    mine: SessionRecord | None
    peer: SessionRecord | None
    plan: Plan | None
    oracle: SessionRecord | None
    watch: submission.Watch

    @property
    def met(self) -> bool:
        return self.mine is not None and self.mine.met


def check(spec: str, situation: Situation | None = None) -> list[Tried]:
    """Run a policy spec on every teaching link. Raises PolicyError for a file that cannot be used."""
    situation = situation or load()
    tried = []
    for trace in teaching_traces():
        watch = submission.Watch()
        plan = situation.best(trace)
        tried.append(
            Tried(
                trace=trace,
                mine=situation.run(submission.make(spec), trace, ask=watch),
                peer=situation.run(registry.make(PEER), trace),
                plan=plan,
                oracle=None if plan is None else situation.run(registry.make("oracle", {"margin": 0.0}), trace),
                watch=watch,
            )
        )
    return tried


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
    """Print one screen: six links with their timelines, then what it comes to. `typed`: as it was asked for."""
    from rich.text import Text

    label = " " * 10
    deadline_s = situation.deadline_s
    for one in tried:
        console.print(Text(f"{short_name(one.trace):<10}", "bold") + Text(_outcome(one, situation)))
        console.print(Text(label + "link    ") + link_line(one.trace, deadline_s), overflow="crop", no_wrap=True)
        for who, record in (("you", one.mine), ("oracle", one.oracle)):
            if record is None and who == "oracle":
                continue
            line = session_line(record, situation.n_levels, deadline_s)
            console.print(Text(f"{label}{who:<8}") + line, overflow="crop", no_wrap=True)
    console.print()
    for remark in _remarks(typed, tried, situation):
        console.print(remark, highlight=False, soft_wrap=True)


def _outcome(one: Tried, situation: Situation) -> str:
    if one.mine is None:
        return "the transfer never ended"
    late_s = one.mine.ttft_s - situation.deadline_s
    words = f"first token {one.mine.ttft_s:.2f} s, " + ("deadline met" if late_s <= 0 else f"MISSED by {late_s:.2f} s")
    words += f"; distortion {one.mine.distortion:.2g}"
    words += f" (oracle {one.plan.distortion:.2g})" if one.plan else " (no policy could meet this deadline)"
    return words


def _remarks(typed: str, tried: list[Tried], situation: Situation) -> list[str]:
    n = len(tried)
    met, peer_met = sum(one.met for one in tried), sum(bool(one.peer and one.peer.met) for one in tried)
    lines = [f"Deadlines met: {met} of {n} ({PEER}: {peer_met})."]
    both = [one for one in tried if one.met and one.mine and one.peer and one.peer.met and one.plan]
    if both:
        mine = sum(one.mine.distortion for one in both if one.mine) / len(both)
        peer = sum(one.peer.distortion for one in both if one.peer) / len(both)
        best = sum(one.plan.distortion for one in both if one.plan) / len(both)
        lines[0] += f" Distortion where both met it: {mine:.2g} ({PEER} {peer:.2g}, oracle {best:.2g})."
    slowest_s = max((asked.seconds for one in tried for asked in one.watch.asked), default=0.0)
    if slowest_s > LIMIT_S:
        lines.append(f"A choice took {slowest_s * 1000:.0f} ms; over a real link {LIMIT_S * 1000:.0f} ms are allowed.")
    faults = sum(one.mine.policy_faults for one in tried if one.mine)
    if faults:
        why = next(chunk.fault for one in tried if one.mine for chunk in one.mine.chunks if chunk.fault)
        trace = next((one.watch.first_fault for one in tried if one.watch.first_fault), "")
        lines.append(f"{faults} choices could not be used and were replaced by level 0. The first:")
        lines.append(trace.rstrip() or why)
    length = submission.lines_in(typed)
    if length is not None and length > submission.MOST_LINES:
        lines.append(f"The file has {length} lines; the lab asks for at most {submission.MOST_LINES}.")
    worst = costliest(tried, situation)
    if worst is not None:
        lines.append(
            f"Look closer: kvstream lab explain {worst[0]} {worst[1]}" + ("" if typed == "policy.py" else f" {typed}")
        )
    return lines


def costliest(tried: list[Tried], situation: Situation) -> tuple[str, int] | None:
    """(trace, chunk) of the choice that cost most, on the link where most was lost; None if nothing was."""

    def lost(one: Tried) -> float:
        if one.plan is None or one.mine is None:
            return -1.0
        return (situation.worst if not one.met else 0.0) + one.mine.distortion - one.plan.distortion

    one = max(tried, key=lost)
    if lost(one) <= 1e-9:
        return None
    chunk = costliest_chunk(situation, one.trace, one.watch.asked)
    return None if chunk is None else (short_name(one.trace), chunk)
