"""Where chunks arrive: a fixed number of slots for encodings, kept from session to session, and room for every text.

A slot is memory of the host, page-locked for a CUDA device, which copies from it while the next bytes come. The event
loop's thread takes slots, fills and frees them; it never waits, and launches nothing: whatever it does takes the
interpreter lock from the thread that computes. How many are in use is decided elsewhere:
`kvstream.testbed.session.session` requests no more encodings than there are slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from torch import Tensor

from kvstream.policies.api import TEXT, LevelOrText
from kvstream.testbed.engine.streams import Mark, Streams
from kvstream.testbed.errors import SpecError
from kvstream.testbed.host.shared_memory import SharedMemory
from kvstream.testbed.store.manifest import Manifest

if TYPE_CHECKING:
    from kvstream.codec.api import Decoder

PIECE_BYTES: Final = 1 << 22
"""A chunk is decoded in pieces of about this size: that of a chunk's segments at the paper's scale, so that smaller
pieces would only cost the host more."""
FIRST_PIECE_BYTES: Final = 1 << 19
"""The first piece is smaller: as a rule it says where the streams lie, and finding that out takes as long as the
rest."""
ALIGNMENT: Final = 64
"""Slots begin at such addresses, so that decoders read their words without copying."""


@dataclass(slots=True)
class IncomingChunk:
    """A chunk on its way from the network into the cache."""

    chunk: int
    level: LevelOrText
    view: memoryview
    """Host memory of exactly its size."""
    streams: Streams = field(default_factory=Streams)
    host: Tensor | None = None
    """`view` as a tensor, uint8; None for text."""
    slot: int | None = None
    free_slots: list[int] = field(default_factory=list)
    """Where `slot` goes when it is released."""
    received: int = 0
    announced: int = 0
    """Bytes that are here and worth decoding."""
    fed: int = 0
    """Bytes that the decoder has."""
    runs: list[tuple[Mark, Mark]] = field(default_factory=list)
    """(start, end) of each stretch of decoding."""
    decoder: Decoder | None = None
    error: Exception | None = None
    """What was wrong with an early piece: the chunk fails when it is complete."""
    is_released: bool = False

    @property
    def is_complete(self) -> bool:
        return self.received == len(self.view)

    @property
    def has_piece(self) -> bool:
        """Whether bytes are here that are worth decoding, and were not decoded yet."""
        return self.announced > self.fed and not self.is_released and self.error is None

    def arrived(self, received: int) -> bool:
        """`received` bytes are here in all. Returns whether that is a piece to decode."""
        self.received = received
        piece = PIECE_BYTES if self.announced else FIRST_PIECE_BYTES
        if received - self.announced < piece and not self.is_complete:
            return False
        self.announced = received
        return True

    def feed(self, open_decoder: Callable[[memoryview], Decoder]) -> None:
        """Decode the bytes that are here and were not decoded yet. An error is kept for `finish`.

        `open_decoder` is given the chunk's first bytes, which it may refuse.
        """
        if self.is_released or self.error is not None:
            return
        try:
            self._feed(open_decoder)
        except Exception as error:
            self.error = error

    def _feed(self, open_decoder: Callable[[memoryview], Decoder]) -> None:
        start, stop = self.fed, self.announced
        if start == stop and self.decoder is not None:
            return  # an earlier call took this piece along
        begin = self.streams.mark("decode")
        with self.streams.on("decode"):
            if self.decoder is None:
                self.decoder = open_decoder(self.view[:stop])
            if stop > start:
                self.decoder.feed(self.view[start:stop], None if self.host is None else self.host[start:stop])
        self.fed = stop
        self.runs.append((begin, self.streams.mark("decode")))

    def finish(self, settle: Callable[[], None] | None = None) -> None:
        """Complete the decoding, then `settle`; returns when both are done. Raises what `feed` has kept."""
        if self.error is not None:
            raise self.error
        assert self.decoder is not None
        if settle is None and self.decoder.only_waits:
            self.decoder.finish()
            self.streams.reach(self.runs[-1][1])
            return
        begin = self.streams.mark("decode")
        with self.streams.on("decode"):
            self.decoder.finish()
            if settle is not None:
                settle()
        end = self.streams.mark("decode")
        self.runs.append((begin, end))
        self.streams.reach(end)

    def release(self) -> None:
        """The chunk is in the cache, or never will be: its slot is free."""
        self.is_released = True
        if self.slot is not None:
            self.free_slots.append(self.slot)
            self.slot = None


class ChunkBuffers:
    """The slots of one receiver."""

    def __init__(self, streams: Streams, shared: SharedMemory | None = None) -> None:
        """Slots lie in `shared`, if that is given."""
        self._streams, self._shared = streams, shared
        self._host: Tensor | None = None
        self._slot_bytes = 0
        self._free: list[int] = []

    def open(self, manifest: Manifest, slots: int) -> None:
        """Have `slots` slots for any encoding of any chunk of a context; all are free afterwards."""
        largest = max(max(info.sizes_bytes) for info in manifest.chunks)
        self._slot_bytes = -(-largest // ALIGNMENT) * ALIGNMENT
        if self._host is None or len(self._host) < slots * self._slot_bytes:
            self._host = None  # the old memory goes before the new comes
            self._host = self._streams.host_memory(slots * self._slot_bytes, self._shared)
        self._free = list(range(slots))[::-1]

    def take(self, chunk: int, level: LevelOrText, size: int) -> IncomingChunk:
        """Memory for a chunk that is now requested. Raises SpecError when every slot is taken."""
        if level == TEXT:
            return IncomingChunk(chunk, level, memoryview(bytearray(size)), self._streams)
        if not self._free or self._host is None:
            raise SpecError(f"no slot is free for chunk {chunk}")
        slot = self._free.pop()
        span = slice(slot * self._slot_bytes, slot * self._slot_bytes + size)
        host = self._host[span]
        view = memoryview(host.numpy())  # type: ignore[arg-type]
        return IncomingChunk(chunk, level, view, self._streams, host, slot, self._free)
