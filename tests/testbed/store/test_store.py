"""What is stored comes back, in Python and over HTTP; names from outside never reach a path."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstream.codec import registry
from kvstream.codec.errors import CodecError
from kvstream.codec.profile import Profile
from kvstream.codec.raw import Raw
from kvstream.testbed.encoding.encode import store_kv
from kvstream.testbed.engine.model import Model, mean_kl
from kvstream.testbed.errors import SpecError
from kvstream.testbed.files import write_whole
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.sender import Sender
from kvstream.testbed.store import shift
from kvstream.testbed.store.layout import checked_id, encodings, level_of
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.store.shift import ShiftInfo
from kvstream.testbed.store.store import Store, split_chunk_id, text_bytes, token_ids
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
    with pytest.raises(SpecError, match="invalid chunk"):
        stored.store.get_kv("ctx/0", -1)
    with pytest.raises(SpecError, match="no profile"):
        stored.store.profile("0" * 64)
    with pytest.raises(SpecError, match="not a store"):
        Store(tmp_path / "none", create=False)


def test_a_context_is_announced_only_when_complete(stored: Stored, tmp_path: Path) -> None:
    manifest = stored.store.manifest(stored.context)
    hashes = stored.store.hashes(stored.context)
    other = Store(tmp_path)
    with other.draft("ctx") as draft:
        with pytest.raises(SpecError, match="missing"):
            draft.publish(manifest)
        for key, _ in encodings(manifest):
            chunk, level = key.split("/")
            data = stored.store.get_kv(f"ctx/{chunk}", level_of(level))
            assert draft.put_chunk(int(chunk), level_of(level), data) == hashes[key]
        draft.put_chunk(0, 0, b"short")
        with pytest.raises(SpecError, match="0/0 is missing or not of"):
            draft.publish(manifest)
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
            with pytest.raises(SpecError, match="already exists"):
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
            with pytest.raises(SpecError, match="does not have the hash"):
                await client._put(f"/v1/profiles/{'0' * 64}", profile)

    asyncio.run(scenario())


SHIFT = {"times_bits": 1.5, "escapes": 210.0, "expected_escapes": 30.0}


def test_how_far_a_context_lies_from_the_calibration_travels_with_it(stored: Stored) -> None:
    plain = stored.store.manifest(stored.context)
    assert plain.shift is None
    told = replace(plain, shift=ShiftInfo(**SHIFT), measured_on="check-prose")
    assert Manifest.from_json(json.loads(told.wire)) == told
    older = {key: value for key, value in plain.to_json().items() if key not in ("shift", "measured_on")}
    assert Manifest.from_json(older) == plain


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("shift", value) for value in (1.5, [1.5], {}, {"times_bits": 1.5})),
        *(
            ("shift", SHIFT | {name: value})
            for name in SHIFT
            for value in (-1, float("nan"), float("inf"), 1e7, 10**400, True, "1", None, [1])
        ),
        *(("measured_on", value) for value in (3, "", "a b", "x\n", "\x1b[2J", "x" * 65, ["check"], "é")),
    ],
)
def test_hostile_claims_about_shift_are_refused(stored: Stored, key: str, value: object) -> None:
    body = stored.store.manifest(stored.context).to_json() | {key: value}
    with pytest.raises(SpecError, match=f"manifest: {key}"):
        Manifest.from_json(body)


@pytest.mark.parametrize("value", [-1, float("nan"), 10**400, "0"])
def test_hostile_distortions_are_refused(stored: Stored, value: object) -> None:
    body = stored.store.manifest(stored.context).to_json()
    body["levels"][0]["distortion"] = value
    with pytest.raises(SpecError, match=r"level\.distortion"):
        Manifest.from_json(body)


def test_far_contexts_are_told_in_a_line_and_in_facts(stored: Stored) -> None:
    near = replace(stored.store.manifest(stored.context), measured_on="check")
    manifests = {
        ("near", "kvstream"): replace(near, shift=ShiftInfo(1.1, 30.0, 25.0)),
        ("wide", "kvstream"): replace(near, shift=ShiftInfo(1.5, 30.0, 25.0), measured_on="check-random"),
        ("wide", "uniform"): near,
        ("spiky", "kvstream"): replace(near, shift=ShiftInfo(1.1, 900.0, 25.0)),
    }
    wide, spiky = shift.lines(manifests)
    assert wide.startswith("wide is unlike the text for which kvstream was calibrated: 1.50 times the bits")
    assert wide.endswith("distortions are those of check-random")
    assert spiky.startswith("spiky")
    facts = shift.facts(manifests)
    assert facts["wide"]["uniform"] == {"shift": None, "measured_on": "check"}
    assert [facts[name]["kvstream"]["shift"]["is_far"] for name in ("near", "wide", "spiky")] == [False, True, True]


def test_a_codec_calibrated_for_another_model_is_refused(tmp_path: Path, tiny_model: Model, stored: Stored) -> None:
    class Foreign(Raw):
        needs_profile = True

    codec = Foreign(profile=Profile({}, {"codec": "raw", "model": "f" * 64, "model_name": "another"}))
    arguments = {"chunk_tokens": 64, "distortions": [0.0], "kv": stored.exact}
    with pytest.raises(CodecError, match="calibrated for model another"):
        store_kv(Store(tmp_path), "x", stored.tokens, tiny_model, codec, **arguments)  # type: ignore[arg-type]
    assert Store(tmp_path).contexts() == []
    store_kv(Store(tmp_path), "x", stored.tokens, tiny_model, codec, force=True, **arguments)  # type: ignore[arg-type]
    assert Store(tmp_path).contexts() == ["x"]
