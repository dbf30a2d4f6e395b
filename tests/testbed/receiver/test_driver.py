"""Sessions over loopback with a real sender and a real model: exact with raw, bounded when something dies."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer

from kvstream.policies.api import (
    CANCEL,
    KEEP,
    TEXT,
    Choice,
    Forecast,
    LevelOrText,
    Observation,
    Policy,
    Progress,
    Replace,
)
from kvstream.testbed.engine.loading import load_model
from kvstream.testbed.engine.measure import measure_costs
from kvstream.testbed.engine.model import Model, generate_with_kv
from kvstream.testbed.engine.model_engine import ModelEngine
from kvstream.testbed.errors import SpecError
from kvstream.testbed.net import messages
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.network_process import NetworkProcess
from kvstream.testbed.net.sender import Sender
from kvstream.testbed.receiver.driver import Fetched, Limits, fetch_session
from kvstream.testbed.session.costs import IN_SESSIONS, Costs
from kvstream.testbed.session.record import ChunkRecord, SessionFailed
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.store.cache import Cached, Content, ContentCache
from kvstream.testbed.store.layout import encodings
from kvstream.traces.trace import Trace
from tests.testbed.conftest import Stored, save_tiny_model, store_context
from tests.testbed.link import Link

SETTINGS = {field.name for field in fields(SessionSettings)}
QUICK = Limits(stall_s=0.4, reconnects=2, session_s=20.0)
"""For sessions that are to fail, and for bytes that never come."""
CALM = Limits(stall_s=5.0, reconnects=2, session_s=50.0)
"""For all others: a process that compiles something stands still for longer than QUICK allows."""


@dataclass
class Plan:
    """Fetches chunk i at `levels[i]`, or all at one level."""

    levels: LevelOrText | Sequence[LevelOrText] = 0
    asked: list[Observation] = field(default_factory=list)

    def choose(self, obs: Observation) -> Choice:
        self.asked.append(obs)
        is_one = isinstance(self.levels, int | str)
        return Choice(self.levels if is_one else self.levels[obs.chunk])  # type: ignore[index,arg-type]


class Receiver(ModelEngine):
    """An engine, and the process that receives for it where this one does not."""

    network: NetworkProcess | None = None


@pytest.fixture(scope="module", params=["this process", "network process"])
def engine(tiny_model: Model, request: pytest.FixtureRequest) -> Iterator[ModelEngine]:
    with ExitStack() as stack:
        network = None
        if request.param == "network process":
            network = stack.enter_context(closing(NetworkProcess()))
        engine = Receiver(tiny_model, shared=network and network.memory)
        engine.network = network
        yield stack.enter_context(closing(engine))


def network_of(engine: ModelEngine) -> NetworkProcess | None:
    return engine.network if isinstance(engine, Receiver) else None


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


async def session(client: Client, stored: Stored, engine: ModelEngine, policy: Any, **more: Any) -> Fetched:
    """`more` are settings of the session and arguments of `fetch_session` alike."""
    return await fetch_session(
        client,
        stored.context,
        policy,
        SessionSettings(**{"deadline_s": 5.0} | {name: more.pop(name) for name in SETTINGS & more.keys()}),
        engine=engine,
        costs=costs_of(stored),
        prompt_ids=stored.questions[0].prompt_ids,
        limits=more.pop("limits", CALM),
        **{"network": network_of(engine)} | more,
    )


def run(stored: Stored, engine: ModelEngine, policy: Any, rate_bps: float | None = None, **settings: Any) -> Fetched:
    async def scenario() -> Fetched:
        async with linked(stored, rate_bps) as (client, _):
            return await session(client, stored, engine, policy, **settings)

    return asyncio.run(scenario())


def exact_token(model: Model, stored: Stored) -> int:
    return generate_with_kv(model, stored.exact, stored.questions[0].prompt_ids, 1)[0]


def cache_of(engine: ModelEngine, stored: Stored) -> torch.Tensor:
    return engine.context.cache.view(0, len(stored.tokens))


# --- what arrives


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("overlap", [True, False])
def test_raw_gives_the_exact_cache_and_first_token(
    stored: Stored, tiny_model: Model, engine: ModelEngine, depth: int, overlap: bool
) -> None:
    policy = Plan(0)
    fetched = run(stored, engine, policy, depth=depth, overlap=overlap, padding_bytes=20_000)
    assert torch.equal(cache_of(engine, stored), stored.exact)
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
    all_here_s = max(c.last_byte_s for c in record.chunks)  # type: ignore[type-var]
    assert overlap or all(c.decode_start_s >= all_here_s for c in record.chunks)  # type: ignore[operator]


def test_text_and_levels_mix(stored_uniform: Stored, tiny_model: Model, engine: ModelEngine) -> None:
    text = run(stored_uniform, engine, Plan(TEXT))
    torch.testing.assert_close(cache_of(engine, stored_uniform), stored_uniform.exact, atol=1e-4, rtol=1e-4)
    assert text.token == exact_token(tiny_model, stored_uniform)
    assert text.record.distortion == 0.0

    mixed = run(stored_uniform, engine, Plan([2, TEXT, 0, TEXT, 1]))
    assert mixed.record.levels == (2, TEXT, 0, TEXT, 1)
    starts = [c.decode_start_s for c in mixed.record.chunks]
    ends = [c.decode_end_s for c in mixed.record.chunks]
    for i in (1, 3):  # a text chunk needs everything before it
        assert all(end <= starts[i] for end in ends[:i])  # type: ignore[operator]
    assert not cache_of(engine, stored_uniform).isnan().any()


def test_cold_sessions_connect_within_the_request(stored: Stored, engine: ModelEngine) -> None:
    async def scenario() -> tuple[Fetched, int]:
        async with linked(stored) as (client, link):
            start_s = time.monotonic() + 1.0
            fetched = await session(client, stored, engine, Plan(), cold=True, start_s=start_s)
            assert 0 <= fetched.late_s == fetched.zero_s - start_s < 0.5
            return fetched, link.connections

    fetched, connections = asyncio.run(scenario())
    assert connections == 1
    assert fetched.record.met


def test_padding_does_not_reach_into_the_session(stored: Stored, engine: ModelEngine) -> None:
    async def scenario() -> tuple[Fetched, int]:
        async with linked(stored, 4e6) as (client, link):
            start_s = time.monotonic() + 1.5
            task = asyncio.create_task(session(client, stored, engine, Plan(), padding_bytes=4 << 20, start_s=start_s))
            await asyncio.sleep(1.0)
            before = link.carried_bytes
            fetched = await task
            return fetched, before

    fetched, before = asyncio.run(scenario())
    assert before > 10_000
    assert fetched.late_s < 0.5  # all of the padding would take 8 s
    assert fetched.record.chunks[0].attempts == 1


def test_decoding_overlaps_the_transfer(stored: Stored, engine: ModelEngine) -> None:
    record = run(stored, engine, Plan(), rate_bps=8e6).record
    chunks = record.chunks
    for before, after in itertools.pairwise(chunks):
        assert before.decode_start_s < after.last_byte_s  # type: ignore[operator]
        # depth 2: the next request went out before the current chunk was complete
        assert after.request_s < before.last_byte_s  # type: ignore[operator]
    one = run(stored, engine, Plan(), rate_bps=8e6, depth=1).record.chunks
    assert all(after.request_s >= before.last_byte_s for before, after in itertools.pairwise(one))  # type: ignore[operator]


def test_goodput_is_known_while_a_chunk_is_in_flight(stored: Stored, engine: ModelEngine) -> None:
    for _ in range(3):  # a machine that stands still for a moment spoils one session
        policy = Plan()
        run(stored, engine, policy, rate_bps=8e6)
        measured = [t.goodput_bps for t in policy.asked[-1].transfers]
        assert len(measured) >= 3
        if min(measured) > 6e6 and max(measured) < 9e6:
            break
    assert all(6e6 < rate < 9e6 for rate in measured), measured
    later = policy.asked[1:]
    assert all(len(obs.in_flight) == 1 for obs in later), "depth 2 chooses while the chunk before is in flight"
    assert all(0 < flight.received_bytes < flight.bytes for obs in later for flight in obs.in_flight)


def test_the_progress_of_chunks_is_reported(stored: Stored, engine: ModelEngine) -> None:
    seen: list[tuple[float, int]] = []

    def on_chunks(chunks: Sequence[ChunkRecord], now_s: float) -> None:
        seen.append((now_s, sum(chunk.received_bytes for chunk in chunks)))

    fetched = run(stored, engine, Plan(0), rate_bps=2e6, on_chunks=on_chunks)
    moments, received = zip(*seen, strict=True)
    assert list(moments) == sorted(moments)
    assert list(received) == sorted(received)
    assert received[0] == 0
    assert len({amount for amount in received if 0 < amount < fetched.record.bytes}) > 2


def test_a_profile_is_fetched_when_it_is_not_known(tmp_path: Path, tiny_model: Model) -> None:
    from kvstream.codec import cachegen, registry
    from kvstream.testbed.encoding.encode import store_kv

    stored = store_context(tmp_path, tiny_model)
    codec = registry.make("cachegen", {}, cachegen.fit([stored.exact]))
    n = len(codec.levels)
    store_kv(
        stored.store, "cg", stored.tokens, tiny_model, codec, chunk_tokens=64, distortions=[0.0] * n, kv=stored.exact,
        questions=stored.questions,
    )  # fmt: skip
    engine = ModelEngine(tiny_model)
    try:
        profiled = Stored(stored.store, "cg", stored.tokens, stored.exact, stored.questions)
        for _ in range(2):
            fetched = run(profiled, engine, Plan(n - 1))
            assert fetched.record.levels == (n - 1,) * 5
            assert not cache_of(engine, profiled).isnan().any()
        assert not engine.lacks_profile(stored.store.manifest("cg"))
    finally:
        engine.close()


def test_clairvoyant_policies_get_the_forecast(stored: Stored, engine: ModelEngine) -> None:
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
    assert run(stored, engine, policy, forecast=forecast).record.policy_faults == 0
    assert policy.forecast is forecast
    with pytest.raises(SpecError, match="needs a forecast"):
        run(stored, engine, Knows())


def test_a_policy_that_fails_costs_levels_not_the_session(stored_uniform: Stored, engine: ModelEngine) -> None:
    class Broken:
        def choose(self, obs: Observation) -> Choice:
            raise RuntimeError("boom")

    record = run(stored_uniform, engine, Broken()).record
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
    stored_uniform: Stored, tiny_model: Model, engine: ModelEngine, answer: Progress
) -> None:
    policy = Impatient(2, answer=answer)
    fetched = run(stored_uniform, engine, policy, rate_bps=4e6)
    record = fetched.record
    assert policy.done
    assert record.wasted_bytes > 0
    assert record.chunks[1].attempts == 2
    assert record.levels == (2, answer.level if isinstance(answer, Replace) else 2, 2, 2, 2)
    assert not cache_of(engine, stored_uniform).isnan().any()
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


def test_progress_is_asked_while_no_byte_comes(stored_uniform: Stored, tiny_model: Model, engine: ModelEngine) -> None:
    policy = Watcher(2)

    async def scenario() -> Fetched:
        async with linked(stored_uniform, 4e6) as (client, link):
            limits = Limits(stall_s=5.0, session_s=20.0)
            task = asyncio.create_task(session(client, stored_uniform, engine, policy, limits=limits))
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


def failure(stored: Stored, engine: ModelEngine, fault: Callable[[Link], None], **settings: Any) -> tuple[str, float]:
    """The reason of a session whose link suffers `fault` in mid-transfer, and how long it took from then."""

    async def scenario() -> tuple[str, float]:
        async with linked(stored, 4e6) as (client, link):
            task = asyncio.create_task(session(client, stored, engine, Plan(), **{"limits": QUICK} | settings))
            await link.carried(60_000, task)
            fault(link)
            began = time.monotonic()
            with pytest.raises(SessionFailed) as caught:
                await task
            return str(caught.value), time.monotonic() - began

    return asyncio.run(scenario())


def test_a_link_at_zero_fails_the_session_within_bounds(stored: Stored, engine: ModelEngine) -> None:
    def stop(link: Link) -> None:
        link.rate_bps = 0

    reason, took_s = failure(stored, engine, stop)
    assert "lost after 2 reconnections" in reason
    assert 3 * QUICK.stall_s <= took_s < 3 * QUICK.stall_s + 2.5


def test_a_session_has_a_time_limit(stored: Stored, engine: ModelEngine) -> None:
    def crawl(link: Link) -> None:
        link.rate_bps = 2e5

    reason, took_s = failure(stored, engine, crawl, limits=Limits(stall_s=5, session_s=1.0))
    assert reason == "no first token within 1 s"
    assert took_s < 2.5


def test_a_cut_connection_is_resumed_by_offset(stored: Stored, tiny_model: Model, engine: ModelEngine) -> None:
    async def scenario() -> tuple[Fetched, int]:
        async with linked(stored, 8e6) as (client, link):
            task = asyncio.create_task(session(client, stored, engine, Plan()))
            for at in (60_000, 150_000):
                await link.carried(at, task)
                link.cut()
            return await task, link.connections

    fetched, connections = asyncio.run(scenario())
    assert (fetched.reconnects, connections) == (2, 3)
    assert torch.equal(cache_of(engine, stored), stored.exact)
    assert fetched.token == exact_token(tiny_model, stored)
    manifest = stored.store.manifest(stored.context)
    # nothing arrived twice
    size = len(json.dumps(manifest.to_json(), separators=(",", ":")))
    assert fetched.stream_bytes == fetched.record.bytes + size


def test_a_trickle_fails_the_session_within_bounds(stored: Stored, engine: ModelEngine) -> None:
    def trickle(link: Link) -> None:
        link.rate_bps, link.piece_bytes = 400.0, 1

    reason, took_s = failure(stored, engine, trickle)
    assert "lost after 2 reconnections" in reason
    assert took_s < 3 * 2 * QUICK.stall_s + 4.0


def test_connections_that_bring_something_may_be_lost_often(stored: Stored, engine: ModelEngine) -> None:
    async def scenario() -> Fetched:
        async with linked(stored, 8e6) as (client, link):
            task = asyncio.create_task(session(client, stored, engine, Plan()))
            for at in range(50_000, 200_000, 30_000):
                await link.carried(at, task)
                link.cut()
            return await task

    fetched = asyncio.run(scenario())
    assert fetched.reconnects == 5 > CALM.reconnects
    assert torch.equal(cache_of(engine, stored), stored.exact)


@pytest.mark.parametrize("fault", [lambda data: data[100:], lambda data: data + data, lambda data: b"", bytes.swapcase])
def test_bytes_lost_or_doubled_once_cost_a_retry(
    stored: Stored, engine: ModelEngine, fault: Callable[[bytes], bytes]
) -> None:
    async def scenario() -> Fetched:
        async with linked(stored, 8e6) as (client, link):
            done = False

            def once(data: bytes) -> bytes:
                nonlocal done
                if done or link.carried_bytes < 100_000:
                    return data
                done = True
                return fault(data)

            link.change = once
            return await session(client, stored, engine, Plan(), limits=QUICK)

    asyncio.run(scenario())
    assert torch.equal(cache_of(engine, stored), stored.exact)


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


def test_a_damaged_chunk_is_fetched_again(stored: Stored, tiny_model: Model, engine: ModelEngine) -> None:
    async def scenario() -> Fetched:
        async with linked(stored, 2e7) as (client, link):
            link.change = corrupt(1)
            return await session(client, stored, engine, Plan())

    fetched = asyncio.run(scenario())
    assert [c.attempts for c in fetched.record.chunks] == [1, 1, 2, 1, 1]
    assert fetched.record.wasted_bytes == fetched.record.chunks[2].bytes
    assert torch.equal(cache_of(engine, stored), stored.exact)


def serve_instead(monkeypatch: pytest.MonkeyPatch, key: str, data: bytes) -> None:
    """Let the sender send other bytes than it announces for the encoding `{chunk}/{level}`."""
    honest = ContentCache.chunk

    async def chunk(cache: ContentCache, cached: Cached, asked: str) -> Content:
        content = await honest(cache, cached, asked)
        return Content(data, content.sha256) if asked == key else content

    monkeypatch.setattr(ContentCache, "chunk", chunk)


@pytest.mark.parametrize(("level", "policy"), [(0, Plan(0)), (TEXT, Plan(TEXT))])
def test_a_chunk_that_stays_damaged_fails_the_session(
    stored: Stored, engine: ModelEngine, monkeypatch: pytest.MonkeyPatch, level: LevelOrText, policy: Policy
) -> None:
    data = bytearray(stored.store.get_kv("ctx/2", level))
    data[-3] ^= 0x10
    serve_instead(monkeypatch, f"2/{level}", bytes(data))
    with pytest.raises(SessionFailed, match=r"chunk 2 failed 3 times, last: .*damaged"):
        run(stored, engine, policy)


def test_another_chunks_bytes_are_refused(stored: Stored, engine: ModelEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_instead(monkeypatch, "2/0", stored.store.get_kv("ctx/1", 0))
    with pytest.raises(SessionFailed, match="requested tokens from 128 at level 0, got tokens from 64"):
        run(stored, engine, Plan())


def test_a_chunk_damaged_on_the_senders_disk_is_named_at_once(
    tmp_path: Path, tiny_model: Model, engine: ModelEngine
) -> None:
    stored = store_context(tmp_path, tiny_model)
    path = stored.store.chunk_path("ctx", 2, 0)
    for data in (b"x" + path.read_bytes()[1:], b"short"):
        path.write_bytes(data)
        begin_s = time.monotonic()
        with pytest.raises(SessionFailed, match="refused by the sender: chunk 2/0 of context ctx is damaged on disk"):
            run(stored, engine, Plan())
        assert time.monotonic() - begin_s < 3.0


def test_another_models_context_is_refused(stored: Stored, tmp_path: Path) -> None:
    engine = ModelEngine(load_model(save_tiny_model(tmp_path, rope_theta=500.0)))
    try:
        with pytest.raises(SessionFailed, match="was computed with model"):
            run(stored, engine, Plan())
    finally:
        engine.close()


def test_a_manifest_cannot_claim_all_memory(stored: Stored, tiny_model: Model) -> None:
    manifest = stored.store.manifest("ctx")
    engine = ModelEngine(tiny_model)
    try:
        for claim in ({"sizes_bytes": (1 << 32,)}, {"text_bytes": 1 << 32}):
            chunks = (replace(manifest.chunks[0], **claim), *manifest.chunks[1:])
            with pytest.raises(SpecError, match="chunk 0 claims more than"):
                engine.open(replace(manifest, chunks=chunks), 8)
        with pytest.raises(SpecError, match="positions"):
            engine.open(manifest, 1000)
    finally:
        engine.close()


def test_unknown_context_and_absent_sender_fail_clearly(stored: Stored, engine: ModelEngine) -> None:
    unknown = Stored(stored.store, "ctx", stored.tokens, stored.exact, stored.questions)

    async def scenario() -> None:
        async with linked(stored) as (client, link):
            with pytest.raises(SessionFailed, match="status 404"):
                await fetch_session(
                    client,
                    "nope",
                    Plan(),
                    SessionSettings(1.0),
                    engine=engine,
                    costs=costs_of(unknown),
                    prompt_ids=[1],
                    limits=QUICK,
                )
            link.target = 1
            with pytest.raises(SessionFailed, match="no connection to the sender"):
                await session(client, stored, engine, Plan(), limits=QUICK)
            with pytest.raises(SessionFailed, match="lost after 2 reconnections"):
                await session(client, stored, engine, Plan(), cold=True, limits=QUICK)

    asyncio.run(scenario())


def header(req: int, size: int, offset: int = 0, sha256: str = "") -> str:
    return messages.pack_answer(messages.Answer(req, size, offset, sha256))


Reply = str | bytes | None


@pytest.mark.parametrize(
    ("replies", "reason"),
    [
        (["no json"], "not JSON"),
        ([header(9, 10)], "out-of-order"),
        ([b"x"], "unsolicited data"),
        ([header(1, 0)], "manifest size of 0 bytes"),
        ([header(1, messages.MAX_MANIFEST_BYTES + 1)], "manifest size of"),
        ([header(1, 4), header(1, 4)], "answered twice"),
        ([header(1, 4), b"12345"], "unsolicited data"),
        ([header(1, 4), b"1234"], "manifest"),
        (["manifest", header(2, 7)], "requested 0 to"),
        (["manifest", header(2, -1)], "'bytes'"),
        (["manifest", '{"req": 2, "cancelled": true}'], "without being cancelled"),
        (["manifest", "chunk", b"x"], "unsolicited data"),
        (["renamed"], "requested context"),
        ([None], "refused by the sender: go away"),
    ],
)
def test_a_hostile_sender_fails_the_session_on_the_second_try(
    stored: Stored, engine: ModelEngine, replies: list[Reply], reason: str
) -> None:
    manifest = stored.store.manifest(stored.context)
    size = manifest.chunks[0].sizes_bytes[0]
    connections = 0

    async def hostile(request: web.Request) -> web.WebSocketResponse:
        nonlocal connections
        connections += 1
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        await ws.receive()
        # what the client asks for again on a second connection no longer includes the manifest
        for reply in (
            replies if connections == 1 else [reply for reply in replies if reply not in ("manifest", "chunk")]
        ):
            match reply:
                case "manifest" | "renamed":
                    body = manifest.to_json() | ({"context": "other"} if reply == "renamed" else {})
                    data = json.dumps(body).encode()
                    await ws.send_str(header(1, len(data), sha256=hashlib.sha256(data).hexdigest()))
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
                await session(client, stored, engine, Plan(), depth=1)

    asyncio.run(scenario())


# --- costs


def test_costs_are_measured_on_this_machine(stored_uniform: Stored, tiny_model: Model) -> None:
    engine = ModelEngine(tiny_model)
    try:
        manifest = stored_uniform.store.manifest("ctx8")
        costs = measure_costs(
            engine, manifest, lambda chunk, level: stored_uniform.store.get_kv(f"ctx8/{chunk}", level), [1, 2, 3]
        )
        assert [len(row) for row in costs.decode_s] == [3] * 5
        assert costs.recompute_s is not None
        assert all(0 < s < 5 for s in (*costs.decode_s[0], *costs.recompute_s, costs.prefill_s))
        assert costs.spreads == IN_SESSIONS, "a policy must know that measured times vary"
        assert engine.context.cache.storage.isnan().all()
    finally:
        engine.close()


# --- the processes


@contextmanager
def sender_process(stored: Stored, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "kvstream.testbed.net.sender", "--store", str(stored.store.path), "--port", str(port)],
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
    """`python -m kvstream.testbed.receiver` and its pipes."""

    def __init__(self, model: Path, store: Path) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "kvstream.testbed.receiver",
                "--model",
                str(model),
                "--store",
                str(store),
                "--threads",
                "1",
            ],
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
        slowdown = worker.command("warm_up", contexts=["ctx8"], url=url)["slowdown"]["ctx8"]
        assert min(slowdown.values()) > 0.0
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
            assert answer["slowdown"].keys() == slowdown.keys()
            assert abs(answer["zero_s"] - start_s) < 0.2
            sizes = dict(encodings(manifest))
            assert record["bytes"] == sum(sizes[f"{i}/{level}"] for i, level in enumerate(record["levels"]))
            kls[policy] = answer["measured_kl"]
        assert kls["text"] < 1e-6 < kls["highest"] < kls["fixed,level=0"]


def test_a_session_is_held_until_its_start_and_judged_beside_the_next(
    worker: WorkerProcess, stored_uniform: Stored
) -> None:
    with sender_process(stored_uniform) as (_, port):
        wanted = {"url": f"http://127.0.0.1:{port}", "context": "ctx8", "deadline_s": 2.0, "question": 1}
        alone = {policy: worker.command("session", policy=policy, **wanted) for policy in ("fixed,level=0", "highest")}
        judged = []
        for policy in ("fixed,level=0", "highest"):
            until_s = time.monotonic() + 0.1
            ready = worker.command(
                "ready",
                policy=policy,
                padding_bytes=20_000,
                padding_until_s=until_s,
                judge=policy == "highest",
                **wanted,
            )
            assert (ready["ok"], ready["status"]) == (True, "ready")
            judged += [ready["judgement"]] if "judgement" in ready else []
            start_s = time.monotonic() + 0.05
            answer = worker.command("start", start_s=start_s)
            assert answer["status"] == "ok"
            assert answer["record"]["levels"] == alone[policy]["record"]["levels"]
            assert 0.0 <= answer["zero_s"] - start_s < 0.2
        judged.append(worker.command("judge")["judgement"])
        assert [one["measured_kl"] for one in judged] == [one["measured_kl"] for one in alone.values()]
        assert all(one.keys() == {"measured_kl", "answer_ok", "answers_right", "answers"} for one in judged)
        # a session that never begins gives way to the next
        assert worker.command("ready", policy="highest", **wanted)["status"] == "ready"
        assert worker.command("session", policy="highest", **wanted)["status"] == "ok"
        assert "ready comes before start" in worker.command("start", start_s=0.0)["error"]
        assert worker.command("ready", policy="highest", **wanted)["status"] == "ready"
        assert "judge comes after" in worker.command("judge")["error"], "its memory is taken"


def test_the_worker_refuses_bad_commands_and_continues(worker: WorkerProcess) -> None:
    for line, reason in (
        ("nonsense", "malformed command"),
        ("[]", "malformed command"),
        ('{"cmd": "dance"}', "unknown command 'dance'; choose from"),
        ('{"cmd": "prepare", "contexts": ["none"]}', "no context 'none'"),
        ('{"cmd": "session", "context": "ctx8"}', "malformed command"),
        ('{"cmd": "warm_up", "contexts": ["ctx8"], "url": "http://127.0.0.1:9"}', "the warm-up of ctx8 failed"),
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


def test_a_restarted_sender_is_resumed_from(stored: Stored, tiny_model: Model, engine: ModelEngine) -> None:
    async def scenario() -> Fetched:
        with sender_process(stored) as (first, port):
            async with Link(port, 4e6) as link, Client(link.url) as client:
                limits = Limits(stall_s=10.0, reconnects=1, session_s=30.0)
                task = asyncio.create_task(session(client, stored, engine, Plan(), limits=limits))
                await link.carried(80_000, task)
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
    assert torch.equal(cache_of(engine, stored), stored.exact)
    assert fetched.token == exact_token(tiny_model, stored)


def test_the_worker_ends_with_its_input(tiny_folder: Path, stored: Stored) -> None:
    worker = WorkerProcess(tiny_folder, stored.store.path)
    _, errors = worker.process.communicate(timeout=30)
    assert worker.process.returncode == 0
    assert errors == ""


def test_the_worker_reports_a_missing_model(stored: Stored) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "kvstream.testbed.receiver",
            "--model",
            "/nonexistent",
            "--store",
            str(stored.store.path),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == "receiver: model folder /nonexistent does not exist\n"
