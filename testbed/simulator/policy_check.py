"""Checks a policy against its contract, and writes a template for a new one.

`check` asks a policy in every situation in which policies have been seen to break: one chunk, one level, no history, a
link at zero, a deadline that has passed, no model to recompute with, chunks out of order; and in whole simulated
sessions. It needs no network, no model and no root.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvstream.policies.api import Choice, Forecast, InFlight, LevelOrText, Observation, Policy, Transfer
from kvstream.policies.errors import PolicyError
from kvstream.testbed.session.ask import IMPORT_S, TimedAsk, check_choice, check_reason, give_forecast
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.session.record import ChunkRecord
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.simulator.simulator import simulate
from kvstream.testbed.store.manifest import ChunkInfo, KVShape, LevelInfo, Manifest
from kvstream.testbed.terminal import many
from kvstream.traces.trace import Trace

TIME_LIMIT_S = 0.005
"""Nine of ten choices must take less than this by themselves: waits for a busy machine do not count."""

STALL_S = 1.0
"""A choice that takes longer is abandoned, and the policy is not asked again in its session."""


@dataclass(frozen=True)
class Finding:
    """One check: what was checked, and what was wrong."""

    name: str
    ok: bool
    detail: str = ""


def check(make: Callable[[], Policy]) -> list[Finding]:
    """Every check on fresh policies from `make`; whatever the policy does, nothing is raised."""
    findings = [_situation(make, name, obs) for name, obs in _situations()]
    sessions, repeated, seconds = _sessions(make)
    return [*findings, sessions, repeated, _speed(seconds)]


def _situation(make: Callable[[], Policy], name: str, obs: Observation) -> Finding:
    """One choice in one situation: it must be valid and leave the observation unchanged."""
    before = copy.deepcopy(obs)
    try:
        policy = make()
        give_forecast(policy, forecast())
        choice = TimedAsk(STALL_S, import_s=IMPORT_S).choose(policy, obs)
        problem = _problem(choice, obs)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if not problem and obs != before:
        problem = "the observation was changed; treat it as read-only"
    return Finding(name, not problem, problem)


def _problem(choice: Choice, obs: Observation) -> str:
    """What is wrong with an answer; empty if nothing is."""
    try:
        check_choice(choice, obs)
    except PolicyError as error:
        return str(error)
    return check_reason(choice.reason)[1] or ""


def _sessions(make: Callable[[], Policy]) -> tuple[Finding, Finding, list[float]]:
    """Whole sessions over three links at both depths, each twice; and the seconds of every choice."""
    seconds: list[float] = []
    manifest, costs = _context(8, 4)
    fault = difference = ""
    for name, goodput in _links().items():
        for depth in (1, 2):
            where = f"over link {name!r} at depth {depth}"
            try:
                records = [
                    simulate(
                        manifest,
                        make(),
                        goodput,
                        SessionSettings(1.0, depth=depth, seed=1),
                        costs=costs,
                        rtt_s=0.02,
                        manifest_bytes=1000,
                        ask=_WatchedAsk(seconds),
                    )
                    for _ in range(2)
                ]
            except Exception as error:
                fault = fault or f"{type(error).__name__} {where}: {error}"
                continue
            faults = [chunk.fault for chunk in records[0].chunks if chunk.fault]
            if faults:
                fault = fault or f"{where}: {faults[0]}"
            first, second = ([_asked(chunk) for chunk in record.chunks] for record in records)
            if first != second:
                at = next(i for i, (one, other) in enumerate(zip(first, second, strict=True)) if one != other)
                difference = difference or (
                    f"{where}: chunk {at} at level {first[at][0]} after {first[at][1]:.3f} s, then at level "
                    f"{second[at][0]} after {second[at][1]:.3f} s; draw from random.Random(obs.seed)"
                )
    return (
        Finding("whole simulated sessions", not fault, fault),
        Finding("the same choices for the same session and seed", not difference, difference),
        seconds,
    )


class _WatchedAsk(TimedAsk):
    """Asks in one session, records what each choice took, and refuses a changed observation."""

    def __init__(self, seconds: list[float]) -> None:
        super().__init__(STALL_S, again=False, import_s=IMPORT_S)
        self._seconds = seconds

    def choose(self, policy: Policy, obs: Observation) -> Choice:
        before = copy.deepcopy(obs)
        try:
            choice = super().choose(policy, obs)
        finally:
            self._seconds.append(self.own_s)
        if obs != before:
            raise PolicyError("the observation was changed; treat it as read-only")
        return choice


def _asked(chunk: ChunkRecord) -> tuple[LevelOrText | None, float]:
    """What was chosen for a chunk, and when, which shows the order of chunks."""
    return chunk.level, chunk.request_s or 0.0


def _speed(seconds: list[float]) -> Finding:
    name = f"a choice takes less than {TIME_LIMIT_S * 1e3:g} ms"
    if not seconds:
        return Finding(name, False, "no choice was made")
    slow_s = float(np.quantile(seconds, 0.9))
    detail = f"one in ten takes {slow_s * 1e3:.2f} ms or more; the limit in sessions is 50 ms"
    return Finding(name, slow_s < TIME_LIMIT_S, "" if slow_s < TIME_LIMIT_S else detail)


def forecast() -> Forecast:
    """What a clairvoyant policy sees in the situations."""
    return Forecast(_links()["steady"], 0.02, 2)


def first_situation() -> Observation:
    """A first choice."""
    return _observation(16, 4)


def _links() -> dict[str, Trace]:
    return {
        "steady": Trace("steady", np.array([1.0]), np.array([40e6])),
        "cliff": Trace("cliff", np.array([0.3, 0.3]), np.array([80e6, 4e6]), end="hold"),
        "outage": Trace("outage", np.array([0.2, 0.5, 0.5]), np.array([40e6, 0.0, 40e6]), end="hold"),
    }


def _context(n_chunks: int, n_levels: int) -> tuple[Manifest, Costs]:
    """A context whose chunks differ in size, the last one shorter."""
    tokens = [256] * (n_chunks - 1) + [100]
    chunks, start = [], 0
    for index, count in enumerate(tokens):
        sizes = tuple(count * (500 + 400 * level + 10 * (index % 3)) for level in range(n_levels))
        chunks.append(ChunkInfo(start, start + count, sizes, 4 * count))
        start += count
    manifest = Manifest(
        context="check",
        model="check",
        codec={"codec": "raw"},
        profile=None,
        kv=KVShape(8, 4, 32, "bfloat16"),
        levels=tuple(LevelInfo(str(i), 0.05 / 3**i, 1.0 + i) for i in range(n_levels)),
        chunks=tuple(chunks),
    )
    costs = Costs(((0.004,) * n_levels,) * n_chunks, (0.06,) * n_chunks, 0.02)
    return manifest, costs


def _situations() -> Iterator[tuple[str, Observation]]:
    """Observations at the edges of the contract, by name."""
    for n_chunks, n_levels in ((1, 1), (1, 4), (16, 1), (64, 6)):
        size = f"{many(n_chunks, 'chunk')} and {many(n_levels, 'level')}"
        yield f"first choice of {size}", _observation(n_chunks, n_levels)
    yield "a prior goodput and no history", _observation(8, 4, prior_bps=40e6)
    yield "no model to recompute with", _observation(8, 4, recompute=False)
    yield "an unmeasured round trip", _observation(8, 4, rtt_s=None)
    yield "a deadline of a microsecond", _observation(8, 4, deadline_s=1e-6)
    yield "a deadline long past", _observation(8, 4, done=3, now_s=9.0)
    yield "a link at zero", _observation(8, 4, done=3, goodput_bps=1e-9, now_s=0.9)
    yield "an unlimited link", _observation(8, 4, done=3, goodput_bps=1e14)
    yield "a chunk in flight without its first byte", _observation(8, 4, done=3, flying=True)
    yield "the last chunk", _observation(8, 4, done=7)
    yield "chunks out of order", _observation(8, 4, done=3, gap=True)
    yield "sixteen concurrent requests", _observation(8, 4, done=2, concurrent=16)


def _observation(
    n_chunks: int,
    n_levels: int,
    *,
    done: int = 0,
    now_s: float = 0.2,
    deadline_s: float = 1.0,
    goodput_bps: float = 40e6,
    prior_bps: float | None = None,
    recompute: bool = True,
    rtt_s: float | None = 0.02,
    flying: bool = False,
    gap: bool = False,
    concurrent: int = 1,
) -> Observation:
    manifest, costs = _context(n_chunks, n_levels)
    order = list(range(n_chunks))
    if gap:  # the last chunk came first
        order = [order[-1], *order[:-1]]
    sent, left = order[:done], order[done:]
    step_s = now_s / (done + 1)
    transfers = tuple(
        Transfer(
            chunk,
            0,
            manifest.chunks[chunk].sizes_bytes[0],
            step_s * (at + 0.1),
            step_s * (at + 0.2),
            step_s * (at + 1),
            goodput_bps,
        )
        for at, chunk in enumerate(sent)
    )
    in_flight: tuple[InFlight, ...] = ()
    if flying:
        chunk, left = left[0], left[1:]
        in_flight = (InFlight(chunk, 0, manifest.chunks[chunk].sizes_bytes[0], 0, now_s - 0.01),)
    ladder = tuple(level.distortion for level in manifest.levels)
    return Observation(
        chunk=min(left),
        n_chunks=n_chunks,
        now_s=now_s,
        deadline_s=deadline_s,
        remaining=tuple(left),
        tokens=tuple(manifest.chunks[i].tokens for i in left),
        sizes_bytes=tuple(manifest.chunks[i].sizes_bytes for i in left),
        distortion=(ladder,) * len(left),
        text_bytes=tuple(manifest.chunks[i].text_bytes for i in left),
        recompute_s=(0.06,) * len(left) if recompute else None,
        decode_s=tuple(costs.decode_s[i] for i in left),
        prefill_s=costs.prefill_s,
        transfers=transfers,
        in_flight=in_flight,
        compute_backlog_s=0.004 * (len(in_flight) + (done > 0)),
        rtt_s=rtt_s,
        prior_bps=prior_bps,
        concurrent=concurrent,
    )


TEMPLATE = '''"""{title}: which level comes next.

Check it:  kvstream policy check ./{file}:{cls}
Try it:    kvstream simulate --policy ./{file}:{cls}
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstream import TEXT, Choice, Observation


@dataclass
class {cls}:
    """The highest level at which all remaining chunks fit, at the goodput of the last one."""

    safety: float = 0.8
    """Fraction of the goodput to rely on. Every field is a setting: ./{file}:{cls},safety=0.7"""

    def choose(self, obs: Observation) -> Choice:
        if not obs.transfers:  # the first chunk: nothing is measured yet
            return Choice(0)
        goodput_bps = self.safety * obs.transfers[-1].goodput_bps
        waiting = sum(flight.bytes - flight.received_bytes for flight in obs.in_flight)
        for level in reversed(range(obs.n_levels)):  # the best level first
            bits = 8 * (waiting + sum(sizes[level] for sizes in obs.sizes_bytes))
            expected_s = bits / goodput_bps + obs.decode_s[-1][level] + obs.prefill_s
            if expected_s <= obs.left_s:
                return Choice(level, reason={{"expected_s": expected_s}})
        if obs.recompute_s is not None and sum(obs.recompute_s) < obs.left_s:
            return Choice(TEXT)
        return Choice(0)
'''


def class_name(name: str) -> str:
    """`my-policy` to `MyPolicy`. Raises PolicyError for a name that yields no Python identifier."""
    words = name.replace("_", "-").split("-")
    joined = "".join(word[:1].upper() + word[1:] for word in words)
    if not joined.isidentifier() or not joined.isascii():
        raise PolicyError(
            f"invalid policy name {name!r}; use letters, digits and dashes, beginning with a letter: my-policy"
        )
    return joined


def write_template(name: str, folder: Path) -> Path:
    """Write `my_policy.py` with a working class `MyPolicy`. Raises PolicyError if the file exists."""
    cls = class_name(name)
    path = folder / f"{name.replace('-', '_').lower()}.py"
    if path.exists():
        raise PolicyError(f"{path} already exists; choose another name or remove it")
    path.write_text(TEMPLATE.format(title=name, file=path.name, cls=cls))
    return path
