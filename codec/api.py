"""The contract of a codec: levels, encode, decode, a configuration that rebuilds it.

`Codec` checks everything that all codecs share (shapes, dtypes, positions, the container, the profile's hash), so
that a codec itself is two methods: `_encode` makes sections of a chunk, `_decode` reads them into a target.
"""

from __future__ import annotations

import inspect
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from kvstream.codec import container
from kvstream.codec.container import Chunk, Header
from kvstream.codec.errors import CodecError
from kvstream.codec.targets import DTYPES, CacheTarget, KVTarget, as_target

if TYPE_CHECKING:
    from kvstream.codec.profile import Profile

Setting = str | int | float
LARGEST_MAGNITUDE = 1e30
"""Lossy codecs refuse larger magnitudes: their squares and products would overflow float32."""


@dataclass(frozen=True)
class Level:
    """One encoding of a chunk: a short name and the settings that define it."""

    name: str
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Shift:
    """How far a chunk, or several, lie from the text for which a codec was calibrated; all per element."""

    bits: float
    expected_bits: float
    """What chunks of such lengths and levels take of the calibration's text."""
    escapes: float
    """Coefficients that no table could code."""
    expected_escapes: float

    @property
    def times(self) -> float:
        """The bits over those expected."""
        return self.bits / max(self.expected_bits, 1e-9)


class Decoder(ABC):
    """One chunk, decoded while it arrives: `feed` with its bytes in order, then `finish`.

    No decoded value may be used before `finish` has returned. A decoder may be dropped at any time, and has then
    written part of its target.
    """

    @abstractmethod
    def feed(self, view: memoryview, source: Tensor | None = None) -> None:
        """The chunk's next bytes, in memory that stays unchanged until `finish` has returned.

        `source` holds the same bytes as uint8 in memory from which the device copies without waiting: page-locked, or
        its own, valid once the work queued on the current stream is done. Raises CodecError as soon as the bytes so far
        cannot be a chunk.
        """

    @property
    def only_waits(self) -> bool:
        """Whether all work is queued on a device, and `finish` only waits for it and checks. What is queued meanwhile
        is not waited for."""
        return False

    @abstractmethod
    def finish(self) -> KVTarget:
        """After the last byte: the target, complete once the work queued on the current stream is done. Raises
        CodecError as `Codec.decode` does."""


class CollectingDecoder(Decoder):
    """Decodes the whole chunk once all bytes have come: for codecs that cannot do better."""

    def __init__(self, codec: Codec, out: KVTarget, device: torch.device | str) -> None:
        self._codec, self._out, self._device = codec, out, device
        self._views: list[memoryview] = []

    def feed(self, view: memoryview, source: Tensor | None = None) -> None:
        self._views.append(view)

    def finish(self) -> KVTarget:
        data = self._views[0] if len(self._views) == 1 else b"".join(self._views)
        return self._codec.decode(data, self._out, device=self._device)


def check_finite(kv: Tensor, what: str, then: str = "") -> None:
    """Raises CodecError for NaN, infinities and magnitudes above 1e30."""
    low, high = torch.stack(torch.aminmax(kv)).tolist()
    if not (low >= -LARGEST_MAGNITUDE and high <= LARGEST_MAGNITUDE):
        raise CodecError(
            f"{what} holds NaN, infinities or magnitudes above {LARGEST_MAGNITUDE:g} (range {low:g} to {high:g}){then}"
        )


def name_and_settings(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Of a codec's configuration, which is untrusted. Raises CodecError."""
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
    verifies_late: ClassVar[bool] = False
    """Whether `_decode` gets chunks whose checksums are not compared yet, and compares them itself
    (`Chunk.verify`), while a device already works."""
    fit_takes: ClassVar[frozenset[str]] = frozenset()
    """What `fit` takes beside caches, as keyword arguments: `rope`, the model's rotary embedding
    (`transform.Rope` or None); `sensitivity`, what an error costs (`[L, 2, H, D, D]`); `sinks`, how many first tokens
    are attention sinks; `held_out`, caches of text that the samples do not have; `say`, which takes a line about what
    goes on."""

    levels: Sequence[Level]
    profile: Profile | None = None

    def __init__(self, *, profile: Profile | None = None) -> None:
        if self.needs_profile and profile is None:
            raise CodecError(f"codec {self.codec_id} needs a profile of the model: run 'kvstream codec calibrate'")
        self.profile = profile if self.needs_profile else None

    @classmethod
    def fit(cls, kv_samples: Iterable[Tensor], *, metadata: Mapping[str, Any], **of_model: Any) -> Profile:
        """A profile for one model, from caches `[L, 2, T, H, D]` of contexts that begin at position 0.

        What `kvstream codec calibrate` calls for a codec that needs a profile. The samples are computed lazily,
        once; `metadata` names the model and goes into the profile's, next to `codec`; `of_model` is what `fit_takes`
        asks for.
        """
        raise CodecError(
            f"codec {cls.codec_id} cannot be calibrated: its class has no method fit(kv_samples, *, metadata), "
            "described in docs/howto/own-codec.md"
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
        """The codec with these of the constructor's settings. Raises CodecError listing those that it has."""
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
            raise CodecError(f"the configuration is for codec {name!r}, not {cls.codec_id!r}")
        codec = cls.of_settings(settings, profile)
        if config.get("profile_sha256") != codec.profile_sha256:
            raise CodecError(
                f"the configuration needs profile {config.get('profile_sha256')}, but was given {codec.profile_sha256}"
            )
        return codec

    def encode(self, kv: Tensor, level: int, *, positions: range) -> bytes:
        """Encode one chunk.

        `kv` is `[L, 2, T, H, D]` (bfloat16, float16 or float32, any strides), `positions` the absolute positions of
        its T tokens (consecutive). Raises CodecError for anything else, and for NaN, infinities and magnitudes above
        1e30 unless the codec is lossless.
        """
        level = self._check_level(level)
        if not isinstance(kv, Tensor):
            raise CodecError(f"encode takes a tensor, not {type(kv).__name__}; codec.layouts makes tensors of caches")
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
            if not self.is_lossless(level):
                check_finite(kv.detach(), "the KV cache", f"; codec {self.codec_id} refuses them, use codec raw")
            return container.pack(header, self._encode(kv.detach(), level, header))

    def decode(
        self, data: bytes | bytearray | memoryview | Tensor, out: KVTarget | None = None, *,
        device: torch.device | str = "cpu",
    ) -> KVTarget:  # fmt: skip
        """Decode one chunk into `out`, or into a new contiguous tensor `[L, 2, T, H, D]` of the encoded dtype.

        Returns `out` or that tensor. Raises CodecError for bytes that this codec with this profile did not write;
        `out` may then be partly written. Bytes behind the chunk are refused too: a buffer that was padded is cut first,
        `decode(data[: container.length_of(data)])`.
        """
        chunk = self.check(container.split(data) if self.verifies_late else container.parse(data))
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

        `total_bytes` is the chunk's size where it is known independently, for instance from a manifest: a chunk that
        claims another size is then refused before memory is allocated for it. `layers` are those that `out` has, where
        it is only part of the cache, for instance one of several GPUs'; only codecs that decode in pieces support that.
        """
        if layers is not None:
            raise CodecError(f"codec {self.codec_id} decodes all layers at once on {device}; omit layers")
        return CollectingDecoder(self, out, device)

    def decodes_pieces(self, device: torch.device | str) -> bool:
        """Whether `decoder` starts decoding on such a device before the last piece has come."""
        return False

    def describe(self, data: bytes | bytearray | memoryview | Tensor) -> dict[str, Any]:
        """What a chunk of this codec holds, as plain values: `container.inspect`, plus what only the codec knows.

        Codecs with coded columns add `bits_by_layer`, bits per element of each layer's keys and values, and
        `ideal_bits_per_element`, the size under ideal coding with the same tables.
        """
        return container.inspect(data) | self._describe(self._open(data))

    def shift(self, data: bytes | bytearray | memoryview | Tensor) -> Shift | None:
        """How far a chunk of this codec lies from what it was calibrated for: far from it, a level loses more than its
        distortion says. None where the codec, its profile or the level has no expectation. Reads no coefficient.
        """
        return self._shift(self._open(data))

    def _shift(self, chunk: Chunk) -> Shift | None:
        """`shift` of a checked chunk."""
        return None

    def _open(self, data: bytes | bytearray | memoryview | Tensor) -> Chunk:
        """Parse a chunk; as `check`."""
        return self.check(container.parse(data))

    def check(self, chunk: Chunk) -> Chunk:
        """The chunk, if this codec with this profile can have written it. Raises CodecError."""
        self.check_header(chunk.header)
        self._check_chunk(chunk)
        return chunk

    def check_header(self, header: Header) -> None:
        """Raises CodecError unless the header is of this codec with this profile."""
        if header.codec_id != self.codec_id:
            raise CodecError(f"chunk was written by codec {header.codec_id}, this is {self.codec_id}")
        if header.profile_sha256 != self.profile_sha256:
            raise CodecError(f"chunk needs profile {header.profile_sha256}, this codec has {self.profile_sha256}")
        self._check_level(header.level)

    def _describe(self, chunk: Chunk) -> dict[str, Any]:
        """What `describe` adds for this codec."""
        return {}

    def is_lossless(self, level: int) -> bool:
        """Whether a level keeps every bit, NaN and infinities included."""
        return self.lossless

    def _check_level(self, level: int) -> int:
        """The level as an `int`, whichever integer it is: any `argmax` gives one of NumPy's. Raises CodecError."""
        try:
            number = -1 if isinstance(level, bool) else operator.index(level)
        except TypeError:
            number = -1
        if not 0 <= number < len(self.levels):
            names = ", ".join(f"{i} ({x.name})" for i, x in enumerate(self.levels))
            raise CodecError(f"codec {self.codec_id} has no level {level!r:.80}; choose from {names}")
        return number

    def _check_chunk(self, chunk: Chunk) -> None:
        """Check section lengths against the header before allocating what the header claims."""
        return None

    @abstractmethod
    def _encode(self, kv: Tensor, level: int, header: Header) -> Mapping[str, bytes | memoryview]:
        """Sections (tag of at most four ASCII characters, content) of a checked tensor."""

    @abstractmethod
    def _decode(self, chunk: Chunk, target: CacheTarget) -> None:
        """Write the chunk into a target of the header's shape."""
