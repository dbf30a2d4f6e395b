"""The byte format of one encoded chunk: a checked header, a table of sections, the sections.

Everything is little-endian. A chunk decodes alone, given the profile that its header names by hash.
`docs/bitstream.md` describes the format for a second implementation. Nothing here trusts its input: lengths are
checked before they are used, checksums before their bytes are, and the size a header claims must be in proportion
to the bytes received.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstream.codec.errors import CodecError

try:  # several times as fast as zlib's: one core then keeps up with a link of 100 Gbit/s
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

    from torch import Tensor

MAGIC = b"KVST"
VERSION = 1
DTYPES = ("bfloat16", "float16", "float32")
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

MAX_LAYERS = 4096
MAX_HEADS = 4096
MAX_HEAD_DIM = 65_536
MAX_TOKENS = 65_536
MAX_POSITION = 1 << 40
MAX_SECTIONS = 64
MAX_EXPANSION = 16_384
"""Most elements that one byte of payload may encode: what a receiver allocates is bounded by what it received."""

_HEADER = struct.Struct("<4sBBBB16s32sQIIIII")
"""magic, version, level, dtype, flags, codec id, profile hash, start, layers, tokens, heads, head dim, sections."""
_SECTION = struct.Struct("<4sIQ")
"""tag, CRC-32 of the content, length in bytes."""
_CRC = struct.Struct("<I")
_WORTH_HANDING = 1 << 21
"""Bytes whose checksums take longer than it takes to hand them to another thread."""
_NO_PROFILE = bytes(32)


@dataclass(frozen=True, slots=True)
class Header:
    """What a chunk declares about itself."""

    codec_id: str
    level: int
    start: int
    """Absolute position of the first token."""
    layers: int
    tokens: int
    heads: int
    head_dim: int
    dtype: str
    """torch's name of the element type that was encoded."""
    profile_sha256: str | None = None

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """`(L, 2, T, H, D)`."""
        return (self.layers, 2, self.tokens, self.heads, self.head_dim)

    @property
    def positions(self) -> range:
        return range(self.start, self.start + self.tokens)

    @property
    def elements(self) -> int:
        return self.layers * 2 * self.tokens * self.heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Chunk:
    """A parsed chunk. Sections are views of the input."""

    header: Header
    sections: dict[str, memoryview]
    total_bytes: int
    table: dict[str, tuple[int, int]]
    """Where each section begins, and its CRC-32, as the chunk says."""

    def section(self, tag: str, nbytes: int | None = None) -> memoryview:
        """The section `tag`; with `nbytes`, of exactly that length. Raises CodecError otherwise."""
        if tag not in self.sections:
            raise CodecError(f"chunk has no section '{tag}'; it was not written by codec {self.header.codec_id}")
        content = self.sections[tag]
        if nbytes is not None and len(content) != nbytes:
            raise CodecError(
                f"section '{tag}' has {len(content)} bytes where the header's shape needs {nbytes}; encode again"
            )
        return content

    def verify(self, *tags: str) -> Chunk:
        """The chunk, if these sections, or all, have their checksums. Raises CodecError otherwise."""
        for tag in tags or self.sections:
            at, crc = self.table[tag]
            if crc32(self.section(tag)) != crc:
                raise CodecError(_damaged(tag, at))
        return self


def pack(header: Header, sections: Mapping[str, bytes | memoryview]) -> bytes:
    """Bytes of a chunk. Raises CodecError for a header that `parse` would refuse."""
    _check_header(header, sum(len(content) for content in sections.values()))
    codec_id = header.codec_id.encode("ascii")
    profile = bytes.fromhex(header.profile_sha256) if header.profile_sha256 else _NO_PROFILE
    head = _HEADER.pack(
        MAGIC, VERSION, header.level, DTYPES.index(header.dtype), 0, codec_id, profile, header.start,
        header.layers, header.tokens, header.heads, header.head_dim, len(sections),
    )  # fmt: skip
    table = b"".join(
        _SECTION.pack(tag.encode("ascii"), crc32(content), len(content)) for tag, content in sections.items()
    )
    return b"".join([head, table, _CRC.pack(crc32(table, crc32(head))), *sections.values()])


class Arrival:
    """A chunk that is still arriving. Its header is checked as soon as it is complete, its sections at the end.

    `total_bytes` is the chunk's size, where that is known. With `apart`, checksums are computed on the only thread of
    that executor, so that the thread that launches a GPU's kernels is not held up.
    """

    def __init__(self, total_bytes: int | None = None, apart: Executor | None = None) -> None:
        self._expected = total_bytes
        self._apart = apart
        self._checked: Future[None] | None = None
        self._handed = 0
        """Bytes that are in the checksums, or will be, where they are computed apart."""
        self.header: Header | None = None
        self.received = 0
        self._views: list[memoryview] = []
        self._sections: dict[str, tuple[int, int, int]] = {}
        self._total = 0
        self._running: list[int] = []

    def feed(self, view: memoryview) -> None:
        """The next bytes, in memory that stays unchanged. Raises CodecError as soon as they cannot be a chunk."""
        before = self.received
        whole = _one_view(self._views[-1], view) if self._views else None
        if whole is None:
            self._views.append(view)
        else:
            self._views[-1] = whole
        self.received += len(view)
        if self.header is None:
            beginning = self.joined()
            if len(beginning) < _HEADER.size + _CRC.size or len(beginning) < _head_bytes(beginning):
                if beginning[: len(MAGIC)] != MAGIC[: len(beginning)]:
                    raise CodecError("not an encoded chunk: it has other first bytes; fetch the chunk again")
                return
            self.header, table, offset = _parse_head(beginning)
            for tag, crc, length in table:
                self._sections[tag] = (offset, length, crc)
                offset += length
            _check_header(self.header, sum(length for _, _, length in table))
            self._total = offset
            if self._expected not in (None, self._total):
                raise CodecError(
                    f"chunk claims {self._total} bytes, but {self._expected} were announced; fetch the chunk again"
                )
            self._running = [0] * len(table)
            before, view = 0, beginning
        if self.received > self._total:
            raise CodecError(f"{self.received - self._total} bytes follow the end of the chunk; fetch the chunk again")
        if self._apart is None:
            self._check(before, view)
        elif self.received - self._handed >= _WORTH_HANDING or self.received == self._total:
            fresh = self.part(self._handed, self.received - self._handed)
            self._checked = self._apart.submit(self._check, self._handed, fresh)
            self._handed = self.received

    def _check(self, before: int, view: memoryview) -> None:
        """Take these bytes, which follow `before` others, into the checksums."""
        for index, (at, length, _) in enumerate(self._sections.values()):
            first, last = max(at, before), min(at + length, before + len(view))
            if first < last:
                self._running[index] = crc32(view[first - before : last - before], self._running[index])

    def has(self, tag: str) -> bool:
        """Whether the chunk, whose header is there, has such a section."""
        return tag in self._sections

    def section(self, tag: str) -> tuple[int, int]:
        """Where a section begins in the chunk, and its length. Raises CodecError for a section the header lacks."""
        if tag not in self._sections:
            raise CodecError(f"chunk has no section '{tag}'; it was written by another codec")
        return self._sections[tag][:2]

    def part(self, start: int, length: int) -> memoryview:
        """Some of the received bytes, without a copy where they came in one piece."""
        pieces, before = [], 0
        for view in self._views:
            first, last = max(start, before), min(start + length, before + len(view))
            if first < last:
                pieces.append(view[first - before : last - before])
            before += len(view)
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def joined(self) -> memoryview:
        return self.part(0, self.received)

    def finish(self) -> Chunk:
        """The chunk, as `parse` gives it. Raises CodecError as `parse` does."""
        if self.header is None or self.received < self._total:
            raise CodecError(f"chunk is truncated: it ends after {self.received} bytes; fetch the chunk again")
        if self._checked is not None:
            self._checked.result()
        found: dict[str, memoryview] = {}
        for (tag, (at, length, crc)), running in zip(self._sections.items(), self._running, strict=True):
            if running != crc:
                raise CodecError(_damaged(tag, at))
            found[tag] = self.part(at, length)
        return Chunk(
            self.header, found, self.received, {tag: (at, crc) for tag, (at, _, crc) in self._sections.items()}
        )


def _damaged(tag: str, at: int) -> str:
    return f"section '{tag}' at offset {at} is damaged (checksum); fetch the chunk again"


def parse(data: bytes | bytearray | memoryview | Tensor) -> Chunk:
    """Check and split a chunk. Raises CodecError; reads nothing unchecked and copies no section."""
    return split(data).verify()


def split(data: bytes | bytearray | memoryview | Tensor) -> Chunk:
    """Split a chunk; whoever reads a section calls `Chunk.verify` before its content is believed. Raises CodecError."""
    view = as_memoryview(data)
    header, table, offset = _parse_head(view)
    sections: dict[str, memoryview] = {}
    places: dict[str, tuple[int, int]] = {}
    for tag, crc, length in table:
        if length > len(view) - offset:
            raise CodecError(
                f"chunk is truncated: section '{tag}' needs {length} bytes at offset {offset} of {len(view)}; "
                "fetch the chunk again"
            )
        sections[tag] = view[offset : offset + length]
        places[tag] = offset, crc
        offset += length
    if offset != len(view):
        raise CodecError(
            f"{len(view) - offset} bytes follow the end of the chunk; "
            "fetch the chunk again, or cut a padded buffer at container.length_of"
        )
    _check_header(header, sum(len(content) for content in sections.values()))
    return Chunk(header, sections, len(view), places)


def length_of(data: bytes | bytearray | memoryview | Tensor) -> int:
    """The bytes of the chunk at the beginning of a buffer that may be longer, as storage that pads to whole pages gives
    it back: `decode(data[: length_of(data)])`. Only the header is read. Raises CodecError for a buffer that is shorter
    than its chunk."""
    view = as_memoryview(data)
    _, table, offset = _parse_head(view)
    total = offset + sum(length for _, _, length in table)
    if total > len(view):
        raise CodecError(f"chunk is truncated: it has {total} bytes, the buffer {len(view)}; fetch the chunk again")
    return total


def parse_header(data: bytes | bytearray | memoryview | Tensor) -> Header:
    """The header of a chunk, from its beginning: header and section table must be complete. Raises CodecError."""
    return _parse_head(as_memoryview(data))[0]


def inspect(data: bytes | bytearray | memoryview | Tensor) -> dict[str, Any]:
    """What a chunk holds, as plain values: header fields, sections with their bytes, bits per element."""
    chunk = parse(data)
    header = chunk.header
    payload = sum(len(content) for content in chunk.sections.values())
    return {
        "version": VERSION,
        "codec": header.codec_id,
        "level": header.level,
        "profile_sha256": header.profile_sha256,
        "tokens": [header.start, header.start + header.tokens],
        "shape": list(header.shape),
        "dtype": header.dtype,
        "total_bytes": chunk.total_bytes,
        "payload_bytes": payload,
        "bits_per_element": 8 * chunk.total_bytes / header.elements,
        "sections": {tag: len(content) for tag, content in chunk.sections.items()},
    }


def as_memoryview(data: bytes | bytearray | memoryview | Tensor) -> memoryview:
    """A flat view of bytes; a tensor must be uint8, contiguous and one-dimensional."""
    if isinstance(data, bytes | bytearray):
        return memoryview(data)
    if isinstance(data, memoryview):
        if data.nbytes == 0:  # the cast takes no view without elements
            return memoryview(b"")
        try:
            return data.cast("B")
        except TypeError as error:  # not contiguous
            raise CodecError(f"encoded data must be contiguous bytes: {error}") from error
    import torch

    if not isinstance(data, torch.Tensor):
        raise CodecError(f"encoded data must be bytes, a memoryview or a uint8 tensor, not {type(data).__name__}")
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise CodecError(f"encoded data must be a flat uint8 tensor, not {data.dtype} of shape {tuple(data.shape)}")
    return as_memoryview(memoryview(data.detach().cpu().contiguous().numpy()))  # type: ignore[arg-type]


def _one_view(first: memoryview, second: memoryview) -> memoryview | None:
    """A view of both where they lie one behind the other in the same memory, so that nothing need be copied."""
    memory = memoryview(first.obj)
    if first.obj is not second.obj or not len(first) or not len(second) or not memory.c_contiguous:
        return None
    memory = memory.cast("B")
    start, end, begin = (_address(view) for view in (first, second, memory))
    if end != start + len(first):
        return None
    return memory[start - begin : end - begin + len(second)]


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


def _head_bytes(view: memoryview) -> int:
    """Bytes of the header, the section table and their checksum; what a header claims too many sections for is left
    to `_parse_head`."""
    return int(_HEADER.size + min(_HEADER.unpack_from(view)[-1], MAX_SECTIONS) * _SECTION.size + _CRC.size)


def _parse_head(view: memoryview) -> tuple[Header, tuple[tuple[str, int, int], ...], int]:
    """Header, section table and the offset at which the sections begin."""
    if len(view) < _HEADER.size + _CRC.size:
        raise CodecError(f"chunk is truncated: {len(view)} bytes are fewer than a header; fetch the chunk again")
    return _parse_whole_head(bytes(view[: _head_bytes(view)]))


@lru_cache(maxsize=64)
def _parse_whole_head(view: bytes) -> tuple[Header, tuple[tuple[str, int, int], ...], int]:
    """`_parse_head` of nothing but a head. Kept, because a receiver reads each one before its decoder does."""
    (magic, version, level, dtype, flags, codec_id, profile, start, layers, tokens, heads, head_dim, n_sections) = (
        _HEADER.unpack_from(view)
    )
    if magic != MAGIC:
        raise CodecError(f"not an encoded chunk: it begins with {bytes(magic)!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise CodecError(f"chunk has format version {version}; this release reads version {VERSION}: encode again")
    if n_sections > MAX_SECTIONS:
        raise CodecError(f"chunk header is damaged: it claims {n_sections} sections; fetch the chunk again")
    end = _HEADER.size + n_sections * _SECTION.size
    if len(view) < end + _CRC.size:
        raise CodecError(f"chunk is truncated: {len(view)} bytes are fewer than its section table; fetch it again")
    if crc32(view[:end]) != _CRC.unpack_from(view, end)[0]:
        raise CodecError("chunk header is damaged (checksum); fetch the chunk again")
    if flags != 0 or dtype >= len(DTYPES):
        raise CodecError(f"chunk header has dtype {dtype} and flags {flags}, unknown to this release; encode again")
    table = tuple(
        (_ascii(tag, "section tag"), crc, length) for tag, crc, length in _SECTION.iter_unpack(view[_HEADER.size : end])
    )
    if len({tag for tag, _, _ in table}) != len(table):
        raise CodecError("chunk header names a section twice; encode again")
    header = Header(
        codec_id=_ascii(codec_id.rstrip(b"\0"), "codec id"),
        level=level,
        start=start,
        layers=layers,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        dtype=DTYPES[dtype],
        profile_sha256=None if profile == _NO_PROFILE else profile.hex(),
    )
    return header, table, end + _CRC.size


def _check_header(header: Header, payload_bytes: int) -> None:
    for name, value, most in (
        ("layers", header.layers, MAX_LAYERS),
        ("tokens", header.tokens, MAX_TOKENS),
        ("heads", header.heads, MAX_HEADS),
        ("head_dim", header.head_dim, MAX_HEAD_DIM),
    ):
        if not 1 <= value <= most:
            raise CodecError(f"a chunk of {value} {name} is outside 1 to {most}; cut the context into smaller chunks")
    if not 0 <= header.start <= MAX_POSITION:
        raise CodecError(f"first token position {header.start} is outside 0 to {MAX_POSITION}")
    if header.elements > MAX_EXPANSION * payload_bytes:
        raise CodecError(
            f"shape {header.shape} is out of proportion to {payload_bytes} bytes of content "
            f"(at most {MAX_EXPANSION} elements a byte)"
        )


def _ascii(raw: bytes, what: str) -> str:
    text = raw.decode("ascii", errors="replace")
    if not text or not all(c.isalnum() or c in "-_" for c in text):
        raise CodecError(f"chunk header is damaged: {what} is {raw!r}; fetch the chunk again")
    return text
