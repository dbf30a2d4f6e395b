"""Writing a context: apart from those that are served, then into its place as a whole.

A draft is a folder `contexts/.{id}.{random}` that its writer holds locked. A writer that dies lets go of the lock, and
the next one who opens the store for writing removes what is left. So two writers of one context never mix, and a
context that is stored again is served until its successor is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvstream.policies.api import LevelOrText
from kvstream.testbed.files import write_whole
from kvstream.testbed.store import layout
from kvstream.testbed.store.api import ContextStore, Draft
from kvstream.testbed.store.manifest import Manifest

LOCK = ".lock"


class FolderDraft(Draft):
    """A draft in a folder of its own, beside the contexts."""

    def __init__(self, store: ContextStore, contexts: Path, context: str) -> None:
        super().__init__(store, context)
        self._contexts = contexts
        self.folder = contexts / f".{context[:64]}.{secrets.token_hex(8)}"
        with _turn(contexts):
            self.folder.mkdir()
            self._lock = os.open(self.folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def chunk_path(self, chunk: int, level: LevelOrText) -> Path:
        return layout.chunk_path(self.folder, chunk, level)

    def new_part(self) -> Path:
        return self.folder / f".{secrets.token_hex(8)}"

    def take(self, part: Path, chunk: int, level: LevelOrText, digest: str) -> None:
        path = self.chunk_path(chunk, level)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, path)
        self.hashes[f"{chunk}/{level}"] = digest

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _write(self, chunk: int, level: LevelOrText, data: bytes) -> None:
        write_whole(self.chunk_path(chunk, level), data)

    def _write_evaluation(self, name: str, data: bytes) -> None:
        write_whole(self.folder / layout.EVALUATION / name, data)

    def _publish(self, manifest: Manifest) -> None:
        layout.check_chunks(self.folder, manifest, self.hashes)
        write_whole(self.folder / "hashes.json", json.dumps(self.hashes).encode())
        write_whole(self.folder / "manifest.json", json.dumps(manifest.to_json(), allow_nan=False).encode())
        place, old = self._contexts / self.context, self._contexts / f".{secrets.token_hex(8)}"
        with _turn(self._contexts):
            (self.folder / LOCK).unlink()
            if place.exists():
                os.replace(place, old)
            os.replace(self.folder, place)
        shutil.rmtree(old, ignore_errors=True)


def remove(contexts: Path, context: str) -> None:
    """Remove a context, if it is there: not seen any more at once, then file by file."""
    old = contexts / f".{secrets.token_hex(8)}"
    with _turn(contexts), suppress(FileNotFoundError):
        os.replace(contexts / context, old)
    shutil.rmtree(old, ignore_errors=True)


def sweep(contexts: Path) -> None:
    """Remove what dead writers have left."""
    with _turn(contexts):
        for folder in contexts.glob(".*"):
            if folder.is_dir() and not _is_held(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_held(folder: Path) -> bool:
    """Whether a living process writes this draft."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


@contextmanager
def _turn(contexts: Path) -> Iterator[None]:
    """One writer at a time exchanges contexts."""
    lock = os.open(contexts / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
