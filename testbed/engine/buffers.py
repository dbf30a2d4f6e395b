"""Where chunks arrive: a fixed number of slots for encodings, kept from session to session, and room for every text.

A slot is memory of the host, page-locked for a CUDA device, and there a mirror on the device to which what arrives is
copied, on a stream of its own, while the next bytes come. The event loop's thread takes slots, fills and frees them; it
never waits. How many are in use is decided elsewhere: `kvstream.testbed.session.session` requests no more encodings
than there are slots.
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
"""A chunk is copied and decoded in pieces of about this size, 100 us of copying: the size of a chunk's segments at the
paper's scale, so that smaller pieces would only cost the host more."""
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
    mirror: Tensor | None = None
    """The same on the device; None where the device reads the host's memory."""
    slot: int | None = None
    free_slots: list[int] = field(default_factory=list)
    """Where `slot` goes when it is released."""
    received: int = 0
    fed: int = 0
    """Bytes that the decoder has."""
    copies: list[tuple[int, Mark, Mark]] = field(default_factory=list)
    """(bytes that are then on the device, start, end), in order."""
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
    def copied(self) -> int:
        """Bytes that are on the device, or soon will be."""
        return self.copies[-1][0] if self.copies else 0

    def arrived(self, received: int) -> bool:
        """`received` bytes are here in all: copy what is new. Returns whether that is a piece to decode."""
        self.received = received
        piece = PIECE_BYTES if self.copies else FIRST_PIECE_BYTES
        if received - self.copied < piece and not self.is_complete:
            return False
        span = slice(self.copied, received)
        start = self.streams.mark("copy")
        if self.mirror is not None and self.host is not None:
            with self.streams.on("copy"):
                self.mirror[span].copy_(self.host[span], non_blocking=True)
        self.copies.append((received, start, self.streams.mark("copy")))
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
        start, (stop, _, copied) = self.fed, self.copies[-1]
        if start == stop and self.decoder is not None:
            return  # an earlier call took this piece along
        streams = self.streams
        streams.after("decode", copied)
        begin = streams.mark("decode")
        with streams.on("decode"):
            if self.decoder is None:
                self.decoder = open_decoder(self.view[:stop])
            if stop > start:
                self.decoder.feed(self.view[start:stop], None if self.mirror is None else self.mirror[start:stop])
        self.fed = stop
        self.runs.append((begin, streams.mark("decode")))

    def finish(self, settle: Callable[[], None]) -> None:
        """Complete the decoding, then `settle`; returns when both are done. Raises what `feed` has kept."""
        if self.error is not None:
            raise self.error
        assert self.decoder is not None
        begin = self.streams.mark("decode")
        with self.streams.on("decode"):
            self.decoder.finish()
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
        self._mirror: Tensor | None = None
        self._slot_bytes = 0
        self._free: list[int] = []

    def open(self, manifest: Manifest, slots: int, *, mirrored: bool) -> None:
        """Have `slots` slots for any encoding of any chunk of a context; all are free afterwards."""
        largest = max(max(info.sizes_bytes) for info in manifest.chunks)
        self._slot_bytes = -(-largest // ALIGNMENT) * ALIGNMENT
        if self._host is None or len(self._host) < slots * self._slot_bytes:
            self._host = self._mirror = None  # the old memory goes before the new comes
            self._host = self._streams.host_memory(slots * self._slot_bytes, self._shared)
        if not mirrored:
            self._mirror = None
        elif self._mirror is None:
            self._mirror = self._streams.mirror(self._host)
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
        mirror = None if self._mirror is None else self._mirror[span]
        view = memoryview(host.numpy())  # type: ignore[arg-type]
        return IncomingChunk(chunk, level, view, self._streams, host, mirror, slot, self._free)
