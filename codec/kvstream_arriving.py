"""Chunks of `codec.kvstream` decoded on GPUs, whole or while they arrive, by one device or several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec import kvstream, kvstream_triton
from codec.api import Decoder
from codec.container import Arrival, Header
from codec.entropy import device as shared
from codec.entropy import escapes, rans_triton, sections
from codec.entropy.device import DeviceStreams
from codec.errors import CodecError
from codec.kvstream_triton import DeviceModel, Job
from codec.targets import CacheTarget, KVTarget, LayeredTarget, as_target

_MOST_BYTES_AN_ELEMENT = 8
"""A symbol takes a word at most; a stream of one symbol, two more and its length."""


@dataclass(eq=False)
class Share:
    """What one device does of a chunk: some of its layers, into a target of its own."""

    model: DeviceModel
    target: CacheTarget
    layers: range
    job: Job | None = None
    coef: Tensor | None = None
    """Room for the section `coef`, uint8."""
    streams: DeviceStreams | None = None

    def begin(self, header: Header) -> Job:
        """Raises CodecError where the chunk does not fit the target."""
        shape = (len(self.layers), *header.shape[1:])
        if header.layers != self.model.layers or self.layers.stop > header.layers or self.target.shape != shape:
            raise CodecError(f"chunk has shape {header.shape}, the target {self.target.shape} for {self.layers}")
        self.job = Job(self.model, header.level, header.positions, self.target, self.layers)
        return self.job

    def current(self) -> AbstractContextManager[object]:
        return shared.current(self.model.device)


def shares(codec: kvstream.KVStream, target: CacheTarget, layers: range | None = None) -> list[Share]:
    """One for each part of a `LayeredTarget`, else one. Raises CodecError for layers that the model has not."""
    if layers is None and target.shape[0] != codec.shape[0]:
        raise CodecError(f"the target has {target.shape[0]} layers, the profile's model {codec.shape[0]}")
    if not isinstance(target, LayeredTarget):
        return [Share(codec.on_device(target.device), target, _checked(layers, codec.shape[0]))]
    if layers is not None:
        raise CodecError("a target of several parts says itself which layers each takes")
    return [Share(codec.on_device(part.device), part, own) for part, own in target.shares()]


def _checked(layers: range | None, count: int) -> range:
    """The layers to decode of a chunk with `count`. Raises CodecError."""
    if layers is None:
        return range(count)
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= count:
        raise CodecError(f"{layers} are not consecutive layers of a model that has {count}")
    return layers


def decode(codec: kvstream.KVStream, header: Header, sections: dict[str, Any], target: CacheTarget) -> None:
    """Decode a chunk's sections `coef`, `fine` and `escs` (parsed), and wait for the device. Raises CodecError."""
    tokens, segment_tokens = header.tokens, kvstream.SEGMENT_TOKENS
    begun = shares(codec, target)
    for share in begun:
        with share.current():
            job = share.begin(header)
            if job.level.fine is not None:
                job.further_bits(rans_triton.upload(sections["fine"], job.level.fine, tokens, segment_tokens))
            job.escapes(sections["escs"])
            share.streams = rans_triton.upload(sections["coef"], job.level.tables, tokens, segment_tokens)
            job.coefficients(share.streams)
            job.values(0, tokens)
    for share in begun:
        assert share.job is not None
        assert share.streams is not None
        share.job.finish(share.streams)


class StreamingDecoder(Decoder):
    """Decodes a chunk's segments as they arrive; what is left after its last byte is one segment and its transform.

    Each device of a `LayeredTarget` decodes its own layers. Checksums are computed on the host as bytes come; a stream
    that was decoded before its section proved damaged has been decoded within bounds, and the chunk fails in `finish`.
    """

    def __init__(
        self, codec: kvstream.KVStream, out: KVTarget, device: torch.device | str, total_bytes: int | None = None,
        layers: range | None = None,
    ) -> None:  # fmt: skip
        self._codec, self._out = codec, out
        target, device = as_target(out), torch.empty(0, device=device).device
        if target.device != device:
            raise CodecError(f"the target lies on {target.device}, the decoder works on {device}")
        self._shares = shares(codec, target, layers)
        self._arrival = Arrival(total_bytes)
        self._ends: list[int] = []
        self._has_bits = self._has_escapes = False
        self._at = self._size = self._copied = 0
        self._has_begun = False
        self._error: Exception | None = None
        self.segments_begun = 0
        self.tokens_done = 0

    def feed(self, view: memoryview, on_device: Tensor | None = None) -> None:
        self._raise_again()
        try:
            self._feed(view, on_device)
        except Exception as error:
            self._error = error
            raise

    def _raise_again(self) -> None:
        """What went wrong once leaves a chunk half decoded: nothing may come of it."""
        if self._error is not None:
            raise self._error

    def _feed(self, view: memoryview, on_device: Tensor | None) -> None:
        before = self._arrival.received
        self._arrival.feed(view)
        header = self._arrival.header
        if header is None:
            return
        with torch.inference_mode():
            if not self._has_begun:
                self._has_begun = True
                self._begin(header)
            self._exceptions(header)
            self._copy(before, view, on_device)
            if not self._ends:
                self._parse_lengths(header)
            self._launch(header)

    def finish(self) -> KVTarget:
        self._raise_again()
        chunk = self._codec.check(self._arrival.finish())
        if not self._ends or self.segments_begun < len(self._ends):
            raise CodecError("the chunk ended before its coded coefficients did; fetch it again")
        with torch.inference_mode():
            self._transform(chunk.header)
            for share in self._shares:
                assert share.job is not None
                assert share.streams is not None
                with share.current():
                    share.job.finish(share.streams)
        return self._out

    def _begin(self, header: Header) -> None:
        self._codec.check_header(header)
        self._at, self._size = self._arrival.section("coef")
        if self._size > _MOST_BYTES_AN_ELEMENT * header.elements + 64:
            raise CodecError(
                f"section 'coef' claims {self._size} bytes for {header.elements} elements; fetch the chunk again"
            )
        for share in self._shares:
            with share.current():
                share.begin(header)
                # Whole words, and one of zeros behind them: kernels read ahead.
                share.coef = torch.zeros(self._size // 4 * 4 + 8, dtype=torch.uint8, device=share.model.device)

    def _jobs(self) -> Iterator[Job]:
        """The shares' jobs, each with its device current."""
        for share in self._shares:
            assert share.job is not None
            with share.current():
                yield share.job

    def _exceptions(self, header: Header) -> None:
        """Start on the further bits of wide columns and on the escapes as soon as they are there."""
        tokens = header.tokens
        if not self._has_bits and (part := self._whole("fine")) is not None:
            self._has_bits = True
            for job in self._jobs():
                if job.level.fine is not None:
                    job.further_bits(rans_triton.upload(part, job.level.fine, tokens, kvstream.SEGMENT_TOKENS))
        if not self._has_escapes and (part := self._whole("escs")) is not None:
            self._has_escapes = True
            escaped = escapes.parse(part, self._columns, tokens)
            for job in self._jobs():
                job.escapes(escaped)

    @property
    def _columns(self) -> int:
        layers, heads, dim = self._codec.shape
        return layers * 2 * heads * dim

    def _whole(self, tag: str) -> memoryview | None:
        """A section, once all of it is there."""
        at, size = self._arrival.section(tag)
        return self._arrival.part(at, size) if at + size <= self._arrival.received else None

    def _copy(self, before: int, view: memoryview, on_device: Tensor | None) -> None:
        """What of these bytes belongs to the coded coefficients goes to its place on the device."""
        first, last = max(self._at, before), min(self._at + self._size, before + len(view))
        if first >= last:
            return
        part = slice(first - before, last - before)
        if on_device is None:
            source = torch.from_numpy(np.array(view[part]))
        else:
            source = on_device[part]
        for share in self._shares:
            assert share.coef is not None
            with share.current():
                share.coef[first - self._at : last - self._at].copy_(source, non_blocking=True)
        self._copied = last - self._at

    def _parse_lengths(self, header: Header) -> None:
        """Once they are there: where every stream lies, and where each segment ends."""
        beginning = self._arrival.part(self._at, self._copied)
        columns = self._columns
        needed = sections.lengths_bytes(beginning, columns, header.tokens, kvstream.SEGMENT_TOKENS)
        if needed is not None and needed > self._size:
            raise CodecError("coded section is shorter than its stream lengths; fetch the chunk again")
        if needed is None or needed > self._copied:
            return
        layout = sections.layout(beginning, columns, header.tokens, 2, kvstream.SEGMENT_TOKENS, self._size)
        offsets = sections.stream_offsets(layout)
        for share in self._shares:
            assert share.coef is not None
            with share.current():
                share.streams = shared.on_device(share.coef, layout, columns, header.tokens)
        self._ends = (layout.units_at + 2 * offsets[columns::columns]).tolist()

    def _launch(self, header: Header) -> None:
        """Decode the segments that are there and were not decoded yet."""
        ready = self.segments_begun
        while ready < len(self._ends) and self._ends[ready] <= self._copied:
            ready += 1
        if ready > self.segments_begun:
            for share, job in zip(self._shares, self._jobs(), strict=True):
                assert share.streams is not None
                job.coefficients(share.streams, self.segments_begun, ready - self.segments_begun)
            self.segments_begun = ready
            self._transform(header)

    def _transform(self, header: Header) -> None:
        """Make values of the tokens whose coefficients are there, if all that they need is."""
        if not (self._has_bits and self._has_escapes):
            return
        tokens = self.segments_begun * min(kvstream.SEGMENT_TOKENS, header.tokens)
        if tokens < header.tokens:
            tokens -= tokens % kvstream_triton.SPAN
        tokens = min(tokens, header.tokens)
        if tokens > self.tokens_done:
            for job in self._jobs():
                job.values(self.tokens_done, tokens)
            self.tokens_done = tokens
