"""The compiled loop against the session itself: every field of every record is the same."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstream.policies.buffer_based import BUFFERS, BufferBased
from kvstream.policies.cachegen import CacheGen, CacheGenCompute
from kvstream.policies.fixed import Fixed, Highest, Lowest, Text
from kvstream.policies.kvstream import KVStream
from kvstream.policies.replacing import Replacing
from kvstream.policies.throughput import Throughput
from kvstream.testbed.config import experiment
from kvstream.testbed.results.folder import Run
from kvstream.testbed.run import simulated
from kvstream.testbed.session.costs import EXACT, IN_SESSIONS, Costs
from kvstream.testbed.session.record import SessionFailed, SessionRecord
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.simulator import compiled, noise
from kvstream.testbed.simulator.compiled import Context
from kvstream.testbed.simulator.simulator import simulate
from kvstream.testbed.store.manifest import ChunkInfo, KVShape, LevelInfo, Manifest
from kvstream.traces.trace import Trace

pytest.importorskip("numba", reason="the extra [run] is not installed")

MADE = Manifest(
    "made", "none", {"codec": "raw"}, None, KVShape(1, 1, 8, "float16"),
    tuple(LevelInfo(str(i), 0.1 / (1 + i), 1.0 + i) for i in range(3)),
    tuple(ChunkInfo(64 * k, 64 * k + 64, (40_000, 90_000, 160_000), 200) for k in range(6)),
)  # fmt: skip
COSTS = Costs(((0.004, 0.005, 0.006),) * 6, (0.5,) * 6, 0.02)


@pytest.fixture(scope="module", autouse=True)
def _compiled_before() -> None:
    """Under hypothesis, which traces what it runs, compiling takes eight times as long."""
    rule = Context(MADE, COSTS).rule_of(Lowest())
    assert rule is not None
    compiled.simulate_many(Context(MADE, COSTS), rule, [Trace("a", [1.0], [1e7])], SessionSettings(1.0))


POLICIES: st.SearchStrategy[Any] = st.one_of(
    st.builds(Fixed, level=st.sampled_from(["lowest", "medium", "highest"])),
    st.builds(Lowest),
    st.builds(Highest),
    st.builds(Text),
    st.builds(CacheGen, first=st.sampled_from(["lowest", "highest"]), reserve_s=st.sampled_from([0, 0.03])),
    st.builds(CacheGenCompute, margin=st.sampled_from([0.0, 0.05, 0.2])),
    st.builds(
        Throughput,
        estimator=st.sampled_from([*compiled.ESTIMATORS]),
        window=st.integers(1, 8),
        safety=st.sampled_from([1, 0.9, 0.5]),
    ),
    st.builds(
        BufferBased,
        buffer=st.sampled_from(BUFFERS),
        reservoir=st.sampled_from([0.0, 0.02, 0.1]),
        cushion=st.sampled_from([0.1, 0.25, 1.0]),
    ),
    st.builds(
        KVStream,
        target=st.sampled_from([0.5, 0.95]),
        memory=st.sampled_from([0.1, 0.6]),
        spread=st.sampled_from([0.3, 0.9]),
        margin_s=st.sampled_from([0.0, 0.01]),
    ),
)


@st.composite
def contexts(draw: st.DrawFn) -> tuple[Manifest, Costs]:
    """Chunks of 2 kB to 20 MB, with times of computing from nothing to what binds."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, n_levels = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    scale = 10.0 ** draw(st.floats(4.3, 7.3))
    compute_s = 10.0 ** draw(st.floats(-5.0, 0.0))
    chunks = []
    for k in range(n):
        sizes = np.sort(rng.uniform(0.1, 1.0, n_levels) * scale).astype(int) + 1
        chunks.append(ChunkInfo(100 * k, 100 * k + 100, tuple(sizes.tolist()), int(rng.integers(1, 6000))))
    levels = tuple(LevelInfo(str(i), nats, 1.0 + i) for i, nats in enumerate((0.3, 0.1, 0.05, 0.02, 0.01, 0.005)))
    manifest = Manifest(
        "made", "none", {"codec": "raw"}, None, KVShape(1, 1, 8, "float16"), levels[:n_levels], tuple(chunks)
    )
    costs = Costs(
        tuple(tuple((compute_s * rng.uniform(0.1, 1.0, n_levels)).tolist()) for _ in range(n)),
        tuple((10 * compute_s * rng.uniform(0.1, 1.0, n)).tolist()) if draw(st.booleans()) else None,
        float(compute_s * rng.uniform(0.0, 3.0)),
        IN_SESSIONS if draw(st.booleans()) else EXACT,
    )
    return manifest, costs


@st.composite
def links(draw: st.DrawFn) -> Trace:
    """Rates from kilobits to 25 Gbit/s in rows from milliseconds to seconds, with outages, over time or per chunk."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, scale = draw(st.integers(1, 30)), 10.0 ** draw(st.floats(4.0, 10.4))
    rates = scale * rng.uniform(0.05, 1.0, rows)
    rates[rng.random(rows) < draw(st.sampled_from([0.0, 0.3]))] = 0.0
    durations = 10.0 ** rng.uniform(-3.0, 0.5, rows)
    per = draw(st.sampled_from(["time", "time", "time", "chunk"]))
    end = draw(st.sampled_from(["loop", "hold", "stop"]))
    return Trace("made", durations if per == "time" else np.empty(0), rates, end=end, per=per)  # type: ignore[arg-type]


def outcome(run: Any) -> SessionRecord | str:
    try:
        return run()  # type: ignore[no-any-return]
    except SessionFailed as error:
        return str(error)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    made=contexts(),
    link=links(),
    policy=POLICIES,
    depth=st.integers(1, 2),
    overlap=st.booleans(),
    rtt_s=st.sampled_from([0.0, 0.0004, 0.02, 0.2]),
    deadline_s=st.floats(0.01, 20.0),
    prior_bps=st.sampled_from([None, 1e6, 3e8]),
    seed=st.integers(0, 1000),
    varies=st.booleans(),
    manifest_bytes=st.sampled_from([0, 700, 40_000]),
    concurrent=st.sampled_from([1, 1, 3]),
)
def test_a_compiled_session_is_the_session(
    made: tuple[Manifest, Costs], link: Trace, policy: Any, depth: int, overlap: bool, rtt_s: float, deadline_s: float,
    prior_bps: float | None, seed: int, varies: bool, manifest_bytes: int, concurrent: int,
) -> None:  # fmt: skip
    manifest, costs = made
    context = Context(manifest, costs)
    rule = context.rule_of(policy)
    assert rule is not None
    how = SessionSettings(deadline_s, depth, overlap, prior_bps, concurrent)
    factors = noise.draw(np.array([seed]), len(manifest.chunks)) if varies else None
    actual = noise.draw(seed, len(manifest.chunks)).on(costs) if varies else None
    ours = compiled.simulate_many(
        context, rule, [link], how, factors=factors, rtts_s=rtt_s, manifest_bytes=manifest_bytes
    )
    theirs = outcome(
        lambda: simulate(
            manifest, policy, link, how, costs=costs, actual=actual, rtt_s=rtt_s, manifest_bytes=manifest_bytes
        )
    )
    assert_same(outcome(lambda: ours.record(0)), theirs)
    if isinstance(theirs, SessionRecord):
        assert ours.distortion[0] == pytest.approx(theirs.distortion)
        assert bool(ours.met[0]) == theirs.met


def assert_same(ours: Any, theirs: Any) -> None:
    """Choices and times to the bit; the numbers that a policy gives as its reasons but for what a compiler may do to a
    power's last bits."""
    if not isinstance(ours, SessionRecord) or not isinstance(theirs, SessionRecord):
        assert ours == theirs
        return
    assert _without_reasons(ours) == _without_reasons(theirs)
    for one, other in zip(ours.chunks, theirs.chunks, strict=True):
        assert one.reason == pytest.approx(other.reason, rel=1e-12, abs=1e-300)


def _without_reasons(record: SessionRecord) -> SessionRecord:
    return replace(record, chunks=tuple(replace(chunk, reason={}) for chunk in record.chunks))


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("per", ["time", "chunk"])
@pytest.mark.parametrize("end", ["stop", "hold", "loop"])
def test_a_link_that_dies_within_a_chunk_ends_both(end: str, per: str) -> None:
    durations_s = [0.05, 0.02] if per == "time" else []
    link = Trace("made", durations_s, [1e7, 0.0] if end != "loop" else [0.0, 0.0], end=end, per=per)  # type: ignore[arg-type]
    context, rule = Context(MADE, COSTS), Context(MADE, COSTS).rule_of(CacheGen(first="highest"))
    assert rule is not None
    for depth in (1, 2):
        how = SessionSettings(1.0, depth)
        ours = outcome(lambda: compiled.simulate_many(context, rule, [link], how).record(0))  # noqa: B023
        theirs = outcome(lambda: simulate(MADE, CacheGen(first="highest"), link, how, costs=COSTS))  # noqa: B023
        assert ours == theirs
        assert (per == "chunk" and end == "hold") or "carries nothing more" in str(theirs)


def test_many_sessions_at_once_are_those_one_by_one() -> None:
    rng = np.random.default_rng(3)
    context = Context(MADE, COSTS)
    traces = [Trace("a", rng.uniform(0.05, 0.2, 9), rng.uniform(4e6, 4e7, 9)) for _ in range(5)]
    which = rng.integers(0, 5, 40)
    deadlines_s, rtts_s = rng.uniform(0.2, 1.0, 40), rng.uniform(0.0, 0.05, 40)
    priors_bps = np.where(rng.random(40) < 0.5, np.nan, 1e7)
    factors = noise.draw(np.arange(40), 6)
    rule = context.rule_of(CacheGen())
    assert rule is not None
    how = SessionSettings(1.0, 2)
    many = compiled.simulate_many(
        context, rule, traces, how, which=which, deadlines_s=deadlines_s, rtts_s=rtts_s, priors_bps=priors_bps,
        factors=factors,
    )  # fmt: skip
    few = compiled.simulate_many(
        context, rule, traces, how, which=which, deadlines_s=deadlines_s, rtts_s=rtts_s, priors_bps=priors_bps,
        factors=factors, chunks=False,
    )  # fmt: skip
    assert len(few.times_s) == 1
    assert (few.ttft_s == many.ttft_s).all()
    assert (few.levels == many.levels).all()
    assert len({tuple(levels) for levels in many.levels.tolist()}) > 5
    for k in range(40):
        prior = None if math.isnan(priors_bps[k]) else float(priors_bps[k])
        one = SessionSettings(float(deadlines_s[k]), 2, prior_bps=prior)
        actual = noise.draw(k, 6).on(COSTS)
        assert many.record(k) == simulate(
            MADE, CacheGen(), traces[which[k]], one, costs=COSTS, actual=actual, rtt_s=float(rtts_s[k])
        )


@pytest.mark.parametrize(
    "policy",
    [Replacing(), Throughput(estimator="ewma"), Fixed(level=9), type("Mine", (KVStream,), {})()],
)
def test_other_policies_are_asked_in_python(policy: Any) -> None:
    assert Context(MADE, COSTS).rule_of(policy) is None


def test_a_run_has_the_same_files_compiled_and_not(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = experiment.from_dict(
        {
            "name": "both",
            "contexts": ["docs", "code"],
            "traces": ["steady,scale_mean=60Mbps", "wifi,scale_mean=60Mbps"],
            "deadlines_s": [0.8],
            "schemes": [
                {"policy": policy, "codec": "uniform", "depth": depth, "label": f"{policy}-{depth}"}
                for policy in ("cachegen", "throughput", "buffer-based", "kvstream", "mpc")
                for depth in (1, 2)
            ],
        }
    )
    runs = [Run(tmp_path / name) for name in ("python", "compiled")]
    simulated.run_simulated(made, runs[0], quiet=True)
    monkeypatch.setattr(simulated, "COMPILED_FROM", 1)
    simulated.run_simulated(made, runs[1], quiet=True)
    for run in runs:
        run.rebuild()
    for name in ("sessions.jsonl", "chunks.jsonl"):
        assert (runs[0].path / name).read_bytes() == (runs[1].path / name).read_bytes()
