"""Contexts on disk: the files that a sender serves, and those that only the evaluation reads.

    contexts/{id}/manifest.json             served; exists once the context is complete
    contexts/{id}/hashes.json               SHA-256 of every encoded chunk: the ETags
    contexts/{id}/chunks/{chunk}/{level}.bin, text.bin
    contexts/{id}/evaluation/questions.json, reference.safetensors      never served
    contexts/.{id}.{random}/                being written (`kvstream.testbed.store.draft`)
    profiles/{sha256}

Files and contexts are written whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from kvstream.policies.api import LevelOrText
from kvstream.testbed.errors import SpecError
from kvstream.testbed.files import parse_json, write_whole
from kvstream.testbed.store import layout, quota
from kvstream.testbed.store.api import ContextStore, Entry, chunk_id, split_chunk_id
from kvstream.testbed.store.draft import FolderDraft, remove, sweep
from kvstream.testbed.store.layout import checked_id, checked_sha256
from kvstream.testbed.store.manifest import MAX_MANIFEST_BYTES, Manifest

__all__ = ["Store", "chunk_id", "get_kv", "split_chunk_id", "text_bytes", "token_ids"]

MAX_JSON_BYTES = 64 << 20
"""Of a file that goes with a context: the hashes of as many encodings as a manifest may have take 25 MB."""
_TOKEN_TYPES = {1: "B", 2: "H", 4: "I"}


def text_bytes(token_ids: Sequence[int], vocabulary: int) -> bytes:
    """Token ids little-endian, 1, 2 or 4 bytes each: the fewest that hold the vocabulary."""
    width = 1 if vocabulary <= 1 << 8 else 2 if vocabulary <= 1 << 16 else 4
    ids = array(_TOKEN_TYPES[width], token_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def token_ids(data: bytes | memoryview, tokens: int) -> list[int]:
    """Inverse of `text_bytes` for a chunk of `tokens` tokens. Raises SpecError."""
    width, rest = divmod(len(data), tokens)
    if rest or width not in _TOKEN_TYPES:
        raise SpecError(f"{len(data)} bytes are not the ids of {tokens} tokens; fetch the chunk again")
    ids = array(_TOKEN_TYPES[width], bytes(data))
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()


class Store(ContextStore):
    """A folder of contexts and profiles. `create=False` refuses a folder that does not exist."""

    is_remote: ClassVar[bool] = False
    path: Path

    def __init__(self, path: str | Path, *, create: bool = True, quota_bytes: int | None = None) -> None:
        self.path = Path(path)
        self.quota_bytes = quota_bytes
        if create:
            (self.path / "contexts").mkdir(parents=True, exist_ok=True)
            (self.path / "profiles").mkdir(exist_ok=True)
            sweep(self.path / "contexts")
        elif not (self.path / "contexts").is_dir():
            raise SpecError(f"{self.path} is not a store: it has no folder 'contexts'")

    # --- read

    def stamps(self) -> dict[str, str]:
        stamps = {}
        for path in (self.path / "contexts").glob("*/manifest.json"):
            with suppress(FileNotFoundError):  # removed since
                if layout.ID.fullmatch(path.parent.name):
                    stamps[path.parent.name] = _stamp(path)
        return stamps

    def stamp(self, context: str) -> str:
        return _stamp(self.manifest_path(context))

    def entry(self, context: str) -> Entry:
        return Entry(self.manifest(context), self.hashes(context), str(self._folder(context)))

    def manifest(self, context: str) -> Manifest:
        path = self.manifest_path(context)
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise SpecError(
                f"context {context}: its manifest is larger than {MAX_MANIFEST_BYTES} bytes; store it again"
            )
        try:
            manifest = Manifest.from_bytes(path.read_bytes())
        except SpecError as error:
            raise SpecError(f"context {context}: {error}") from error
        if manifest.context != context:
            raise SpecError(f"context {context}: its manifest is for {manifest.context!r}; store the context again")
        return manifest

    def manifest_path(self, context: str) -> Path:
        path = self._folder(context) / "manifest.json"
        if not path.is_file():
            raise SpecError(f"no context {context!r} in this store")
        return path

    def chunk_path(self, context: str, chunk: int, level: LevelOrText) -> Path:
        """File of one encoding; it need not exist. Raises SpecError."""
        return layout.chunk_path(self._folder(context), chunk, level)

    def get_kv(self, identifier: str, level: LevelOrText) -> bytes:
        return self._read(*split_chunk_id(identifier), level)

    def read(self, entry: Entry, chunk: int, level: LevelOrText) -> bytes:
        return self._read(entry.manifest.context, chunk, level)

    def _read(self, context: str, chunk: int, level: LevelOrText) -> bytes:
        try:
            return self.chunk_path(context, chunk, level).read_bytes()
        except FileNotFoundError:
            raise SpecError(f"no chunk {chunk_id(context, chunk)!r} at level {level!r} in this store") from None

    def hashes(self, context: str) -> dict[str, str]:
        data = _read_json(self._folder(context) / "hashes.json", f"hashes of context {context}")
        if not isinstance(data, dict) or not all(isinstance(digest, str) for digest in data.values()):
            raise SpecError(f"context {context}: hashes.json is damaged; store the context again")
        return data

    def profile(self, digest: str) -> bytes:
        try:
            return (self.path / "profiles" / checked_sha256(digest)).read_bytes()
        except FileNotFoundError:
            raise SpecError(f"no profile {digest} in this store") from None

    def read_evaluation(self, context: str, name: str) -> bytes:
        path = self._folder(context) / layout.EVALUATION / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise SpecError(f"the evaluation of {context} is damaged: {name} is not in this store") from None

    def check(self, entry: Entry) -> None:
        layout.check_chunks(self._folder(entry.manifest.context), entry.manifest, entry.hashes)

    # --- write

    def put_profile(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        write_whole(self.path / "profiles" / digest, data)
        return digest

    def draft(self, context: str) -> FolderDraft:
        return FolderDraft(self, self.path / "contexts", context)

    def remove(self, context: str) -> None:
        remove(self.path / "contexts", checked_id(context))

    def touch(self, context: str) -> None:
        # the folder's own time: nothing else changes it once the context is published, and no file is needed
        with suppress(OSError):
            os.utime(self._folder(context))

    def uses(self) -> dict[str, quota.Use]:
        uses = {}
        for context in self.stamps():
            with suppress(SpecError, FileNotFoundError):
                size = quota.size_bytes(self.manifest(context))
                uses[context] = quota.Use(size, self._folder(context).stat().st_mtime)
        return uses

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.path).free

    def _folder(self, context: str) -> Path:
        return self.path / "contexts" / checked_id(context)


def get_kv(store: ContextStore, identifier: str, level: LevelOrText) -> bytes:
    """One chunk's bytes at a level, or its token ids for 'text' (the paper's API). Over HTTP: `Client.get_kv`."""
    return store.get_kv(identifier, level)


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_mtime_ns}-{status.st_ino}"


def _read_json(path: Path, what: str) -> Any:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise SpecError(f"larger than {MAX_JSON_BYTES} bytes")
        return parse_json(path.read_bytes(), "damaged")
    except FileNotFoundError:
        raise SpecError(f"{what}: {path.name} is not in this store") from None
    except (OSError, SpecError) as error:
        raise SpecError(f"{what}: {path.name}: {str(error)[:120]}; store the context again") from error
