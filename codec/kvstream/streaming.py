"""Chunks decoded on GPUs, whole or while they arrive, by one device or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.api import Codec, Decoder
from kvstream.codec.container import Arrival, Chunk, Header
from kvstream.codec.entropy import device as shared
from kvstream.codec.entropy import sections
from kvstream.codec.entropy.device import DeviceStreams
from kvstream.codec.entropy.sections import Layout
from kvstream.codec.errors import CodecError
from kvstream.codec.kvstream.parameters import Parameters
from kvstream.codec.kvstream.rest import Rest
from kvstream.codec.kvstream.triton_job import DeviceModel, Job
from kvstream.codec.targets import CacheTarget, KVTarget, LayeredTarget, SomeLayers

_MAX_BYTES_PER_ELEMENT = 8
"""A symbol takes at most one word; a stream of a single symbol, two more and its length."""


@dataclass(eq=False)
class Share:
    """What one device decodes of a chunk: some of its layers, into a target of its own."""

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


def shares(
    on_device: Callable[[torch.device], DeviceModel], target: CacheTarget, device: torch.device,
    layers: range | None = None,
) -> list[Share]:  # fmt: skip
    """One for each part of a `LayeredTarget`, else one.

    `on_device` gives the codec's parameters on a device; `layers` are those that `target` has, where it has not all.
    Raises CodecError for a target that is not on `device`, and for layers that the model does not have.
    """
    if target.device != device:
        raise CodecError(f"the target is on {target.device}, the decoder works on {device}")
    model = on_device(device)
    if layers is None and target.shape[0] != model.layers:
        raise CodecError(f"the target has {target.shape[0]} layers, the profile's model {model.layers}")
    if not isinstance(target, LayeredTarget):
        return [Share(model, target, _checked(layers, model.layers))]
    if layers is not None:
        raise CodecError("a target of several parts defines the layers of each; omit layers")
    return [Share(on_device(part.device), part, own) for part, own in target.shares()]


def _checked(layers: range | None, count: int) -> range:
    """The layers to decode of a chunk with `count`. Raises CodecError."""
    if layers is None:
        return range(count)
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= count:
        raise CodecError(f"{layers} is not a range of consecutive layers of a model with {count}")
    return layers


def decode(begun: list[Share], chunk: Chunk) -> None:
    """Decode a whole chunk, whose checksums are not compared yet, and wait for the devices. Raises CodecError.

    The checksum of the coefficients is computed while the devices work: damaged ones are decoded within bounds, and
    refused at the end.
    """
    header = chunk.header
    coef = chunk.section("coef")
    for share in begun:
        with share.current():
            share.coef = shared.stage(coef, share.model.device)
    chunk.verify(*(tag for tag in chunk.sections if tag != "coef"))
    rest = Rest.of(begun[0].model.parameters, header, chunk.section)
    _check_streams(rest, len(coef))
    try:
        _launch_all(begun, header, rest, coef)
    except CodecError:
        chunk.verify("coef")  # says it better
        raise
    chunk.verify("coef")
    _finish(begun)


def _launch_all(begun: list[Share], header: Header, rest: Rest, coef: memoryview) -> None:
    columns, tokens = len(rest.alive), header.tokens
    layout = sections.layout(coef, columns, tokens, 2, Parameters.segment_tokens) if columns else None
    offsets = shared.stream_offsets(layout) if layout else None
    for share in begun:
        assert share.coef is not None
        with share.current():
            job = share.begin(header)
            job.begin(rest, offsets)
            if layout is not None and offsets is not None:
                job.coefficients(job.streams(share.coef, layout, offsets))
            job.add_extras()
            job.values(0, tokens)
            job.end()


def _check_streams(rest: Rest, nbytes: int) -> None:
    if nbytes and not len(rest.alive):
        raise CodecError("section 'coef' holds streams of no column; fetch the chunk again")


def _finish(begun: list[Share]) -> None:
    for share in begun:
        assert share.job is not None
        with share.current():
            share.job.finish()


@cache
def _checking() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="checksums")


class State(Enum):
    """What a streaming decoder waits for."""

    HEADER = "the chunk's header"
    REST = "the sections before `coef`"
    LENGTHS = "the lengths of the coded streams, at the beginning of `coef`"
    SEGMENTS = "the segments of `coef`, each decoded once it is complete"
    END = "the last byte of a chunk coded without the transform"


class StreamingDecoder(Decoder):
    """Decodes a chunk's segments as they arrive; after the last byte only one segment and its transform are left.

    Each share decodes its own layers. What comes before `coef` is small and is read at once; bytes of `coef` go to the
    devices as they come. Checksums are computed on the host as bytes come: a stream decoded before its section proved
    damaged was decoded within bounds, and the chunk fails in `finish`.
    """

    def __init__(self, codec: Codec, out: KVTarget, shares: list[Share], total_bytes: int | None = None) -> None:
        self._codec, self._out, self._shares = codec, out, shares
        self._arrival = Arrival(total_bytes, _checking())
        self._state = State.HEADER
        self._at = self._size = self._copied = 0
        """Where `coef` begins in the chunk, its bytes, and how many of them are on the devices."""
        self._columns = 0
        self._ends: list[int] = []
        """Where each segment ends in `coef`."""
        self._error: Exception | None = None
        self.segments_begun = 0
        self.tokens_done = 0

    def feed(self, view: memoryview, source: Tensor | None = None) -> None:
        self._raise_again()
        try:
            self._feed(view, source)
        except Exception as error:
            self._error = error
            raise

    def _raise_again(self) -> None:
        """An error leaves a chunk half decoded: every later call fails with it."""
        if self._error is not None:
            raise self._error

    def _feed(self, view: memoryview, source: Tensor | None) -> None:
        before = self._arrival.received
        self._arrival.feed(view)
        header = self._arrival.header
        if header is None:
            return
        with torch.inference_mode():
            if self._state is State.HEADER:
                self._begin(header)
            if self._state is State.END:
                return
            self._copy(before, view, source)
            if self._state is State.REST and self._arrival.received >= self._at:
                self._read_rest(header)
            if self._state is State.LENGTHS and (layout := self._layout(header)) is not None:
                self._begin_streams(layout, shared.stream_offsets(layout))
            if self._state is State.SEGMENTS:
                self._launch(header)

    @property
    def only_waits(self) -> bool:
        return all(share.job is not None and share.job.only_waits for share in self._shares)

    def finish(self) -> KVTarget:
        self._raise_again()
        chunk = self._codec.check(self._arrival.finish())
        if self._state is State.END:
            return self._decode_whole(chunk.header)
        if self._state is not State.SEGMENTS or self.segments_begun < len(self._ends):
            raise CodecError("the chunk ended before its coded coefficients did; fetch it again")
        with torch.inference_mode():
            self._transform(chunk.header)
            _finish(self._shares)
        return self._out

    def _decode_whole(self, header: Header) -> KVTarget:
        """Decode a chunk that has no coefficients; whoever holds some layers keeps only those."""
        first = self._shares[0]
        alone = len(self._shares) == 1 and first.layers != range(header.layers)
        target = SomeLayers(first.target, first.layers, header.layers) if alone else self._out
        self._codec.decode(self._arrival.joined(), target)
        return self._out

    def _begin(self, header: Header) -> None:
        self._codec.check_header(header)
        if self._codec.is_lossless(header.level) or not self._arrival.has("coef"):
            self._state = State.END
            return
        self._at, self._size = self._arrival.section("coef")
        if self._size > _MAX_BYTES_PER_ELEMENT * header.elements + 64:
            raise CodecError(
                f"section 'coef' claims {self._size} bytes for {header.elements} elements; fetch the chunk again"
            )
        for share in self._shares:
            with share.current():
                share.begin(header)
                # Whole words, and one behind them: kernels read ahead, and use nothing of what they find there.
                share.coef = torch.empty(self._size // 4 * 4 + 8, dtype=torch.uint8, device=share.model.device)
        self._state = State.REST

    def _read_rest(self, header: Header) -> None:
        """Read what comes before `coef`, and start on it; where the streams lie, as a rule, is there as well."""
        rest = Rest.of(self._shares[0].model.parameters, header, self._section)
        _check_streams(rest, self._size)
        self._columns = len(rest.alive)
        layout = self._layout(header) if self._columns else None
        offsets = None if layout is None else shared.stream_offsets(layout)
        for job in self._jobs():
            job.begin(rest, offsets)
            job.add_extras()
        self._state = State.LENGTHS if self._columns else State.SEGMENTS
        if layout is not None and offsets is not None:
            self._begin_streams(layout, offsets)
        if not self._columns:
            self.segments_begun = -(-header.tokens // Parameters.segment_tokens)

    def _section(self, tag: str) -> memoryview:
        at, size = self._arrival.section(tag)
        if at + size > self._at:
            raise CodecError(f"section '{tag}' follows 'coef'; this codec did not write the chunk")
        return self._arrival.part(at, size)

    def _jobs(self) -> Iterator[Job]:
        """The shares' jobs, each with its device current."""
        for share in self._shares:
            assert share.job is not None
            with share.current():
                yield share.job

    def _copy(self, before: int, view: memoryview, source: Tensor | None) -> None:
        """Copy what these bytes hold of the coded coefficients to its place on the devices."""
        first, last = max(self._at, before), min(self._at + self._size, before + len(view))
        if first >= last:
            return
        part = slice(first - before, last - before)
        data = torch.from_numpy(np.array(view[part])) if source is None else source[part]
        for share in self._shares:
            assert share.coef is not None
            with share.current():
                share.coef[first - self._at : last - self._at].copy_(data, non_blocking=True)
        self._copied = last - self._at

    def _layout(self, header: Header) -> Layout | None:
        """How long every stream is; None while that is incomplete."""
        beginning = self._arrival.part(self._at, self._copied)
        columns, segment_tokens = self._columns, Parameters.segment_tokens
        needed = sections.lengths_bytes(beginning, columns, header.tokens, segment_tokens)
        if needed is not None and needed > self._size:
            raise CodecError("coded section is shorter than its stream lengths; fetch the chunk again")
        if needed is None or needed > self._copied:
            return None
        return sections.layout(beginning, columns, header.tokens, 2, segment_tokens, self._size)

    def _begin_streams(self, layout: Layout, offsets: NDArray[np.int32]) -> None:
        """It is known where every stream lies, and so where each segment ends."""
        for share, job in zip(self._shares, self._jobs(), strict=True):
            assert share.coef is not None
            share.streams = job.streams(share.coef, layout, offsets)
        self._ends = (layout.units_at + 2 * offsets[self._columns :: self._columns].astype(np.int64)).tolist()
        self._state = State.SEGMENTS

    def _launch(self, header: Header) -> None:
        """Decode the segments that are complete and were not decoded yet."""
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
        """Make values of the tokens whose coefficients are there."""
        tokens = min(self.segments_begun * Parameters.segment_tokens, header.tokens)
        if tokens > self.tokens_done:
            for job in self._jobs():
                job.values(self.tokens_done, tokens)
                if tokens == header.tokens:
                    job.end()
            self.tokens_done = tokens
