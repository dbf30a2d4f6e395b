"""The store that real receivers fetch beginnings of prompts from."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from kvstream.codec import container
from kvstream.testbed.requests import prefixes
from kvstream.testbed.store import layout
from kvstream.testbed.workloads import synthetic

MODEL = synthetic.parse("mistral-7b,compute=a40")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "cache_dir", lambda: tmp_path)


def test_chunks_have_the_workloads_sizes_and_take_hardly_any_room() -> None:
    store, ids = prefixes.prepare(MODEL, ["kvstream"], 1536, 5)
    assert set(ids) == {("kvstream", blocks) for blocks in range(1, 6)}
    for (codec, blocks), key in ids.items():
        manifest, wanted = store.manifest(key), MODEL.manifest(str(512 * blocks), codec, 1536)
        assert (manifest.chunks, manifest.levels) == (wanted.chunks, wanted.levels)
        for index, chunk in enumerate(manifest.chunks):
            data = store.read(store.entry(key), index, 0)
            header = container.parse_header(data)
            assert len(data) == chunk.sizes_bytes[0]
            assert (header.level, header.start, header.tokens) == (0, chunk.start, chunk.tokens)
    files = list((store.path / "contexts").rglob("*.bin"))
    assert sum(512 * file.stat().st_blocks for file in files) < 1_000_000
    first = [layout.chunk_path(store.path / "contexts" / ids["kvstream", blocks], 0, 5) for blocks in (3, 4, 5)]
    assert len({file.stat().st_ino for file in first}) == 1, "a whole chunk is there once"


def test_what_is_there_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store, ids = prefixes.prepare(MODEL, ["kvstream"], 1536, 4)
    before = {key: store.stamp(key) for key in ids.values()}
    again, longer = prefixes.prepare(MODEL, ["kvstream"], 1536, 5)
    assert {key: again.stamp(key) for key in ids.values()} == before
    assert again.fault(longer["kvstream", 5]) is None
