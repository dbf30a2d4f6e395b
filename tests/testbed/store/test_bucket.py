"""Contexts in an object store: whole or not seen, read by ranges, asked about no more than needed, checked by us."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestServer

from kvstream.testbed.encoding.encode import store_kv
from kvstream.testbed.engine.model import Model
from kvstream.testbed.errors import MachineError, SpecError
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.sender import Sender
from kvstream.testbed.store import bucket, remote
from kvstream.testbed.store.api import ContextStore, Entry
from kvstream.testbed.store.cache import ContentCache
from kvstream.testbed.store.layout import encodings, level_of
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.store.opening import open_store
from kvstream.testbed.store.store import Store
from tests.testbed import made
from tests.testbed.conftest import CHUNK_TOKENS, Stored
from tests.testbed.s3_server import S3Server

pytest.importorskip("s3fs", reason="needs the extra [s3]")


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "s3":
        yield request.getfixturevalue("s3")
        return
    import fsspec

    place = f"memory://{secrets.token_hex(6)}"
    yield place
    fs = fsspec.filesystem("memory")
    if fs.exists(place):
        fs.rm(place, recursive=True)


def content(key: str) -> bytes:
    """The bytes that `fill` gives an encoding of `manifest()`, which differ from all others'."""
    return hashlib.sha256(key.encode()).digest()


def manifest(context: str, chunks: int = 3) -> Manifest:
    body = made.manifest([[32, 32]] * chunks, [0.2, 0.1], text_bytes=32).to_json()
    return Manifest.from_json(body | {"context": context})


def fill(store: ContextStore, context: str, chunks: int = 3, salt: str = "") -> Manifest:
    of = manifest(context, chunks)
    with store.draft(context) as draft:
        for key, _ in encodings(of):
            chunk, _, level = key.partition("/")
            draft.put_chunk(int(chunk), level_of(level), content(salt + key))
        draft.publish(of)
    return of


def names(store: ContextStore, folder: str = "puts") -> list[str]:
    assert isinstance(store, bucket.Bucket)
    return sorted(store._remote.files(folder))


def copy(source: ContextStore, context: str, store: ContextStore) -> None:
    of = source.manifest(context)
    with store.draft(context) as draft:
        for key, _ in encodings(of):
            chunk, _, level = key.partition("/")
            draft.put_chunk(int(chunk), level_of(level), source.get_kv(f"{context}/{chunk}", level_of(level)))
        draft.publish(of)


# --- put and get


def test_a_context_comes_back_as_from_a_folder(url: str, stored_uniform: Stored, tiny_model: Model) -> None:
    import torch

    from kvstream.codec import registry

    store, source, context = open_store(url), stored_uniform.store, stored_uniform.context
    store_kv(
        store, context, stored_uniform.tokens, tiny_model, registry.make("uniform"), chunk_tokens=CHUNK_TOKENS,
        distortions=[0.02, 0.01, 0.0], kv=stored_uniform.exact, questions=stored_uniform.questions,
    )  # fmt: skip
    again = open_store(url, create=False)
    assert again.contexts() == [context]
    assert again.manifest(context) == source.manifest(context)
    assert again.hashes(context) == source.hashes(context)
    for key, _ in encodings(again.manifest(context)):
        chunk, _, level = key.partition("/")
        name = f"{context}/{chunk}", level_of(level)
        assert again.get_kv(*name) == source.get_kv(*name)
    assert again.questions(context) == source.questions(context)
    assert again.exact_right(context) == source.exact_right(context)
    assert torch.equal(again.reference(context), source.reference(context))
    assert again.fault(context, evaluation=True) is None
    assert again.profile(again.put_profile(b"any bytes")) == b"any bytes"


def test_unknown_things_are_named(url: str) -> None:
    with pytest.raises(SpecError, match="nothing is there yet"):
        open_store(url, create=False)
    store = open_store(url)
    assert store.contexts() == []
    fill(store, "one")
    for call, message in (
        (lambda: store.manifest("nope"), "no context 'nope'"),
        (lambda: store.stamp("nope"), "no context 'nope'"),
        (lambda: store.get_kv("one/3", 0), "no chunk 'one/3'"),
        (lambda: store.get_kv("one/3", "text"), "no chunk 'one/3'"),
        (lambda: store.get_kv("one/0", 7), "no chunk 'one/0'"),
        (lambda: store.get_kv("one/0", -1), "invalid chunk"),
        (lambda: store.profile("0" * 64), "no profile"),
        (lambda: store.questions("one"), "questions.json is not in this store"),
        (lambda: store.manifest("../x"), "not a context id"),
    ):
        with pytest.raises(SpecError, match=message):
            call()


def test_nothing_is_seen_of_a_put_before_its_end(url: str) -> None:
    store, of = open_store(url), manifest("one")
    with store.draft("one") as draft:
        for key, _ in list(encodings(of))[:-1]:
            chunk, _, level = key.partition("/")
            draft.put_chunk(int(chunk), level_of(level), content(key))
        with pytest.raises(SpecError, match="chunk 2/1 is missing"):
            draft.publish(of)
        draft.put_chunk(2, 1, b"short")
        with pytest.raises(SpecError, match="2/1 is missing or not of 32 bytes"):
            draft.publish(of)
        assert store.contexts() == []
        assert names(store) != []
    assert names(store) == []
    with store.draft("one") as draft:
        for key, _ in encodings(of):
            chunk, _, level = key.partition("/")
            draft.put_chunk(int(chunk), level_of(level), content(key) if level != "text" else b"short")
        with pytest.raises(SpecError, match="0/text is missing or not of"):
            draft.publish(of)


KILLED = """
import os, signal, sys
from kvstream.testbed.store.opening import open_store
draft = open_store(sys.argv[1]).draft("ctx")
for chunk in range(40):
    draft.put_chunk(chunk, 0, b"x" * 1000)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_writer_that_is_killed_leaves_nothing_that_is_seen(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3)
    of = fill(store, "ctx")
    before = names(store)
    done = subprocess.run([sys.executable, "-c", KILLED, s3], check=False)
    assert done.returncode == -signal.SIGKILL
    left = [name for name in names(store) if name not in before]
    assert left
    assert (store.contexts(), store.manifest("ctx"), store.fault("ctx")) == (["ctx"], of, None)
    open_store(s3)
    assert set(left) <= set(names(store))  # its writer might be alive still
    monkeypatch.setattr(bucket, "ABANDONED_S", -1.0)
    open_store(s3)
    assert names(store) == before
    assert store.fault("ctx") is None


def test_a_first_put_that_was_killed_is_swept(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, s3], check=False)
    assert done.returncode == -signal.SIGKILL
    store = open_store(s3)
    assert store.contexts() == []
    assert names(store)
    monkeypatch.setattr(bucket, "ABANDONED_S", -1.0)
    open_store(s3)
    assert names(store) == []


def test_a_context_that_is_stored_again_is_replaced(url: str) -> None:
    store = open_store(url)
    fill(store, "one")
    found, stamp, before = store.entry("one"), store.stamp("one"), names(store)
    of = fill(store, "one", 5, salt="again")
    assert store.stamp("one") != stamp
    assert store.manifest("one") == of
    assert set(names(store)).isdisjoint(before)
    assert len(names(store)) == 5 * 2 + 1
    assert names(store, "used") == [f"one.{5 * 3 * 32}"]
    with pytest.raises(SpecError, match="no chunk 'one/0'"):
        store.read(found, 0, 0)
    assert store.get_kv("one/4", 1) == content("again4/1")


def test_a_write_that_fails_is_heard(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(url)

    def fail(*_: object) -> None:
        raise remote.RemoteError("the bucket is full")

    monkeypatch.setattr(remote.Remote, "put", fail)
    with pytest.raises(MachineError, match="the bucket is full"):
        fill(store, "one")
    assert store.contexts() == []


def test_large_chunks_are_read_in_ranges(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(url)
    fill(store, "one")
    monkeypatch.setattr(remote, "RANGE_BYTES", 5)
    for key, _ in encodings(manifest("one")):
        chunk, _, level = key.partition("/")
        assert store.get_kv(f"one/{chunk}", level_of(level)) == content(key)


def test_removing(url: str) -> None:
    store = open_store(url)
    fill(store, "one")
    fill(store, "two")
    store.remove("one")
    store.remove("never-there")
    assert store.contexts() == ["two"]
    assert len(names(store)) == 3 * 2 + 1
    assert [name.partition(".")[0] for name in names(store, "used")] == ["two"]


# --- damage


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"[" * 5000, b'{"sha256": "0", "context": {}}', b"\xff\xfe"])
def test_a_damaged_context_has_a_fault_in_one_line(url: str, data: bytes) -> None:
    store = open_store(url)
    fill(store, "one")
    assert isinstance(store, bucket.Bucket)
    store._remote.put("contexts/one.json", data)
    fault = open_store(url).fault("one")
    assert fault is not None
    assert "\n" not in fault
    assert len(fault) < 300


def test_a_changed_byte_of_a_context_is_found(url: str) -> None:
    store = open_store(url)
    fill(store, "one")
    assert isinstance(store, bucket.Bucket)
    data = store._remote.get("contexts/one.json", 1 << 20)
    store._remote.put("contexts/one.json", data.replace(b'"distortion":0.2', b'"distortion":0.3'))
    with pytest.raises(SpecError, match="damaged"):
        store.manifest("one")


def test_a_changed_chunk_is_found_by_our_own_hash(url: str) -> None:
    """An object store's ETag would be that of the changed bytes."""
    store = open_store(url)
    fill(store, "one")
    assert isinstance(store, bucket.Bucket)
    store._remote.put(f"{store.entry('one').place}/1.0", bytes(32))

    async def scenario() -> None:
        cache = ContentCache(store)
        cached = await cache.context("one")
        assert (await cache.chunk(cached, "0/0")).data == content("0/0")
        with pytest.raises(SpecError, match=r"chunk 1/0 of context one is damaged in the object store \(hash\)"):
            await cache.chunk(cached, "1/0")
        await cache.close()

    asyncio.run(scenario())


# --- serving


def test_through_senders_from_a_bucket_into_another(url: str, stored_uniform: Stored) -> None:
    source, context = open_store(url + "/from"), stored_uniform.context
    copy(stored_uniform.store, context, source)
    target = open_store(url + "/to")

    async def scenario() -> None:
        async with (
            TestServer(Sender(source).app()) as one,
            TestServer(Sender(target, writable=True).app()) as other,
            Client(str(one.make_url("/"))) as reader,
            Client(str(other.make_url("/"))) as writer,
        ):
            assert await reader.contexts() == [context]
            assert await reader.manifest(context) == source.manifest(context)
            assert await reader.token_ids(source.manifest(context)) == stored_uniform.tokens
            await writer.store_kv(source, context)
            assert await writer.contexts() == [context]
            for level in (0, 1, 2, "text"):
                assert await writer.get_kv(f"{context}/4", level) == source.get_kv(f"{context}/4", level)
            with pytest.raises(SpecError, match="already exists"):
                await writer.store_kv(source, context)

    asyncio.run(scenario())
    assert target.hashes(context) == stored_uniform.store.hashes(context)
    assert target.fault(context) is None


def test_an_upload_that_ends_leaves_nothing(url: str) -> None:
    store, of = open_store(url), manifest("one")

    async def scenario() -> None:
        async with (
            TestServer(Sender(store, writable=True).app()) as server,
            Client(str(server.make_url("/"))) as client,
        ):
            await client._put("/v1/contexts/one", of.wire)
            await client._put("/v1/contexts/one/chunks/0/1", content("0/1"))
            assert await asyncio.to_thread(names, store) != []

    asyncio.run(scenario())
    assert names(store) == []
    assert store.contexts() == []


def test_a_chunk_costs_one_request_and_none_to_look(s3: str, s3_server: S3Server) -> None:
    store = open_store(s3)
    fill(store, "one", chunks=6)
    store = open_store(s3, create=False)

    async def scenario() -> None:
        cache = ContentCache(store)
        cached = await cache.context("one")
        await cache.close()  # the use is noted
        before = len(s3_server.requests())
        together = [cache.chunk(cached, f"{index}/0") for index in (0, 1, 2, 2, 2, 3, 4, 5)]
        assert [found.data for found in await asyncio.gather(*together)][-1] == content("5/0")
        await cache.chunk(cached, "1/1")
        tokens = await cache.tokens(cached)
        assert tokens.data == b"".join(content(f"{index}/text") for index in range(6))
        for _ in range(3):
            await cache.chunk(cached, "1/1")
            assert await cache.context("one") is cached
        made = [request.partition(" ") for request in s3_server.requests()[before:]]
        assert [verb for verb, _, _ in made] == ["GET"] * (6 + 1 + 1)
        assert all("/puts/" in path for _, _, path in made)

    asyncio.run(scenario())


def test_a_context_that_is_stored_again_is_served_anew(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstream.testbed.store.cache.FRESH_S", 0.0)
    store = open_store(url)
    fill(store, "one")

    async def scenario() -> None:
        async with TestServer(Sender(store).app()) as server, Client(str(server.make_url("/"))) as client:
            assert (await client.manifest("one")).tokens == 300
            assert await client.get_kv("one/0", 0) == content("0/0")
            await asyncio.to_thread(fill, store, "one", 5, "again")
            assert (await client.manifest("one")).tokens == 500
            assert await client.get_kv("one/0", 0) == content("again0/0")
            await asyncio.to_thread(store.remove, "one")
            with pytest.raises(SpecError, match="no context 'one'"):
                await client.manifest("one")

    asyncio.run(scenario())


class Slow(Store):
    """A disk whose reads take as long as a test wants."""

    gate = threading.Event()

    def read(self, entry: Entry, chunk: int, level: Any) -> bytes:
        assert self.gate.wait(60)
        return super().read(entry, chunk, level)


def test_a_store_that_takes_its_time_holds_up_nobody_else(tmp_path: Path) -> None:
    store = Slow(tmp_path)
    fill(store, "one")

    async def scenario() -> None:
        async with TestServer(Sender(store).app()) as server, Client(str(server.make_url("/"))) as client:
            waiting = asyncio.create_task(client.get_kv("one/0", 0))
            for _ in range(20):
                await client.manifest("one")
            assert not waiting.done()
            store.gate.set()
            assert await waiting == content("0/0")

    asyncio.run(scenario())


def test_a_store_that_does_not_answer_is_not_a_missing_context(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(url)
    fill(store, "one")

    def fail(*_: object) -> None:
        raise remote.RemoteError("gone")

    async def scenario() -> None:
        async with TestServer(Sender(store).app()) as server, Client(str(server.make_url("/"))) as client:
            await client.manifest("one")
            monkeypatch.setattr(remote.Remote, "range", fail)
            with pytest.raises(SpecError, match="the store of this sender does not answer"):
                await client.get_kv("one/0", 0)

    asyncio.run(scenario())


# --- opening


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("nonsense://x/y", "nonsense"),
        ("s3://", "give a bucket"),
        ("s3://no-such-bucket-here/x", "there is no bucket 'no-such-bucket-here'"),
    ],
)
def test_urls_that_cannot_be_meant(s3: str, where: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        open_store(where)


def test_paths_and_file_urls_are_folders(tmp_path: Path) -> None:
    for where in (tmp_path / "a b", str(tmp_path / "a b"), f"file://{tmp_path}/a%20b"):
        store = open_store(where)
        assert isinstance(store, Store)
        assert store.path == tmp_path / "a b"


def test_without_credentials(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import s3fs

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(MachineError, match=r"no credentials .*set AWS_ACCESS_KEY_ID"):
        open_store(s3)
    s3fs.S3FileSystem.clear_instance_cache()


def test_an_address_where_nothing_listens(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(MachineError, match=r"cannot be reached .*check AWS_ENDPOINT_URL"):
        open_store(s3)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_password_in_a_url_is_not_shown() -> None:
    import fsspec

    store = bucket.Bucket("sftp://me:secret@host/x", fsspec.filesystem("memory"), f"/{secrets.token_hex(6)}")
    assert store.path == "sftp://host/x"


def test_processes_see_each_other(s3: str) -> None:
    store = open_store(s3)
    script = (
        "import sys; from kvstream.testbed.store.opening import open_store; print(*open_store(sys.argv[1]).contexts())"
    )
    for context in ("one", "two"):
        fill(store, context)
        done = subprocess.run(
            [sys.executable, "-c", script, s3], capture_output=True, text=True, check=True, env=os.environ
        )
        assert done.stdout.split()[-1] == context


def test_only_what_is_abandoned_is_swept(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what cannot be read: a later version may have put it."""
    store = open_store(url)
    for context in ("whole", "later"):
        fill(store, context)
    assert isinstance(store, bucket.Bucket)
    store._remote.put("contexts/later.json", b'{"format": 2}')
    store._remote.put("puts/later.0123456789abcdef/0.0", b"of a writer")
    store._remote.put("puts/gone.0123456789abcdef/0.0", b"of a dead writer")
    store._remote.put("used/gone.7", b"")
    kept = [name for name in names(store) if not name.startswith("gone")]
    monkeypatch.setattr(bucket, "ABANDONED_S", -1.0)
    again = open_store(url)
    assert names(again) == kept
    assert [name.partition(".")[0] for name in names(again, "used")] == ["later", "whole"]
    assert again.fault("whole") is None
