"""One chunk decoded on one GPU: the transform around the rANS kernels, in Triton.

Decoding has two steps. The first decodes the streams of live columns into float16, which is exact: reconstruction
values are float16, and the high parts of wide columns are seven bits times a power of two. Low bits of wide columns and
escapes, in parts of eleven bits, are columns of their own beside them. The second multiplies a tile of tokens with the
rows of the basis that belong to these columns, on the matrix units (float16 operands, float32 sums), a head at a time,
adds means, rotates keys, and writes the values where they belong, whatever the target's layout. Dead columns take part
in neither. Both go segment by segment, so that little is left to do after a chunk's last byte.

A small chunk's time is the host's, so what the host does is little: it unpacks lengths and lays out columns in compiled
loops, sends all that is small in one transfer, and launches few kernels.

A head's dimensions are kept as two halves, the first and the second of each rotary pair: rotating is elementwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.entropy import device as shared
from kvstream.codec.entropy import rans_triton
from kvstream.codec.entropy.device import DeviceStreams
from kvstream.codec.entropy.rans_triton import DeviceTables
from kvstream.codec.entropy.sections import Layout
from kvstream.codec.errors import CodecError
from kvstream.codec.kvstream import triton_kernels as kernels
from kvstream.codec.kvstream.parameters import UNIFORM, Parameters
from kvstream.codec.kvstream.places import FLAGS, LOW_FLAG, PART, SHIFT, STEP, Places
from kvstream.codec.kvstream.rest import Rest
from kvstream.codec.targets import CacheTarget, Placement, StridedTarget

DECODE_LANES = 128
DECODE_WARPS = 4
"""Streams a program decodes: four warps, so that the number of programs a multiprocessor holds is no limit."""
_DECODE_REGISTERS = 48
"""Fewer make the loop over symbols spill."""
FAR = True
BLOCK = 256
"""Tokens of a head whose values one program makes: the more, the less often the basis is read."""
WARPS, STAGES = 8, 4
REGISTERS: int | None = None
TURNED_AHEAD = 1 << 14
"""Positions for which cosines and sines are made at a time."""


class DeviceModel:
    """The codec's parameters on one device."""

    def __init__(self, parameters: Parameters, device: torch.device) -> None:
        self.parameters, self.device = parameters, device
        layers, heads, dim = parameters.shape
        self.layers, self.heads, self.dim = layers, heads, dim
        rope = parameters.rope
        first, second = _halves(dim, 2 * rope.inv_freq.shape[1] if rope else 0, bool(rope and rope.interleaved))
        self.contiguous = bool(
            (first == np.arange(len(first))).all() and (second == np.arange(len(second)) + len(first)).all()
        )
        self.half = len(first)
        self.half_block = max(16, triton.next_power_of_2(self.half))
        self.dims = torch.from_numpy(np.stack([first, second]).astype(np.int32)).to(device)
        self.both = torch.from_numpy(np.concatenate([first, second]))
        self.group_pairs = len(parameters.groups[0].layers) * 2 * heads
        bases = [self._in_halves(group.stored_basis.flatten(1, 3)) for group in parameters.groups]
        parts = [basis.transpose(-1, -2).flatten(1) for basis in bases]
        # one row a column; a last group of fewer layers is padded
        wide = parts[0].shape[1]
        padded = [torch.nn.functional.pad(part, (0, wide - part.shape[1])) for part in parts]
        self.basis = torch.cat(padded).to(device)
        self.scale = torch.cat([group.scale for group in parameters.groups]).flatten().to(device)
        self.mean = self._in_halves(parameters.mean.flatten(0, 2)).to(device)
        self.group_ends = np.array([group.columns.stop for group in parameters.groups])
        self.classes = parameters.classes.tables.count
        self.slots, self.entries = _tables(parameters, device)
        # Layers that rotate alike share a table of cosines and sines.
        frequencies = rope.inv_freq if rope else torch.zeros((layers, 1))
        distinct, rope_of_layer = torch.unique(frequencies, dim=0, return_inverse=True)
        self._frequencies = torch.zeros((len(distinct), self.half_block))
        self._frequencies[:, : distinct.shape[1]] = distinct
        self._frequencies = self._frequencies.to(device)
        self.rope_of_layer = rope_of_layer.to(torch.int32).to(device)
        self._rotations = Rotations(range(0), torch.empty(0))

    def _in_halves(self, rows: Tensor) -> Tensor:
        """`[..., D]` as `[..., 2, HALF]`, padded with zeros."""
        found = torch.zeros((*rows.shape[:-1], 2, self.half_block), dtype=rows.dtype)
        found[..., : self.half] = rows[..., self.both].unflatten(-1, (2, self.half))
        return found

    def tables(self, rows: Tensor) -> DeviceTables:
        """The tables of columns, whose numbers are int32: those of the classes, then those of low bits."""
        return DeviceTables(rows, self.slots, self.entries)

    def rotations(self, positions: range) -> Rotations:
        """Cosines and sines for these positions, and some that follow: they are kept for the next chunk."""
        found = self._rotations
        if positions.start not in found.positions or positions[-1] not in found.positions:
            covered = range(positions.start, positions.start + max(len(positions), TURNED_AHEAD))
            at = torch.arange(covered.start, covered.stop, dtype=torch.float32, device=self.device)
            angle = at[None, :, None] * self._frequencies[:, None, :]
            both = torch.stack([angle.cos(), angle.sin()], dim=-1).view(torch.int64).squeeze(-1)
            if both.is_cuda:  # whoever uses them next may do so on another stream
                torch.cuda.current_stream(self.device).synchronize()
            self._rotations = found = Rotations(covered, both)
        return found


@dataclass(frozen=True)
class Rotations:
    """In how many ways layers rotate, R, and how far at each of N positions."""

    positions: range
    both: Tensor
    """int64 `[R, N, HALF]`: a cosine's bits (float32), and above them a sine's."""


def _tables(parameters: Parameters, device: torch.device) -> tuple[Tensor, Tensor]:
    """Slots and entries of the classes' tables, then of those for low bits, which stand for themselves less half."""
    classes = parameters.classes
    bits = np.arange(1, UNIFORM.count + 1, dtype=np.float32)
    low_bits = np.arange(UNIFORM.symbols, dtype=np.float32) - np.exp2(bits - 1)[:, None]
    nothing = np.zeros(1, np.uint8)
    both = [
        rans_triton.to_device(classes.tables, nothing, device, classes.values),
        rans_triton.to_device(UNIFORM, nothing, device, low_bits),
    ]
    width = max(part.entries.shape[1] for part in both)
    entries = [torch.nn.functional.pad(part.entries, (0, width - part.entries.shape[1])) for part in both]
    return torch.cat([part.slots for part in both]), torch.cat(entries)


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
        self._step = model.parameters.step(level)
        self._rotations = model.rotations(positions)
        self._apart: tuple[Tensor, Tensor] | None = None
        self._values: Tensor | None = None
        self._flags: Callable[[], list[NDArray[np.int32]]] | None = None
        placement = target.placement
        if placement is None:
            # A target that only takes finished values: they are made beside it.
            self._values = torch.empty(target.shape, dtype=target.dtype, device=model.device)
            placement = StridedTarget(self._values).placement
        self.placement: Placement = placement

    def begin(self, rest: Rest, offsets: NDArray[np.int32] | None = None) -> None:
        """Take what a chunk holds beside its coefficients; `offsets`, where the streams of those begin, may come later.
        Raises CodecError."""
        self._rest, device, tokens = rest, self.model.device, len(self.positions)
        # Kernels count layers as the chunk does.
        beside = (2 * self.layers.start, 2 * (self.model.layers - self.layers.stop))
        addresses = np.pad(self.placement.addresses, beside) if any(beside) else self.placement.addresses
        self._places = places = Places.of(
            self.model.parameters, self.model.group_ends, rest, tokens, addresses, offsets, shared.on_cuda(device)
        )  # fmt: skip
        self._words = places.words.to(device, non_blocking=True)
        self._bases = self._part("bases", 2 * len(addresses)).view(torch.int64)
        self._source = torch.zeros((tokens, places.width), dtype=torch.float16, device=device)
        self._low_left, self._has_offsets = places.low > 0, offsets is not None

    def streams(self, section: Tensor, layout: Layout, offsets: NDArray[np.int32]) -> DeviceStreams:
        """The streams of the live columns, in a section that is, or will be, on the device; after `begin`. `offsets`
        are sent unless `begin` was told them."""
        live, tokens = self._places.live, len(self.positions)
        if not self._has_offsets:
            return shared.on_device(section, layout, offsets, live, tokens)
        words = section.view(torch.int32)[layout.units_at // 4 :]
        there = self._part("offsets", layout.streams + 1)
        return DeviceStreams(words, there, layout.units, live, tokens, layout.segment_tokens)

    def _part(self, name: str, count: int) -> Tensor:
        begin = self._places.begins[name]
        return self._words[begin : begin + count]

    def coefficients(self, streams: DeviceStreams, first_segment: int = 0, segments: int | None = None) -> None:
        """Decode the streams of some segments; the first time, those of all low bits too."""
        columns, places = self.columns, self._places
        if not len(columns):
            return
        segments = streams.segments - first_segment if segments is None else segments
        programs = segments * triton.cdiv(len(columns), DECODE_LANES)
        low_programs = streams.segments * triton.cdiv(places.low, DECODE_LANES) if self._low_left else 0
        self._low_left = False
        at = places.begins
        kernels.coefficients[(programs + low_programs,)](
            streams.payload, streams.offsets, self._words, self.model.slots, self.model.entries, self._source,
            streams.units, streams.columns, columns.start, columns.stop, first_segment, programs,
            at["own"], at["live"],
            places.low_units, places.low, at["low_own"], at["low"], at["low_offsets"], at["low_units"],
            streams.tokens, streams.segment_tokens, places.width,
            N_SYMBOLS=self.model.entries.shape[1], SHIFT=SHIFT, LOW_FLAG=LOW_FLAG, BLOCK=DECODE_LANES, FAR=FAR,
            num_warps=DECODE_WARPS, maxnreg=_DECODE_REGISTERS, enable_fp_fusion=False,
        )  # fmt: skip

    def add_extras(self) -> None:
        """Take what only values need: the basis, escapes and tokens coded apart."""
        places = self._places
        # Gathered, not looked up by the product, whose loads can then run ahead.
        self._basis = self.model.basis.index_select(0, self._part("rows", places.width))
        if places.escapes:
            at = self._part("at", 4 * places.escapes).view(torch.int64)
            self._source.view(-1)[at] = self._part("parts", 2 * places.escapes).view(torch.float32).half()
        if places.coarse:
            self._basis[self._part("coarse", places.coarse)] *= PART
        self._take_apart()

    @property
    def columns(self) -> range:
        """Which of the live columns belong to groups of the target's layers."""
        if len(self.layers) == self.model.layers:
            return range(len(self._rest.alive))
        each = len(self.model.parameters.groups[0].layers)
        groups = self.model.parameters.groups[self.layers.start // each : (self.layers.stop - 1) // each + 1]
        return range(*np.searchsorted(self._rest.alive, (groups[0].columns.start, groups[-1].columns.stop)).tolist())

    def values(self, first: int, last: int) -> None:
        """Turn the coefficients of tokens `[first, last)` into values, once they are there."""
        model, placement = self.model, self.placement
        heads = 2 * model.heads
        turned = self._rotations
        kernels.synthesise[(len(self.layers) * heads, triton.cdiv(last - first, BLOCK))](
            self._bases, self._token_at, self._source, self._basis, self._words,
            model.scale, model.mean, model.dims, turned.both, model.rope_of_layer, self._step,
            self._places.begins["first"],
            first, last, self.positions.start - turned.positions.start, len(turned.positions),
            self.layers.start * heads, model.group_pairs, model.heads,
            self._source.shape[1], model.basis.shape[1],
            placement.token_stride, placement.head_stride, placement.dim_stride,
            TABLE=placement.token_at is not None, VALUE=_TYPES[self.target.dtype], CONTIGUOUS=model.contiguous,
            ALIGNED=placement.aligned and model.half * self.target.dtype.itemsize % 16 == 0,
            D=model.dim, HALF=model.half_block, BLOCK=BLOCK, STEP=STEP,
            num_warps=WARPS, num_stages=STAGES, maxnreg=REGISTERS,
        )  # fmt: skip

    @property
    def only_waits(self) -> bool:
        """Whether `end` was called, and nothing is left to launch."""
        return self._flags is not None and self._values is None

    def end(self) -> None:
        """After all values: write the tokens coded apart, and ask what was damaged."""
        self._write_apart()
        self._flags = shared.fetch(self._part("flags", FLAGS))

    def finish(self) -> None:
        """Wait for the device until `end`, and give a target that only takes finished values what it is due. Raises
        CodecError."""
        assert self._flags is not None
        (numbers,) = self._flags()
        for number, columns in ((numbers[0], self._places.live), (numbers[LOW_FLAG], self._places.low)):
            if number:
                shared.raise_damaged(int(number), columns)
        if self._values is not None:
            for layer in range(len(self.layers)):
                for side in (0, 1):
                    self.target.write(layer, side, self._values[layer, side])

    def _take_apart(self) -> None:
        found, device = self._rest.apart, self.model.device
        if len(found.tokens):
            values = found.values[self.layers.start : self.layers.stop].contiguous()
            self._apart = shared.send(device, torch.from_numpy(found.tokens)), shared.send(device, values)

    def _write_apart(self) -> None:
        if self._apart is None:
            return
        model, placement = self.model, self.placement
        tokens, values = self._apart
        kernels.write_apart[(len(self.layers) * 2 * model.heads, len(tokens))](
            placement.bases, self._token_at, tokens, values,
            len(tokens), model.heads, placement.token_stride, placement.head_stride, placement.dim_stride,
            TABLE=placement.token_at is not None, VALUE=_TYPES[self.target.dtype], D=model.dim,
            DIM=triton.next_power_of_2(model.dim),
        )  # fmt: skip

    @property
    def _token_at(self) -> Tensor:
        return self._bases if self.placement.token_at is None else self.placement.token_at


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
