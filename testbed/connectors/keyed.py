"""Chunks as values of a key–value store that knows neither positions nor shapes: those of other systems' caches.

A value is a seal, 32 bytes that follow from the key, and an encoded chunk. So a value under the wrong key is refused
like a damaged one, and a buffer may be longer than what it holds. The chunk's header has its position, which decoding
needs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvstream.codec import container, registry
from kvstream.codec.errors import CodecError
from kvstream.codec.profile import Profile
from kvstream.testbed.config.build import codec_spec

if TYPE_CHECKING:
    from torch import Tensor

    from kvstream.codec.api import Codec
    from kvstream.codec.targets import KVTarget

_SEAL_BYTES: Final = 32
MARGIN_BYTES: Final = 1 << 16
"""What a value may have beyond the cache's own bytes."""


@dataclass(frozen=True)
class KeyedCodec:
    """A codec at one level."""

    codec: Codec
    level: int

    @classmethod
    def of(cls, settings: dict[str, Any]) -> KeyedCodec:
        """From `codec` (`kvstream` by default, with settings), `level` (the highest by default), `profile` (a file, for
        codecs that need one) and `model` (the engine's, a folder or name: a profile of another model is refused, which
        would code its caches at several times the bits or the distortion). Raises SpecError or CodecError."""
        name, given = codec_spec(str(settings.get("codec", "kvstream")))
        path, model = settings.get("profile"), settings.get("model")
        profile = None if path is None else Profile.load(Path(str(path)))
        if profile is not None and model is not None:
            from kvstream.testbed.engine.loading import fingerprint_of

            profile.check_model(fingerprint_of(str(model)))
        codec = registry.make(name, given, profile)
        level = settings.get("level", len(codec.levels) - 1)
        if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < len(codec.levels):
            raise CodecError(f"level is {level!r}; codec {name} has levels 0 to {len(codec.levels) - 1}")
        return cls(codec, level)

    def encode(self, kv: Tensor, key: bytes, start: int | None, candidates: Iterable[int] = ()) -> bytes:
        """The value for `kv` `[L, 2, T, H, D]`, whose first token is at `start` or, where that is not known, at one of
        the candidates. Raises CodecError."""
        at = self._start(kv, candidates) if start is None else start
        data = self.codec.encode(kv, self.level, positions=range(at, at + kv.shape[2]))
        return _seal(key) + data

    def decode(self, value: memoryview, key: bytes, out: KVTarget) -> None:
        """Into `out`. Raises CodecError for a value that is damaged or another key's; `out` may then be partly
        written."""
        if value[:_SEAL_BYTES] != _seal(key):
            raise CodecError("the value was not stored under this key")
        chunk = value[_SEAL_BYTES:]
        self.codec.decode(chunk[: container.length_of(chunk)], out)

    def _start(self, kv: Tensor, candidates: Iterable[int]) -> int:
        """Positions matter to codecs that rotate keys back, and are found from the keys themselves."""
        from kvstream.codec.kvstream.codec import KVStream
        from kvstream.codec.kvstream.start import find_start

        if not isinstance(self.codec, KVStream) or self.codec.parameters.rope is None:
            return 0
        return find_start(self.codec, kv, candidates)


def _seal(key: bytes) -> bytes:
    return hashlib.sha256(b"kvstream value 1\0" + key).digest()
