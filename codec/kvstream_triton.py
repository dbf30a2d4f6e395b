"""`codec.kvstream` on a GPU: both directions of the transform around the rANS kernels, in Triton.

Decoding has two steps. The first decodes every stream and writes coefficients into the very places of the target that
the values will take: as float16 where the target's elements have 16 bits, which is exact, since reconstruction values
are float16 and the high parts of wide columns are seven bits times a power of two. The second takes a tile of tokens
of one head at a time, multiplies it with the head's basis on the matrix units (float16 operands, float32 sums), adds
the further bits of wide columns and escapes as terms of their own, then scale, mean and RoPE in float32, and writes
the values over the coefficients. So no second copy of the cache exists, whatever the target's layout. Both go segment
by segment, so that little is left to do after a chunk's last byte.

A head's dimensions are kept as two halves, the first and the second of each rotary pair, so that rotating them is
elementwise. Importing this module imports Triton; its kernels also run in Triton's interpreter (`entropy.device`).
Those that decode are not specialised on what differs from chunk to chunk: each such variant would be compiled in
mid-session.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# Triton gives kernels their types.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from codec import kvstream
from codec.api import Decoder
from codec.container import Arrival, Header
from codec.entropy import device as shared
from codec.entropy import escapes, rans_triton, sections
from codec.entropy.device import DeviceReconstruction, DeviceStreams
from codec.entropy.escapes import RECORD
from codec.entropy.rans_triton import DeviceTables, advance, begin
from codec.errors import CodecError
from codec.quantize import HALF as MIDDLE
from codec.quantize import LARGEST_ESCAPE
from codec.targets import CacheTarget, KVTarget, LayeredTarget, Placement, StridedTarget, as_target

DECODE_LANES = 128
_DECODE_WARPS = 4
"""Streams a program decodes: four warps, so that the number of programs a multiprocessor holds is no limit."""


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts a head's tokens: `tiles` tiles of `block` tokens a program of `warps` warps."""

    block: int
    tiles: int
    warps: int
    stages: int


SYNTHESIS = Tiling(block=64, tiles=4, warps=4, stages=1)
SPAN = SYNTHESIS.block * SYNTHESIS.tiles
"""Tokens of a head whose values one program makes."""
ANALYSIS = Tiling(block=64, tiles=4, warps=8, stages=1)
_MOST_BYTES_AN_ELEMENT = 8
"""A symbol takes a word at most; a stream of one symbol, two more and its length."""
_ESCAPES_A_CHUNK = 4_096
"""Escapes that the encoder makes room for at first."""


@dataclass(frozen=True, eq=False)
class DeviceLevel:
    """What depends on the level: each column's table and shift."""

    tables: DeviceTables
    unit: Tensor
    """float32 `[C]`: 2^shift."""
    shift: Tensor
    """int32 `[C]`."""
    factor: Tensor
    """float32 `[L * 2 * H]`: what products with the stored basis are to be multiplied with."""
    wide_half: Tensor
    """int32 `[W]`: what is taken off a wide column's further bits."""
    wide_place: Tensor
    """int32 `[W]`: which coefficient of its head it is."""
    wide_first: Tensor
    """int32 `[L * 2 * H + 1]`: where each head's wide columns begin."""
    wide_index: Tensor
    """int32 `[C]`: which of the wide columns a column is; -1 for the others."""
    fine: DeviceTables | None
    """Tables of the further bits, None where no column is wide."""
    symbols: DeviceReconstruction | None
    """That further bits are taken as they are."""


@dataclass(frozen=True, eq=False)
class Escapes:
    """A chunk's escapes, in the order of the tiles that they lie in: head by head, `SYNTHESIS.block` tokens each."""

    first: Tensor
    """int32 `[tiles + 1]`: where each tile's begin."""
    column: Tensor
    """int32 `[E]`."""
    place: Tensor
    """int32 `[E]`: which coefficient of its head it is."""
    token: Tensor
    """int32 `[E]`."""
    value: Tensor
    """float32 `[E]`, in steps."""


class DeviceModel:
    """A codec's profile on one device. Levels are copied when they are first used."""

    def __init__(self, codec: kvstream.KVStream, device: torch.device) -> None:
        self.codec, self.device = codec, device
        layers, heads, dim = codec.shape
        self.layers, self.heads, self.dim = layers, heads, dim
        rope = codec.rope
        first, second = _halves(dim, 2 * rope.inv_freq.shape[1] if rope else 0, bool(rope and rope.interleaved))
        self.contiguous = bool(
            (first == np.arange(len(first))).all() and (second == np.arange(len(second)) + len(first)).all()
        )
        self.half = len(first)
        self.half_block = max(16, triton.next_power_of_2(self.half))
        self.dim_block = max(16, triton.next_power_of_2(dim))
        self.dims = torch.from_numpy(np.stack([first, second]).astype(np.int32)).to(device)
        pairs = layers * 2 * heads
        both = torch.from_numpy(np.concatenate([first, second]))
        rows = codec.stored_basis.view(pairs, dim, dim)[:, both].unflatten(1, (2, self.half))
        # [pair, half, coefficient, dimension], padded with zeros.
        self.basis = torch.zeros((pairs, 2, self.dim_block, self.half_block), dtype=torch.float16)
        self.basis[:, :, :dim, : self.half] = rows.transpose(2, 3)
        self.basis = self.basis.to(device)
        self.mean = torch.zeros((pairs, 2, self.half_block))
        self.mean[:, :, : self.half] = codec.mean.view(pairs, dim)[:, both].unflatten(1, (2, self.half))
        self.mean = self.mean.to(device)
        self._both = both
        self._levels: dict[int, DeviceLevel] = {}
        self.no_bits = torch.zeros((1, 1), dtype=torch.uint8, device=device)
        self._beside = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Layers that rotate alike share a table of cosines and sines.
        frequencies = rope.inv_freq if rope else torch.zeros((layers, 1))
        distinct, self._rope_of_layer = torch.unique(frequencies, dim=0, return_inverse=True)
        self._frequencies = torch.zeros((len(distinct), self.half_block))
        self._frequencies[:, : distinct.shape[1]] = distinct
        self._frequencies = self._frequencies.to(device)
        self.rope_of_layer = self._rope_of_layer.to(torch.int32).to(device)

    def level(self, level: int) -> DeviceLevel:
        if level not in self._levels:
            self._levels[level] = self._level(level)
        return self._levels[level]

    def _level(self, level: int) -> DeviceLevel:
        codec, device = self.codec, self.device
        own, shift = codec.columns(level)
        wide = np.flatnonzero(shift)
        index = np.full(len(own), -1, np.int32)
        index[wide] = np.arange(len(wide))

        def copy(array: NDArray[Any], dtype: Any) -> Tensor:
            return torch.from_numpy(array.astype(dtype)).to(device)

        fine = rans_triton.to_device(kvstream.UNIFORM, shift[wide] - 1, device) if len(wide) else None
        some = wide if len(wide) else np.zeros(1, np.int64)
        return DeviceLevel(
            tables=rans_triton.to_device(codec.classes.tables, own, device, codec.classes.values),
            unit=copy(np.exp2(shift), np.float32),
            shift=copy(shift, np.int32),
            factor=(codec.scale.flatten() * codec.step(level)).to(device),
            wide_half=copy((1 << shift[some].astype(np.int32)) >> 1, np.int32),
            wide_place=copy(some % self.dim, np.int32),
            wide_first=copy(np.searchsorted(wide, np.arange(0, len(own) + 1, self.dim)), np.int32),
            wide_index=copy(index, np.int32),
            fine=fine,
            symbols=rans_triton.reconstruction(fine, 1) if fine else None,
        )

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Work that runs beside what is launched afterwards, until `wait_for_beside`."""
        if self._beside is None:
            yield
            return
        self._beside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._beside):
            yield

    def wait_for_beside(self) -> None:
        if self._beside is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._beside)

    def rotations(self, positions: range) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 `[R, T, D / 2]`, of the R ways in which layers rotate."""
        at = torch.arange(positions.start, positions.stop, dtype=torch.float32, device=self.device)
        angle = at[None, :, None] * self._frequencies[:, None, :]
        return angle.cos(), angle.sin()

    @cached_property
    def thresholds(self) -> tuple[Tensor, Tensor]:
        """The classes' thresholds float32 `[K, HALF + 2]` and largest magnitudes int32 `[K]`."""
        classes = self.codec.classes
        return torch.from_numpy(classes.thresholds).to(self.device), torch.from_numpy(classes.support).to(self.device)

    @cached_property
    def inverse(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the encoder multiplies with: the inverse of the stored basis as a sum of two float16
        `[pair, half, dimension, coefficient]`, padded with zeros, times a float32 `[pair]`."""
        pairs = self.layers * 2 * self.heads
        whole = self.codec.inverse.view(pairs, self.dim, self.dim) * self.codec.scale.view(pairs, 1, 1)
        scale = whole.abs().amax(dim=(1, 2))
        found = torch.zeros((pairs, 2, self.half_block, self.dim_block))
        rows = (whole / scale[:, None, None])[:, :, self._both].unflatten(2, (2, self.half))
        found[:, :, : self.half, : self.dim] = rows.permute(0, 2, 3, 1)
        high = found.half()
        return high.to(self.device), (found - high.float()).half().to(self.device), scale.to(self.device)


def _halves(dim: int, rotary: int, interleaved: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The dimensions of a head as two halves; the first `rotary / 2` of each are the partners of rotary pairs."""
    turned = np.arange(rotary)
    rest = np.arange(rotary, dim)
    pairs = (turned[::2], turned[1::2]) if interleaved else (turned[: rotary // 2], turned[rotary // 2 :])
    if not rotary and dim % 2 == 0:
        return rest[: dim // 2], rest[dim // 2 :]
    middle = (len(rest) + 1) // 2
    if len(rest) % 2:
        raise CodecError(f"heads of {dim} dimensions, an odd number, cannot be decoded on a GPU; decode on the CPU")
    return np.concatenate([pairs[0], rest[:middle]]), np.concatenate([pairs[1], rest[middle:]])


class Job:
    """One chunk's decoding into one target, launched step by step on the current stream.

    `layers` are the target's, where it has not all of the chunk's.
    """

    def __init__(
        self, model: DeviceModel, level: int, positions: range, target: CacheTarget, layers: range | None = None
    ) -> None:
        self.model, self.positions, self.target = model, positions, target
        self.layers = range(model.layers) if layers is None else layers
        self.level = model.level(level)
        placement = target.placement
        self._bits = model.no_bits
        with model.beside():
            self._rotations = model.rotations(positions)
        self._fine: tuple[DeviceStreams, Tensor] | None = None
        tiles = triton.cdiv(len(positions), SYNTHESIS.block)
        zeros = torch.zeros(model.layers * 2 * model.heads * tiles + 2, dtype=torch.int32, device=model.device)
        none = zeros[:0]
        self.damaged = zeros[:1]
        self._escapes = Escapes(zeros[1:], none, none, none, none.view(torch.float32))
        self._values: Tensor | None = None
        if placement is None:
            # A target that only takes finished values: they are made beside it.
            self._values = torch.empty(target.shape, dtype=target.dtype, device=model.device)
            placement = StridedTarget(self._values).placement
        self.placement: Placement = placement
        self._bases = placement.bases
        if len(self.layers) < model.layers:  # kernels count layers as the chunk does
            beside = (2 * self.layers.start, 2 * (model.layers - self.layers.stop))
            self._bases = torch.nn.functional.pad(placement.bases, beside)

    def coefficients(self, streams: DeviceStreams, first_segment: int = 0, segments: int | None = None) -> None:
        """Decode the streams of some segments into the target's places."""
        model, level, placement = self.model, self.level, self.placement
        segments = streams.segments - first_segment if segments is None else segments
        width = model.heads * model.dim
        first_column, last_column = 2 * self.layers.start * width, 2 * self.layers.stop * width
        programs = triton.cdiv(last_column - first_column, DECODE_LANES)
        _coefficients[(segments * programs,)](
            streams.payload, streams.offsets, level.tables.rows, level.tables.slots, level.tables.entries, level.unit,
            self.damaged, self._bases, self._token_at,
            streams.units, streams.columns, streams.tokens, streams.segment_tokens, first_segment,
            first_column, last_column, width, model.dim,
            placement.token_stride, placement.head_stride, placement.dim_stride,
            TABLE=placement.token_at is not None, ELEMENT=_coefficient_type(self.target.dtype),
            N_SYMBOLS=level.tables.entries.shape[1], BLOCK=DECODE_LANES,
            num_warps=_DECODE_WARPS, enable_fp_fusion=False,
        )  # fmt: skip

    def further_bits(self, streams: DeviceStreams) -> None:
        """Decode the further bits of wide columns, beside what follows on the current stream: they are few, and take
        as long as many."""
        model, tables = self.model, self.level.fine
        assert tables is not None
        with model.beside():
            self._bits = torch.empty((streams.tokens, streams.columns), dtype=torch.uint8, device=model.device)
            how = self.level.symbols
            assert how is not None
            self._fine = streams, rans_triton.launch_decode(streams, tables, how, self._bits)

    def escapes(self, escaped: NDArray[Any]) -> None:
        """Copy escapes (`escapes.RECORD`, in order) of the target's layers to the device, by tiles of `values`."""
        model = self.model
        width = 2 * model.heads * model.dim
        own = np.searchsorted(escaped["column"], (self.layers.start * width, self.layers.stop * width))
        escaped = escaped[slice(*own)]
        if len(escaped):
            self._escapes = _by_tile(escaped, model, len(self.positions))

    def values(self, first: int, last: int) -> None:
        """Turn the coefficients of tokens `[first, last)` into values, once they, the further bits and the escapes are
        there. `first` is a multiple of SPAN; so is `last`, unless it is the chunk's."""
        model, level, placement = self.model, self.level, self.placement
        model.wait_for_beside()
        bits, found = self._bits, self._escapes
        if len(found.column):
            _clear[(triton.cdiv(len(found.column), 128),)](
                found.column, found.token, level.wide_index, level.wide_half, bits, self._bases, self._token_at,
                len(found.column), first, last, model.heads * model.dim, model.dim, bits.shape[1],
                placement.token_stride, placement.head_stride, placement.dim_stride,
                TABLE=placement.token_at is not None, ELEMENT=_coefficient_type(self.target.dtype), BLOCK=128,
            )  # fmt: skip
        heads = 2 * model.heads
        cosine, sine = self._rotations
        tokens = len(self.positions)
        _synthesise[(len(self.layers) * heads, triton.cdiv(last - first, SPAN))](
            self._bases, self._token_at, model.basis, level.factor, model.mean, model.dims,
            cosine, sine, model.rope_of_layer,
            level.wide_first, level.wide_place, level.wide_half, bits,
            found.first, found.place, found.token, found.value,
            tokens, first, last, self.layers.start * heads, model.heads, bits.shape[1],
            placement.token_stride, placement.head_stride, placement.dim_stride,
            TABLE=placement.token_at is not None, COEFFICIENT=_coefficient_type(self.target.dtype),
            VALUE=_TYPES[self.target.dtype], CONTIGUOUS=model.contiguous,
            ALIGNED=placement.aligned and model.half * self.target.dtype.itemsize % 16 == 0,
            WIDE=level.fine is not None, D=model.dim, DIM=model.dim_block, HALF=model.half_block,
            BLOCK=SYNTHESIS.block, TILES=SYNTHESIS.tiles, num_warps=SYNTHESIS.warps, num_stages=SYNTHESIS.stages,
        )  # fmt: skip

    def finish(self, streams: DeviceStreams) -> None:
        """Wait for the device, and give a target that only takes finished values what it is due. Raises CodecError."""
        shared.raise_if_damaged(self.damaged, streams)
        if self._fine is not None:
            fine, damaged = self._fine
            shared.raise_if_damaged(damaged, fine)
        if self._values is not None:
            for layer in range(len(self.layers)):
                for side in (0, 1):
                    self.target.write(layer, side, self._values[layer, side])

    @property
    def _token_at(self) -> Tensor:
        return self._bases if self.placement.token_at is None else self.placement.token_at


def _by_tile(escaped: NDArray[Any], model: DeviceModel, tokens: int) -> Escapes:
    tiles = triton.cdiv(tokens, SYNTHESIS.block)
    column = escaped["column"].astype(np.int64)
    tile = column // model.dim * tiles + escaped["token"] // SYNTHESIS.block
    order = np.argsort(tile, kind="stable")
    first = np.searchsorted(tile[order], np.arange(model.layers * 2 * model.heads * tiles + 1))
    value = escaped["value"].astype(np.float32).view(np.int32)
    parts = [first, *(part[order] for part in (column, column % model.dim, escaped["token"], value))]
    both = torch.from_numpy(np.concatenate([part.astype(np.int32) for part in parts])).to(model.device)
    begins, columns, places, token, values = both.split([len(part) for part in parts])
    return Escapes(begins, columns, places, token, values.view(torch.float32))


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _coefficient_type(dtype: torch.dtype) -> Any:
    """The type in which coefficients wait in a target's places: of the same size."""
    return tl.float32 if dtype == torch.float32 else tl.float16


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
        tokens = header.tokens if tokens >= header.tokens else tokens // SPAN * SPAN
        if tokens > self.tokens_done:
            for job in self._jobs():
                job.values(self.tokens_done, tokens)
            self.tokens_done = tokens


def encode(model: DeviceModel, kv: Tensor, level: int, positions: range, segment_tokens: int) -> dict[str, Any]:
    """Sections of a chunk `[L, 2, T, H, D]` on the model's device, as `codec.kvstream` makes them; `escs` as records.

    Where a value lies on the threshold between two symbols, sums in another order may choose the other one.
    """
    with shared.current(model.device):
        symbols, fine, escaped = launch_quantise(model, kv, level, positions)
        found = model.level(level)
        return {
            "escs": escaped.tobytes(),
            "fine": rans_triton.encode(fine.T, found.fine, segment_tokens=segment_tokens) if found.fine else b"",
            "coef": rans_triton.encode(symbols.T, found.tables, segment_tokens=segment_tokens),
        }


def launch_quantise(
    model: DeviceModel, kv: Tensor, level: int, positions: range
) -> tuple[Tensor, Tensor, NDArray[Any]]:
    """Symbols uint8 `[T, C]`, further bits uint8 `[T, W]`, escapes (waits for the device to count them)."""
    found, tokens = model.level(level), len(positions)
    columns = model.layers * 2 * model.heads * model.dim
    symbols = torch.empty((tokens, columns), dtype=torch.uint8, device=model.device)
    fine = torch.empty((tokens, found.fine.columns if found.fine else 1), dtype=torch.uint8, device=model.device)
    thresholds, support = model.thresholds
    cosine, sine = model.rotations(positions)
    high, low, scale = model.inverse
    room = _ESCAPES_A_CHUNK
    while True:
        count = torch.zeros(1, dtype=torch.int32, device=model.device)
        places = torch.empty((2, room), dtype=torch.int32, device=model.device)
        steps = torch.empty(room, dtype=torch.float32, device=model.device)
        _analyse[(model.layers * 2 * model.heads, triton.cdiv(tokens, ANALYSIS.block * ANALYSIS.tiles))](
            kv, high, low, scale, found.factor, model.mean, model.dims, cosine, sine, model.rope_of_layer,
            found.tables.rows, found.shift, found.wide_index, thresholds, support,
            symbols, fine, count, places, steps,
            tokens, model.heads, columns, fine.shape[1], room, *kv.stride(),
            THRESHOLDS=thresholds.shape[1], MIDDLE=MIDDLE, WIDE=found.fine is not None, CONTIGUOUS=model.contiguous,
            D=model.dim, DIM=model.dim_block, HALF=model.half_block, BLOCK=ANALYSIS.block, TILES=ANALYSIS.tiles,
            num_warps=ANALYSIS.warps, num_stages=ANALYSIS.stages,
        )  # fmt: skip
        n = int(count.item())
        if n <= room:
            break
        room = n
    column, token = places[:, :n].cpu().numpy()
    values = np.rint(steps[:n].cpu().numpy())
    if n and not np.abs(values).max() <= LARGEST_ESCAPE:  # so written, NaN is refused too
        raise CodecError(
            f"the cache holds a value {np.abs(values).max():g} steps from what the profile was calibrated on, more "
            f"than the {LARGEST_ESCAPE} that can be coded; take a lower level, or codec raw"
        )
    escaped = np.empty(n, RECORD)
    order = np.lexsort((token, column))
    escaped["column"], escaped["token"], escaped["value"] = column[order], token[order], values[order]
    return symbols, fine, escaped


@triton.jit
def _at(token_at, t, mask, token_stride, TABLE: tl.constexpr):
    """Element offsets of tokens."""
    if TABLE:
        return tl.load(token_at + t, mask=mask, other=0)
    else:
        return t.to(tl.int64) * token_stride


@triton.jit(do_not_specialize=["payload", "units", "tokens", "segment_tokens", "first_segment"])
def _coefficients(
    payload, offsets, rows, slots, entries, unit, damaged, bases, token_at,
    units, columns, tokens, segment_tokens, first_segment, first_column, last_column,
    width, dim, token_stride, head_stride, dim_stride,
    TABLE: tl.constexpr, ELEMENT: tl.constexpr, N_SYMBOLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    programs = tl.cdiv(last_column - first_column, BLOCK)
    segment = first_segment + tl.program_id(0) // programs
    # Lanes beyond the last column repeat it and store the same values: no mask in the loop.
    column = first_column + (tl.program_id(0) % programs) * BLOCK + tl.arange(0, BLOCK)
    column = tl.minimum(column, last_column - 1)
    stream = segment * columns + column
    end = tl.minimum(tl.maximum(tl.load(offsets + stream + 1), 0), units)
    at = tl.minimum(tl.maximum(tl.load(offsets + stream), 0), end)
    row = tl.load(rows + column)
    slots += row * 1024
    entries += row * N_SYMBOLS
    factor = tl.load(unit + column)
    place = column % width
    to = tl.load(bases + column // width).to(tl.pointer_type(ELEMENT))
    to += (place // dim).to(tl.int64) * head_stride + (place % dim).to(tl.int64) * dim_stride
    first = segment * segment_tokens
    last = tl.minimum(first + segment_tokens, tokens)
    if not TABLE:
        to += first.to(tl.int64) * token_stride
    state, ahead, at = begin(payload, at, end)
    if TABLE:
        following = tl.load(token_at + first)
    for t in tl.range(first, last, loop_unroll_factor=4):
        if TABLE:  # a token ahead, so that no store waits for where it goes
            here = following
            following = tl.load(token_at + t + 1)
        _, entry, state, ahead, at = advance(state, ahead, at, end, payload, slots, entries)
        value = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True) * factor
        if TABLE:
            tl.store(to + here, value.to(ELEMENT))
        else:
            tl.store(to, value.to(ELEMENT))
            to += token_stride
    number = tl.max(tl.where((state != 0) | (at != end), stream + 1, 0))
    if number > 0:
        tl.atomic_max(damaged, number)


@triton.jit(do_not_specialize=["column", "token", "n", "first", "last", "wide"])
def _clear(
    column, token, wide_index, wide_half, bits, bases, token_at, n, first, last, width, dim, wide,
    token_stride, head_stride, dim_stride, TABLE: tl.constexpr, ELEMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Zero the coefficients in the places of escapes among tokens `[first, last)`: the high part in the target, the
    further bits apart."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.load(column + e, mask=e < n, other=0)
    t = tl.load(token + e, mask=e < n, other=-1)
    some = (t >= first) & (t < last)
    place = c % width
    to = tl.load(bases + c // width).to(tl.pointer_type(ELEMENT)) + _at(token_at, t, some, token_stride, TABLE)
    to += (place // dim).to(tl.int64) * head_stride + (place % dim).to(tl.int64) * dim_stride
    tl.store(to, tl.zeros([BLOCK], ELEMENT), mask=some)
    index = tl.load(wide_index + c, mask=some, other=-1)
    has = some & (index >= 0)
    tl.store(bits + t.to(tl.int64) * wide + index, tl.load(wide_half + index, mask=has).to(tl.uint8), mask=has)


@triton.jit
def _coefficient_tile(
    base, token_at, begin, last_token, offset, token_stride, dim_stride,
    TABLE: tl.constexpr, COEFFICIENT: tl.constexpr, ALIGNED: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Offsets of a tile's tokens, and their coefficients as float16."""
    r = tl.arange(0, BLOCK)
    k = tl.arange(0, DIM)
    there = r < last_token - begin
    if TABLE:
        at = offset + tl.load(token_at + begin + r, mask=there, other=0)
    else:
        at = offset + begin.to(tl.int64) * token_stride + r.to(tl.int64) * token_stride
    places = base.to(tl.pointer_type(COEFFICIENT)) + at[:, None]
    if ALIGNED:  # what is loaded is an address: that vectors may be loaded from it has to be said
        places = tl.max_contiguous(tl.multiple_of(places + k[None, :], [1, 16]), [1, DIM])
    else:
        places += k[None, :].to(tl.int64) * dim_stride
    return at, tl.load(places, mask=there[:, None] & (k < D)[None, :], other=0.0).to(tl.float16)


@triton.jit(
    do_not_specialize=[
        "escape_first", "escape_place", "escape_token", "escape_value", "tokens", "first_token", "last_token",
        "first_pair", "wide",
    ]
)  # fmt: skip
def _synthesise(
    bases, token_at, basis, factor, mean, dims, cosine, sine, rope_of_layer,
    wide_first, wide_place, wide_half, bits, escape_first, escape_place, escape_token, escape_value,
    tokens, first_token, last_token, first_pair, heads, wide, token_stride, head_stride, dim_stride,
    TABLE: tl.constexpr, COEFFICIENT: tl.constexpr, VALUE: tl.constexpr, CONTIGUOUS: tl.constexpr,
    ALIGNED: tl.constexpr, WIDE: tl.constexpr, D: tl.constexpr,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Values from coefficients, in place, of one head's keys or values: `TILES` tiles of `BLOCK` tokens.

    Further bits of wide columns are a product of their own, with 16 rows of the basis at a time: a head has few.
    """
    pair = first_pair + tl.program_id(0)
    block = pair // heads
    k = tl.arange(0, DIM)
    j = tl.arange(0, HALF)
    r = tl.arange(0, BLOCK)
    base = tl.load(bases + block)
    offset = (pair % heads).to(tl.int64) * head_stride
    if CONTIGUOUS:
        first = j
        second = D // 2 + j
    else:
        first = tl.load(dims + j, mask=j < D // 2, other=0)
        second = tl.load(dims + D // 2 + j, mask=j < D // 2, other=0)
    rows = basis + pair.to(tl.int64) * (2 * DIM * HALF) + j[None, :]
    basis_a = tl.load(rows + k[:, None] * HALF)
    basis_b = tl.load(rows + (DIM + k[:, None]) * HALF)
    scale = tl.load(factor + pair)
    mean_a = tl.load(mean + pair * (2 * HALF) + j)[None, :]
    mean_b = tl.load(mean + pair * (2 * HALF) + HALF + j)[None, :]
    angle = r[:, None] * HALF + j[None, :]
    if WIDE:
        wide_begin = tl.load(wide_first + pair)
        wide_end = tl.load(wide_first + pair + 1)
    own_first = first_token + tl.program_id(1) * TILES * BLOCK
    own_last = tl.minimum(own_first + TILES * BLOCK, last_token)
    next_at, following = _coefficient_tile(
        base, token_at, own_first, own_last, offset, token_stride, dim_stride,
        TABLE, COEFFICIENT, ALIGNED, D, DIM, BLOCK,
    )  # fmt: skip
    for tile in range(TILES):
        begin = own_first + tile * BLOCK
        there = r < own_last - begin
        at, c = next_at, following
        # a tile ahead, so that this one's products do not wait for memory
        next_at, following = _coefficient_tile(
            base, token_at, begin + BLOCK, own_last, offset, token_stride, dim_stride,
            TABLE, COEFFICIENT, ALIGNED, D, DIM, BLOCK,
        )  # fmt: skip
        a = tl.dot(c, basis_a)
        b = tl.dot(c, basis_b)
        if WIDE:
            for some in range(wide_begin, wide_end, 16):
                index = some + tl.arange(0, 16)
                own = index < wide_end
                place = tl.load(wide_place + index, mask=own, other=0)
                centre = tl.load(wide_half + index, mask=own, other=0)
                low = tl.load(bits + begin.to(tl.int64) * wide + r[:, None] * wide + index[None, :],
                              mask=there[:, None] & own[None, :], other=0)  # fmt: skip
                low = tl.where(own[None, :], low.to(tl.int32) - centre[None, :], 0).to(tl.float16)
                a = tl.dot(low, tl.load(rows + place[:, None] * HALF), a)
                b = tl.dot(low, tl.load(rows + (DIM + place[:, None]) * HALF), b)
        number = pair * tl.cdiv(tokens, BLOCK) + begin // BLOCK
        escape = tl.load(escape_first + number, mask=begin < own_last, other=0)
        last = tl.load(escape_first + number + 1, mask=begin < own_last, other=0)
        for e in range(escape, last):
            place = tl.load(escape_place + e)
            hit = tl.where(r == tl.load(escape_token + e) - begin, tl.load(escape_value + e), 0.0)[:, None]
            a += hit * tl.load(rows + place * HALF).to(tl.float32)
            b += hit * tl.load(rows + (DIM + place) * HALF).to(tl.float32)
        a = a * scale + mean_a
        b = b * scale + mean_b
        if block % 2 == 0:
            row = (tl.load(rope_of_layer + block // 2) * tokens + begin).to(tl.int64) * HALF
            cos = tl.load(cosine + row + angle, mask=there[:, None], other=1.0)
            sin = tl.load(sine + row + angle, mask=there[:, None], other=0.0)
            x = a * cos - b * sin
            b = b * cos + a * sin
            a = x
        if tl.float16 == VALUE:
            a = tl.minimum(tl.maximum(a, -65504.0), 65504.0)
            b = tl.minimum(tl.maximum(b, -65504.0), 65504.0)
        # Every warp has read its coefficients before any of them is overwritten.
        tl.debug_barrier()
        stored = there[:, None] & (j < D // 2)[None, :]
        to = base.to(tl.pointer_type(VALUE)) + at[:, None]
        if ALIGNED and CONTIGUOUS:
            to_a = tl.max_contiguous(tl.multiple_of(to + first[None, :], [1, 16]), [1, HALF])
            to_b = tl.max_contiguous(tl.multiple_of(to + second[None, :], [1, 16]), [1, HALF])
        else:
            to_a = to + first[None, :].to(tl.int64) * dim_stride
            to_b = to + second[None, :].to(tl.int64) * dim_stride
        tl.store(to_a, a.to(VALUE), mask=stored)
        tl.store(to_b, b.to(VALUE), mask=stored)


@triton.jit
def _analyse(
    kv, high_part, low_part, inverse_scale, factor, mean, dims, cosine, sine, rope_of_layer,
    rows, shifts, wide_index, thresholds, support,
    symbols, fine, count, places, steps,
    tokens, heads, columns, wide, room,
    layer_stride, side_stride, token_stride, head_stride, dim_stride,
    THRESHOLDS: tl.constexpr, MIDDLE: tl.constexpr, WIDE: tl.constexpr, CONTIGUOUS: tl.constexpr, D: tl.constexpr,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Symbols of one head's keys or values: `TILES` tiles of `BLOCK` tokens.

    Values and the inverse basis are each the sum of two float16 numbers, of whose products the smallest is left out:
    as good as float32.
    """
    pair = tl.program_id(0)
    block = pair // heads
    k = tl.arange(0, DIM)
    j = tl.arange(0, HALF)
    real = k < D
    if CONTIGUOUS:
        first = j
        second = D // 2 + j
    else:
        first = tl.load(dims + j, mask=j < D // 2, other=0)
        second = tl.load(dims + D // 2 + j, mask=j < D // 2, other=0)
    source = kv + (block // 2).to(tl.int64) * layer_stride + (block % 2).to(tl.int64) * side_stride
    source += (pair % heads).to(tl.int64) * head_stride
    matrix = pair.to(tl.int64) * (2 * DIM * HALF) + j[:, None] * DIM + k[None, :]
    high_a = tl.load(high_part + matrix)
    high_b = tl.load(high_part + matrix + HALF * DIM)
    low_a = tl.load(low_part + matrix)
    low_b = tl.load(low_part + matrix + HALF * DIM)
    mean_a = tl.load(mean + pair * (2 * HALF) + j)[None, :]
    mean_b = tl.load(mean + pair * (2 * HALF) + HALF + j)[None, :]
    per_step = 1.0 / tl.load(factor + pair)
    scale = tl.load(inverse_scale + pair)
    column = pair * D + k
    own = tl.load(rows + column, mask=real, other=0)
    largest = tl.load(support + own)[None, :]
    for tile in range(TILES):
        t = (tl.program_id(1) * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        there = t < tokens
        inside = there[:, None] & (j < D // 2)[None, :]
        here = source + t[:, None].to(tl.int64) * token_stride
        a = tl.load(here + first[None, :].to(tl.int64) * dim_stride, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(here + second[None, :].to(tl.int64) * dim_stride, mask=inside, other=0.0).to(tl.float32)
        if block % 2 == 0:
            row = (tl.load(rope_of_layer + block // 2) * tokens + t).to(tl.int64) * HALF
            angle = row[:, None] + j[None, :]
            cos = tl.load(cosine + angle, mask=there[:, None], other=1.0)
            sin = tl.load(sine + angle, mask=there[:, None], other=0.0)
            x = a * cos + b * sin
            b = b * cos - a * sin
            a = x
        a = (a - mean_a) * per_step
        b = (b - mean_b) * per_step
        a_high = a.to(tl.float16)
        b_high = b.to(tl.float16)
        v = tl.dot((a - a_high.to(tl.float32)).to(tl.float16), high_a)
        v = tl.dot((b - b_high.to(tl.float32)).to(tl.float16), high_b, v)
        v = tl.dot(a_high, low_a, v)
        v = tl.dot(b_high, low_b, v)
        v = tl.dot(a_high, high_a, v)
        v = tl.dot(b_high, high_b, v) * scale
        size = tl.abs(v)
        # A threshold lies within a step below its symbol: one comparison tells the symbol.
        ceiling = tl.minimum(size, 127.5).to(tl.int32) + 1
        threshold = tl.load(thresholds + own[None, :] * THRESHOLDS + ceiling)
        magnitude = tl.where(size >= 128.0, 128, ceiling - (size < threshold).to(tl.int32))
        symbol = tl.where(v < 0, -magnitude, magnitude)
        written = there[:, None] & real[None, :]
        if WIDE:
            shift = tl.load(shifts + column, mask=real, other=0)[None, :]
            q = tl.where(size < 1e6, tl.floor(v + 0.5), 1073741824.0).to(tl.int32)
            unit = (1 << shift) >> 1
            symbol = tl.where(shift > 0, (q + unit) >> shift, symbol)
            index = tl.load(wide_index + column, mask=real, other=-1)[None, :]
            beyond = (symbol > largest) | (symbol < -largest)
            low = tl.where(beyond, 0, q - (symbol << shift) + unit)
            tl.store(fine + t[:, None].to(tl.int64) * wide + index, low.to(tl.uint8), mask=written & (index >= 0))
        beyond = written & ((symbol > largest) | (symbol < -largest) | (v != v))
        tl.store(symbols + t[:, None].to(tl.int64) * columns + column[None, :],
                 tl.where(beyond, MIDDLE, MIDDLE + symbol).to(tl.uint8), mask=written)  # fmt: skip
        if tl.max(tl.max(beyond.to(tl.int32), axis=1), axis=0) > 0:
            number = tl.atomic_add(count + tl.zeros([BLOCK, DIM], tl.int32), 1, mask=beyond)
            kept = beyond & (number < room)
            tl.store(places + number, tl.zeros([BLOCK, DIM], tl.int32) + column[None, :], mask=kept)
            tl.store(places + room + number, tl.zeros([BLOCK, DIM], tl.int32) + t[:, None], mask=kept)
            tl.store(steps + number, v, mask=kept)
