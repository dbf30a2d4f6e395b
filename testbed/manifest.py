"""The manifest of a stored context: what there is to fetch, how large it is, and what each level costs.

The JSON form travels over the network, so `from_json` trusts nothing: every field is checked before use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from testbed.errors import SpecError

FORMAT = 1
MAX_CHUNKS = 65_536
MAX_LEVELS = 64
MAX_CHUNK_BYTES = 1 << 32


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
    """What a sender offers for one context under one codec."""

    context: str
    model: str
    """Fingerprint of the model's weights and configuration: another model's cache must never be used."""
    codec: Mapping[str, Any]
    """`Codec.get_config()`: enough to rebuild the codec."""
    profile: str | None
    """SHA-256 of the profile the codec was calibrated with; it travels apart, once."""
    kv: KVShape
    levels: tuple[LevelInfo, ...]
    chunks: tuple[ChunkInfo, ...]

    @property
    def tokens(self) -> int:
        return self.chunks[-1].stop

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
        }

    @cached_property
    def wire(self) -> bytes:
        """As it travels: JSON without spaces."""
        return json.dumps(self.to_json(), allow_nan=False, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: object) -> Manifest:
        """Check and build. Raises SpecError naming the first field that is wrong."""
        body = _mapping(data, "manifest")
        if body.get("format") != FORMAT:
            raise SpecError(f"manifest: format is {body.get('format')!r}, this version reads {FORMAT}; store again")
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
        expected = 0
        for index, chunk in enumerate(chunks):
            if chunk.start != expected:
                raise SpecError(f"manifest: chunk {index} starts at token {chunk.start}, not {expected}; store again")
            expected = chunk.stop
        profile = body.get("profile")
        return cls(
            context=_text(body.get("context"), "context"),
            model=_text(body.get("model"), "model"),
            codec=_mapping(body.get("codec"), "codec"),
            profile=None if profile is None else _text(profile, "profile"),
            kv=shape,
            levels=levels,
            chunks=chunks,
        )


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


def _list(value: object, name: str, most: int) -> list[Any]:
    if not isinstance(value, list) or not 1 <= len(value) <= most:
        raise SpecError(f"manifest: {name} is not a list of 1 to {most} entries; store again")
    return value


def _integer(value: object, name: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise SpecError(f"manifest: {name} is {value!r}, not a whole number from {low} to {high}; store again")
    return value


def _number(value: object, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise SpecError(f"manifest: {name} is {value!r}, not a finite number of at least 0; store again")
    return float(value)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 256:
        raise SpecError(f"manifest: {name} is not a text of 1 to 256 characters; store again")
    return value
