"""`codec.kvstream` on a GPU: both directions of the transform around the rANS kernels, in Triton.

Decoding has two steps. The first decodes every stream and writes coefficients into the very places of the target that
the values will take: as float16 where the target's elements have 16 bits, which is exact, since reconstruction values
are float16 and the high parts of wide columns are seven bits times a power of two. The second takes a tile of tokens
of one head at a time, multiplies it with the head's basis on the matrix units (float16 operands, float32 sums), adds
the further bits of wide columns and escapes as terms of their own, then scale, mean and RoPE in float32, and writes
the values over the coefficients. So no second copy of the cache exists, whatever the target's layout. Both go segment
by segment, so that little is left to do after a chunk's last byte.

A head's dimensions are kept as two halves, the first and the second of each rotary pair, so that rotating them is
elementwise. Importing this module imports Triton; the kernels also run in Triton's interpreter (`entropy.device`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
from codec import kvstream_kernels as kernels
from codec.entropy import device as shared
from codec.entropy import rans_triton
from codec.entropy.device import DeviceReconstruction, DeviceStreams
from codec.entropy.escapes import RECORD
from codec.entropy.rans_triton import DeviceTables
from codec.errors import CodecError
from codec.quantize import HALF as MIDDLE
from codec.quantize import LARGEST_ESCAPE
from codec.targets import CacheTarget, Placement, StridedTarget

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
        kernels.coefficients[(segments * programs,)](
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
            kernels.clear[(triton.cdiv(len(found.column), 128),)](
                found.column, found.token, level.wide_index, level.wide_half, bits, self._bases, self._token_at,
                len(found.column), first, last, model.heads * model.dim, model.dim, bits.shape[1],
                placement.token_stride, placement.head_stride, placement.dim_stride,
                TABLE=placement.token_at is not None, ELEMENT=_coefficient_type(self.target.dtype), BLOCK=128,
            )  # fmt: skip
        heads = 2 * model.heads
        cosine, sine = self._rotations
        tokens = len(self.positions)
        kernels.synthesise[(len(self.layers) * heads, triton.cdiv(last - first, SPAN))](
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
        kernels.analyse[(model.layers * 2 * model.heads, triton.cdiv(tokens, ANALYSIS.block * ANALYSIS.tiles))](
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
