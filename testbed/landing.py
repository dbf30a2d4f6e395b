"""Where chunks land: a fixed number of places for encodings, kept from session to session, and room for every text.

A place is memory of the host, page-locked on a CUDA device, and there a mirror on the device to which what arrives is
copied, on a lane of its own, while the next bytes come. The event loop's thread takes places, fills and frees them; it
never waits. Who holds a place decides nothing here: `testbed.session` asks for no more encodings than there are places.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from torch import Tensor

from policies.api import TEXT, LevelOrText
from testbed.errors import SpecError
from testbed.lanes import Lanes, Mark
from testbed.manifest import Manifest

if TYPE_CHECKING:
    from codec.api import Decoder

PIECE_BYTES: Final = 1 << 22
"""A chunk is copied and decoded in pieces of about this size, 100 us of copying: what a chunk's segments come to at the
paper's scale, so that smaller ones would only cost the host more."""
FIRST_PIECE_BYTES: Final = 1 << 19
"""The first is smaller: as a rule it tells where the streams lie, and finding that out takes as long as the rest."""
ALIGNMENT: Final = 64
"""Places begin at such addresses, so that decoders read their words without copying."""


@dataclass(slots=True)
class Inflow:
    """A chunk on its way from the network into the cache."""

    chunk: int
    level: LevelOrText
    view: memoryview
    """Host memory of exactly its size."""
    mirror: Tensor | None = None
    """The same on the device, uint8."""
    host: Tensor | None = None
    place: int | None = None
    received: int = 0
    fed: int = 0
    """Bytes that the decoder has."""
    copies: list[tuple[int, Mark, Mark]] = field(default_factory=list)
    """(bytes that are then on the device, begin, end), in order."""
    runs: list[tuple[Mark, Mark]] = field(default_factory=list)
    """(begin, end) of each stretch of decoding."""
    decoder: Decoder | None = None
    error: Exception | None = None
    """What the decoder said of an early piece: the chunk fails when it is complete."""
    is_dropped: bool = False

    @property
    def copied(self) -> int:
        return self.copies[-1][0] if self.copies else 0

    @property
    def is_complete(self) -> bool:
        return self.received == len(self.view)


class Landing:
    """The places of one receiver."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._host: Tensor | None = None
        self._mirror: Tensor | None = None
        self._largest = 0
        self._free: list[int] = []

    def open(self, manifest: Manifest, places: int, *, mirrored: bool) -> None:
        """Have `places` places for any encoding of any chunk of a context; all are free afterwards."""
        largest = max(max(info.sizes_bytes) for info in manifest.chunks)
        self._largest = -(-largest // ALIGNMENT) * ALIGNMENT
        if self._host is None or len(self._host) < places * self._largest:
            self._host = self._mirror = None  # the old goes before the new comes
            self._host = self._lanes.host_memory(places * self._largest)
        if not mirrored:
            self._mirror = None
        elif self._mirror is None:
            self._mirror = self._lanes.mirror(self._host)
        self._free = list(range(places))[::-1]

    def take(self, chunk: int, level: LevelOrText, size: int) -> Inflow:
        """Memory for a chunk that is now asked for. Raises SpecError when every place is taken."""
        if level == TEXT:
            return Inflow(chunk, level, memoryview(bytearray(size)))
        if not self._free or self._host is None:
            raise SpecError(f"no place is free for chunk {chunk}")
        place = self._free.pop()
        span = slice(place * self._largest, place * self._largest + size)
        host = self._host[span]
        mirror = None if self._mirror is None else self._mirror[span]
        return Inflow(chunk, level, memoryview(host.numpy()), mirror, host, place)  # type: ignore[arg-type]

    def landed(self, inflow: Inflow, received: int) -> bool:
        """`received` bytes of a chunk are here in all: copy what is new. Returns whether there is a new piece."""
        inflow.received = received
        piece = PIECE_BYTES if inflow.copies else FIRST_PIECE_BYTES
        if received - inflow.copied < piece and not inflow.is_complete:
            return False
        span = slice(inflow.copied, received)
        begin = self._lanes.mark("copy")
        if inflow.mirror is not None and inflow.host is not None:
            with self._lanes.on("copy"):
                inflow.mirror[span].copy_(inflow.host[span], non_blocking=True)
        inflow.copies.append((received, begin, self._lanes.mark("copy")))
        return True

    def release(self, inflow: Inflow) -> None:
        """The chunk is in the cache, or will never be: its place is free."""
        inflow.is_dropped = True
        if inflow.place is not None:
            self._free.append(inflow.place)
            inflow.place = None
