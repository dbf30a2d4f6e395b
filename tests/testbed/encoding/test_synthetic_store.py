"""Synthetic workloads as real bytes: statistics of the draws, a store that serves, compute that takes its profile's
time, and several requests on one link and decoder."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch, from the extra [run]")
from aiohttp.test_utils import TestServer  # noqa: E402

from kvstream.codec import container, registry  # noqa: E402
from kvstream.codec.errors import CodecError  # noqa: E402
from kvstream.policies.api import TEXT, Choice, Observation  # noqa: E402
from kvstream.policies.fixed import Fixed  # noqa: E402
from kvstream.policies.kvstream import KVStream  # noqa: E402
from kvstream.testbed.encoding import synthetic_store  # noqa: E402
from kvstream.testbed.encoding.prepare import Prepared  # noqa: E402
from kvstream.testbed.engine.buffers import IncomingChunk  # noqa: E402
from kvstream.testbed.engine.timed_engine import TimedEngine  # noqa: E402
from kvstream.testbed.errors import SpecError  # noqa: E402
from kvstream.testbed.net.client import Client  # noqa: E402
from kvstream.testbed.net.sender import Sender  # noqa: E402
from kvstream.testbed.receiver.batch import fetch_batched, fetch_shared  # noqa: E402
from kvstream.testbed.receiver.driver import fetch_session  # noqa: E402
from kvstream.testbed.session.settings import SessionSettings  # noqa: E402
from kvstream.testbed.simulator.concurrent import Request, Served  # noqa: E402
from kvstream.testbed.store.manifest import KVShape  # noqa: E402
from kvstream.testbed.store.store import Store  # noqa: E402
from kvstream.testbed.workloads import synthetic  # noqa: E402

WORKLOAD = "mistral-7b,compute=a40,prompt=4"
SHAPE = KVShape(6, 8, 128, "float16")
PAPER_BITS = 2.26


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    """Two contexts of 45 and 30 tokens in chunks of 15, at 3, 4 and 8 bit."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield synthetic_store.prepare(WORKLOAD, ["45", "30"], ["uniform"], 15)
    patch.undo()


# --- the draws


def test_neighbouring_tokens_differ_as_the_paper_says():
    kv = synthetic_store.draw(SHAPE, 400, seed=3).float()
    values = kv - kv.mean(dim=2, keepdim=True)
    ratio = values.var() / values.diff(dim=2).var()
    assert 2.4 < float(ratio) < 2.9
    assert torch.equal(kv, synthetic_store.draw(SHAPE, 400, seed=3).float())
    other = synthetic_store.draw(SHAPE, 400, seed=4).float()
    assert not torch.equal(kv, other)
    # channels stand for the model: their scales are those of every context
    assert torch.corrcoef(torch.stack([kv.std(dim=2).flatten(), other.std(dim=2).flatten()]))[0, 1] > 0.97


def test_cachegen_s_default_level_costs_the_paper_s_bits():
    shape = replace(SHAPE, layers=3)
    codec = synthetic_store.fitted("cachegen", shape)
    kv = synthetic_store.draw(shape, 500, seed=2)
    default = [level.name for level in codec.levels].index("bins x1")
    bits = 8.0 * len(codec.encode(kv, default, positions=range(500))) / kv.numel()
    assert bits == pytest.approx(PAPER_BITS, rel=0.04)


def test_our_levels_cost_what_they_aim_at():
    shape = replace(SHAPE, layers=1)
    codec = synthetic_store.fitted("kvstream", shape)
    kv = synthetic_store.draw(shape, 500, seed=2)
    ladder = synthetic.parse("mistral-7b").ladder("kvstream")
    for level, rung in enumerate(ladder):
        bits = 8.0 * len(codec.encode(kv, level, positions=range(500))) / kv.numel()
        assert bits == pytest.approx(rung.bits_per_element, rel=0.1, abs=0.1)


def test_a_chunk_can_be_moved_where_positions_do_not_matter():
    codec = registry.make("uniform")
    kv = synthetic_store.draw(KVShape(2, 1, 16, "float16"), 8, seed=1)
    data = codec.encode(kv, 1, positions=range(8))
    moved = synthetic_store.moved_to(data, 800)
    assert container.parse_header(moved).start == 800
    assert torch.equal(codec.decode(moved), codec.decode(data))


def test_distortion_is_read_off_the_curve():
    ladder = synthetic.parse("mistral-7b").ladder("kvstream")
    for rung in ladder:
        found = synthetic_store.distortion_at(rung.bits_per_element, ladder)
        assert found == pytest.approx(rung.distortion)
    bits = [0.2, 0.4, 1.0, 2.0, 3.0, 5.0]
    nats = [synthetic_store.distortion_at(rate, ladder) for rate in bits]
    assert nats == sorted(nats, reverse=True)
    assert nats[-1] > 0.0


def test_codecs_that_need_a_real_model_are_refused():
    with pytest.raises(SpecError, match="no codec 'raw'"):
        synthetic_store.prepare(WORKLOAD, ["30"], ["raw"], 15)


# --- the store


def test_what_is_stored_is_what_the_manifest_says(prepared):
    store = Store(prepared.path, create=False)
    manifest = prepared.manifests["45", "uniform"]
    assert [chunk.start for chunk in manifest.chunks] == [0, 15, 30]
    for index, chunk in enumerate(manifest.chunks):
        for level, size in enumerate(chunk.sizes_bytes):
            data = store.get_kv(f"{manifest.context}/{index}", level)
            header = container.parse(data).header
            assert (len(data), header.start, header.level) == (size, chunk.start, level)
        assert chunk.text_bytes == chunk.tokens * synthetic.TEXT_BYTES_PER_TOKEN
    workload = synthetic.parse(WORKLOAD)
    for real, level in zip(manifest.levels, workload.manifest("45", "uniform", 15).levels, strict=True):
        assert real.bits_per_element == pytest.approx(level.bits_per_element, rel=0.02)
        assert real.distortion == pytest.approx(level.distortion, rel=0.3)


def test_prepared_once(prepared):
    files = {path: path.stat().st_mtime_ns for path in prepared.path.rglob("*.bin")}
    said: list[str] = []
    again = synthetic_store.prepare(WORKLOAD, ["45", "30"], ["uniform"], 15, said.append)
    assert again == prepared
    assert said == []
    assert {path: path.stat().st_mtime_ns for path in prepared.path.rglob("*.bin")} == files


# --- compute by profile


def run(prepared: Prepared, work: Any) -> Any:
    """Over loopback, with a real sender."""

    async def inside() -> Any:
        sender = Sender(Store(prepared.path, create=False))
        async with asyncio.timeout(60), TestServer(sender.app()) as server, Client(str(server.make_url("/"))) as client:
            return await work(client)

    return asyncio.run(inside())


def test_steps_take_the_time_of_the_profile(prepared):
    workload = synthetic.parse(WORKLOAD)
    manifest = prepared.manifests["45", "uniform"]
    costs = workload.costs(manifest)
    engine = TimedEngine(workload)

    async def work(client: Client) -> Any:
        policy = _Plan([2, TEXT, 0])
        return await fetch_session(
            client,
            manifest.context,
            policy,
            SessionSettings(5.0),
            engine=engine,
            costs=costs,
            prompt_ids=(0,) * workload.prompt,
        )

    try:
        fetched = run(prepared, work)
    finally:
        engine.close()
    assert costs.recompute_s is not None
    expected = [costs.decode_s[0][2], costs.recompute_s[1], costs.decode_s[2][0]]
    for chunk, seconds in zip(fetched.record.chunks, expected, strict=True):
        assert chunk.decode_end_s - chunk.decode_start_s == pytest.approx(seconds, abs=0.05)
        assert chunk.decode_end_s - chunk.decode_start_s >= seconds
    assert fetched.record.ttft_s >= sum(expected[1:]) + costs.prefill_s
    assert fetched.record.distortion == pytest.approx(manifest.distortion((2, TEXT, 0)))


def test_bytes_of_another_place_or_model_are_noticed(prepared):
    workload = synthetic.parse(WORKLOAD)
    manifest = prepared.manifests["45", "uniform"]
    store = Store(prepared.path, create=False)
    engine = TimedEngine(workload)
    try:
        engine.open(manifest, 0)
        wrong = memoryview(store.get_kv(f"{manifest.context}/0", 1))
        with pytest.raises(CodecError, match="requested tokens from 15"):
            engine.decode(IncomingChunk(1, 1, wrong))
        with pytest.raises(CodecError, match="text of chunk 0"):
            engine.recompute(0, memoryview(b"abc"))
        with pytest.raises(SpecError, match="simulates synthetic mistral-7b"):
            engine.open(synthetic.parse("llama-34b").manifest("45", "uniform", 15), 0)
    finally:
        engine.close()


# --- several requests


class _Plan:
    """Fetches chunk i at `levels[i % n]`; remembers how many it was told share link and decoder."""

    def __init__(self, levels: list[Any]) -> None:
        self.levels = levels
        self.concurrent: list[int] = []

    def choose(self, obs: Observation) -> Choice:
        self.concurrent.append(obs.concurrent)
        return Choice(self.levels[obs.chunk % len(self.levels)])


def requests(prepared: Prepared, policies: list[Any], arrivals_s: list[float]) -> list[Request]:
    workload = synthetic.parse(WORKLOAD)
    contexts = itertools.cycle(["45", "30"])
    found = []
    for policy, arrival_s, context in zip(policies, arrivals_s, contexts, strict=False):
        manifest = prepared.manifests[context, "uniform"]
        found.append(Request(manifest, policy, workload.costs(manifest), 5.0, arrival_s))
    return found


def test_batches_go_by_chunk_index_and_are_decoded_together(prepared):
    plans = [_Plan([1]), _Plan([TEXT, 0]), _Plan([2])]
    asked = requests(prepared, plans, [0.0, 0.01, 0.02])

    async def work(client: Client) -> list[Served]:
        workload = synthetic.parse(WORKLOAD)
        return await fetch_batched(client, asked, workload, time.monotonic() + 0.1, window_s=0.05, max_batch=8)

    served = run(prepared, work)
    assert [plan.concurrent for plan in plans] == [[3, 3, 2], [3, 3], [3, 3, 2]], "N_c falls with the shorter context"
    assert {one.batch for one in served} == {0}
    for index in range(3):
        present = [one for one in served if index < len(one.record.chunks)]
        ends = [one.arrival_s + one.record.chunks[index].last_byte_s for one in present]
        assert ends == sorted(ends), "in the order of arrival"
        decoded = {}
        for one in present:
            chunk = one.record.chunks[index]
            assert chunk.decode_start_s >= chunk.last_byte_s - 1e-6
            span = (round(one.arrival_s + chunk.decode_start_s, 6), round(one.arrival_s + chunk.decode_end_s, 6))
            decoded.setdefault(chunk.level == TEXT, set()).add(span)
        assert all(len(spans) == 1 for spans in decoded.values()), "one padded batch"
    first = served[0].record.chunks
    seconds = first[0].decode_end_s - first[0].decode_start_s
    assert seconds == pytest.approx(2 * asked[0].costs.decode_s[0][1], abs=1e-6), "as often as it has members"
    assert all(one.record.policy_faults == 0 for one in served)


def test_a_full_batch_does_not_wait_and_the_next_one_follows(prepared):
    asked = requests(prepared, [Fixed("lowest") for _ in range(3)], [0.0, 0.0, 0.01])

    async def work(client: Client) -> list[Served]:
        workload = synthetic.parse(WORKLOAD)
        return await fetch_batched(
            client, asked, workload, time.monotonic() + 0.1, window_s=30.0, max_batch=2, limits=None
        )

    with pytest.raises(Exception, match="first token within"):
        run_limited(prepared, asked)
    asked = requests(prepared, [Fixed("lowest") for _ in range(4)], [0.0, 0.0, 0.01, 0.02])
    served = run(prepared, work)
    assert [one.batch for one in served] == [0, 0, 1, 1]
    assert served[2].record.chunks[0].request_s is not None
    assert (
        0.01 + served[2].record.chunks[0].request_s
        >= max(one.arrival_s + one.record.chunks[-1].last_byte_s for one in served[:2]) - 0.005
    )


def run_limited(prepared: Prepared, asked: list[Request]) -> Any:
    from kvstream.testbed.net.inbound import Limits

    async def work(client: Client) -> list[Served]:
        workload = synthetic.parse(WORKLOAD)
        return await fetch_batched(
            client, asked, workload, time.monotonic() + 0.1, window_s=30.0, max_batch=2, limits=Limits(session_s=0.5)
        )

    return run(prepared, work)


def test_requests_for_themselves_share_the_decoder(prepared):
    asked = requests(prepared, [_Plan([TEXT]) for _ in range(3)], [0.0, 0.0, 0.02])

    async def work(client: Client) -> list[Served]:
        return await fetch_shared(client, asked, synthetic.parse(WORKLOAD), time.monotonic() + 0.2)

    served = run(prepared, work)
    spans = sorted(
        (one.arrival_s + chunk.decode_start_s, one.arrival_s + chunk.decode_end_s)
        for one in served
        for chunk in one.record.chunks
    )
    assert len(spans) == 8
    for (_, end_s), (start_s, _) in itertools.pairwise(spans):
        assert start_s >= end_s - 0.002, "one step at a time, whoever's it is"


def test_policies_that_reorder_are_refused_in_batches(prepared):
    [patient] = requests(prepared, [KVStream()], [0.0])
    asked = [replace(patient, deadline_s=0.05)]  # no time for text, which goes in order

    async def work(client: Client) -> list[Served]:
        return await fetch_batched(client, asked, synthetic.parse(WORKLOAD), time.monotonic() + 0.1)

    with pytest.raises(SpecError, match="reorders"):
        run(prepared, work)


def test_engines_on_one_thread_end_together():
    engine = TimedEngine(synthetic.parse(WORKLOAD))
    other = TimedEngine(synthetic.parse(WORKLOAD), engine.thread)
    assert other.submit(lambda: 5).result() == 5
    engine.close()
    with pytest.raises(RuntimeError):
        other.submit(lambda: 5)
