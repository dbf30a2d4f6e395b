"""The codec `kvstream` as others use it: what it checks, and who codes a chunk."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvstream.codec import container, uniform
from kvstream.codec.api import Codec, Decoder, Level, Setting, Shift
from kvstream.codec.container import Chunk, Header
from kvstream.codec.errors import CodecError
from kvstream.codec.kvstream import cpu, lossless, usual
from kvstream.codec.kvstream.escapes import UnlikeCalibration
from kvstream.codec.kvstream.parameters import CODEC_ID, Parameters
from kvstream.codec.profile import Profile
from kvstream.codec.targets import CacheTarget, KVTarget, as_target

if TYPE_CHECKING:
    from kvstream.codec.kvstream.triton_job import DeviceModel


MAX_TOKENS = 1 << 16
"""Escapes count a chunk's tokens in 16 bits."""
FALLBACK_BITS = 8
"""A chunk so unlike the calibration that it would take more is coded as codec `uniform` does with so many bits."""
SMALL_BYTES = 128
"""Room for what a short chunk takes beside its sinks."""
SECTIONS = ("kind", "apar", "escs", "fine", "coef")
FALLBACK_SECTIONS = ("scal", "bits")
LOSSLESS_SECTIONS = ("tabs", "cols", "rans", "kept")


class Form(Enum):
    """How a chunk is coded."""

    TRANSFORM = "with the model's transform"
    FALLBACK = "as codec `uniform` does"
    LOSSLESS = "to the bit"


ORDER = {Form.TRANSFORM: SECTIONS, Form.FALLBACK: FALLBACK_SECTIONS, Form.LOSSLESS: LOSSLESS_SECTIONS}
"""Sections in the order in which they must be: a decoder of arriving bytes needs the others before `coef`."""


class KVStream(Codec):
    """Sections `kind` (the columns' kinds), `apar` (tokens coded apart), `escs` (coefficients that no table can code),
    `fine` (rANS, the low bits of wide columns) and `coef` (rANS, the live columns in order (group, coefficient)); or
    those of codec `uniform`; at level `lossless` those of `kvstream.codec.kvstream.lossless`.

    `lossless=1` adds that level behind the profile's: about two thirds of the bytes of 16-bit numbers, and so no step
    of the ladder that a controller should climb unasked.
    """

    codec_id = CODEC_ID
    needs_profile = True
    verifies_late = True
    fit_takes = frozenset({"rope", "sensitivity", "sinks", "held_out", "say"})

    def __init__(self, *, lossless: int = 0, profile: Profile | None = None) -> None:
        super().__init__(profile=profile)
        assert self.profile is not None
        if lossless not in (0, 1):
            raise CodecError(f"codec {CODEC_ID}: lossless={lossless!r} must be 0 or 1")
        self.has_lossless = bool(lossless)
        self.parameters = Parameters.of(self.profile)
        steps = zip(self.parameters.level_names, self.parameters.steps, strict=True)
        lossy = tuple(Level(name, {"step": float(step)}) for name, step in steps)
        self.levels = (*lossy, Level("lossless")) if self.has_lossless else lossy
        self._on_device: dict[torch.device, DeviceModel] = {}

    def settings(self) -> dict[str, Setting]:
        return {"lossless": int(self.has_lossless)}

    @classmethod
    def fit(cls, kv_samples: Iterable[Tensor], *, metadata: Mapping[str, Any], **of_model: Any) -> Profile:
        from kvstream.codec.kvstream.fitting import fit

        caches = [kv.to("cpu", torch.bfloat16) for kv in kv_samples]
        return fit(caches, metadata=metadata, **of_model)

    def on_device(self, device: torch.device) -> DeviceModel:
        """The parameters on a GPU, kept there. Raises CodecError where Triton is missing."""
        device = torch.empty(0, device=device).device  # "cuda" means the current one
        if device not in self._on_device:
            try:
                from kvstream.codec.kvstream.triton_job import DeviceModel
            except ImportError as error:
                raise CodecError(
                    f"coding on {device} needs Triton, which is not installed: pip install triton"
                ) from error
            self._on_device[device] = DeviceModel(self.parameters, device)
        return self._on_device[device]

    def decoder(
        self, out: KVTarget, *, device: torch.device | str = "cpu", total_bytes: int | None = None,
        layers: range | None = None,
    ) -> Decoder:  # fmt: skip
        if not self.decodes_pieces(device):
            return super().decoder(out, device=device, total_bytes=total_bytes, layers=layers)
        from kvstream.codec.kvstream.streaming import StreamingDecoder, shares

        device = torch.empty(0, device=device).device
        return StreamingDecoder(self, out, shares(self.on_device, as_target(out), device, layers), total_bytes)

    def decodes_pieces(self, device: torch.device | str) -> bool:
        return torch.device(device).type == "cuda"

    def is_lossless(self, level: int) -> bool:
        return self.has_lossless and level == len(self.levels) - 1

    def form(self, header: Header, sections: Container[str]) -> Form:
        """How a chunk with this header and sections of these tags is coded."""
        if self.is_lossless(header.level):
            return Form.LOSSLESS
        return Form.FALLBACK if "bits" in sections else Form.TRANSFORM

    def check_header(self, header: Header) -> None:
        super().check_header(header)
        self._check_shape(header)

    def _shift(self, chunk: Chunk) -> Shift | None:
        return None if self.is_lossless(chunk.header.level) else usual.shift(self.parameters, chunk)

    def _describe(self, chunk: Chunk) -> dict[str, Any]:
        header = chunk.header
        form = self.form(header, chunk.sections)
        if form is Form.LOSSLESS:
            return {"lossless": True, "fallback": False} | lossless.describe(chunk)
        if form is Form.FALLBACK:
            return {"lossless": False, "fallback": True}
        content = cpu.Content.of(self.parameters, chunk)
        bits = []
        for group in self.parameters.groups:
            part = slice(*np.searchsorted(content.rest.alive, (group.columns.start, group.columns.stop)))
            words = 0
            if content.streams is not None:
                ends = content.streams.offsets
                for segment in range(content.streams.segments):
                    first = segment * content.streams.columns
                    words += int(ends[first + part.stop] - ends[first + part.start])
            share = len(group.layers) / header.layers
            bits.append(16 * words / (header.elements * share))
        return {
            "lossless": False,
            "fallback": False,
            "bits_by_group": bits,
            "group_layers": len(self.parameters.groups[0].layers),
            "live_columns": len(content.rest.alive),
            "columns": header.elements // header.tokens,
            "wide_columns": int(np.count_nonzero(content.rest.shift)),
            "escapes": len(content.rest.escapes),
            "tokens_apart": len(content.rest.apart.tokens),
        }

    def _encode(self, kv: Tensor, level: int, header: Header) -> Mapping[str, bytes | memoryview]:
        self._check_shape(header)
        if header.tokens > MAX_TOKENS:
            raise CodecError(f"a chunk has at most {MAX_TOKENS} tokens, not {header.tokens}; cut it")
        if self.is_lossless(level):
            return lossless.encode(kv)
        try:
            sections = self._transformed(kv, level, header)
            size = sum(map(len, sections.values()))
            # A cache that never changes would take less than what a container believes.
            if header.elements / container.MAX_EXPANSION <= size <= self._most_bytes(header):
                return sections
        except UnlikeCalibration:
            pass
        return uniform.encode_bits(kv, FALLBACK_BITS)

    def _most_bytes(self, header: Header) -> float:
        """What a chunk with the transform may take: 8 bits an element; however short it is, its sinks may take more."""
        sinks = max(0, min(self.parameters.sinks - header.start, header.tokens))
        if sinks in (0, header.tokens):
            return header.elements * FALLBACK_BITS / 8
        share = sinks / header.tokens
        exact = header.elements * share * container.DTYPE_BYTES[header.dtype]
        return header.elements * (1 - share) * FALLBACK_BITS / 8 + exact + SMALL_BYTES

    def _transformed(self, kv: Tensor, level: int, header: Header) -> Mapping[str, bytes | memoryview]:
        if not kv.is_cuda:
            return cpu.encode(self.parameters, kv, level, header.positions)
        from kvstream.codec.kvstream import triton_encode

        return triton_encode.encode(self.on_device(kv.device), kv, level, header.positions)

    def _decode(self, chunk: Chunk, target: CacheTarget) -> None:
        form = self.form(chunk.header, chunk.sections)
        if form is Form.TRANSFORM and target.device.type == "cuda":
            from kvstream.codec.kvstream import streaming

            streaming.decode(streaming.shares(self.on_device, target, target.device), chunk)
        elif form is Form.LOSSLESS and target.device.type == "cuda":
            from kvstream.codec.kvstream import lossless_triton

            lossless_triton.decode(chunk, target)
        elif form is Form.LOSSLESS:
            lossless.decode(chunk.verify(), target)
        elif form is Form.FALLBACK:
            uniform.decode_bits(chunk.verify(), FALLBACK_BITS, target)
        else:
            cpu.decode(self.parameters, chunk.verify(), target)

    def _check_chunk(self, chunk: Chunk) -> None:
        form = self.form(chunk.header, chunk.sections)
        if tuple(chunk.sections) != ORDER[form]:
            raise CodecError(f"chunk has no sections {', '.join(ORDER[form])} in this order; encode again")
        if form is Form.FALLBACK:
            uniform.check_bits(chunk, FALLBACK_BITS)

    def _check_shape(self, header: Header) -> None:
        shape = (header.layers, header.heads, header.head_dim)
        if shape != self.parameters.shape:
            raise CodecError(
                f"the cache has (layers, heads, head_dim) {shape}, the profile's model {self.parameters.shape}"
            )
