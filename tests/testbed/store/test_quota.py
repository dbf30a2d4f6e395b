"""A quota, in a folder and in a bucket: what was used longest ago goes first, what was just put stays."""

from __future__ import annotations

import asyncio
import secrets
import time
from pathlib import Path

import pytest
from aiohttp.test_utils import TestServer

from kvstream.testbed.errors import SpecError
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.sender import Sender
from kvstream.testbed.store.api import ContextStore
from kvstream.testbed.store.layout import encodings
from kvstream.testbed.store.opening import open_store
from kvstream.testbed.store.quota import size_bytes
from tests.testbed.store.test_bucket import content, fill, manifest

SIZE = 3 * 3 * 32
CLOCK_S = {"folder": 0.02, "memory": 0.0, "s3": 1.05}
"""How fine the times of last use are."""


@pytest.fixture(params=["folder", "memory", "s3"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param != "folder":
        pytest.importorskip("fsspec", reason="needs the extra [s3]")
    return str(request.param)


@pytest.fixture
def store(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> ContextStore:
    """Room for three and a half contexts."""
    urls = {"folder": str(tmp_path), "memory": f"memory://{secrets.token_hex(6)}"}
    where = urls[kind] if kind in urls else request.getfixturevalue("s3")
    return open_store(where, quota_bytes=3 * SIZE + SIZE // 2)


def test_what_was_used_longest_ago_goes(store: ContextStore, kind: str) -> None:
    for context in ("a", "b", "c"):
        assert size_bytes(fill(store, context)) == SIZE
        time.sleep(CLOCK_S[kind])
    assert {context: use.bytes for context, use in store.uses().items()} == {"a": SIZE, "b": SIZE, "c": SIZE}
    store.touch("a")
    time.sleep(CLOCK_S[kind])
    fill(store, "d")
    assert store.contexts() == ["a", "c", "d"]
    time.sleep(CLOCK_S[kind])
    fill(store, "e", chunks=6)
    assert store.contexts() == ["d", "e"]
    assert store.fault("e") is None
    assert sum(use.bytes for use in store.uses().values()) <= (store.quota_bytes or 0)


def test_a_context_larger_than_the_quota_is_refused(store: ContextStore) -> None:
    fill(store, "a")
    with pytest.raises(SpecError, match=f"context 'large' has {4 * SIZE} bytes, the store's quota is"):
        fill(store, "large", chunks=12)
    assert store.contexts() == ["a"]


def test_putting_again_does_not_count_twice(store: ContextStore) -> None:
    for _ in range(5):
        fill(store, "a", chunks=6)
    fill(store, "b")
    assert store.contexts() == ["a", "b"]
    assert {context: use.bytes for context, use in store.uses().items()} == {"a": 2 * SIZE, "b": SIZE}


def test_a_session_is_a_use_and_an_upload_makes_room(store: ContextStore, kind: str) -> None:
    for context in ("a", "b", "c"):
        fill(store, context)
        time.sleep(CLOCK_S[kind])

    async def scenario() -> None:
        async with (
            TestServer(Sender(store, writable=True).app()) as server,
            Client(str(server.make_url("/"))) as client,
        ):
            before = store.uses()["a"].last_s
            await client.manifest("a")
            while store.uses()["a"].last_s == before:  # beside the answer
                await asyncio.sleep(0.05)
            with pytest.raises(SpecError, match="quota"):
                await client._put("/v1/contexts/large", manifest("large", 12).wire)
            await client._put("/v1/contexts/d", manifest("d").wire)
            for key, _ in encodings(manifest("d")):
                await client._put(f"/v1/contexts/d/chunks/{key}", content(key))
            assert await client.contexts() == ["a", "c", "d"]

    asyncio.run(scenario())


def test_without_a_quota_nothing_goes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for context in "abcdefgh":
        fill(store, context)
    assert len(store.contexts()) == 8
