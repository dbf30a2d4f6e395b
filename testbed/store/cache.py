"""A cache of what a sender serves: manifests and chunks of a store in memory, with their hashes.

It lives on one event loop; everything that may block happens on threads, but for a look at a local store. A chunk is
read once, however many ask for it at a time. Whether a context was stored again is looked up when its manifest is asked
for, never for a chunk: those that a session gets belong to the manifest that it got.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from kvstream.policies.api import TEXT
from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.api import ContextStore, Entry
from kvstream.testbed.store.layout import encodings, level_of
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.store.quota import TOUCH_S

log = logging.getLogger("kvstream.sender")

CAPACITY_BYTES = 1 << 30
"""Chunks are held in memory so that the disk never limits the rate."""
MAX_CONTEXTS = 4096
"""Manifests are held too; the one asked for longest ago goes."""
FRESH_S = 2.0
"""For so long a look at a remote store holds: a session asks for its manifest right after its stream was opened."""


@dataclass(frozen=True, slots=True)
class Content:
    """Bytes to serve and their SHA-256 in hexadecimal."""

    data: bytes
    sha256: str


@dataclass(slots=True)
class Cached:
    """A context as it was found; what is served of it belongs together."""

    entry: Entry
    content: Content
    """The manifest."""
    stamp: str
    looked_s: float
    touched_s: float = float("-inf")

    @property
    def manifest(self) -> Manifest:
        return self.entry.manifest


class ContentCache:
    """Manifests and chunks of a store in memory; evicts the least recently used chunk first."""

    def __init__(self, store: ContextStore) -> None:
        self.store = store
        self._contexts: OrderedDict[str, Cached] = OrderedDict()
        self._chunks: OrderedDict[str, Content] = OrderedDict()
        """By their hash."""
        self._bytes = 0
        self._reading: dict[str, asyncio.Task[Content]] = {}
        self._opening = asyncio.Lock()
        """One manifest at a time: a parsed one takes far more memory than its text."""
        self._left_out: dict[str, str] = {}
        self._background: set[asyncio.Task[None]] = set()

    async def contexts(self) -> list[str]:
        """Ids of the contexts that can be served. A damaged one is left out, and named in the log once; in a remote
        store that is found when it is asked for."""
        stamps = await asyncio.to_thread(self.store.stamps)
        if not self.store.is_remote:
            for context, stamp in stamps.items():
                try:
                    await self._look(context, stamp)
                except (SpecError, OSError) as error:
                    self._leave_out(context, stamp, error)
        return sorted(context for context, stamp in stamps.items() if self._left_out.get(context) != stamp)

    async def preload(self) -> None:
        """Read all chunks that fit, so that the first session is as fast as later ones."""
        for context in await self.contexts():
            cached = self._contexts.get(context)
            if cached is None:
                continue
            try:
                for key, size in encodings(cached.manifest):
                    if self._bytes + size > CAPACITY_BYTES:
                        return
                    await self.chunk(cached, key)
            except (SpecError, OSError) as error:
                self._leave_out(context, cached.stamp, error)

    def _leave_out(self, context: str, stamp: str, error: Exception) -> None:
        """Not served until it is stored again."""
        if self._left_out.get(context) != stamp:
            log.warning("not served: %s", error)
        self._left_out[context] = stamp

    def known(self, context: str) -> Manifest | None:
        """A context's manifest, if it is here."""
        cached = self._contexts.get(context)
        return None if cached is None else cached.manifest

    async def context(self, context: str, *, look: bool = True) -> Cached:
        """A context, read again when it was stored again; without `look`, as it is here. Raises SpecError for an
        unknown one."""
        cached = self._contexts.get(context)
        if cached is not None and (not look or self._is_fresh(cached)):
            return cached
        try:
            # at a local store, looking takes less than handing over to a thread
            stamp = (
                await asyncio.to_thread(self.store.stamp, context)
                if self.store.is_remote
                else self.store.stamp(context)
            )
        except SpecError:
            self._contexts.pop(context, None)
            raise
        cached = await self._look(context, stamp)
        self._note_use(context, cached)
        return cached

    def _is_fresh(self, cached: Cached) -> bool:
        return self.store.is_remote and time.monotonic() - cached.looked_s < FRESH_S

    async def _look(self, context: str, stamp: str) -> Cached:
        """The context with this stamp."""
        async with self._opening:
            cached = self._contexts.get(context)
            if cached is None or cached.stamp != stamp:
                entry, content = await asyncio.to_thread(_opened, self.store, context)
                cached = self._contexts[context] = Cached(entry, content, stamp, 0.0)
            cached.looked_s = time.monotonic()
            self._contexts.move_to_end(context)
            while len(self._contexts) > MAX_CONTEXTS:
                self._contexts.popitem(last=False)
            return cached

    async def chunk(self, cached: Cached, key: str) -> Content:
        """The encoding `{chunk}/{level}`. Raises SpecError if it does not exist."""
        chunk, _, level = key.partition("/")
        size = size_of(cached.manifest, int(chunk), level)
        digest = cached.entry.hashes[key]
        content = self._chunks.get(digest)
        if content is not None:
            self._chunks.move_to_end(digest)
            return content
        task = self._reading.get(digest)
        if task is None:
            task = self._reading[digest] = asyncio.create_task(self._read(cached.entry, key, size))
        return await asyncio.shield(task)  # one that gives up must not take it from the others

    async def _read(self, entry: Entry, key: str, size: int) -> Content:
        try:
            content = await asyncio.to_thread(_checked, self.store, entry, key, size)
        finally:
            del self._reading[entry.hashes[key]]
        self._chunks[content.sha256] = content
        self._bytes += size
        while self._bytes > CAPACITY_BYTES and len(self._chunks) > 1:
            _, old = self._chunks.popitem(last=False)
            self._bytes -= len(old.data)
        return content

    async def tokens(self, cached: Cached) -> Content:
        """The texts of all chunks in a row: the token ids of a context. Raises SpecError for damaged ones."""
        return await asyncio.to_thread(_tokens, self.store, cached.entry)

    def _note_use(self, context: str, cached: Cached) -> None:
        """Beside what is served: nobody waits for it."""
        if time.monotonic() - cached.touched_s > TOUCH_S:
            cached.touched_s = time.monotonic()
            self._in_background(self._touch(context))

    async def _touch(self, context: str) -> None:
        try:
            await asyncio.to_thread(self.store.touch, context)
        except (SpecError, OSError) as error:
            log.info("the use of %s is not noted: %s", context, error)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """Wait for what was begun."""
        await asyncio.gather(*self._background, *self._reading.values(), return_exceptions=True)


def size_of(manifest: Manifest, chunk: int, level: str) -> int:
    """Bytes of one encoding. Raises SpecError if it does not exist."""
    if not 0 <= chunk < len(manifest.chunks):
        raise SpecError(f"context {manifest.context} has chunks 0 to {len(manifest.chunks) - 1}, not {chunk}")
    wanted = level_of(level)
    if isinstance(wanted, str):
        return manifest.chunks[chunk].text_bytes
    if wanted >= len(manifest.levels):
        raise SpecError(f"context {manifest.context} has levels 0 to {len(manifest.levels) - 1}, not {wanted}")
    return manifest.chunks[chunk].sizes_bytes[wanted]


def _opened(store: ContextStore, context: str) -> tuple[Entry, Content]:
    entry = store.entry(context)
    if lacking := next((key for key, _ in encodings(entry.manifest) if key not in entry.hashes), None):
        raise SpecError(f"context {context}: hashes.json lacks chunk {lacking}; store the context again")
    data = entry.manifest.wire
    return entry, Content(data, hashlib.sha256(data).hexdigest())


def _checked(store: ContextStore, entry: Entry, key: str, size: int) -> Content:
    """Read one encoding and compare it with its hash."""
    chunk, _, level = key.partition("/")
    return _compare(store, entry, key, size, store.read(entry, int(chunk), level_of(level)))


def _tokens(store: ContextStore, entry: Entry) -> Content:
    data = b"".join(
        _compare(store, entry, f"{index}/{TEXT}", chunk.text_bytes, text).data
        for index, (chunk, text) in enumerate(zip(entry.manifest.chunks, store.texts(entry), strict=True))
    )
    return Content(data, hashlib.sha256(data).hexdigest())


def _compare(store: ContextStore, entry: Entry, key: str, size: int, data: bytes) -> Content:
    """Raises SpecError for bytes that are not those of an encoding."""
    what = f"chunk {key} of context {entry.manifest.context} is damaged"
    where = "in the object store" if store.is_remote else "on disk"
    if len(data) != size:
        raise SpecError(f"{what} {where}: {len(data)} bytes, not {size}")
    if hashlib.sha256(data).hexdigest() != entry.hashes[key]:
        raise SpecError(f"{what} {where} (hash); store the context again")
    return Content(data, entry.hashes[key])
