"""The contract of a codec: levels, encode, decode, a configuration that rebuilds it.

`Codec` checks everything that all codecs share (shapes, dtypes, positions, the container, the profile's hash), so
that a codec itself is two methods: `_encode` makes sections of a chunk, `_decode` reads them into a target.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from codec import container
from codec.container import Chunk, Header
from codec.errors import CodecError
from codec.targets import DTYPES, CacheTarget, KVTarget, as_target

if TYPE_CHECKING:
    from codec.profile import Profile

Setting = str | int | float
LARGEST_MAGNITUDE = 1e30
"""Lossy codecs refuse larger magnitudes: their squares and products would leave float32."""


@dataclass(frozen=True)
class Level:
    """One encoding of a chunk: a short name and the settings that define it."""

    name: str
    settings: Mapping[str, Setting] = field(default_factory=dict)


class Decoder(ABC):
    """One chunk, decoded while it arrives: `feed` with its bytes in order, then `finish`.

    Nothing that was decoded may be used before `finish` returned; a decoder that is not finished may be dropped at any
    time, and has then written some of its target.
    """

    @abstractmethod
    def feed(self, view: memoryview, on_device: Tensor | None = None) -> None:
        """The chunk's next bytes, in memory that stays as it is until `finish` returned.

        `on_device` are the same bytes as uint8 in the device's memory, there as soon as what the current stream holds
        is done. Raises CodecError as soon as what came cannot be a chunk.
        """

    @abstractmethod
    def finish(self) -> KVTarget:
        """Every byte was fed: the target, complete once what the current stream holds is done. Raises CodecError as
        `Codec.decode` does."""


class CollectingDecoder(Decoder):
    """Decodes as a whole when all bytes are there: for codecs that have no better way."""

    def __init__(self, codec: Codec, out: KVTarget, device: torch.device | str) -> None:
        self._codec, self._out, self._device = codec, out, device
        self._views: list[memoryview] = []

    def feed(self, view: memoryview, on_device: Tensor | None = None) -> None:
        self._views.append(view)

    def finish(self) -> KVTarget:
        data = self._views[0] if len(self._views) == 1 else b"".join(self._views)
        return self._codec.decode(data, self._out, device=self._device)


def check_finite(kv: Tensor, what: str, then: str = "") -> None:
    """Raises CodecError for NaN, infinities and magnitudes above 1e30."""
    low, high = (float(x) for x in torch.aminmax(kv))
    if not (low >= -LARGEST_MAGNITUDE and high <= LARGEST_MAGNITUDE):
        raise CodecError(
            f"{what} holds NaN, infinities or magnitudes above {LARGEST_MAGNITUDE:g} (range {low:g} to {high:g}){then}"
        )


def name_and_settings(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Of a codec's configuration, which may come from anywhere. Raises CodecError."""
    if isinstance(config, Mapping):
        name, settings = config.get("codec"), config.get("settings", {})
        if isinstance(name, str) and isinstance(settings, Mapping):
            return name, settings
    raise CodecError("a codec's configuration is an object with 'codec' (a name) and 'settings' (an object)")


class Codec(ABC):
    """Encodes chunks of one model's KV cache at several levels; level 0 is the smallest."""

    codec_id: ClassVar[str]
    """Name in the registry and in every chunk's header; at most 16 ASCII characters."""
    lossless: ClassVar[bool] = False
    """Lossless codecs keep NaN and infinities; the others refuse them."""
    needs_profile: ClassVar[bool] = False

    levels: Sequence[Level]
    profile: Profile | None = None

    def __init__(self, *, profile: Profile | None = None) -> None:
        if self.needs_profile and profile is None:
            raise CodecError(f"codec {self.codec_id} needs a profile of the model: run 'kvstream codec calibrate'")
        self.profile = profile if self.needs_profile else None

    @classmethod
    def fit(cls, kv_samples: Iterable[Tensor], *, metadata: Mapping[str, Any]) -> Profile:
        """A profile for one model, from caches `[L, 2, T, H, D]` of contexts that begin at position 0.

        What `kvstream codec calibrate` calls for a codec that needs a profile. The samples are computed as they are
        asked for, once; `metadata` names the model and goes into the profile's, beside `codec`.
        """
        raise CodecError(
            f"codec {cls.codec_id} cannot be calibrated: its class has no method fit(kv_samples, *, metadata), "
            "which docs/howto/own-codec.md describes"
        )

    @property
    def profile_sha256(self) -> str | None:
        """Content hash of the profile, or None for a codec that needs none."""
        return None if self.profile is None else self.profile.sha256

    def settings(self) -> dict[str, Setting]:
        """The constructor's settings, profile excepted."""
        return {}

    def get_config(self) -> dict[str, Any]:
        """A JSON object from which `from_config` rebuilds this codec, given its profile."""
        return {"codec": self.codec_id, "settings": self.settings(), "profile_sha256": self.profile_sha256}

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any], profile: Profile | None = None) -> Self:
        """The codec with these of the constructor's settings. Raises CodecError naming those that it has."""
        known = [name for name in inspect.signature(cls).parameters if name != "profile"]
        for key in settings:
            if key not in known:
                raise CodecError(f"codec {cls.codec_id} has no setting {key!r}; it has {', '.join(known) or 'none'}")
        return cls(profile=profile, **settings)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], profile: Profile | None = None) -> Self:
        """Rebuild a codec. Raises CodecError if the configuration is another codec's or names another profile."""
        name, settings = name_and_settings(config)
        if name != cls.codec_id:
            raise CodecError(f"configuration is for codec {name!r}, not {cls.codec_id!r}")
        codec = cls.of_settings(settings, profile)
        if config.get("profile_sha256") != codec.profile_sha256:
            raise CodecError(
                f"configuration needs profile {config.get('profile_sha256')}, given was {codec.profile_sha256}"
            )
        return codec

    def encode(self, kv: Tensor, level: int, *, positions: range) -> bytes:
        """Encode one chunk.

        `kv` is `[L, 2, T, H, D]` (bfloat16, float16 or float32, any strides), `positions` the absolute positions of
        its T tokens (consecutive). Raises CodecError for anything else, and for NaN, infinities and magnitudes above
        1e30 unless the codec is lossless.
        """
        self._check_level(level)
        if not isinstance(kv, Tensor):
            raise CodecError(f"what is encoded is a tensor, not {type(kv).__name__}; codec.layouts has views of caches")
        if kv.dim() != 5 or kv.shape[1] != 2 or 0 in kv.shape:
            raise CodecError(f"a KV tensor is [layers, 2, tokens, heads, head_dim], not {tuple(kv.shape)}")
        dtype = str(kv.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise CodecError(f"a KV tensor is bfloat16, float16 or float32, not {dtype}")
        if not isinstance(positions, range) or positions.step != 1 or len(positions) != kv.shape[2]:
            raise CodecError(f"positions must be a range of {kv.shape[2]} consecutive tokens, not {positions!r}")
        layers, _, tokens, heads, head_dim = kv.shape
        header = Header(
            self.codec_id, level, positions.start, layers, tokens, heads, head_dim, dtype, self.profile_sha256
        )
        with torch.inference_mode():
            if not self.lossless:
                check_finite(kv.detach(), "the KV cache", f"; codec {self.codec_id} refuses them, use codec raw")
            return container.pack(header, self._encode(kv.detach(), level, header))

    def decode(
        self, data: bytes | bytearray | memoryview | Tensor, out: KVTarget | None = None, *,
        device: torch.device | str = "cpu",
    ) -> KVTarget:  # fmt: skip
        """Decode one chunk into `out`, or into a new contiguous tensor `[L, 2, T, H, D]` of the encoded dtype.

        Returns `out` or that tensor. Raises CodecError for bytes that this codec with this profile did not write:
        then `out` may be partly written.
        """
        chunk = self._open(data)
        header = chunk.header
        if out is None:
            out = torch.empty(header.shape, dtype=DTYPES[header.dtype], device=device)
        target = as_target(out)
        if target.shape != header.shape:
            raise CodecError(f"chunk has shape {header.shape}, the target {target.shape}")
        with torch.inference_mode():
            self._decode(chunk, target)
        return out

    def decoder(
        self, out: KVTarget, *, device: torch.device | str = "cpu", total_bytes: int | None = None,
        layers: range | None = None,
    ) -> Decoder:  # fmt: skip
        """A decoder of one chunk into `out`, to be fed with its bytes as they arrive.

        `total_bytes` is the chunk's size where that is known otherwise than from the chunk, from a manifest say: what
        claims another size is then refused before memory is taken for it. `layers` are those that `out` has, where it
        is a part of the cache, for instance that of one of several GPUs; who decodes in pieces can do that.
        """
        if layers is not None:
            raise CodecError(f"codec {self.codec_id} decodes all layers at once on {device}; leave layers out")
        return CollectingDecoder(self, out, device)

    def decodes_pieces(self, device: torch.device | str) -> bool:
        """Whether `decoder` begins with the first piece on such a device, rather than with the last."""
        return False

    def describe(self, data: bytes | bytearray | memoryview | Tensor) -> dict[str, Any]:
        """What a chunk of this codec holds, as plain values: `container.inspect`, and what only the codec can tell.

        Codecs with coded columns add `bits_by_layer`, bits per element of each layer's keys and values, and
        `ideal_bits_per_element`, what ideal coding under the same tables would take.
        """
        return container.inspect(data) | self._describe(self._open(data))

    def _open(self, data: bytes | bytearray | memoryview | Tensor) -> Chunk:
        """Parse a chunk and check that it is this codec's, of its profile, and in proportion."""
        return self.check(container.parse(data))

    def check(self, chunk: Chunk) -> Chunk:
        """The chunk, if it is this codec's, of its profile, and in proportion. Raises CodecError."""
        self.check_header(chunk.header)
        self._check_chunk(chunk)
        return chunk

    def check_header(self, header: Header) -> None:
        """Raises CodecError unless this codec with this profile wrote what has this header."""
        if header.codec_id != self.codec_id:
            raise CodecError(f"chunk was written by codec {header.codec_id}, this is {self.codec_id}")
        if header.profile_sha256 != self.profile_sha256:
            raise CodecError(f"chunk needs profile {header.profile_sha256}, this codec has {self.profile_sha256}")
        self._check_level(header.level)

    def _describe(self, chunk: Chunk) -> dict[str, Any]:
        """What `describe` adds for this codec."""
        return {}

    def _check_level(self, level: int) -> None:
        if not isinstance(level, int) or not 0 <= level < len(self.levels):
            names = ", ".join(f"{i} ({x.name})" for i, x in enumerate(self.levels))
            raise CodecError(f"codec {self.codec_id} has no level {level!r}; it has {names}")

    def _check_chunk(self, chunk: Chunk) -> None:
        """Check section lengths against the header before anything of the header's size is allocated."""
        return None

    @abstractmethod
    def _encode(self, kv: Tensor, level: int, header: Header) -> dict[str, bytes]:
        """Sections (tag of at most four ASCII characters, content) of a checked tensor."""

    @abstractmethod
    def _decode(self, chunk: Chunk, target: CacheTarget) -> None:
        """Write the chunk into a target of the header's shape."""
