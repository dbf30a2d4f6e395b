"""The manifest of a stored context: its chunks and levels, their sizes, and the distortion of each level.

The JSON form travels over the network, so `from_json` trusts nothing: every field is checked before use.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.shift import MAX_SHIFT, ShiftInfo

FORMAT = 1
MAX_CHUNKS = 65_536
MAX_LEVELS = 64
MAX_ENCODINGS = 1 << 18
"""Chunks times levels."""
MAX_CHUNK_BYTES = 1 << 32
MAX_MANIFEST_BYTES = 4 << 20
"""Serialised. A manifest of 12 levels and chunks of 256 tokens reaches it with a context of ten million tokens."""
MAX_CODEC_BYTES = 1 << 16
MAX_NUMBER = 1e12


@dataclass(frozen=True, slots=True)
class LevelInfo:
    """One level of a context; level 0 is the smallest."""

    name: str
    distortion: float
    """Mean KL (nats) of the next-token distribution against the exact cache, measured on held-out text."""
    bits_per_element: float


@dataclass(frozen=True, slots=True)
class ChunkInfo:
    """Tokens [start, stop) of the context and the bytes of each of its encodings."""

    start: int
    stop: int
    sizes_bytes: tuple[int, ...]
    text_bytes: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def ladder(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """The levels of a codec for people: what each is, and the bytes that a context takes at it, the mean over those
    given."""
    first = manifests[0]
    return [
        {**asdict(level), "bytes": sum(chunk.sizes_bytes[at] for m in manifests for chunk in m.chunks) / len(manifests)}
        for at, level in enumerate(first.levels)
    ]


@dataclass(frozen=True, slots=True)
class KVShape:
    """Shape of the cache of one token, and its dtype by torch's name."""

    layers: int
    heads: int
    head_dim: int
    dtype: str

    @property
    def elements_per_token(self) -> int:
        return self.layers * 2 * self.heads * self.head_dim


@dataclass(frozen=True)
class Manifest:
    """The chunks and levels of one context under one codec."""

    context: str
    model: str
    """Fingerprint of the model's weights and configuration: another model's cache must never be used."""
    codec: Mapping[str, Any]
    """`Codec.get_config()`: enough to rebuild the codec."""
    profile: str | None
    """SHA-256 of the profile the codec was calibrated with; it is fetched separately, once."""
    kv: KVShape
    levels: tuple[LevelInfo, ...]
    chunks: tuple[ChunkInfo, ...]
    shift: ShiftInfo | None = None
    """None where the codec does not say, as codecs without a profile."""
    measured_on: str | None = None
    """The kind of text on which the levels' distortions were measured; None where that is not known."""

    @property
    def tokens(self) -> int:
        return self.chunks[-1].stop

    @cached_property
    def columns(self) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[int, ...]]:
        """[chunk]: its tokens, its bytes at each level, and as text."""
        chunks = self.chunks
        return (
            tuple(c.tokens for c in chunks),
            tuple(c.sizes_bytes for c in chunks),
            tuple(c.text_bytes for c in chunks),
        )

    @cached_property
    def ladder(self) -> tuple[float, ...]:
        """[level]: its distortion."""
        return tuple(level.distortion for level in self.levels)

    def distortion(self, levels: Sequence[int | str]) -> float:
        """Token-weighted mean distortion (nats) of a session that took `levels[i]` for chunk i; text counts 0."""
        total = sum(
            chunk.tokens * self.levels[level].distortion
            for chunk, level in zip(self.chunks, levels, strict=True)
            if isinstance(level, int)
        )
        return total / self.tokens

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "context": self.context,
            "model": self.model,
            "codec": dict(self.codec),
            "profile": self.profile,
            "kv": asdict(self.kv),
            "levels": [asdict(level) for level in self.levels],
            "chunks": [[c.start, c.stop, c.text_bytes, list(c.sizes_bytes)] for c in self.chunks],
            "shift": None if self.shift is None else asdict(self.shift),
            "measured_on": self.measured_on,
        }

    @cached_property
    def wire(self) -> bytes:
        """The serialised form: JSON without spaces."""
        return json.dumps(self.to_json(), allow_nan=False, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Manifest:
        """From the serialised form, of whatever origin. Raises SpecError."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise SpecError(f"the manifest has {len(data)} bytes, more than {MAX_MANIFEST_BYTES}; use larger chunks")
        try:
            body = json.loads(bytes(data), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"the manifest is not JSON: {str(error)[:100]}") from error
        return cls.from_json(body)

    @classmethod
    def from_json(cls, data: object) -> Manifest:
        """Check and build. Raises SpecError naming the first field that is wrong."""
        body = _mapping(data, "manifest")
        if body.get("format") != FORMAT:
            raise SpecError(
                f"manifest: format is {_shown(body.get('format'))}, this version reads {FORMAT}; store again"
            )
        kv = _mapping(body.get("kv"), "kv")
        shape = KVShape(
            layers=_integer(kv.get("layers"), "kv.layers", 1, 4096),
            heads=_integer(kv.get("heads"), "kv.heads", 1, 4096),
            head_dim=_integer(kv.get("head_dim"), "kv.head_dim", 1, 65_536),
            dtype=_text(kv.get("dtype"), "kv.dtype"),
        )
        levels = tuple(
            LevelInfo(
                name=_text(level.get("name"), "level.name"),
                distortion=_number(level.get("distortion"), "level.distortion"),
                bits_per_element=_number(level.get("bits_per_element"), "level.bits_per_element"),
            )
            for level in (_mapping(x, "level") for x in _list(body.get("levels"), "levels", MAX_LEVELS))
        )
        chunks = tuple(
            _chunk(x, index, len(levels)) for index, x in enumerate(_list(body.get("chunks"), "chunks", MAX_CHUNKS))
        )
        if len(chunks) * len(levels) > MAX_ENCODINGS:
            raise SpecError(f"manifest: {len(chunks)} chunks at {len(levels)} levels are more than {MAX_ENCODINGS}")
        expected = 0
        for index, chunk in enumerate(chunks):
            if chunk.start != expected:
                raise SpecError(f"manifest: chunk {index} starts at token {chunk.start}, not {expected}; store again")
            expected = chunk.stop
        profile, shift, measured_on = (body.get(key) for key in ("profile", "shift", "measured_on"))
        return cls(
            context=_text(body.get("context"), "context"),
            model=_text(body.get("model"), "model"),
            codec=_settings(body.get("codec")),
            profile=None if profile is None else _text(profile, "profile"),
            kv=shape,
            levels=levels,
            chunks=chunks,
            shift=None if shift is None else _shift(_mapping(shift, "shift")),
            measured_on=None if measured_on is None else _name(measured_on, "measured_on"),
        )


def _shift(fields: Mapping[str, Any]) -> ShiftInfo:
    names = ("times_bits", "escapes", "expected_escapes")
    return ShiftInfo(*(_number(fields.get(name), f"shift.{name}", MAX_SHIFT) for name in names))


def _chunk(value: object, index: int, n_levels: int) -> ChunkInfo:
    fields = _list(value, f"chunk {index}", 4)
    if len(fields) != 4:
        raise SpecError(f"manifest: chunk {index} has {len(fields)} fields instead of 4; store again")
    start, stop, text_bytes, sizes = fields
    sizes = _list(sizes, f"chunk {index} sizes", MAX_LEVELS)
    if len(sizes) != n_levels:
        raise SpecError(f"manifest: chunk {index} has {len(sizes)} sizes for {n_levels} levels; store again")
    first = _integer(start, f"chunk {index} start", 0, 1 << 31)
    return ChunkInfo(
        start=first,
        stop=_integer(stop, f"chunk {index} stop", first + 1, 1 << 31),
        text_bytes=_integer(text_bytes, f"chunk {index} text bytes", 1, MAX_CHUNK_BYTES),
        sizes_bytes=tuple(_integer(s, f"chunk {index} size", 1, MAX_CHUNK_BYTES) for s in sizes),
    )


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise SpecError(f"manifest: {name} is not an object; store again")
    return value


def _list(value: object, name: str, limit: int) -> list[Any]:
    if not isinstance(value, list) or not 1 <= len(value) <= limit:
        raise SpecError(f"manifest: {name} is not a list of 1 to {limit} entries; store again")
    return value


def _integer(value: object, name: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise SpecError(f"manifest: {name} is {_shown(value)}, not a whole number from {low} to {high}; store again")
    return value


def _number(value: object, name: str, most: float = MAX_NUMBER) -> float:
    # a comparison is false for NaN, and takes integers that no float can hold
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
        raise SpecError(f"manifest: {name} is {_shown(value)}, not a number from 0 to {most:g}; store again")
    return float(value)


def _name(value: object, name: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9-]{1,64}", value):
        raise SpecError(f"manifest: {name} is no name of letters, digits and dashes; store again")
    return value


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 256 or not value.isprintable():
        raise SpecError(f"manifest: {name} is not a string of 1 to 256 printable characters; store again")
    return value


def _settings(value: object) -> Mapping[str, Any]:
    """The codec's configuration, which only the codec understands: of bounded size and depth, numbers finite."""
    settings = _mapping(value, "codec")
    try:
        size = len(json.dumps(settings, allow_nan=False))
        deepest = _depth(settings)
    except (ValueError, RecursionError) as error:
        raise SpecError(f"manifest: codec cannot be read: {str(error)[:100]}") from error
    if size > MAX_CODEC_BYTES or deepest > 8:
        raise SpecError(
            f"manifest: codec is larger than {MAX_CODEC_BYTES} bytes or nested more than 8 deep; store again"
        )
    return settings


def _depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise ValueError("a number is too large")
    return 0


def _shown(value: object) -> str:
    return reprlib.repr(value)[:60]


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
