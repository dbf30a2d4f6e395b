"""Loads into blocks over a real sender's stream: right values, or an error and the blocks that have them not."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch, from the extra [run]")

from aiohttp.test_utils import TestServer  # noqa: E402

from kvstream.codec import registry  # noqa: E402
from kvstream.testbed.connectors import vllm_loads  # noqa: E402
from kvstream.testbed.connectors.vllm_blocks import PackedBlocks, Share, StridedBlocks  # noqa: E402
from kvstream.testbed.connectors.vllm_loads import Load, Loaded, Loader  # noqa: E402
from kvstream.testbed.net.inbound import Limits  # noqa: E402
from kvstream.testbed.net.sender import Sender  # noqa: E402
from kvstream.testbed.store.manifest import Manifest  # noqa: E402
from kvstream.testbed.store.store import Store  # noqa: E402
from tests.testbed.conftest import Stored, store_context  # noqa: E402
from tests.testbed.connectors.packing import packed_update  # noqa: E402
from tests.testbed.link import Link  # noqa: E402

BLOCK, N_BLOCKS = 16, 40
TABLE = tuple(range(N_BLOCKS - 1, 10, -1))
"""Blocks of a request: enough for 464 tokens, in no order that memory has."""
WHOLE = 288
"""Tokens of the context's 300 that fill blocks."""


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up soon."""
    monkeypatch.setattr(vllm_loads, "LIMITS", Limits(stall_s=0.5, reconnects=1, session_s=20.0))


@dataclass
class Rank:
    """Blocks of a rank, full of a value that no cache has."""

    blocks: StridedBlocks | PackedBlocks
    share: Share

    def untouched(self, table: tuple[int, ...]) -> bool:
        return all(bool((cache[list(table)] == 77.0).all()) for cache in self.blocks.caches)


def rank_of(manifest: Manifest, kind: str, share: Share | None = None) -> Rank:
    kv = manifest.kv
    share = share or Share(tuple(range(kv.layers)), range(kv.heads))
    shape = (N_BLOCKS, len(share.heads), BLOCK, 2 * kv.head_dim)
    caches = [torch.full(shape, 77.0) for _ in share.layers]
    blocks = StridedBlocks(caches) if kind == "strided" else PackedBlocks(caches, [packed_update] * len(caches))
    return Rank(blocks, share)


def load_of(manifest: Manifest, **more: Any) -> Load:
    load = Load("request", manifest, TABLE[: WHOLE // BLOCK], BLOCK, 0, WHOLE, "highest", 5.0, time.time())
    return replace(load, **more)


async def loaded(loader: Loader, count: int = 1) -> list[Loaded]:
    found: list[Loaded] = []
    async with asyncio.timeout(30):
        while len(found) < count:
            found += loader.take_finished()
            await asyncio.sleep(0.01)
    return found


def run(
    stored: Stored,
    rank: Rank,
    load: Load,
    *,
    change: Callable[[bytes], bytes] | None = None,
    rate_bps: float | None = None,
    during: Callable[[Link, Loader], Any] | None = None,
) -> Loaded:
    """One load over a link that may do harm."""

    async def scenario() -> Loaded:
        async with (
            TestServer(Sender(stored.store).app()) as server,
            Link(server.port or 0, rate_bps) as link,
        ):
            loader = Loader(link.url, rank.blocks, rank.share)
            try:
                if change is not None:
                    link.change = change
                loader.begin(load, lambda: None)
                if during is not None:
                    await during(link, loader)
                (one,) = await loaded(loader)
                return one
            finally:
                await asyncio.get_running_loop().run_in_executor(None, loader.close)

    return asyncio.run(scenario())


def test_an_idle_step_waits_for_a_load_and_not_for_nothing(stored: Stored) -> None:
    async def scenario() -> list[list[Loaded]]:
        async with TestServer(Sender(stored.store).app()) as server:
            rank = rank_of(stored.store.manifest(stored.context), "strided")
            loader = Loader(f"http://127.0.0.1:{server.port}", rank.blocks, rank.share)
            loop, found = asyncio.get_running_loop(), []
            try:
                for loads in (0, 1, 0):
                    if loads:
                        loader.begin(load_of(stored.store.manifest(stored.context)), lambda: None)
                    async with asyncio.timeout(40):
                        found.append(await loop.run_in_executor(None, loader.take_finished, 60.0))
            finally:
                await loop.run_in_executor(None, loader.close)
            return found

    none, one, nothing_more = asyncio.run(scenario())
    assert (none, len(one), nothing_more) == ([], 1, [])
    assert "error" not in one[0].report


@pytest.mark.parametrize("kind", ["strided", "packed"])
def test_a_context_goes_into_its_blocks_and_nowhere_else(stored: Stored, kind: str) -> None:
    manifest = stored.store.manifest(stored.context)
    rank = rank_of(manifest, kind)
    one = run(stored, rank, load_of(manifest))
    assert one.failed_blocks == frozenset()
    assert "error" not in one.report
    assert one.report["levels"] == [0] * 5
    assert one.report["tokens"] == WHOLE
    assert torch.equal(rank.blocks.read(TABLE, WHOLE), stored.exact[:, :, :WHOLE])
    assert rank.untouched(TABLE[WHOLE // BLOCK :])
    assert rank.untouched(tuple(range(11)))


@pytest.mark.parametrize("kind", ["strided", "packed"])
def test_blocks_of_an_own_prefix_stay_as_they_are(stored: Stored, kind: str) -> None:
    """The engine's prefix cache has the first 80 tokens, in blocks that other requests share; a chunk straddles the
    end."""
    manifest = stored.store.manifest(stored.context)
    rank = rank_of(manifest, kind)
    one = run(stored, rank, load_of(manifest, skip=80, stop=272))
    assert one.failed_blocks == frozenset()
    assert rank.untouched(TABLE[:5])
    assert rank.untouched(TABLE[17:])
    assert torch.equal(rank.blocks.read(TABLE, 272)[:, :, 80:], stored.exact[:, :, 80:272])


@pytest.mark.parametrize("kind", ["strided", "packed"])
@pytest.mark.parametrize("share", [Share((0, 1, 2), range(1)), Share((0, 1, 2), range(1, 2)), Share((1, 2), range(2))])
def test_ranks_load_their_heads_and_layers(stored: Stored, kind: str, share: Share) -> None:
    manifest = stored.store.manifest(stored.context)
    rank = rank_of(manifest, kind, share)
    assert run(stored, rank, load_of(manifest)).failed_blocks == frozenset()
    assert torch.equal(rank.blocks.read(TABLE, WHOLE), share.of(stored.exact)[:, :, :WHOLE])


# --- what goes wrong: never a wrong value without an error


def is_right_or_reported(stored: Stored, rank: Rank, one: Loaded) -> int:
    """Tokens that the engine may use; all of them are right."""
    assert one.report["error"]
    failed = [index for index, block in enumerate(TABLE[: WHOLE // BLOCK]) if block in one.failed_blocks]
    assert failed == list(range(failed[0], WHOLE // BLOCK)), "everything after the first missing block is missing"
    good = failed[0] * BLOCK
    if good:
        assert torch.equal(rank.blocks.read(TABLE, good), stored.exact[:, :, :good])
    return good


def flipped_after(n_bytes: int) -> Callable[[bytes], bytes]:
    """Flip a bit in everything that comes after so many bytes, in the middle of each piece."""
    seen = 0

    def change(data: bytes) -> bytes:
        nonlocal seen
        seen += len(data)
        if seen < n_bytes or len(data) < 200:
            return data
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]

    return change


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["strided", "packed"])
@pytest.mark.parametrize("after_bytes", [0, 60_000, 150_000])
def test_damage_on_the_way(stored: Stored, kind: str, after_bytes: int) -> None:
    rank = rank_of(stored.store.manifest(stored.context), kind)
    one = run(stored, rank, load_of(stored.store.manifest(stored.context)), change=flipped_after(after_bytes))
    is_right_or_reported(stored, rank, one)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["strided", "packed"])
def test_a_link_that_dies_in_mid_load_leaves_whole_chunks(stored: Stored, kind: str) -> None:
    manifest = stored.store.manifest(stored.context)
    rank = rank_of(manifest, kind)

    async def dies(link: Link, loader: Loader) -> None:
        size = sum(chunk.sizes_bytes[0] for chunk in manifest.chunks)
        await link.carried(int(0.75 * size))
        link.rate_bps = 0
        link.cut()

    one = run(stored, rank, load_of(manifest), rate_bps=4e6, during=dies)
    assert is_right_or_reported(stored, rank, one) >= 64


@pytest.mark.usefixtures("quick")
def test_no_sender(stored: Stored) -> None:
    manifest = stored.store.manifest(stored.context)
    rank = rank_of(manifest, "packed")
    loader = Loader("http://127.0.0.1:9", rank.blocks, rank.share)
    loader.begin(load_of(manifest), lambda: None)
    try:
        (one,) = asyncio.run(loaded(loader))
    finally:
        loader.close()
    assert one.failed_blocks == frozenset(TABLE[: WHOLE // BLOCK])
    assert rank.untouched(TABLE)


def test_a_request_that_ends_frees_its_blocks_when_nothing_writes_any_more(stored: Stored) -> None:
    manifest = stored.store.manifest(stored.context)
    rank = rank_of(manifest, "packed")

    async def ends(link: Link, loader: Loader) -> None:
        await link.carried(30_000)
        loader.cancel(["request", "unknown"])
        loader.cancel(["request"])

    one = run(stored, rank, load_of(manifest), rate_bps=1e6, during=ends)
    assert "request ended" in one.report["error"]
    assert one.failed_blocks


def rewritten(stored: Stored, folder: Path, change: Callable[[Store, str], None]) -> Stored:
    """The same context in a store of its own, after a change that its sender does not notice."""
    store = Store(folder)
    for source in (stored.store.path / "contexts" / stored.context).rglob("*"):
        if source.is_file():
            target = store.path / source.relative_to(stored.store.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    change(store, stored.context)
    return replace(stored, store=store)


def replace_chunk(store: Store, context: str, chunk: int, data: bytes) -> None:
    """With the hash of the new bytes: a sender that lies consistently."""
    store.chunk_path(context, chunk, 0).write_bytes(data)
    path = store.path / "contexts" / context / "hashes.json"
    hashes = json.loads(path.read_text()) | {f"{chunk}/0": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(hashes))


def not_finite(stored: Stored) -> bytes:
    kv = stored.exact[:, :, 128:192].clone()
    kv[1, 1, 7, 0, 3] = torch.inf
    return registry.make("raw").encode(kv, 0, positions=range(128, 192))


def another_place(stored: Stored) -> bytes:
    return stored.store.get_kv(f"{stored.context}/1", 0)


def another_codec(stored: Stored) -> bytes:
    data = registry.make("uniform").encode(stored.exact[:, :, 128:192], 0, positions=range(128, 192))
    return data + bytes(len(stored.store.get_kv(f"{stored.context}/2", 0)) - len(data))


def cut_short(stored: Stored) -> bytes:
    data = stored.store.get_kv(f"{stored.context}/2", 0)
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


@pytest.mark.parametrize("kind", ["strided", "packed"])
@pytest.mark.parametrize("lie", [not_finite, another_place, another_codec, cut_short])
def test_a_sender_that_lies_in_its_third_chunk(
    stored: Stored, tmp_path: Path, kind: str, lie: Callable[[Stored], bytes]
) -> None:
    hostile = rewritten(stored, tmp_path, lambda store, context: replace_chunk(store, context, 2, lie(stored)))
    manifest = stored.store.manifest(stored.context)
    rank = rank_of(manifest, kind)
    one = run(hostile, rank, load_of(manifest))
    assert is_right_or_reported(stored, rank, one) <= 128


def test_a_context_that_changed_since_it_was_matched(stored: Stored, tmp_path: Path, tiny_model: Any) -> None:
    """Its id now names other tokens under another codec: nothing of it may reach the blocks."""
    other = store_context(tmp_path / "other", tiny_model, "uniform", stored.context)
    manifest = stored.store.manifest(stored.context)
    rank = rank_of(manifest, "packed")
    one = run(other, rank, load_of(manifest))
    assert one.report["error"]
    assert one.failed_blocks == frozenset(TABLE[: WHOLE // BLOCK])


@pytest.fixture
def manifest(stored: Stored) -> Manifest:
    return stored.store.manifest(stored.context)


def test_a_policy_that_fails_costs_the_load_only_quality(stored: Stored, manifest: Manifest) -> None:
    rank = rank_of(manifest, "packed")
    one = run(stored, rank, load_of(manifest, policy="text"))  # there is nothing to recompute with
    assert "error" not in one.report
    assert torch.equal(rank.blocks.read(TABLE, WHOLE), stored.exact[:, :, :WHOLE])
