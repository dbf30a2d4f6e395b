"""`kvstream.fetch`: any target, exact with raw, from threads and event loops, and nothing wrong without an error."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer

import kvstream
from kvstream import SessionFailed, SpecError
from kvstream.codec.targets import (
    CacheTarget,
    HuggingFaceTarget,
    LayeredTarget,
    LMCacheTarget,
    PagedTarget,
    StridedTarget,
    as_target,
)
from kvstream.policies.api import TEXT, Choice, LevelOrText, Observation
from kvstream.testbed.engine import decoding
from kvstream.testbed.engine.buffers import ChunkBuffers
from kvstream.testbed.engine.model import Model, extend_kv
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.sender import Sender
from kvstream.testbed.receiver import kept_times
from kvstream.testbed.store.layout import encodings
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.store.store import Store
from tests.testbed.conftest import TOKENS, Stored, store_context
from tests.testbed.link import Link

SHAPE = (3, 2, TOKENS, 2, 16)


@pytest.fixture(scope="module", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Measurements of decoding are kept here."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def url(stored: Stored, stored_uniform: Stored, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A sender process with both contexts."""
    path = tmp_path_factory.mktemp("both")
    for part in (stored, stored_uniform):
        for folder in ("contexts", "profiles"):
            (path / folder).mkdir(exist_ok=True)
        (path / "contexts" / part.context).symlink_to(part.store.path / "contexts" / part.context)
    command = [sys.executable, "-m", "kvstream.testbed.net.sender", "--store", str(path), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}"
    finally:
        process.kill()
        process.communicate()


@dataclass
class Plan:
    """Fetches chunk i at `levels[i]`, or all at one level, and looks at the process meanwhile."""

    levels: LevelOrText | Sequence[LevelOrText] = 0
    seen: list[Observation] = field(default_factory=list)
    settings: set[Any] = field(default_factory=set)

    def choose(self, obs: Observation) -> Choice:
        self.seen.append(obs)
        self.settings.add(settings_of_the_process())
        return Choice(self.levels if isinstance(self.levels, int | str) else self.levels[obs.chunk])


def settings_of_the_process() -> tuple[Any, ...]:
    handlers = tuple(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))
    return sys.getswitchinterval(), gc.isenabled(), gc.get_freeze_count(), handlers


# --- targets


def test_a_new_tensor_by_default(url: str, stored: Stored) -> None:
    got = kvstream.fetch(url, "ctx", "fixed,level=highest", 5.0)
    assert isinstance(got.cache, torch.Tensor)
    assert torch.equal(got.cache, stored.exact)
    assert got.token_ids == stored.tokens
    assert got.record.levels == (0,) * 5
    assert got.record.met
    assert 0 < got.record.ttft_s < 5.0
    assert got.manifest == stored.store.manifest("ctx")


class OnlyWrites(CacheTarget):
    """What an engine of others might pass: it can nothing but take values."""

    def __init__(self) -> None:
        self.shape, self.dtype, self.device = SHAPE, torch.float32, torch.device("cpu")
        self.kept = torch.zeros(SHAPE)

    def write(self, layer: int, kv: int, values: torch.Tensor, first: int = 0) -> None:
        self.kept[layer, kv, first : first + len(values)] = values


def paged(layers: int) -> tuple[PagedTarget, Callable[[], torch.Tensor]]:
    """Blocks of 16 out of order, from the middle of one on; and what they hold."""
    offset, block = 5, 16
    blocks = -(-(TOKENS + offset) // block)
    pages = [torch.zeros(2, blocks + 3, block, 2, 16) for _ in range(layers)]
    table = torch.randperm(blocks + 3)[:blocks]
    at = torch.arange(offset, offset + TOKENS)
    return (
        PagedTarget(pages, table, offset, TOKENS),
        lambda: torch.stack([page[:, table[at // block], at % block] for page in pages]),
    )


def made_targets() -> dict[str, tuple[Any, Callable[[], torch.Tensor]]]:
    """A target, and the cache `[L, 2, T, H, D]` that it then holds."""
    strided = torch.zeros(3, 2, 2, TOKENS, 16).permute(0, 1, 3, 2, 4)
    hugging_face = HuggingFaceTarget.allocate(SHAPE, torch.float32)
    filled = HuggingFaceTarget.allocate(SHAPE, torch.float32)
    dynamic = filled.dynamic_cache()
    lmcache = torch.zeros(3, 2, TOKENS, 32)
    blocks, in_blocks = paged(3)
    (front, in_front), (back, in_back) = paged(1), paged(2)
    own = OnlyWrites()

    def of_cache(cache: Any) -> torch.Tensor:
        return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]).transpose(2, 3)

    return {
        "strided": (strided, lambda: strided),
        "hugging face": (hugging_face, lambda: of_cache(hugging_face.dynamic_cache())),
        "dynamic cache": (dynamic, lambda: of_cache(dynamic)),
        "lmcache": (LMCacheTarget(lmcache, 2), lambda: lmcache.unflatten(3, (2, 16))),
        "paged": (blocks, in_blocks),
        "layered": (LayeredTarget([front, back]), lambda: torch.cat([in_front(), in_back()])),
        "another's": (own, lambda: own.kept),
    }


@pytest.mark.parametrize("name", made_targets())
def test_into_any_target(url: str, stored: Stored, name: str) -> None:
    target, held = made_targets()[name]
    got = kvstream.fetch(url, "ctx", "fixed,level=highest", 5.0, into=target)
    assert got.cache is target
    assert torch.equal(held(), stored.exact)


def test_a_function_makes_the_target_when_the_size_is_known(url: str, stored: Stored) -> None:
    made = []

    def into(manifest: Manifest) -> HuggingFaceTarget:
        assert manifest.tokens == TOKENS
        made.append(HuggingFaceTarget.allocate(SHAPE, torch.bfloat16))
        return made[-1]

    got = kvstream.fetch(url, "ctx", "fixed,level=highest", 5.0, into=into)
    assert [got.cache] == made
    keys = made[0].dynamic_cache().layers[1].keys[0].transpose(0, 1)
    assert torch.equal(keys, stored.exact[1, 0].to(torch.bfloat16))


@pytest.mark.parametrize(
    ("into", "says"),
    [
        (torch.zeros(3, 2, TOKENS + 1, 2, 16), "the target (3, 2, 301, 2, 16)"),
        (torch.zeros(3, TOKENS, 2, 16), "a KV tensor is [layers, 2, tokens, heads, head_dim]"),
        ("cache", "cannot decode into a str"),
        (lambda manifest: torch.zeros(3, 2, 10, 2, 16), "the target (3, 2, 10, 2, 16)"),
    ],
)
def test_what_is_no_target_is_refused_before_the_session(url: str, into: Any, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        kvstream.fetch(url, "ctx", into=into)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", [name for name in made_targets() if name != "dynamic cache"])
def test_some_tokens_of_a_target_are_a_target(name: str) -> None:
    target, held = made_targets()[name]
    for layer in range(3):
        for side in (0, 1):
            as_target(target).write(layer, side, torch.zeros(TOKENS, 2, 16))
    part = as_target(target).narrow(40, 30).narrow(10, 7)
    assert part.shape == (3, 2, 7, 2, 16)
    block = torch.arange(4.0 * 2 * 16).view(4, 2, 16) + 1
    part.write(1, 1, block, 2)
    assert torch.equal(held()[1, 1, 52:56], block)
    assert int(held().count_nonzero()) == block.numel()
    with pytest.raises(kvstream.CodecError, match="do not fit into a cache of 7"):
        part.narrow(3, 5)


# --- a guest


def test_nothing_of_the_process_is_changed(url: str) -> None:
    before, threads = settings_of_the_process(), torch.get_num_threads()
    for context in ("ctx", "ctx8"):
        plan = Plan()
        kvstream.fetch(url, context, plan, 5.0)
        assert plan.settings == {before}
    assert (settings_of_the_process(), torch.get_num_threads()) == (before, threads)
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()


def test_in_event_loops_and_threads_at_once(url: str, stored: Stored) -> None:
    caches: list[Any] = []

    async def scenario() -> None:
        both = await asyncio.gather(*(kvstream.afetch(url, "ctx", Plan(), 9.0) for _ in range(2)))
        caches.extend(one.cache for one in both)
        caches.append(kvstream.fetch(url, "ctx", Plan(), 9.0).cache)  # blocks the loop, but works: as in a notebook

    def thread() -> None:
        caches.append(kvstream.fetch(url, "ctx", Plan(), 9.0).cache)

    threads = [threading.Thread(target=thread) for _ in range(3)]
    for one in threads:
        one.start()
    asyncio.run(scenario())
    for one in threads:
        one.join()
    assert len(caches) == 6
    assert all(torch.equal(cache, stored.exact) for cache in caches)


def test_under_another_kind_of_event_loop(url: str, stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest's process may have made another loop the default, such as uvloop's."""

    class Other(asyncio.DefaultEventLoopPolicy):
        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            pytest.fail("the caller's loop was taken")

    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(Other())
    try:
        assert torch.equal(kvstream.fetch(url, "ctx", Plan()).cache, stored.exact)  # type: ignore[arg-type]
    finally:
        asyncio.set_event_loop_policy(before)


def test_a_cancelled_fetch_writes_no_more(stored: Stored) -> None:
    async def scenario() -> tuple[torch.Tensor, torch.Tensor]:
        into = torch.zeros(SHAPE)
        async with TestServer(Sender(stored.store).app()) as server, Link(server.port or 0) as link:
            await kvstream.afetch(link.url, "ctx", Plan())  # everything warm
            link.rate_bps, before = 2e6, link.carried_bytes
            task = asyncio.create_task(kvstream.afetch(link.url, "ctx", Plan(), 9.0, into))
            await link.carried(before + 120_000)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            then = into.clone()
            assert not [one for one in threading.enumerate() if one.name == "kvstream-fetch"]
            link.rate_bps = None
            await asyncio.sleep(0.1)
        return then, into

    then, into = asyncio.run(scenario())
    assert torch.equal(then, into)
    assert not torch.equal(into, stored.exact)


# --- text


def recompute_into(cache: torch.Tensor, model: Model) -> Callable[[Sequence[int], int], None]:
    """The tiny model computes a chunk after what is in the cache."""

    def recompute(token_ids: Sequence[int], start: int) -> None:
        room = model.new_cache(start + len(token_ids))
        room.length = start
        room.view().copy_(cache[:, :, :start])
        extend_kv(model, room, token_ids)
        cache[:, :, start : start + len(token_ids)] = room.view(start)

    return recompute


def test_text_comes_where_it_can_be_recomputed(url: str, stored: Stored, tiny_model: Model) -> None:
    cache = torch.zeros(SHAPE)
    plan = Plan((TEXT, 0, TEXT, 0, TEXT))
    got = kvstream.fetch(url, "ctx", plan, 5.0, cache, recompute=recompute_into(cache, tiny_model))
    assert got.record.levels == (TEXT, 0, TEXT, 0, TEXT)
    assert torch.allclose(cache, stored.exact, atol=1e-5)
    assert plan.seen[0].recompute_s is not None
    assert all(0 < seconds < 5 for seconds in plan.seen[0].recompute_s)


def test_without_recompute_no_text_comes(url: str, stored: Stored) -> None:
    plan = Plan(TEXT)
    got = kvstream.fetch(url, "ctx", plan, 5.0)
    assert plan.seen[0].recompute_s is None
    assert got.record.levels == (0,) * 5
    assert got.record.policy_faults == 5
    assert torch.equal(got.cache, stored.exact)  # type: ignore[arg-type]


def test_what_one_fetch_got_the_next_one_knows(url: str) -> None:
    first, second = Plan(0), Plan(0)
    got = kvstream.fetch(url, "ctx", first, 5.0)
    assert got.record.goodput_bps is not None
    assert got.record.goodput_bps > 1e5
    kvstream.fetch(url, "ctx", second, 5.0, prior_bps=got.record.goodput_bps)
    assert (first.seen[0].prior_bps, second.seen[0].prior_bps) == (None, got.record.goodput_bps)


def test_what_recompute_raises_comes_through(url: str) -> None:
    def recompute(token_ids: Sequence[int], start: int) -> None:
        raise LookupError("no model today")

    with pytest.raises(LookupError, match="no model today"):
        kvstream.fetch(url, "ctx", Plan(TEXT), 5.0, recompute=recompute)


# --- measurements


def test_decoding_is_measured_once_a_machine(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked: list[tuple[str, LevelOrText]] = []
    get_kv = Client.get_kv

    async def counted(self: Client, identifier: str, level: LevelOrText, size: int) -> bytes:
        asked.append((identifier, level))
        return await get_kv(self, identifier, level, size)

    monkeypatch.setattr(Client, "get_kv", counted)
    first = Plan()
    kvstream.fetch(url, "ctx8", first, 5.0)
    assert asked == [("ctx8/0", 0), ("ctx8/0", 1), ("ctx8/0", 2)]
    [file] = (tmp_path / "kvstream" / "times").iterdir()
    again, kept = Plan(), json.loads(file.read_text())
    kvstream.fetch(url, "ctx8", again, 5.0)
    assert len(asked) == 3
    assert [row[0] for row in again.seen[0].decode_s] == pytest.approx([n * kept[0] for n in again.seen[0].tokens])
    assert all(0 < seconds < 5 for row in first.seen[0].decode_s for seconds in row)
    assert all(obs.decode_spread > 0.0 for obs in first.seen), "decoding takes now more, now less"

    monkeypatch.setattr(kept_times, "_warm", set())  # another process: only warm code is missing
    kvstream.fetch(url, "ctx8", Plan(), 5.0)
    assert asked[3:] == [("ctx8/0", 0)]
    for damaged in ("[1, 2]", "[0, 1, NaN]", "{", '["a", 1, 2]'):
        file.write_text(damaged)
        kvstream.fetch(url, "ctx8", Plan(), 5.0)
        assert len(json.loads(file.read_text())) == 3


@pytest.mark.parametrize(("wrong", "fetches"), [(1e4, 2), (1e-4, 8)])
def test_what_was_measured_wrongly_is_learned_from_sessions(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float, fetches: int
) -> None:
    """As by an engine that had just begun: its threads left the measurement a hundredth of the interpreter."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kvstream.fetch(url, "ctx8", Plan(), 5.0)
    [file] = (tmp_path / "kvstream" / "times").iterdir()
    right = json.loads(file.read_text())
    file.write_text(json.dumps([wrong * seconds for seconds in right]))
    for _ in range(fetches):
        kvstream.fetch(url, "ctx8", Plan(), 5.0)
    assert json.loads(file.read_text()) == [pytest.approx(seconds, rel=20.0) for seconds in right]
    assert min(json.loads(file.read_text())) > min(right) / 20.0


def test_a_cache_folder_that_cannot_be_written_is_done_without(
    url: str, stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert torch.equal(kvstream.fetch(url, "ctx", Plan()).cache, stored.exact)  # type: ignore[arg-type]


# --- senders that are absent, wrong or damaged


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"context": "nowhere"}, SpecError, "no context 'nowhere' in this store; it has ctx, ctx8"),
        ({"policy": "nobody"}, kvstream.PolicyError, "unknown policy 'nobody'"),
        ({"policy": "oracle"}, SpecError, "clairvoyant"),
        ({"deadline_s": 0.0}, SpecError, "deadline is 0 s"),
        ({"url": "http://127.0.0.1:1"}, SessionFailed, "no sender at http://127.0.0.1:1"),
        ({"url": "127.0.0.1:1"}, SpecError, "give an address like"),
        ({"device": "abacus"}, SpecError, "context ctx: no memory for its cache ("),
    ],
)
def test_mistakes_are_said(url: str, arguments: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind) as caught:
        kvstream.fetch(**({"url": url, "context": "ctx", "policy": Plan()} | arguments))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_context_is_found_by_its_name(tmp_path: Path, tiny_model: Model) -> None:
    for codec, context in (("raw", "docs-raw-0123456789ab"), ("uniform", "docs-uniform-0123456789ab")):
        stored = store_context(tmp_path, tiny_model, codec, context)

    async def scenario() -> None:
        async with TestServer(Sender(stored.store).app()) as server:
            url = str(server.make_url("/"))
            for name in ("docs-raw", "docs-raw-0123456789ab"):
                got = await kvstream.afetch(url, name, Plan())
                assert got.manifest.context == "docs-raw-0123456789ab"
            with pytest.raises(
                SpecError, match="2 contexts are called 'docs'; give one of docs-raw-0123456789ab, docs-u"
            ):
                await kvstream.afetch(url, "docs", Plan())

    asyncio.run(scenario())


def flipped(count: int, after: bytes) -> Callable[[bytes], bytes]:
    """Flip a bit of the piece that follows one with `after` in it, so many times."""
    left, is_next = count, False

    def change(data: bytes) -> bytes:
        nonlocal left, is_next
        if is_next and left:
            left, is_next = left - 1, False
            return data[:-1] + bytes([data[-1] ^ 1])
        is_next = after in data
        return data

    return change


@pytest.mark.parametrize("times", [1, 1000])
def test_damage_on_the_way_never_gives_wrong_values(stored: Stored, times: int) -> None:
    """What is damaged once is fetched again; what stays damaged fails."""

    async def scenario() -> Any:
        async with TestServer(Sender(stored.store).app()) as server, Link(server.port or 0) as link:
            await kvstream.afetch(link.url, "ctx", Plan())
            link.change = flipped(times, b"KVST")
            return await kvstream.afetch(link.url, "ctx", Plan(), 9.0)

    if times > 1:
        with pytest.raises(SessionFailed, match="damaged"):
            asyncio.run(scenario())
    else:
        got = asyncio.run(scenario())
        assert torch.equal(got.cache, stored.exact)
        assert got.record.wasted_bytes > 0


def altered(stored: Stored, path: Path, change: Callable[[Store], None]) -> Store:
    """A copy of the store with something wrong in it."""
    import shutil

    shutil.copytree(stored.store.path, path)
    store = Store(path)
    change(store)
    return store


def serve_instead(store: Store, chunk: int, level: LevelOrText, data: bytes) -> None:
    """Let the sender take other bytes for what was stored."""
    store.chunk_path("ctx", chunk, level).write_bytes(data)
    hashes = store.hashes("ctx") | {f"{chunk}/{level}": hashlib.sha256(data).hexdigest()}
    (store.path / "contexts" / "ctx" / "hashes.json").write_text(json.dumps(hashes))


def other_text(store: Store) -> None:
    data = bytearray(store.get_kv("ctx/1", TEXT))
    data[3] ^= 1
    store.chunk_path("ctx", 1, TEXT).write_bytes(data)


def other_chunk(store: Store) -> None:
    serve_instead(store, 2, 0, store.get_kv("ctx/1", 0))


def cut_chunk(store: Store) -> None:
    serve_instead(store, 2, 0, store.get_kv("ctx/2", 0)[:-1])


def out_of_proportion(store: Store) -> None:
    manifest = store.manifest("ctx")
    huge = replace(manifest, kv=replace(manifest.kv, layers=4096, heads=4096, head_dim=4096))
    (store.path / "contexts" / "ctx" / "manifest.json").write_text(json.dumps(huge.to_json()))


def other_levels(store: Store) -> None:
    manifest = store.manifest("ctx")
    sizes = [replace(chunk, sizes_bytes=chunk.sizes_bytes * 2) for chunk in manifest.chunks]
    more = replace(manifest, levels=manifest.levels * 2, chunks=tuple(sizes))
    (store.path / "contexts" / "ctx" / "manifest.json").write_text(json.dumps(more.to_json()))
    hashes = dict.fromkeys((key for key, _ in encodings(more)), "0" * 64) | store.hashes("ctx")
    (store.path / "contexts" / "ctx" / "hashes.json").write_text(json.dumps(hashes))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_text, "chunk 1/text of context ctx is damaged on disk"),
        (other_chunk, "requested tokens from 128 at level 0, got tokens from 64"),
        (cut_chunk, "chunk 2/0 of context ctx is damaged on disk: 49255 bytes"),
        (out_of_proportion, "out of proportion"),
        (other_levels, "context ctx has 2 levels, its codec 1"),
    ],
)
def test_a_store_that_is_wrong_gives_an_error(
    stored: Stored, tmp_path: Path, change: Callable[[Store], None], says: str
) -> None:
    async def scenario() -> None:
        async with TestServer(Sender(altered(stored, tmp_path / "store", change)).app()) as server:
            await kvstream.afetch(str(server.make_url("/")), "ctx", Plan(), 5.0)

    with pytest.raises((SessionFailed, SpecError)) as caught:
        asyncio.run(scenario())
    assert says in str(caught.value)


@pytest.mark.parametrize("size", [0, 100, 10_000_000])
def test_a_chunk_to_measure_on_has_the_manifests_size(
    stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    async def lie(request: web.Request) -> web.Response:
        return web.Response(body=bytes(size))

    async def scenario() -> None:
        sender = Sender(stored.store)
        sender._chunk = lie  # type: ignore[method-assign,assignment]
        async with TestServer(sender.app()) as server:
            await kvstream.afetch(str(server.make_url("/")), "ctx", Plan())

    with pytest.raises(SpecError, match="bytes"):
        asyncio.run(scenario())


def test_token_ids_must_be_what_the_sender_states(stored: Stored) -> None:
    async def lie(request: web.Request) -> web.Response:
        return web.Response(body=bytes(TOKENS), headers={"ETag": '"00"'})

    async def scenario() -> None:
        sender = Sender(stored.store)
        sender._tokens = lie  # type: ignore[method-assign,assignment]
        async with TestServer(sender.app()) as server:
            await kvstream.afetch(str(server.make_url("/")), "ctx", Plan())

    with pytest.raises(SpecError, match="not what the sender announced"):
        asyncio.run(scenario())


def test_a_context_that_changes_meanwhile_is_refused(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = stored.store.manifest("ctx")

    async def older(self: Client, name: str) -> Manifest:
        return replace(manifest, model="another")

    monkeypatch.setattr(Client, "find", older)

    async def scenario() -> None:
        async with TestServer(Sender(stored.store).app()) as server:
            await kvstream.afetch(str(server.make_url("/")), "ctx", Plan())

    with pytest.raises((SessionFailed, SpecError), match="has changed on the sender"):
        asyncio.run(scenario())


def test_strided_targets_are_taken_as_they_are(url: str, stored: Stored) -> None:
    memory = torch.full((3, 2, 2, TOKENS + 40, 16), 7.0)
    target = StridedTarget(memory.permute(0, 1, 3, 2, 4)).narrow(20, TOKENS)
    kvstream.fetch(url, "ctx", Plan(), into=target)
    assert torch.equal(memory[:, :, :, 20:-20].transpose(2, 3), stored.exact)
    assert bool((memory[:, :, :, :20] == 7.0).all())
    assert bool((memory[:, :, :, -20:] == 7.0).all())


def test_a_context_of_any_length_has_bounded_memory(url: str, stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all slots taken, nothing is requested; what was decoded makes room again."""
    largest = max(max(chunk.sizes_bytes) for chunk in stored.store.manifest("ctx").chunks)
    opened: list[int] = []
    honest = ChunkBuffers.open

    def open_slots(self: ChunkBuffers, manifest: Manifest, slots: int) -> None:
        opened.append(slots)
        honest(self, manifest, slots)

    monkeypatch.setattr(ChunkBuffers, "open", open_slots)
    for room, slots in ((decoding.HOST_BYTES, 5), (4 * largest, 4), (0, 4)):
        monkeypatch.setattr(decoding, "HOST_BYTES", room)
        assert torch.equal(kvstream.fetch(url, "ctx", Plan()).cache, stored.exact)  # type: ignore[arg-type]
        assert set(opened) == {slots}
        opened.clear()
