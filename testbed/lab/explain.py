"""`kvstream lab explain`: one choice, what the policy saw, and the best outcome of every alternative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvstream.policies.api import TEXT, Forecast, LevelOrText, Observation
from kvstream.policies.optimum import Line, Plan, least_distortion, least_ttft
from kvstream.policies.oracle import line_ahead
from kvstream.testbed.errors import SpecError
from kvstream.testbed.lab import submission
from kvstream.testbed.lab.situation import Asked, Situation, load, short_name, teaching_traces
from kvstream.traces.errors import TraceError
from kvstream.traces.resolve import open_trace
from kvstream.traces.trace import Trace


@dataclass(frozen=True)
class Outcome:
    """The best possible outcome of a choice, with optimal choices after it on the true link."""

    level: LevelOrText
    distortion: float | None
    """Least distortion of the whole session with the deadline met; None if it can no longer be met."""
    earliest_s: float
    """Earliest first token."""


@dataclass(frozen=True)
class Explanation:
    """One choice of one policy on one link."""

    trace: Trace
    chunk: int
    asked: Asked
    outcomes: tuple[Outcome, ...]
    """Smallest level first, text last."""

    @property
    def best(self) -> Outcome:
        """What the oracle would do from here: least distortion in time, else the earliest token."""
        return min(
            self.outcomes,
            key=lambda one: (one.distortion is None, one.earliest_s if one.distortion is None else one.distortion),
        )

    @property
    def chosen(self) -> Outcome:
        return next(one for one in self.outcomes if one.level == self.asked.level)


def explain(spec: str, trace_name: str, chunk: int, situation: Situation | None = None) -> Explanation:
    """Run the policy on a link and explain one of its choices.

    Raises SpecError for a chunk outside the session, TraceError for an unknown link, PolicyError for a bad file.
    """
    situation = situation or load()
    trace = find_trace(trace_name)
    watch = submission.Watch()
    situation.run(submission.make(spec), trace, ask=watch)
    found = [asked for asked in watch.asked if asked.observation.chunk == chunk]
    if not found:
        raise SpecError(f"chunk {chunk}: the session has chunks 0 to {len(situation.manifest.chunks) - 1}")
    return Explanation(trace, chunk, found[0], outcomes(situation, trace, found[0].observation))


def find_trace(name: str) -> Trace:
    """A teaching link by its short name, else any trace spec. Raises TraceError."""
    for trace in teaching_traces():
        if name in (short_name(trace), trace.name):
            return trace
    try:
        return open_trace(name)
    except TraceError as error:
        known = ", ".join(short_name(trace) for trace in teaching_traces())
        raise TraceError(f"{error} (in the lab: {known})") from None


def outcomes(situation: Situation, trace: Trace, obs: Observation) -> tuple[Outcome, ...]:
    """For each option of the chunk: the best outcome that is still possible after it."""
    line = _line(situation, trace, obs)
    results = []
    for option in range(len(line.sizes_bytes[0])):
        fixed = _with_first(line, option)
        plan = least_distortion(fixed, obs.deadline_s)
        best = None if plan is None else _whole(situation, obs, plan)
        results.append(Outcome(situation.option(option), best, least_ttft(fixed).ttft_s))
    return tuple(results)


def best_outcome(
    situation: Situation, trace: Trace, obs: Observation, level: LevelOrText | None = None
) -> float | None:
    """Least distortion of the whole session that is still possible, after this level if one is given; None if the
    deadline is lost."""
    line = _line(situation, trace, obs)
    if level is not None:
        line = _with_first(line, situation.n_levels if level == TEXT else int(level))
    plan = least_distortion(line, obs.deadline_s)
    return None if plan is None else _whole(situation, obs, plan)


def _line(situation: Situation, trace: Trace, obs: Observation) -> Line:
    return line_ahead(Forecast(trace.as_goodput(), situation.rtt_s, situation.depth), obs)


def _whole(situation: Situation, obs: Observation, plan: Plan) -> float:
    """The session's distortion with a plan for the chunks that are left."""
    manifest = situation.manifest
    ladder = [level.distortion for level in manifest.levels]
    sent = [*((done.chunk, done.level) for done in obs.transfers), *((one.chunk, one.level) for one in obs.in_flight)]
    spent = sum(manifest.chunks[chunk].tokens * ladder[level] for chunk, level in sent if isinstance(level, int))
    return (spent + plan.distortion * sum(obs.tokens)) / manifest.tokens


def _with_first(line: Line, option: int) -> Line:
    """The same line with the first chunk's option fixed."""

    def only(table: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        return ((table[0][option],) * len(table[0]), *table[1:])

    return replace(
        line, sizes_bytes=only(line.sizes_bytes), compute_s=only(line.compute_s), distortion=only(line.distortion)
    )


def costliest_chunk(situation: Situation, trace: Trace, asked: Sequence[Asked]) -> int | None:
    """The chunk whose choice gave away most of what was still possible; losing the deadline weighs most."""
    worst, worst_cost = None, 1e-9
    for one in asked:
        explanation = Explanation(trace, one.observation.chunk, one, outcomes(situation, trace, one.observation))
        best, chosen = explanation.best, explanation.chosen
        if best.distortion is None:
            break
        cost = situation.worst * 10 if chosen.distortion is None else chosen.distortion - best.distortion
        if cost > worst_cost:
            worst, worst_cost = one.observation.chunk, cost
    return worst


def to_json(explanation: Explanation) -> dict[str, Any]:
    obs = explanation.asked.observation
    return {
        "trace": explanation.trace.name,
        "chunk": explanation.chunk,
        "now_s": obs.now_s,
        "left_s": obs.left_s,
        "goodput_bps": [done.goodput_bps for done in obs.transfers],
        "chosen": explanation.asked.level,
        "reason": dict(explanation.asked.reason),
        "oracle": explanation.best.level,
        "outcomes": [vars(one) for one in explanation.outcomes],
    }


def text(explanation: Explanation, situation: Situation) -> str:
    """The explanation as text."""
    obs, trace = explanation.asked.observation, explanation.trace
    rates = ", ".join(f"{done.goodput_bps / 1e6:.1f}" for done in obs.transfers[-3:]) or "none yet"
    lines = [
        f"{short_name(trace)}, chunk {explanation.chunk} of 0 to {obs.n_chunks - 1}: chosen {obs.now_s:.3f} s after "
        f"the request, {obs.left_s:.3f} s before the deadline.",
        *([trace.story] if trace.story else []),
        "",
        "What the policy saw",
        f"  goodput of the last chunks  {rates}" + (" Mbit/s" if obs.transfers else ""),
        *(
            f"  in flight                   chunk {one.chunk} at {_name(one.level)}, "
            f"{one.received_bytes / 1e3:.0f} of {one.bytes / 1e3:.0f} kB received"
            for one in obs.in_flight
        ),
        f"  decode backlog              {obs.compute_backlog_s * 1000:.0f} ms",
        f"  chunks left                 {len(obs.remaining)}",
        "What it could not know",
        f"  the link carries            {_future(explanation, situation)} Mbit/s on average from now to the deadline",
        "",
        f"{'option':<9}{'this chunk':>11}{'all left':>10}   best possible outcome",
    ]
    for option, one in enumerate(explanation.outcomes):
        size, rest = _sizes(obs, option)
        marks = [
            word
            for word, other in (("you", explanation.chosen), ("the oracle", explanation.best))
            if other.level == one.level
        ]
        lines.append(
            f"{_name(one.level):<9}{size / 1e3:>8.1f} kB{rest / 1e6:>7.2f} MB   {_fate(one, obs):<38}"
            + (f"<- {' and '.join(marks)}" if marks else "")
        )
    reason = ", ".join(reason_words(key, value) for key, value in explanation.asked.reason.items())
    lines += ["", f"You took {_name(explanation.asked.level)}" + (f" because of {reason}." if reason else ".")]
    lines.append(_why(explanation))
    return "\n".join(line.rstrip() for line in lines)


def reason_words(key: str, value: float) -> str:
    """A policy's reason with the unit that its name carries: `rate 34.4 Mbit/s` for rate_bps."""
    for ending, unit, scale in (("_bps", " Mbit/s", 1e6), ("_bytes", " kB", 1e3), ("_s", " s", 1.0)):
        if key.endswith(ending):
            return f"{key.removesuffix(ending).replace('_', ' ')} {value / scale:.3g}{unit}"
    return f"{key.replace('_', ' ')} {value:.3g}"


def _why(explanation: Explanation) -> str:
    best, chosen = explanation.best, explanation.chosen
    if best.distortion is None:
        return "The deadline was lost before this choice; the oracle can only finish as early as possible."
    if chosen.level == best.level:
        return "So does the oracle."
    if chosen.distortion is None:
        late_s = chosen.earliest_s - explanation.asked.observation.deadline_s
        return (
            f"This choice lost the deadline: even with the smallest chunks from here on, the first token is "
            f"{late_s:.3f} s late. "
            f"The oracle takes {_name(best.level)}."
        )
    return (
        f"The oracle takes {_name(best.level)}: your choice costs {chosen.distortion - best.distortion:.2g} nats, "
        "whatever follows."
    )


def _fate(one: Outcome, obs: Observation) -> str:
    if one.distortion is None:
        late_s = one.earliest_s - obs.deadline_s
        return f"too late by at least {late_s:.3f} s" if late_s < 1e6 else "never arrives"
    return f"in time, distortion {one.distortion:.3g}"


def _sizes(obs: Observation, option: int) -> tuple[int, int]:
    """(bytes of this chunk, bytes of all remaining chunks) at an option."""
    if option == obs.n_levels:
        return obs.text_bytes[0], sum(obs.text_bytes)
    return obs.sizes_bytes[0][option], sum(sizes[option] for sizes in obs.sizes_bytes)


def _future(explanation: Explanation, situation: Situation) -> str:
    obs = explanation.asked.observation
    if obs.left_s <= 0:
        return "(the deadline has passed) 0.0"
    bits = explanation.trace.bits_by(obs.deadline_s) - explanation.trace.bits_by(obs.now_s)
    return f"{bits / obs.left_s / 1e6:.1f}"


def _name(level: LevelOrText) -> str:
    return "text" if level == "text" else f"level {level}"
