"""What is stored comes back, in Python and over HTTP; names from outside never reach a path."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from codec import registry
from testbed.client import Client
from testbed.errors import SpecError
from testbed.llm import Model, mean_kl
from testbed.manifest import Manifest
from testbed.sender import Sender
from testbed.store import Store, checked_id, encodings, split_chunk_id, store_kv, text_bytes, token_ids, write_whole
from tests.testbed.conftest import CHUNK_TOKENS, TOKENS, Stored

HOSTILE = ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "-rf", "a" * 129, "a\0", "ü", "a\n", "%2e%2e"]


def test_a_stored_context_decodes_to_the_exact_cache(stored: Stored) -> None:
    manifest = stored.store.manifest(stored.context)
    codec = registry.from_config(manifest.codec)
    parts = [codec.decode(stored.store.get_kv(f"{stored.context}/{i}", 0)) for i in range(-(-TOKENS // CHUNK_TOKENS))]
    assert torch.equal(torch.cat(parts, dim=2), stored.exact)
    texts = [
        token_ids(stored.store.get_kv(f"{stored.context}/{i}", "text"), chunk.tokens)
        for i, chunk in enumerate(manifest.chunks)
    ]
    assert [token for text in texts for token in text] == stored.tokens


def test_the_manifest_says_what_the_files_are(stored_uniform: Stored) -> None:
    store, context = stored_uniform.store, stored_uniform.context
    manifest = store.manifest(context)
    assert Manifest.from_json(json.loads(store.manifest_path(context).read_text())) == manifest
    assert store.contexts() == [context]
    assert manifest.tokens == TOKENS
    assert [level.distortion for level in manifest.levels] == [0.02, 0.01, 0.0]
    assert [round(level.bits_per_element) for level in manifest.levels] == [4, 5, 9]
    hashes = store.hashes(context)
    for key, size in encodings(manifest):
        data = (store.path / "contexts" / context / "chunks" / f"{key}.bin").read_bytes()
        assert len(data) == size
        assert hashlib.sha256(data).hexdigest() == hashes[key]


def test_reference_and_questions_stand_beside_the_context(stored: Stored) -> None:
    assert stored.store.questions(stored.context) == stored.questions
    reference = stored.store.reference(stored.context)
    assert reference.shape == (sum(len(q.answer_ids) for q in stored.questions), 256)
    assert mean_kl(reference, reference) == 0.0


def test_store_kv_refuses_what_cannot_be_meant(tmp_path: Path, tiny_model: Model, stored: Stored) -> None:
    store, raw = Store(tmp_path), registry.make("raw")
    for ids, tokens, distortions, kv, message in (
        ("x", stored.tokens, [0.0, 0.0], None, "distortions"),
        ("x", [], [0.0], None, "at least one token"),
        ("../x", [1, 2], [0.0], None, "not a context id"),
        ("x", [1, 2], [0.0], stored.exact, "cache has"),
    ):
        with pytest.raises(SpecError, match=message):
            store_kv(store, ids, tokens, tiny_model, raw, chunk_tokens=64, distortions=distortions, kv=kv)
    assert store.contexts() == []


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_ids_are_refused(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path)
    with pytest.raises(SpecError):
        checked_id(name)
    with pytest.raises(SpecError):
        store.manifest(name)
    with pytest.raises(SpecError):
        store.get_kv(f"{name}/0", 0)
    with pytest.raises(SpecError):
        store.profile(name)
    with pytest.raises(SpecError):
        split_chunk_id(f"ok/{name}")


def test_unknown_things_are_named(stored: Stored, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no context 'nope'"):
        stored.store.manifest("nope")
    with pytest.raises(SpecError, match="no chunk 'ctx/99'"):
        stored.store.get_kv("ctx/99", 0)
    with pytest.raises(SpecError, match="cannot be"):
        stored.store.get_kv("ctx/0", -1)
    with pytest.raises(SpecError, match="no profile"):
        stored.store.profile("0" * 64)
    with pytest.raises(SpecError, match="not a store"):
        Store(tmp_path / "none", create=False)


def test_a_context_is_announced_only_when_complete(stored: Stored, tmp_path: Path) -> None:
    manifest = stored.store.manifest(stored.context)
    hashes = stored.store.hashes(stored.context)
    other = Store(tmp_path)
    with pytest.raises(SpecError, match="missing"):
        other.announce(manifest, hashes)
    for key, _ in encodings(manifest):
        chunk, level = key.split("/")
        data = stored.store.get_kv(f"ctx/{chunk}", "text" if level == "text" else int(level))
        other.put_chunk("ctx", int(chunk), "text" if level == "text" else int(level), data)
    other.put_chunk("ctx", 0, 0, b"short")
    with pytest.raises(SpecError, match="0/0 is missing or not of"):
        other.announce(manifest, hashes)
    assert other.contexts() == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "a", b"old")

    def full(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "a", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


@given(vocabulary=st.sampled_from([256, 257, 65_536, 65_537, 128_256]), data=st.data())
@settings(max_examples=60)
def test_token_ids_take_the_fewest_bytes(vocabulary: int, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=50))
    packed = text_bytes(ids, vocabulary)
    assert len(packed) == len(ids) * (1 if vocabulary <= 256 else 2 if vocabulary <= 65_536 else 4)
    assert token_ids(memoryview(packed), len(ids)) == ids


def test_text_of_another_length_is_refused() -> None:
    for size in (7, 9, 24, 0):
        with pytest.raises(SpecError, match="not the ids of"):
            token_ids(bytes(size), 8)


def test_round_trip_over_http(stored_uniform: Stored, tmp_path: Path) -> None:
    other, source = Store(tmp_path), stored_uniform.store

    async def scenario() -> dict[int, str]:
        app = Sender(other, writable=True).app()
        async with TestServer(app) as server, Client(str(server.make_url("/"))) as client:
            assert await client.contexts() == []
            ids = await client.store_kv(source, stored_uniform.context)
            assert await client.contexts() == [stored_uniform.context]
            assert await client.manifest(stored_uniform.context) == source.manifest(stored_uniform.context)
            for identifier in ids.values():
                for level in (0, 1, 2, "text"):
                    assert await client.get_kv(identifier, level) == source.get_kv(identifier, level)
            with pytest.raises(SpecError, match="is here already"):
                await client.store_kv(source, stored_uniform.context)
            return ids

    ids = asyncio.run(scenario())
    assert ids == {i: f"{stored_uniform.context}/{i}" for i in range(5)}
    assert other.hashes(stored_uniform.context) == stored_uniform.store.hashes(stored_uniform.context)
    # what only the evaluation reads does not travel
    assert not (tmp_path / "contexts" / stored_uniform.context / "evaluation").exists()


def test_a_profile_travels_with_its_context(stored: Stored, tmp_path: Path) -> None:
    profile = b"any bytes: the store only knows their hash"

    async def scenario() -> None:
        source = Store(tmp_path / "a")
        digest = source.put_profile(profile)
        async with (
            TestServer(Sender(Store(tmp_path / "b"), writable=True).app()) as server,
            Client(str(server.make_url("/"))) as client,
        ):
            await client._put(f"/v1/profiles/{digest}", profile)
            assert await client.profile(digest) == profile
            with pytest.raises(SpecError, match="do not have the hash"):
                await client._put(f"/v1/profiles/{'0' * 64}", profile)

    asyncio.run(scenario())
