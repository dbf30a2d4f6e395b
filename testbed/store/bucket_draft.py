"""Writing a context into an object store: encodings as they come, beside what is served; last, what makes it seen."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from typing import Final

from kvstream.policies.api import TEXT, LevelOrText
from kvstream.testbed.errors import SpecError
from kvstream.testbed.store import layout
from kvstream.testbed.store.api import ContextStore, Draft
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.store.remote import Remote

WRITERS: Final = 8
"""Encodings on their way at a time: a request to an object store takes tens of milliseconds whatever its size."""
MAX_WAITING: Final = 2 * WRITERS
"""Encodings in memory; then the encoder waits."""


class BucketDraft(Draft):
    """Puts under a name of its own; `seen(manifest, hashes, put)` makes it the context."""

    def __init__(
        self,
        store: ContextStore,
        remote: Remote,
        context: str,
        seen: Callable[[Manifest, Mapping[str, str], str], None],
    ) -> None:
        super().__init__(store, context)
        self.put = f"{context}.{secrets.token_hex(8)}"
        self._remote = remote
        self._seen = seen
        self._is_seen = False
        self._texts: dict[int, bytes] = {}
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="kvstream-put")
        self._waiting: set[Future[None]] = set()
        self._turn = Lock()
        self._parts: tempfile.TemporaryDirectory[str] | None = None

    def new_part(self) -> Path:
        with self._turn:
            if self._parts is None:
                self._parts = tempfile.TemporaryDirectory(prefix="kvstream-")
        return Path(self._parts.name) / secrets.token_hex(8)

    def take(self, part: Path, chunk: int, level: LevelOrText, digest: str) -> None:
        layout.check_chunk(chunk, level)
        if level == TEXT:
            self._texts[chunk] = part.read_bytes()
        else:
            self._remote.put_file(self._name(f"{chunk}.{level}"), part)
        part.unlink()
        self.hashes[f"{chunk}/{level}"] = digest

    def discard(self) -> None:
        self._writers.shutdown(cancel_futures=True)
        if not self._is_seen:
            self._is_seen = True
            self._remote.remove(f"puts/{self.put}")
        if self._parts is not None:
            self._parts.cleanup()

    def _write(self, chunk: int, level: LevelOrText, data: bytes) -> None:
        layout.check_chunk(chunk, level)
        if level == TEXT:
            self._texts[chunk] = data
            return
        with self._turn:
            self._wait(MAX_WAITING - 1)
            self._waiting.add(self._writers.submit(self._remote.put, self._name(f"{chunk}.{level}"), data))

    def _write_evaluation(self, name: str, data: bytes) -> None:
        self._remote.put(self._name(f"{layout.EVALUATION}/{name}"), data)

    def _publish(self, manifest: Manifest) -> None:
        for index, chunk in enumerate(manifest.chunks):
            if len(self._texts[index]) != chunk.text_bytes:
                raise SpecError(
                    f"context {self.context}: chunk {index}/{TEXT} is missing or not of {chunk.text_bytes} bytes"
                )
        texts = b"".join(self._texts[index] for index in range(len(manifest.chunks)))
        self._remote.put(self._name("text.bin"), texts)
        with self._turn:
            self._wait(0)
        self._seen(manifest, self.hashes, self.put)
        self._is_seen = True

    def _wait(self, most: int) -> None:
        """Until at most so many are on their way. Raises what a write raised."""
        while len(self._waiting) > most:
            done, self._waiting = wait(self._waiting, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()

    def _name(self, file: str) -> str:
        return f"puts/{self.put}/{file}"
