"""Several requests on one link and decoder: hand-computed times, conservation, and what batching is for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstream.policies.api import TEXT, Choice, Observation
from kvstream.policies.cachegen import CacheGen
from kvstream.policies.fixed import Fixed
from kvstream.testbed.errors import SpecError
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.session.record import SessionFailed
from kvstream.testbed.simulator.concurrent import Request, batches, simulate_batched, simulate_shared, totals
from kvstream.testbed.simulator.simulator import simulate
from kvstream.testbed.store.manifest import ChunkInfo, KVShape, LevelInfo, Manifest
from kvstream.testbed.workloads import synthetic
from kvstream.traces.trace import Trace

MBPS = 1e6
LEVELS = (LevelInfo("low", 0.1, 1.0), LevelInfo("high", 0.01, 2.0))


def offer(chunks: int, size: int = 125_000, decode_s: float = 0.02, prefill_s: float = 0.01) -> tuple[Manifest, Costs]:
    infos = tuple(ChunkInfo(100 * i, 100 * i + 100, (size, 2 * size), 100) for i in range(chunks))
    manifest = Manifest("c", "m", {"codec_id": "raw"}, None, KVShape(1, 1, 2, "float32"), LEVELS, infos)
    return manifest, Costs(((decode_s, 2 * decode_s),) * chunks, (0.05,) * chunks, prefill_s)


def request(chunks: int = 3, arrival_s: float = 0.0, policy: object = None, **facts: float) -> Request:
    manifest, costs = offer(chunks, **facts)
    return Request(manifest, policy or Fixed("lowest"), costs, 10.0, arrival_s)  # type: ignore[arg-type]


def constant(mbps: float) -> Trace:
    return Trace("constant", [1000.0], [mbps * MBPS], end="hold")


def simulate_alone(one: Request, goodput: Trace, depth: int = 1, rtt_s: float = 0.0):
    return simulate(one.manifest, one.policy, goodput, one.settings(depth), costs=one.costs, rtt_s=rtt_s)


class Alternating:
    """An encoded level and text in turn; remembers how many requests it shared with."""

    def __init__(self) -> None:
        self.concurrent: list[int] = []

    def choose(self, obs: Observation) -> Choice:
        self.concurrent.append(obs.concurrent)
        return Choice(TEXT if obs.chunk % 2 else 0)


# --- batches


def test_batches_close_after_the_window_or_when_full():
    assert batches([0.0, 0.05, 0.2, 0.21, 0.22], 0.1, 2) == [(0.05, [0, 1]), (0.21, [2, 3]), (0.32, [4])]
    assert batches([0.3, 0.0], 0.1, 8) == [(0.1, [1]), (0.4, [0])]
    assert batches([0.0, 0.0, 0.0], 0.0, 8) == [(0.0, [0, 1, 2])]
    assert batches([0.0, 1.0], 5.0, 1) == [(0.0, [0]), (1.0, [1])]


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=20), st.floats(0.0, 3.0), st.integers(1, 6))
def test_every_request_is_in_one_batch_that_closes_in_time(arrivals_s, window_s, max_batch):
    found = batches(arrivals_s, window_s, max_batch)
    assert sorted(i for _, members in found for i in members) == list(range(len(arrivals_s)))
    for close_s, members in found:
        assert 1 <= len(members) <= max_batch
        assert all(arrivals_s[i] <= close_s <= arrivals_s[i] + window_s for i in members)


@pytest.mark.parametrize(("window_s", "max_batch"), [(-1.0, 2), (float("nan"), 2), (0.1, 0)])
def test_impossible_batches_are_refused(window_s, max_batch):
    with pytest.raises(SpecError):
        batches([0.0], window_s, max_batch)


# --- batched


def test_one_request_in_a_batch_is_a_session_of_the_simulator():
    for rtt_s in (0.0, 0.05):
        alone = simulate_alone(request(), constant(10), rtt_s=rtt_s)
        [served] = simulate_batched([request()], constant(10), rtt_s=rtt_s)
        assert served.record.ttft_s == pytest.approx(alone.ttft_s)
        assert [c.last_byte_s for c in served.record.chunks] == pytest.approx([c.last_byte_s for c in alone.chunks])
        assert [c.decode_end_s for c in served.record.chunks] == pytest.approx([c.decode_end_s for c in alone.chunks])


def test_a_batch_is_streamed_by_chunk_index_and_decoded_padded():
    long, short = request(3, decode_s=0.03), request(2, decode_s=0.02)
    a, b = (one.record for one in simulate_batched([long, short], constant(10)))
    manifests_s = (len(long.manifest.wire) + len(short.manifest.wire)) * 8 / 10e6
    # 125,000 bytes take 0.1 s: a0 b0 a1 b1 a2
    assert [c.last_byte_s for c in a.chunks] == pytest.approx([manifests_s + t for t in (0.1, 0.3, 0.5)])
    assert [c.last_byte_s for c in b.chunks] == pytest.approx([manifests_s + t for t in (0.2, 0.4)])
    # both of index 0 are decoded when b0 is here, for twice the longest's time
    for chunk in (a.chunks[0], b.chunks[0]):
        assert chunk.decode_start_s == pytest.approx(manifests_s + 0.2)
        assert chunk.decode_end_s == pytest.approx(manifests_s + 0.26)
    assert b.ttft_s == pytest.approx(manifests_s + 0.4 + 0.06 + 0.01)
    assert a.ttft_s == pytest.approx(manifests_s + 0.5 + 0.03 + 0.01)


def test_policies_see_how_many_requests_have_the_chunk():
    long, short = Alternating(), Alternating()
    served = simulate_batched([request(4, policy=long), request(2, policy=short)], constant(10))
    assert long.concurrent == [2, 2, 1, 1]
    assert short.concurrent == [2, 2]
    assert served[0].record.levels == (0, TEXT, 0, TEXT)
    for one in served:
        ends = [chunk.decode_end_s for chunk in one.record.chunks]
        assert ends == sorted(ends)
        assert one.record.ttft_s > ends[-1]


def test_the_throughput_that_a_member_measures_is_the_link_s():
    seen: list[float] = []

    class Noting(Fixed):
        def choose(self, obs: Observation) -> Choice:
            seen.extend(transfer.goodput_bps for transfer in obs.transfers[-1:])
            return Choice(0)

    simulate_batched([request(4, policy=Noting()) for _ in range(3)], constant(10))
    assert seen
    assert seen == pytest.approx([10e6] * len(seen))


def test_waiting_for_the_batch_counts():
    early, late = simulate_batched([request(), request(arrival_s=0.08)], constant(10), window_s=0.5)
    assert (early.batch, late.batch) == (0, 0)
    assert early.record.chunks[0].request_s is not None
    assert early.record.chunks[0].request_s >= 0.5
    assert early.record.ttft_s > 0.5 + 0.6
    assert early.done_s == pytest.approx(late.done_s)
    assert early.record.ttft_s == pytest.approx(late.record.ttft_s + 0.08)


def test_the_next_batch_has_the_link_after_the_one_before():
    served = simulate_batched([request(), request(arrival_s=0.05)], constant(10), max_batch=1)
    assert [one.batch for one in served] == [0, 1]
    last = [one.arrival_s + one.record.chunks[-1].last_byte_s for one in served]
    first = served[1].arrival_s + served[1].record.chunks[0].first_byte_s
    assert first >= last[0]


# --- shared


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("rtt_s", [0.0, 0.04])
def test_one_request_alone_is_a_session_of_the_simulator(depth, rtt_s):
    trace = Trace("steps", [0.15, 0.1, 0.3], [10 * MBPS, 4 * MBPS, 20 * MBPS], end="hold")
    for policy in (Fixed("lowest"), Fixed("highest"), CacheGen()):
        one = replace(request(5), policy=policy)
        alone = simulate_alone(one, trace, depth, rtt_s)
        [served] = simulate_shared([one], trace, depth=depth, rtt_s=rtt_s)
        assert served.record.levels == alone.levels
        times = [c.last_byte_s for c in served.record.chunks]
        assert times == pytest.approx([c.last_byte_s for c in alone.chunks], abs=0.004)
        assert served.record.ttft_s == pytest.approx(alone.ttft_s, abs=0.004)


def test_equal_requests_get_equal_shares():
    a, b = simulate_shared([request(decode_s=0.0, prefill_s=0.0) for _ in range(2)], constant(10), depth=1)
    wire_s = 2 * len(request().manifest.wire) * 8 / 10e6
    for one in (a, b):
        assert [c.last_byte_s for c in one.record.chunks] == pytest.approx([wire_s + t for t in (0.2, 0.4, 0.6)])
        assert one.record.ttft_s == pytest.approx(wire_s + 0.6)


def test_the_decoder_serves_one_at_a_time():
    served = simulate_shared([request(2, decode_s=0.3) for _ in range(3)], constant(100), depth=1)
    steps = sorted((c.decode_start_s, c.decode_end_s) for one in served for c in one.record.chunks)
    for (_, end_s), (start_s, _) in pairwise(steps):
        assert start_s >= end_s - 1e-9


class Fickle:
    """Levels that change from chunk to chunk, from a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def choose(self, obs: Observation) -> Choice:
        return Choice((0, 1, TEXT)[(self.seed + obs.chunk * 7) % 3])


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.floats(0.0, 0.5), st.integers(0, 5)), min_size=1, max_size=4),
    st.sampled_from([1, 2]),
    st.sampled_from([0.0, 0.02]),
    st.booleans(),
)
def test_the_link_never_carries_more_than_it_can(members, depth, rtt_s, batched):
    trace = Trace("steps", [0.2, 0.2], [20 * MBPS, 5 * MBPS], end="loop")
    requests = [request(n, arrival_s, Fickle(seed)) for n, arrival_s, seed in members]
    if batched:
        served = simulate_batched(requests, trace, window_s=0.1, max_batch=2, rtt_s=rtt_s)
    else:
        served = simulate_shared(requests, trace, depth=depth, rtt_s=rtt_s)
    for one, asked in zip(served, requests, strict=True):
        assert one.arrival_s == asked.arrival_s
        assert len(one.record.levels) == len(asked.manifest.chunks)
        for chunk in one.record.chunks:
            assert chunk.request_s <= chunk.first_byte_s <= chunk.last_byte_s <= chunk.decode_start_s
            assert chunk.decode_start_s < chunk.decode_end_s < one.record.ttft_s
    last_s = max(one.arrival_s + one.record.chunks[-1].last_byte_s for one in served)
    carried = sum(8 * one.record.bytes for one in served)
    assert carried <= trace.bits_by(last_s) - trace.bits_by(min(r.arrival_s for r in requests)) + 1


def test_a_dead_link_is_a_failure():
    dead = Trace("dead", [0.1], [10 * MBPS], end="stop")
    with pytest.raises(SessionFailed):
        simulate_shared([request(5)], dead)
    with pytest.raises(SessionFailed):
        simulate_batched([request(5)], dead)


# --- what it is for


def test_loading_beats_recomputing_more_the_more_requests_share_the_machine():
    """CacheGen, section 7.3: recomputing grows with the number of requests on a GPU, and so does the advantage."""
    workload = synthetic.parse("mistral-7b,prompt=0")
    manifest = workload.manifest("3000", "cachegen", 1500)
    costs = workload.costs(manifest)
    goodput = Trace("link", [100.0], [20e9], end="hold")
    gains = []
    for n in (1, 4):
        mean_s = []
        for policy in (_Text(), Fixed(3)):
            served = simulate_batched([Request(manifest, policy, costs, 5.0)] * n, goodput)
            mean_s.append(totals(served)["ttft_mean_s"])
        gains.append(mean_s[0] - mean_s[1])
    assert gains[1] > 2 * gains[0] > 0


class _Text:
    def choose(self, obs: Observation) -> Choice:
        return Choice(TEXT)
