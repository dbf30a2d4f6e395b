"""What a session needs of the engine that computes for it: our model, a timed stand-in, or another's engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from kvstream.policies.api import LevelOrText
from kvstream.testbed.engine.buffers import IncomingChunk
from kvstream.testbed.store.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Step:
    """A finished step; times on CLOCK_MONOTONIC, seconds."""

    start_s: float
    end_s: float
    token: int | None = None
    """The first output token of a prefill."""
    pieces: tuple[tuple[float, float], ...] = ()
    """(start, end) of each piece's decoding, its copy to the device included, where a chunk is decoded as it arrives.
    The last is what was left when all bytes were here."""


class Engine(Protocol):
    """Holds one context's cache and computes in it, one step after the other.

    `decode`, `recompute`, `prefill` and `forget` are steps: the driver submits them to the engine's thread. Everything
    else is called on the event loop's thread and returns at once.
    """

    @property
    def slots(self) -> int:
        """Encodings of the open context that may be held at a time."""

    def submit(self, step: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run a step on the engine's thread, after everything submitted before."""

    def close(self) -> None:
        """End the thread; steps that have not begun are dropped."""

    def lacks_profile(self, manifest: Manifest) -> bool:
        """Whether the manifest's codec needs a profile that was not added."""

    def add_profile(self, data: bytes) -> str:
        """Keep a profile; its hash is returned. Raises CodecError for malformed bytes."""

    def forget(self) -> None:
        """Make sure that nothing of an earlier session can be used."""

    def open(self, manifest: Manifest, extra_tokens: int, *, overlap: bool = True) -> None:
        """Get ready for a context's chunks and `extra_tokens` after them. Without `overlap` all chunks are held before
        any is decoded. Raises SpecError or CodecError if the engine cannot take the context."""

    def take(self, chunk: int, level: LevelOrText, size: int) -> IncomingChunk:
        """Memory for a chunk that is now requested. Raises SpecError when every slot is taken."""

    def on_bytes(self, incoming: IncomingChunk, received: int) -> None:
        """`received` bytes of a chunk are here in all; an engine may decode them while the rest arrives."""

    def decode(self, incoming: IncomingChunk) -> Step:
        """Decode (the rest of) a complete chunk into the cache. Raises CodecError if its bytes are not this chunk at
        this level."""

    def recompute(self, chunk: int, data: memoryview) -> Step:
        """Compute a chunk's KV from its token ids; everything before it is in the cache. Raises CodecError."""

    def prefill(self, prompt_ids: Sequence[int]) -> Step:
        """Run the prompt over the whole context; the step has the first output token."""
