"""Sessions over loopback with a real sender and a real model: exact with raw, bounded when something dies."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer

from policies.api import CANCEL, KEEP, TEXT, Choice, Forecast, LevelOrText, Observation, Progress, Replace
from testbed import wire
from testbed.client import Client
from testbed.compute import Compute, measure_costs
from testbed.errors import SpecError
from testbed.llm import Model, generate_with_kv
from testbed.receiver import Fetched, Limits, fetch_session
from testbed.sender import Sender
from testbed.session import ChunkRecord, Costs, SessionFailed
from testbed.store import encodings
from tests.testbed.conftest import Stored, save_tiny_model, store_context
from tests.testbed.link import Link
from traces.trace import Trace

QUICK = Limits(stall_s=0.4, reconnects=2, session_s=20.0)


@dataclass
class Plan:
    """Fetches chunk i at `levels[i]`, or all at one level."""

    levels: LevelOrText | Sequence[LevelOrText] = 0
    asked: list[Observation] = field(default_factory=list)

    def choose(self, obs: Observation) -> Choice:
        self.asked.append(obs)
        is_one = isinstance(self.levels, int | str)
        return Choice(self.levels if is_one else self.levels[obs.chunk])  # type: ignore[index,arg-type]


@pytest.fixture(scope="module")
def compute(tiny_model: Model) -> Iterator[Compute]:
    compute = Compute(tiny_model)
    yield compute
    compute.close()


def costs_of(stored: Stored) -> Costs:
    manifest = stored.store.manifest(stored.context)
    n = len(manifest.chunks)
    return Costs(((1e-4,) * len(manifest.levels),) * n, (1e-3,) * n, 1e-3)


@asynccontextmanager
async def linked(stored: Stored, rate_bps: float | None = None) -> AsyncIterator[tuple[Client, Link]]:
    async with (
        asyncio.timeout(60),
        TestServer(Sender(stored.store).app()) as server,
        Link(server.port or 0, rate_bps) as link,
        Client(link.url) as client,
    ):
        yield client, link


async def session(client: Client, stored: Stored, compute: Compute, policy: Any, **settings: Any) -> Fetched:
    return await fetch_session(
        client,
        stored.context,
        policy,
        settings.pop("deadline_s", 5.0),
        compute=compute,
        costs=costs_of(stored),
        prompt_ids=stored.questions[0].prompt_ids,
        limits=settings.pop("limits", QUICK),
        **settings,
    )


def run(stored: Stored, compute: Compute, policy: Any, rate_bps: float | None = None, **settings: Any) -> Fetched:
    async def scenario() -> Fetched:
        async with linked(stored, rate_bps) as (client, _):
            return await session(client, stored, compute, policy, **settings)

    return asyncio.run(scenario())


def exact_token(model: Model, stored: Stored) -> int:
    return generate_with_kv(model, stored.exact, stored.questions[0].prompt_ids, 1)[0]


def cache_of(compute: Compute, stored: Stored) -> torch.Tensor:
    _, _, cache = compute._ready()
    return cache.view(0, len(stored.tokens))


# --- what arrives


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("overlap", [True, False])
def test_raw_gives_the_exact_cache_and_first_token(
    stored: Stored, tiny_model: Model, compute: Compute, depth: int, overlap: bool
) -> None:
    policy = Plan(0)
    fetched = run(stored, compute, policy, depth=depth, overlap=overlap, padding_bytes=20_000)
    assert torch.equal(cache_of(compute, stored), stored.exact)
    assert fetched.token == exact_token(tiny_model, stored)
    record = fetched.record
    assert record.levels == (0,) * 5
    assert record.met
    assert record.policy_faults == record.wasted_bytes == fetched.reconnects == 0
    assert 0 < fetched.rtt_s < record.chunks[0].request_s <= policy.asked[0].now_s + 1e-9  # type: ignore[operator]
    assert all(obs.rtt_s == fetched.rtt_s for obs in policy.asked)
    assert record.ttft_s > fetched.prefill_start_s >= max(c.decode_end_s for c in record.chunks)  # type: ignore[type-var]
    for chunk in record.chunks:
        assert chunk.request_s < chunk.first_byte_s <= chunk.last_byte_s <= chunk.decode_start_s < chunk.decode_end_s  # type: ignore[operator]
    if not overlap:
        assert min(c.decode_start_s for c in record.chunks) >= max(c.last_byte_s for c in record.chunks)  # type: ignore[type-var]


def test_text_and_levels_mix(stored_uniform: Stored, tiny_model: Model, compute: Compute) -> None:
    text = run(stored_uniform, compute, Plan(TEXT))
    torch.testing.assert_close(cache_of(compute, stored_uniform), stored_uniform.exact, atol=1e-4, rtol=1e-4)
    assert text.token == exact_token(tiny_model, stored_uniform)
    assert text.record.distortion == 0.0

    mixed = run(stored_uniform, compute, Plan([2, TEXT, 0, TEXT, 1]))
    assert mixed.record.levels == (2, TEXT, 0, TEXT, 1)
    starts = [c.decode_start_s for c in mixed.record.chunks]
    ends = [c.decode_end_s for c in mixed.record.chunks]
    for i in (1, 3):  # a text chunk needs everything before it
        assert all(end <= starts[i] for end in ends[:i])  # type: ignore[operator]
    assert not cache_of(compute, stored_uniform).isnan().any()


def test_cold_sessions_connect_within_the_request(stored: Stored, compute: Compute) -> None:
    async def scenario() -> tuple[Fetched, int]:
        async with linked(stored) as (client, link):
            start_s = time.monotonic() + 1.0
            fetched = await session(client, stored, compute, Plan(), cold=True, start_s=start_s)
            assert 0 <= fetched.late_s == fetched.zero_s - start_s < 0.5
            return fetched, link.connections

    fetched, connections = asyncio.run(scenario())
    assert connections == 1
    assert fetched.record.met


def test_padding_does_not_reach_into_the_session(stored: Stored, compute: Compute) -> None:
    async def scenario() -> tuple[Fetched, int]:
        async with linked(stored, 4e6) as (client, link):
            start_s = time.monotonic() + 1.5
            task = asyncio.create_task(session(client, stored, compute, Plan(), padding_bytes=4 << 20, start_s=start_s))
            await asyncio.sleep(1.0)
            before = link.carried_bytes
            fetched = await task
            return fetched, before

    fetched, before = asyncio.run(scenario())
    assert before > 10_000
    assert fetched.late_s < 0.5  # all of the padding would take 8 s
    assert fetched.record.chunks[0].attempts == 1


def test_decoding_overlaps_the_transfer(stored: Stored, compute: Compute) -> None:
    record = run(stored, compute, Plan(), rate_bps=8e6).record
    chunks = record.chunks
    for before, after in itertools.pairwise(chunks):
        assert before.decode_start_s < after.last_byte_s  # type: ignore[operator]
        # depth 2: the next request went out before the current chunk was complete
        assert after.request_s < before.last_byte_s  # type: ignore[operator]
    one = run(stored, compute, Plan(), rate_bps=8e6, depth=1).record.chunks
    assert all(after.request_s >= before.last_byte_s for before, after in itertools.pairwise(one))  # type: ignore[operator]


def test_goodput_is_seen_while_a_chunk_is_under_way(stored: Stored, compute: Compute) -> None:
    policy = Plan()
    run(stored, compute, policy, rate_bps=8e6)
    measured = [t.goodput_bps for t in policy.asked[-1].transfers]
    assert all(6e6 < rate < 9e6 for rate in measured), measured
    assert all(0 < f.received_bytes < f.bytes for obs in policy.asked[1:] for f in obs.in_flight)


def test_who_watches_is_told_how_the_chunks_get_on(stored: Stored, compute: Compute) -> None:
    told: list[tuple[float, int]] = []

    def tell(chunks: Sequence[ChunkRecord], now_s: float) -> None:
        told.append((now_s, sum(chunk.received_bytes for chunk in chunks)))

    fetched = run(stored, compute, Plan(0), rate_bps=2e6, tell=tell)
    moments, received = zip(*told, strict=True)
    assert list(moments) == sorted(moments)
    assert list(received) == sorted(received)
    assert received[0] == 0
    assert len({amount for amount in received if 0 < amount < fetched.record.bytes}) > 2


def test_a_profile_is_fetched_when_it_is_not_known(tmp_path: Path, tiny_model: Model) -> None:
    from codec import cachegen, registry
    from testbed.store import store_evaluation, store_kv

    stored = store_context(tmp_path, tiny_model)
    codec = registry.make("cachegen", {}, cachegen.fit([stored.exact]))
    n = len(codec.levels)
    store_kv(
        stored.store, "cg", stored.tokens, tiny_model, codec, chunk_tokens=64, distortions=[0.0] * n, kv=stored.exact
    )
    store_evaluation(stored.store, "cg", tiny_model, stored.exact, stored.questions)
    compute = Compute(tiny_model)
    try:
        profiled = Stored(stored.store, "cg", stored.tokens, stored.exact, stored.questions)
        for _ in range(2):
            fetched = run(profiled, compute, Plan(n - 1))
            assert fetched.record.levels == (n - 1,) * 5
            assert not cache_of(compute, profiled).isnan().any()
        assert not compute.lacks_profile(stored.store.manifest("cg"))
    finally:
        compute.close()


def test_clairvoyant_policies_get_the_future(stored: Stored, compute: Compute) -> None:
    class Knows(Plan):
        clairvoyant: ClassVar[bool] = True
        forecast: Forecast | None = None

        def foresee(self, forecast: Forecast) -> None:
            self.forecast = forecast

        def choose(self, obs: Observation) -> Choice:
            assert self.forecast is not None
            return super().choose(obs)

    forecast = Forecast(Trace("t", [1.0], [1e6]), 0.01, 2)
    policy = Knows()
    assert run(stored, compute, policy, forecast=forecast).record.policy_faults == 0
    assert policy.forecast is forecast
    with pytest.raises(SpecError, match="needs a forecast"):
        run(stored, compute, Knows())


def test_a_policy_that_fails_costs_levels_not_the_session(stored_uniform: Stored, compute: Compute) -> None:
    class Broken:
        def choose(self, obs: Observation) -> Choice:
            raise RuntimeError("boom")

    record = run(stored_uniform, compute, Broken()).record
    assert record.levels == (0,) * 5
    assert record.policy_faults == 5
    assert record.chunks[0].fault == "RuntimeError: boom"


# --- cancelling


@dataclass
class Impatient(Plan):
    """Cancels or replaces chunk 1 once, when a quarter of it is here."""

    answer: Progress = CANCEL
    done: bool = False

    def progress(self, obs: Observation) -> Progress:
        flight = obs.in_flight[0]
        if self.done or flight.chunk != 1 or flight.received_bytes < flight.bytes / 4:
            return KEEP
        self.done = True
        return self.answer


@pytest.mark.parametrize("answer", [CANCEL, Replace(0), Replace(TEXT)])
def test_a_chunk_is_cancelled_and_fetched_again(
    stored_uniform: Stored, tiny_model: Model, compute: Compute, answer: Progress
) -> None:
    policy = Impatient(2, answer=answer)
    fetched = run(stored_uniform, compute, policy, rate_bps=4e6)
    record = fetched.record
    assert policy.done
    assert record.wasted_bytes > 0
    assert record.chunks[1].attempts == 2
    assert record.levels == (2, answer.level if isinstance(answer, Replace) else 2, 2, 2, 2)
    assert not cache_of(compute, stored_uniform).isnan().any()
    full = stored_uniform.store.manifest(stored_uniform.context).chunks[1].sizes_bytes[2]
    needed = record.bytes + len(json.dumps(stored_uniform.store.manifest(stored_uniform.context).to_json()))
    assert fetched.stream_bytes < needed + full


@dataclass
class Watcher(Plan):
    """Gives chunk 1 up once its deadline is near, whether or not anything comes."""

    asked_s: list[float] = field(default_factory=list)
    done: bool = False

    def progress(self, obs: Observation) -> Progress:
        self.asked_s.append(obs.now_s)
        if self.done or obs.in_flight[0].chunk != 1 or obs.now_s < 0.6:
            return KEEP
        self.done = True
        return Replace(TEXT)


def test_progress_is_asked_while_no_byte_comes(stored_uniform: Stored, tiny_model: Model, compute: Compute) -> None:
    policy = Watcher(2)

    async def scenario() -> Fetched:
        async with linked(stored_uniform, 4e6) as (client, link):
            limits = Limits(stall_s=5.0, session_s=20.0)
            task = asyncio.create_task(session(client, stored_uniform, compute, policy, limits=limits))
            manifest = stored_uniform.store.manifest(stored_uniform.context)
            await link.carried(manifest.chunks[0].sizes_bytes[2] + manifest.chunks[1].sizes_bytes[2] // 2)
            link.rate_bps = 0
            await asyncio.sleep(1.2)
            link.rate_bps = 4e6
            return await task

    fetched = asyncio.run(scenario())
    assert policy.done
    assert fetched.record.levels[1] == TEXT
    assert next(now_s for now_s in policy.asked_s if now_s >= 0.6) < 0.9, "long before bytes come again"


# --- faults


def failure(stored: Stored, compute: Compute, fault: Callable[[Link], None], **settings: Any) -> tuple[str, float]:
    """The reason of a session whose link suffers `fault` in mid-transfer, and how long it took from then."""

    async def scenario() -> tuple[str, float]:
        async with linked(stored, 4e6) as (client, link):
            task = asyncio.create_task(session(client, stored, compute, Plan(), **settings))
            await link.carried(60_000)
            fault(link)
            began = time.monotonic()
            with pytest.raises(SessionFailed) as caught:
                await task
            return str(caught.value), time.monotonic() - began

    return asyncio.run(scenario())


def test_a_link_at_zero_fails_the_session_within_bounds(stored: Stored, compute: Compute) -> None:
    def stop(link: Link) -> None:
        link.rate_bps = 0

    reason, took_s = failure(stored, compute, stop)
    assert "lost after 2 reconnections" in reason
    assert 3 * QUICK.stall_s <= took_s < 3 * QUICK.stall_s + 2.5


def test_a_session_has_a_last_moment(stored: Stored, compute: Compute) -> None:
    def crawl(link: Link) -> None:
        link.rate_bps = 2e5

    reason, took_s = failure(stored, compute, crawl, limits=Limits(stall_s=5, session_s=1.0))
    assert reason == "no first token within 1 s"
    assert took_s < 2.5


def test_a_cut_connection_is_resumed_by_offset(stored: Stored, tiny_model: Model, compute: Compute) -> None:
    async def scenario() -> tuple[Fetched, int]:
        async with linked(stored, 8e6) as (client, link):
            task = asyncio.create_task(session(client, stored, compute, Plan()))
            for at in (60_000, 150_000):
                await link.carried(at)
                link.cut()
            return await task, link.connections

    fetched, connections = asyncio.run(scenario())
    assert (fetched.reconnects, connections) == (2, 3)
    assert torch.equal(cache_of(compute, stored), stored.exact)
    assert fetched.token == exact_token(tiny_model, stored)
    manifest = stored.store.manifest(stored.context)
    # nothing arrived twice
    size = len(json.dumps(manifest.to_json(), separators=(",", ":")))
    assert fetched.stream_bytes == fetched.record.bytes + size


def corrupt(times: int) -> Callable[[bytes], bytes]:
    """Flip a byte of the last element of the chunk that starts at token 128, so many times."""
    left = times

    def change(data: bytes) -> bytes:
        nonlocal left
        at = data.find(b"KVST")
        if left and at >= 0 and data[at + 56 : at + 64] == (128).to_bytes(8, "little"):
            left -= 1
            return data[:-1] + bytes([data[-1] ^ 1])
        return data

    return change


def test_a_damaged_chunk_is_fetched_again(stored: Stored, tiny_model: Model, compute: Compute) -> None:
    async def scenario() -> Fetched:
        async with linked(stored, 2e7) as (client, link):
            link.change = corrupt(1)
            return await session(client, stored, compute, Plan())

    fetched = asyncio.run(scenario())
    assert [c.attempts for c in fetched.record.chunks] == [1, 1, 2, 1, 1]
    assert fetched.record.wasted_bytes == fetched.record.chunks[2].bytes
    assert torch.equal(cache_of(compute, stored), stored.exact)


def test_a_chunk_that_stays_damaged_fails_the_session(tmp_path: Path, tiny_model: Model, compute: Compute) -> None:
    stored = store_context(tmp_path, tiny_model)
    for level, policy in ((0, Plan(0)), ("text", Plan(TEXT))):
        path = stored.store.path / "contexts" / "ctx" / "chunks" / "2" / f"{level}.bin"
        data = bytearray(path.read_bytes())
        data[-3] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(SessionFailed, match=r"chunk 2 failed 3 times, last: .*damaged"):
            run(stored, compute, policy)


def test_a_chunk_from_another_place_is_not_believed(tmp_path: Path, tiny_model: Model, compute: Compute) -> None:
    stored = store_context(tmp_path, tiny_model)
    chunks = stored.store.path / "contexts" / "ctx" / "chunks"
    (chunks / "2" / "0.bin").write_bytes((chunks / "1" / "0.bin").read_bytes())
    with pytest.raises(SessionFailed, match="asked for tokens from 128 at level 0, got tokens from 64"):
        run(stored, compute, Plan())


def test_another_models_context_is_refused(stored: Stored, tmp_path: Path) -> None:
    compute = Compute(Model.load(save_tiny_model(tmp_path, rope_theta=500.0)))
    try:
        with pytest.raises(SessionFailed, match="was computed with model"):
            run(stored, compute, Plan())
    finally:
        compute.close()


def test_a_manifest_cannot_claim_all_memory(stored: Stored, tiny_model: Model) -> None:
    manifest = stored.store.manifest("ctx")
    compute = Compute(tiny_model)
    try:
        for claim in ({"sizes_bytes": (1 << 32,)}, {"text_bytes": 1 << 32}):
            chunks = (replace(manifest.chunks[0], **claim), *manifest.chunks[1:])
            with pytest.raises(SpecError, match="chunk 0 claims more than"):
                compute.open(replace(manifest, chunks=chunks), 8)
        with pytest.raises(SpecError, match="positions"):
            compute.open(manifest, 1000)
    finally:
        compute.close()


def test_unknown_context_and_absent_sender_fail_clearly(stored: Stored, compute: Compute) -> None:
    unknown = Stored(stored.store, "ctx", stored.tokens, stored.exact, stored.questions)

    async def scenario() -> None:
        async with linked(stored) as (client, link):
            with pytest.raises(SessionFailed, match="status 404"):
                await fetch_session(
                    client, "nope", Plan(), 1.0, compute=compute, costs=costs_of(unknown), prompt_ids=[1], limits=QUICK
                )
            link.target = 1
            with pytest.raises(SessionFailed, match="no connection to the sender"):
                await session(client, stored, compute, Plan())
            with pytest.raises(SessionFailed, match="lost after 2 reconnections"):
                await session(client, stored, compute, Plan(), cold=True)

    asyncio.run(scenario())


def header(req: int, size: int, offset: int = 0) -> str:
    return wire.pack_answer(wire.Answer(req, size, offset, ""))


Reply = str | bytes | None


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        (["no json"], "not JSON"),
        ([header(9, 10)], "out of turn"),
        ([b"x"], "nobody asked for"),
        ([header(1, 0)], "manifest of 0 bytes"),
        ([header(1, wire.MAX_MANIFEST_BYTES + 1)], "a manifest of"),
        ([header(1, 4), header(1, 4)], "answered twice"),
        ([header(1, 4), b"12345"], "nobody asked for"),
        ([header(1, 4), b"1234"], "manifest"),
        (["manifest", header(2, 7)], "were asked for"),
        (["manifest", header(2, -1)], "'bytes'"),
        (["manifest", '{"req": 2, "cancelled": true}'], "without being cancelled"),
        (["manifest", "chunk", b"x"], "nobody asked for"),
        (["renamed"], "asked for context"),
        ([None], "refuses: go away"),
    ],
)
def test_a_hostile_sender_fails_the_session_at_once(
    stored: Stored, compute: Compute, replies: list[Reply], reason: str
) -> None:
    manifest = stored.store.manifest(stored.context)
    size = manifest.chunks[0].sizes_bytes[0]

    async def hostile(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        await ws.receive()
        for reply in replies:
            match reply:
                case "manifest" | "renamed":
                    body = manifest.to_json() | ({"context": "other"} if reply == "renamed" else {})
                    data = json.dumps(body).encode()
                    await ws.send_str(header(1, len(data)))
                    await ws.send_bytes(data)
                    await ws.receive()
                case "chunk":
                    await ws.send_str(header(2, size))
                    await ws.send_bytes(stored.store.get_kv("ctx/0", 0))
                case str():
                    await ws.send_str(reply)
                case bytes():
                    await ws.send_bytes(reply)
                case None:
                    await ws.close(code=1008, message=b"go away")
        await ws.receive()
        return ws

    async def scenario() -> None:
        app = web.Application()
        app.router.add_get("/v1/contexts/ctx/stream", hostile)
        async with asyncio.timeout(10), TestServer(app) as server, Client(str(server.make_url("/"))) as client:
            with pytest.raises(SessionFailed, match=reason):
                await session(client, stored, compute, Plan(), depth=1)

    asyncio.run(scenario())


# --- costs


def test_costs_are_measured_on_this_machine(stored_uniform: Stored, tiny_model: Model) -> None:
    compute = Compute(tiny_model)
    try:
        manifest = stored_uniform.store.manifest("ctx8")
        costs = measure_costs(
            compute, manifest, lambda chunk, level: stored_uniform.store.get_kv(f"ctx8/{chunk}", level), [1, 2, 3]
        )
        assert [len(row) for row in costs.decode_s] == [3] * 5
        assert costs.recompute_s is not None
        assert all(0 < s < 5 for s in (*costs.decode_s[0], *costs.recompute_s, costs.prefill_s))
        _, _, cache = compute._ready()
        assert cache.storage.isnan().all()
    finally:
        compute.close()


# --- the processes


@contextmanager
def sender_process(stored: Stored, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "testbed.sender", "--store", str(stored.store.path), "--port", str(port)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())["port"]
    finally:
        process.kill()
        process.communicate()


class WorkerProcess:
    """`python -m testbed.receiver` and its pipes."""

    def __init__(self, model: Path, store: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "testbed.receiver", "--model", str(model), "--store", str(store), "--threads", "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        self.ready = self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        return dict(json.loads(line))

    def tell(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.read()

    def command(self, cmd: str, **settings: Any) -> dict[str, Any]:
        return self.tell(json.dumps({"cmd": cmd} | settings))


@pytest.fixture(scope="module")
def worker(tiny_folder: Path, stored_uniform: Stored) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(tiny_folder, stored_uniform.store.path)
    yield worker
    worker.process.kill()
    worker.process.communicate()


def test_processes_stay_warm_across_sessions(worker: WorkerProcess, stored_uniform: Stored, tiny_model: Model) -> None:
    assert worker.ready["model"] == tiny_model.fingerprint
    costs = worker.command("prepare", contexts=["ctx8"])["costs"]["ctx8"]
    assert len(costs["decode_s"]) == len(costs["recompute_s"]) == 5
    manifest = stored_uniform.store.manifest("ctx8")
    with sender_process(stored_uniform) as (_, port):
        url = f"http://127.0.0.1:{port}"
        strain = worker.command("rehearse", contexts=["ctx8"], url=url)["strain"]["ctx8"]
        assert min(strain.values()) > 0.0
        kls = {}
        for policy in ("fixed,level=0", "highest", "text", "cachegen", "buffer-based"):
            start_s = time.monotonic() + 0.05
            answer = worker.command(
                "session", url=url, context="ctx8", policy=policy, deadline_s=2.0, question=1, start_s=start_s
            )
            assert answer["status"] == "ok", answer
            record = answer["record"]
            assert record["met"]
            assert record["policy_faults"] == 0
            assert answer["answers"] == 3
            assert answer["strain"].keys() == strain.keys()
            assert abs(answer["zero_s"] - start_s) < 0.2
            sizes = dict(encodings(manifest))
            assert record["bytes"] == sum(sizes[f"{i}/{level}"] for i, level in enumerate(record["levels"]))
            kls[policy] = answer["measured_kl"]
        assert kls["text"] < 1e-6 < kls["highest"] < kls["fixed,level=0"]


def test_the_worker_refuses_and_goes_on(worker: WorkerProcess) -> None:
    for line, reason in (
        ("nonsense", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"cmd": "dance"}', "unknown"),
        ('{"cmd": "prepare", "contexts": ["none"]}', "no context 'none'"),
        ('{"cmd": "session", "context": "ctx8"}', "cannot be read"),
        ('{"cmd": "rehearse", "contexts": ["ctx8"], "url": "http://127.0.0.1:9"}', "the rehearsal of ctx8 failed"),
        ('{"cmd": "session", "context": "ctx8", "policy": "nope", "url": "http://x", "deadline_s": 1}', "nope"),
        ('{"cmd": "session", "context": "ctx8", "policy": "highest", "url": "x", "deadline_s": 1}', "give an address"),
    ):
        answer = worker.tell(line)
        assert answer["ok"] is False
        assert reason in answer["error"]


def test_killing_the_sender_fails_the_session_and_a_new_one_works(
    worker: WorkerProcess, stored_uniform: Stored
) -> None:
    async def relayed(port: int, then: Callable[[Link], Any]) -> dict[str, Any]:
        async with Link(port, 2e6) as link:
            task = asyncio.create_task(then(link))
            await link.carried(20_000)
            process.kill()
            return dict(await task)

    def ask(link: Link) -> Any:
        limits = {"stall_s": 0.5, "reconnects": 2, "session_s": 20}
        return asyncio.to_thread(
            worker.command, "session", url=link.url, context="ctx8", policy="highest", deadline_s=1.0, limits=limits
        )

    with sender_process(stored_uniform) as (process, port):
        began = time.monotonic()
        answer = asyncio.run(relayed(port, ask))
        assert (answer["status"], answer["ok"]) == ("failed", True)
        assert "lost after 2 reconnections" in answer["error"]
        assert time.monotonic() - began < 10
    with sender_process(stored_uniform) as (_, port):
        url = f"http://127.0.0.1:{port}"
        assert worker.command("session", url=url, context="ctx8", policy="highest", deadline_s=1.0)["status"] == "ok"


def test_a_restarted_sender_is_resumed_from(stored: Stored, tiny_model: Model, compute: Compute) -> None:
    async def scenario() -> Fetched:
        with sender_process(stored) as (first, port):
            async with Link(port, 4e6) as link, Client(link.url) as client:
                limits = Limits(stall_s=10.0, reconnects=1, session_s=30.0)
                task = asyncio.create_task(session(client, stored, compute, Plan(), limits=limits))
                await link.carried(80_000)
                first.kill()
                await asyncio.to_thread(first.wait)
                starting = sender_process(stored, port)
                await asyncio.to_thread(starting.__enter__)
                try:
                    return await task
                finally:
                    starting.__exit__(None, None, None)

    fetched = asyncio.run(scenario())
    assert fetched.reconnects == 1
    assert torch.equal(cache_of(compute, stored), stored.exact)
    assert fetched.token == exact_token(tiny_model, stored)


def test_the_worker_ends_with_its_input(tiny_folder: Path, stored: Stored) -> None:
    worker = WorkerProcess(tiny_folder, stored.store.path)
    _, errors = worker.process.communicate(timeout=30)
    assert worker.process.returncode == 0
    assert errors == ""


def test_the_worker_says_what_is_missing(stored: Stored) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "testbed.receiver", "--model", "/nonexistent", "--store", str(stored.store.path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == "receiver: model folder /nonexistent does not exist\n"
