"""What every engine that decodes does with chunks: slots, and decoding as bytes arrive.

Steps run on one thread beside the network's, so their order is the order of submission, and the event loop is never
held: torch and numba release the interpreter lock in their kernels. On a CUDA device that thread launches, copies
included, and, at a step's end, waits for the device's own mark. A codec that can then decodes pieces of a chunk as they
arrive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from kvstream.policies.api import TEXT, LevelOrText
from kvstream.testbed.engine.api import Step
from kvstream.testbed.engine.buffers import ChunkBuffers, IncomingChunk
from kvstream.testbed.engine.checks import check_chunk, check_sizes
from kvstream.testbed.engine.codecs import CodecCache
from kvstream.testbed.engine.streams import Mark, streams_of
from kvstream.testbed.engine.threads import ComputeThread
from kvstream.testbed.errors import SpecError
from kvstream.testbed.host.shared_memory import SharedMemory
from kvstream.testbed.store.manifest import Manifest

if TYPE_CHECKING:
    from kvstream.codec.api import Codec, Decoder
    from kvstream.codec.targets import KVTarget

LEAST_SLOTS: Final = 4
"""Encodings that a receiver can hold, whatever their size: two in flight, one being decoded, one to spare. With all of
its slots taken, none is requested: a decoder that is slower than the link slows the link down instead of taking ever
more memory."""
CUDA_SLOTS: Final = 8
"""A CUDA device's receiver has no more: its slots are page-locked, and such memory is the whole machine's loss."""
HOST_BYTES: Final = 1 << 28
"""Slots may take this much together, so that a context of any length has bounded memory; on a CPU ordinary contexts
fit whole, and their links never wait for the decoder."""


class DecodingEngine(ABC):
    """The half of an `Engine` that takes chunks in. Where they are decoded to is the other half's."""

    def __init__(
        self,
        device: torch.device,
        *,
        max_slots: int | None = None,
        codecs: CodecCache | None = None,
        shared: SharedMemory | None = None,
    ) -> None:
        """`max_slots` bounds the encodings held at a time; by default they are as many as HOST_BYTES hold, on a CUDA
        device CUDA_SLOTS at most. With the `codecs` of others it needs no profile that they have. `shared` memory is
        where chunks arrive, if another process receives them."""
        self.device = device
        self.slots = 0
        self._max_slots = max_slots
        self._streams = streams_of(device)
        self._buffers = ChunkBuffers(self._streams, shared)
        self._codecs = CodecCache() if codecs is None else codecs
        self._open: tuple[Manifest, Codec] | None = None
        self._decodes_early = False
        self._waiting: deque[IncomingChunk] = deque()
        """Pieces of these have come, and are not launched yet."""
        self._steps: deque[None] = deque()
        """One for each step that is submitted and has not begun."""
        self._thread = ComputeThread()

    @abstractmethod
    def _target(self, start: int, stop: int) -> KVTarget:
        """Where tokens [start, stop) of the open context are decoded to."""

    _settles = False
    """Whether `_settle` has anything to do."""

    def _settle(self, start: int, stop: int) -> None:
        """Tokens [start, stop) are decoded; an engine that keeps them elsewhere moves them now."""
        return None

    def submit(self, step: Callable[..., Any], *arguments: Any) -> Future[Any]:
        self._steps.append(None)
        return self._thread.submit(self._begin, step, *arguments)

    def _begin(self, step: Callable[..., Any], *arguments: Any) -> Any:
        self._steps.popleft()
        return step(*arguments)

    def close(self) -> None:
        self._thread.close()

    def add_profile(self, data: bytes) -> str:
        return self._codecs.add_profile(data)

    def lacks_profile(self, manifest: Manifest) -> bool:
        return self._codecs.lacks_profile(manifest)

    def forget(self) -> None:
        self._open = None
        self._streams.set_clock()

    @property
    def manifest(self) -> Manifest:
        """Of the open context. Raises SpecError if none is."""
        return self._opened()[0]

    @property
    def decodes_pieces(self) -> bool:
        """Whether the open context's codec can decode a chunk while it arrives."""
        return self._opened()[1].decodes_pieces(self.device)

    def _codec_of(self, manifest: Manifest) -> Codec:
        """The codec of a context whose sizes and levels make sense. Raises SpecError or CodecError."""
        codec = self._codecs.codec(manifest)
        if len(codec.levels) != len(manifest.levels):
            raise SpecError(
                f"context {manifest.context} has {len(manifest.levels)} levels, its codec {len(codec.levels)}"
            )
        check_sizes(manifest)
        return codec

    def _take_in(self, manifest: Manifest, codec: Codec, *, overlap: bool) -> None:
        """Get ready for a context's chunks."""
        self._open = manifest, codec
        n = len(manifest.chunks)
        most = CUDA_SLOTS if self.device.type == "cuda" else n
        self.slots = min(self._max_slots or min(slots_within(HOST_BYTES, manifest), most), n) if overlap else n
        self._decodes_early = overlap and self.decodes_pieces
        self._buffers.open(manifest, self.slots)

    def _opened(self) -> tuple[Manifest, Codec]:
        if self._open is None:
            raise SpecError("no context is open")
        return self._open

    # --- a chunk arrives

    def take(self, chunk: int, level: LevelOrText, size: int) -> IncomingChunk:
        return self._buffers.take(chunk, level, size)

    def on_bytes(self, incoming: IncomingChunk, received: int) -> None:
        if incoming.arrived(received) and self._decodes_early and incoming.level != TEXT:
            self._waiting.append(incoming)
            self._thread.submit(self._feed_next)

    def _feed_next(self) -> None:
        """Launch one piece, but not before a step: the session waits for that, and then has the next one."""
        if self._steps:
            self._thread.submit(self._feed_next)
            return
        while self._waiting:
            incoming = self._waiting.popleft()
            if incoming.has_piece:
                self._feed(incoming)
                return

    def _feed(self, incoming: IncomingChunk) -> None:
        manifest, codec = self._opened()
        info = manifest.chunks[incoming.chunk]

        def open_decoder(first_bytes: memoryview) -> Decoder:
            check_chunk(first_bytes, info.start, incoming.level)
            target = self._target(info.start, info.stop)
            return codec.decoder(target, device=self.device, total_bytes=len(incoming.view))

        incoming.feed(open_decoder)

    def decode(self, incoming: IncomingChunk) -> Step:
        """A step of a session. What has come of the next chunk is launched before this one's end is waited for: one
        piece, or a chunk would never be finished while others come."""
        self._feed(incoming)
        self._feed_next()
        info = self.manifest.chunks[incoming.chunk]
        incoming.finish((lambda: self._settle(info.start, info.stop)) if self._settles else None)
        when = self._streams.when
        pieces = tuple((when(start), when(end)) for start, end in incoming.runs)
        return Step(pieces[0][0], pieces[-1][1], pieces=pieces if self._decodes_early else ())

    # --- a model's steps

    @contextmanager
    def _model_runs(self) -> Iterator[Mark]:
        """The model runs within, after everything that was decoded; gives the mark of its start."""
        self._streams.after("model", self._streams.mark("decode"))
        start = self._streams.mark("model")
        with self._streams.on("model"):
            yield start

    def _step(self, start: Mark, token: int | None = None) -> Step:
        end = self._streams.mark("model")
        self._streams.reach(end)
        return Step(self._streams.when(start), self._streams.when(end), token)


def slots_within(nbytes: int, manifest: Manifest) -> int:
    """How many of a context's largest encoding fit, LEAST_SLOTS at least."""
    return max(LEAST_SLOTS, nbytes // max(max(chunk.sizes_bytes) for chunk in manifest.chunks))
