"""Contexts that clients upload to a sender: written apart, announced when they are whole."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from kvstream.policies.api import LevelOrText
from kvstream.testbed.errors import SpecError
from kvstream.testbed.store import quota
from kvstream.testbed.store.api import ContextStore, Draft
from kvstream.testbed.store.cache import size_of
from kvstream.testbed.store.layout import encodings
from kvstream.testbed.store.manifest import Manifest

MAX_UPLOADS = 8
IDLE_S = 30.0
"""An upload that brought nothing for this long gives its place to another."""
WRITE_BYTES = 1 << 20
"""Written to disk at a time; more is never held in memory."""


class Refused(SpecError):
    """A request that cannot be met now, with the HTTP status that says so."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass
class Upload:
    """A context that is being uploaded."""

    manifest: Manifest
    draft: Draft
    encodings: int
    came: dict[str, str] = field(default_factory=dict)
    """SHA-256 of what came, by `{chunk}/{level}`, from before it is put into the store."""
    touched_s: float = field(default_factory=time.monotonic)

    @property
    def missing(self) -> int:
        return self.encodings - len(self.draft.hashes)

    @property
    def idle_s(self) -> float:
        return time.monotonic() - self.touched_s


class Uploads:
    """The uploads of one sender. Everything but the store runs on the event loop's thread."""

    def __init__(self, store: ContextStore) -> None:
        self._store = store
        self._uploads: dict[str, Upload] = {}
        self._beginning = asyncio.Lock()

    async def begin(self, manifest: Manifest) -> int:
        """Begin an upload, or go on with one of the same manifest: encodings that are missing.

        Raises Refused if the context exists, is being uploaded, or there is no room for it.
        """
        async with self._beginning:
            context = manifest.context
            for name in [name for name, upload in self._uploads.items() if upload.idle_s > IDLE_S]:
                await self._end(name)
            if await asyncio.to_thread(_exists, self._store, context):
                raise Refused(409, f"context {context!r} already exists")
            upload = self._uploads.get(context)
            if upload is not None and upload.manifest != manifest:
                raise Refused(409, f"another upload of {context!r} is in progress; try again in {IDLE_S:g} s")
            if upload is None:
                if len(self._uploads) >= MAX_UPLOADS:
                    raise Refused(
                        429, f"{MAX_UPLOADS} uploads are in progress; finish one, or try again in {IDLE_S:g} s"
                    )
                draft = await asyncio.to_thread(_draft, self._store, manifest)
                count = sum(1 for _ in encodings(manifest))
                upload = self._uploads[context] = Upload(manifest, draft, count)
            upload.touched_s = time.monotonic()
            return upload.missing

    async def put_chunk(
        self, context: str, chunk: int, level: LevelOrText, length: int | None, body: AsyncIterator[bytes]
    ) -> tuple[str, int]:
        """Take one encoding: its SHA-256, and how many are missing still. With the last one, the context is seen.

        Raises Refused if no such upload is in progress, or the chunk came before with other bytes; SpecError if it
        is not of the manifest's size.
        """
        upload = self._uploads.get(context)
        if upload is None:
            raise Refused(409, f"no upload of context {context!r} is in progress; PUT its manifest first")
        size = size_of(upload.manifest, chunk, str(level))
        if length != size:
            raise SpecError(f"chunk {chunk} at level {level} must have {size} bytes (manifest), got {length}")
        key = f"{chunk}/{level}"
        part = await asyncio.to_thread(upload.draft.new_part)
        try:
            digest = await _write(part, size, body, upload)
            if self._uploads.get(context) is not upload:
                raise Refused(409, f"the upload of context {context!r} has ended; begin it again")
            if upload.came.setdefault(key, digest) != digest:
                raise Refused(409, f"chunk {key} of context {context!r} was uploaded with other bytes before")
            if key not in upload.draft.hashes:
                try:
                    await asyncio.to_thread(upload.draft.take, part, chunk, level, digest)
                except BaseException:
                    del upload.came[key]
                    raise
                upload.touched_s = time.monotonic()
        finally:
            part.unlink(missing_ok=True)
        if not upload.missing and self._uploads.get(context) is upload:
            del self._uploads[context]
            try:
                await asyncio.to_thread(upload.draft.publish, upload.manifest)
            finally:
                await asyncio.to_thread(upload.draft.discard)
        return digest, upload.missing

    async def close(self) -> None:
        """Remove what is not whole."""
        for context in list(self._uploads):
            await self._end(context)

    async def _end(self, context: str) -> None:
        await asyncio.to_thread(self._uploads.pop(context).draft.discard)


def _exists(store: ContextStore, context: str) -> bool:
    try:
        store.stamp(context)
    except SpecError:
        return False
    return True


def _draft(store: ContextStore, manifest: Manifest) -> Draft:
    """Raises Refused where there is no room."""
    total, free = quota.size_bytes(manifest), store.free_bytes()
    try:
        quota.admit(store, manifest)
    except SpecError as error:
        raise Refused(507, str(error)) from error
    if free is not None and total > free:
        raise Refused(507, f"context {manifest.context!r} has {total} bytes, the sender's disk has {free} left")
    return store.draft(manifest.context)


async def _write(path: Path, size: int, body: AsyncIterator[bytes], upload: Upload) -> str:
    """Write a body of `size` bytes as it comes; returns its SHA-256. Raises SpecError if it is shorter or longer."""
    digest, received, waiting = hashlib.sha256(), 0, bytearray()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        async for piece in body:
            received += len(piece)
            if received > size:
                break
            waiting += piece
            upload.touched_s = time.monotonic()
            if len(waiting) >= WRITE_BYTES:
                await asyncio.to_thread(_append, file, waiting, digest)
                waiting = bytearray()
        await asyncio.to_thread(_append, file, waiting, digest)
    finally:
        os.close(file)
    if received != size:
        raise SpecError(f"the body has {'more' if received > size else 'less'} than {size} bytes")
    return digest.hexdigest()


def _append(file: int, data: bytearray, digest: hashlib._Hash) -> None:
    digest.update(data)
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
