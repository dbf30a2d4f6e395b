"""What a sender serves, in memory: manifests and chunks of a store, with their hashes."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from testbed.errors import SpecError
from testbed.manifest import Manifest
from testbed.store import Store, encodings, level_of

HOT_BYTES = 1 << 30
"""Chunks held in memory, so that the disk is not the link."""


@dataclass(frozen=True, slots=True)
class Content:
    data: bytes
    sha256: str


class Shelf:
    """Contexts of a store with their chunks in memory, least recently used out first."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._stamps: dict[str, tuple[int, int]] = {}
        self._manifests: dict[str, tuple[Manifest, Content]] = {}
        self._hashes: dict[str, dict[str, str]] = {}
        self._hot: OrderedDict[tuple[str, str], Content] = OrderedDict()
        self._bytes = 0

    def preload(self) -> None:
        """Read what fits, so that the first session is like the others."""
        for context in self.store.contexts():
            manifest, _ = self.manifest(context)
            for key, size in encodings(manifest):
                if self._bytes + size > HOT_BYTES:
                    return
                self.chunk(context, key)

    def manifest(self, context: str) -> tuple[Manifest, Content]:
        """Raises SpecError for an unknown context. A context that was stored again is read again."""
        status = self.store.manifest_path(context).stat()
        stamp = (status.st_mtime_ns, status.st_ino)
        if self._stamps.get(context) != stamp:
            manifest = self.store.manifest(context)
            data = manifest.wire
            for key in [key for key in self._hot if key[0] == context]:
                self._bytes -= len(self._hot.pop(key).data)
            self._hashes[context] = self.store.hashes(context)
            self._manifests[context] = (manifest, Content(data, hashlib.sha256(data).hexdigest()))
            self._stamps[context] = stamp
        return self._manifests[context]

    def chunk(self, context: str, key: str) -> Content:
        """The encoding `{chunk}/{level}`. Raises SpecError if there is none."""
        manifest, _ = self.manifest(context)
        content = self._hot.get((context, key))
        if content is not None:
            self._hot.move_to_end((context, key))
            return content
        chunk, _, level = key.partition("/")
        size = size_of(manifest, int(chunk), level)
        data = self.store.get_kv(f"{context}/{chunk}", level_of(level))
        if len(data) != size:
            raise SpecError(f"chunk {key} of context {context} is damaged on disk: {len(data)} bytes, not {size}")
        content = self._hot[(context, key)] = Content(data, self._hashes[context][key])
        self._bytes += size
        while self._bytes > HOT_BYTES and len(self._hot) > 1:
            _, old = self._hot.popitem(last=False)
            self._bytes -= len(old.data)
        return content


def size_of(manifest: Manifest, chunk: int, level: str) -> int:
    """Bytes of one encoding. Raises SpecError if the context has none such."""
    if not 0 <= chunk < len(manifest.chunks):
        raise SpecError(f"context {manifest.context} has chunks 0 to {len(manifest.chunks) - 1}, not {chunk}")
    wanted = level_of(level)
    if isinstance(wanted, str):
        return manifest.chunks[chunk].text_bytes
    if wanted >= len(manifest.levels):
        raise SpecError(f"context {manifest.context} has levels 0 to {len(manifest.levels) - 1}, not {wanted}")
    return manifest.chunks[chunk].sizes_bytes[wanted]
