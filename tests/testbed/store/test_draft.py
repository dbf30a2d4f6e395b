"""Contexts that are being written: whole or not seen, whoever dies or writes beside."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.layout import encodings, level_of
from kvstream.testbed.store.store import Store
from tests.testbed.conftest import Stored


def fill(store: Store, source: Stored) -> None:
    """Write a context as its own writer would."""
    manifest = source.store.manifest(source.context)
    with store.draft(source.context) as draft:
        for key, _ in encodings(manifest):
            chunk, level = key.split("/")
            draft.put_chunk(
                int(chunk), level_of(level), source.store.get_kv(f"{source.context}/{chunk}", level_of(level))
            )
        draft.publish(manifest)


def test_a_writer_that_is_killed_leaves_nothing_that_is_seen(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from kvstream.testbed.store.store import Store;"
        "draft = Store(sys.argv[1]).draft('ctx'); draft.put_chunk(0, 0, b'x' * 1000);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert Store(tmp_path, create=False).contexts() == []
    assert len(list((tmp_path / "contexts").glob(".ctx.*"))) == 1
    Store(tmp_path)
    assert list((tmp_path / "contexts").glob(".ctx.*")) == []


def test_a_living_writer_is_left_alone(tmp_path: Path, stored: Stored) -> None:
    store = Store(tmp_path)
    with store.draft("ctx") as draft:
        draft.put_chunk(0, 0, b"x")
        Store(tmp_path)
        assert draft.chunk_path(0, 0).read_bytes() == b"x"
    assert [path.name for path in (tmp_path / "contexts").iterdir()] == [".lock"]


def test_writers_of_one_context_end_with_one_whole_context(tmp_path: Path, stored: Stored) -> None:
    store = Store(tmp_path)
    with ThreadPoolExecutor(4) as writers:
        for done in [writers.submit(fill, store, stored) for _ in range(12)]:
            done.result()
    assert store.contexts() == [stored.context]
    assert store.fault(stored.context) is None
    for key, digest in store.hashes(stored.context).items():
        chunk, level = key.split("/")
        data = store.get_kv(f"{stored.context}/{chunk}", level_of(level))
        assert hashlib.sha256(data).hexdigest() == digest
    assert sorted(path.name for path in (tmp_path / "contexts").iterdir()) == [".lock", stored.context]


def test_a_context_is_served_until_its_successor_is_whole(tmp_path: Path, stored: Stored) -> None:
    store = Store(tmp_path)
    fill(store, stored)
    manifest = store.manifest(stored.context)
    with store.draft(stored.context) as draft:
        draft.put_chunk(0, 0, b"half")
        with pytest.raises(SpecError, match="missing"):
            draft.publish(manifest)
    assert store.fault(stored.context) is None


@pytest.mark.parametrize("broken", ["chunks/1/0.bin", "hashes.json", "manifest.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[" * 5000, b'{"a": ' * 2000, b"[1, 2]", None])
def test_a_damaged_context_has_a_fault_in_one_line(
    tmp_path: Path, stored: Stored, broken: str, content: bytes | None
) -> None:
    store = Store(tmp_path)
    fill(store, stored)
    path = tmp_path / "contexts" / stored.context / broken
    path.unlink() if content is None else path.write_bytes(content)
    fault = store.fault(stored.context)
    assert fault is not None
    assert "\n" not in fault
    assert len(fault) < 300


def test_the_evaluation_is_part_of_the_whole(tmp_path: Path, stored: Stored) -> None:
    assert stored.store.fault(stored.context, evaluation=True) is None
    store = Store(tmp_path)
    fill(store, stored)
    assert store.fault(stored.context) is None
    assert "questions" in str(store.fault(stored.context, evaluation=True))
    folder = tmp_path / "contexts" / stored.context / "evaluation"
    folder.mkdir()
    (folder / "questions.json").write_text(json.dumps({"questions": [], "passage_ids": [], "exact_right": 0}))
    assert "damaged" in str(store.fault(stored.context, evaluation=True))
    (folder / "reference.safetensors").write_bytes(os.urandom(100))
    assert "damaged" in str(store.fault(stored.context, evaluation=True))


def test_stray_folders_are_no_contexts(tmp_path: Path, stored: Stored) -> None:
    store = Store(tmp_path)
    fill(store, stored)
    for name in ("-x", "with blank", ".hidden"):
        stray = tmp_path / "contexts" / name
        stray.mkdir()
        (stray / "manifest.json").write_text("{}")
    assert store.contexts() == [stored.context]
