"""A chunk encoded on a GPU, in Triton.

The product with the analysis runs on the matrix units, float16 operands and float32 sums, twice: with rounded operands
for all columns, which tells how each is coded; and for the live ones with what rounding left of the operands, which is
as good as float32. So symbols differ from the CPU's only where a coefficient lies that close to a threshold, and kinds
where two cost nearly the same. What a kernel needs is copied in one piece, and while the device works on the streams,
the host compresses what it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.entropy import device as shared
from kvstream.codec.entropy import rans_triton
from kvstream.codec.entropy.device import Coded
from kvstream.codec.kvstream import apart, escapes, kinds
from kvstream.codec.kvstream import triton_encode_kernels as kernels
from kvstream.codec.kvstream.parameters import SKETCH, Parameters
from kvstream.codec.kvstream.triton_job import DeviceModel
from kvstream.codec.quantize import ESCAPES, MAX_SHIFT, WIDE, whole_steps
from kvstream.codec.quantize import HALF as MIDDLE

COLUMNS = 128
"""Columns of which a program of the product makes coefficients."""


@dataclass(frozen=True)
class Shape:
    """How a product is cut up: a program's tokens, the values that it multiplies at a time, its warps, and how far it
    reads ahead."""

    tokens: int
    step: int
    warps: int
    stages: int


# 96 KiB of shared memory each, which smaller GPUs have too.
ROUNDED = Shape(128, 64, 4, 3)
EXACT = Shape(128, 32, 8, 3)
_EVEN = 64
"""What a group's number of values is usually a multiple of, and steps divide."""
_LARGEST = float(1 << 14)
"""What the largest magnitude that is not coded apart becomes in a product's operand; less a mean and turned, at most
twice that, which float16 holds."""
_ESCAPES_PER_CHUNK = 4_096
"""Escapes that the encoder makes room for at first."""


@dataclass(frozen=True)
class Analysis:
    """What only encoding needs of the parameters, on a device."""

    limit: Tensor
    """float32 `[P]`, for each layer's keys and values and each head: a token with more is coded apart."""
    gain: Tensor
    """float32 `[P]`: by which values are multiplied before they become float16."""
    matrix: Tensor
    """float16 `[2, C + S, N]`: rows of `Group.analysis`, then those of every `Group.sketch`, dimensions as two halves,
    each over its largest magnitude; rounded, and what rounding left."""
    factor: Tensor
    """float32 `[C + S]`: what turns a row's product into a coefficient."""
    begins: NDArray[np.int64]
    """`[G]`: where each group's values begin among a token's."""
    counts: NDArray[np.int64]
    """`[G]`: how many values a token each group has."""
    weights: Tensor
    """float32 `[G, 1]`: `counts` on the device."""
    all: tuple[Tensor, Tensor]
    """All columns, int32 `[C]`, and their tiles."""
    sketches: tuple[Tensor, Tensor]
    """The S rows of the groups' sketches, and their tiles."""
    even: bool
    thresholds: Tensor
    """float32 `[K, HALF + 2]`, of the classes."""
    support: Tensor
    """int32 `[K]`: the classes' largest magnitudes."""
    expected: Tensor
    """int64 `[levels, C]`."""
    prices: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, model: DeviceModel) -> Analysis:
        parameters, device = model.parameters, model.device
        limit = apart.limits(parameters.mean, parameters.spread)
        scale = limit.clamp(min=1e-30) / _LARGEST
        widest = max(group.basis_values for group in parameters.groups)
        count, groups = parameters.n_columns, parameters.groups
        matrix = torch.zeros((2, count + SKETCH * len(groups), widest), dtype=torch.float16)
        factor = torch.empty(matrix.shape[1])
        places = [group.columns for group in groups]
        places += [slice(count + SKETCH * g, count + SKETCH * (g + 1)) for g in range(len(groups))]
        parts = [group.analysis for group in groups] + [group.sketch for group in groups]
        for group, place, part in zip(groups * 2, places, parts, strict=True):
            own = slice(group.layers.start, group.layers.stop)
            rows = part.unflatten(1, group.stored_basis.shape[1:]) * scale[own, :, :, None]
            rows = rows[..., model.both].flatten(1)
            largest = rows.abs().amax(dim=1).clamp(min=1e-30)
            rows /= largest[:, None]
            rounded = rows.half()
            matrix[0, place, : rows.shape[1]] = rounded
            matrix[1, place, : rows.shape[1]] = (rows - rounded.float()).half()
            factor[place] = largest
        begins = np.array([group.layers.start for group in parameters.groups]) * 2 * model.heads * model.dim
        counts = np.array([group.basis_values for group in parameters.groups])
        columns = np.arange(len(factor), dtype=np.int32)
        tiles = tiles_of(columns[:count], model.group_ends, begins, counts)
        sketched = np.arange(1, len(groups) + 1) * SKETCH
        sketch_tiles = tiles_of(columns[: sketched[-1]], sketched, begins, counts)
        classes = parameters.classes
        return cls(
            limit.flatten().to(device),
            (1 / scale).flatten().to(device),
            matrix.to(device),
            factor.to(device),
            begins,
            counts,
            torch.from_numpy(counts).to(device, torch.float32)[:, None],
            (torch.from_numpy(columns[:count]).to(device), torch.from_numpy(tiles).to(device)),
            (torch.from_numpy(columns[count:]).to(device), torch.from_numpy(sketch_tiles).to(device)),
            not (begins % _EVEN).any() and not (counts % _EVEN).any(),
            torch.from_numpy(classes.thresholds).to(device),
            torch.from_numpy(classes.support).to(device),
            torch.from_numpy(parameters.expected.astype(np.int64)).to(device),
            parameters.kinds.prices(device),
        )


_KEPT: WeakKeyDictionary[DeviceModel, Analysis] = WeakKeyDictionary()


def analysis_of(model: DeviceModel) -> Analysis:
    """What only encoding needs of a model; made once, and kept as long as the model."""
    found = _KEPT.get(model)
    if found is None:
        found = _KEPT[model] = Analysis.of(model)
    return found


def encode(model: DeviceModel, kv: Tensor, level: int, positions: range) -> dict[str, bytes | memoryview]:
    """Sections of a chunk `[L, 2, T, H, D]` on the model's device; as `cpu.encode`, but for rounding."""
    parameters = model.parameters
    with shared.current(model.device):
        skipped = torch.zeros(len(positions), dtype=torch.uint8, device=model.device)
        skipped[: max(0, parameters.sinks - positions.start)] = 1
        operands = rows(model, kv, positions, skipped)
        skipped |= apart.inexpressible(left_out(model, operands, level).masked_fill(skipped > 0, 0.0))
        while True:
            chosen, tokens = survey(model, product(model, operands, level), level, skipped)
            streams = Streams(model, operands, level, chosen, skipped)
            kind = kinds.pack(chosen, parameters.expected[level])
            escaped = streams.escapes(kv.numel())
            if not len(beyond := escapes.beyond(escaped)):
                break
            tokens = apart.more(tokens, beyond)
            skipped[torch.from_numpy(tokens).to(model.device)] = 1
        coef, fine = (coded.section() if coded else bytes for coded in (streams.coef, streams.fine))
        return {
            "kind": kind,
            "apar": apart.pack(kv, tokens),
            "escs": escapes.pack(escaped),
            "fine": fine(),
            "coef": coef(),
        }


def tiles_of(
    columns: NDArray[Any], group_ends: NDArray[Any], begins: NDArray[Any], counts: NDArray[Any]
) -> NDArray[np.int32]:
    """The tiles of some columns, ascending, as `kernels.analyse` takes them, int32 `[4, tiles]`."""
    ends = np.searchsorted(columns, group_ends)
    firsts = np.concatenate([[0], ends[:-1]])
    each = -(-(ends - firsts) // COLUMNS)
    group = np.repeat(np.arange(len(ends)), each)
    number = np.arange(len(group)) - np.repeat(np.cumsum(each) - each, each)
    found = np.stack([firsts[group] + COLUMNS * number, ends[group], begins[group], counts[group]])
    return found.astype(np.int32)


def rows(model: DeviceModel, kv: Tensor, positions: range, skipped: Tensor) -> Tensor:
    """Operands float16 `[2, T, L * 2 * H * D]` of the product, rounded and what rounding left. Marks tokens in
    `skipped`, uint8 `[T]`, that have to be coded apart; their own operands mean nothing."""
    analysis = analysis_of(model)
    tokens, (layers, _, _, heads, dim) = len(positions), kv.shape
    found = torch.empty((2, tokens, layers * 2 * heads * dim), dtype=torch.float16, device=model.device)
    turned = model.rotations(positions)
    kernels.prepare[(layers * 2 * heads, triton.cdiv(tokens, 32))](
        kv, skipped, found, analysis.limit, analysis.gain, model.mean, model.dims, turned.both,
        model.rope_of_layer, positions.start - turned.positions.start, len(turned.positions), tokens, heads,
        found.shape[2], *kv.stride(),
        CONTIGUOUS=model.contiguous, D=dim, HALF=model.half_block, TOKENS=32,
    )  # fmt: skip
    return found


def product(model: DeviceModel, rows: Tensor, level: int, live: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Coefficients, in steps, of rows as `rows` makes them: of all columns float32 `[C, T]`, rounded on the way; or
    `[A, T]` of `live` ones and their tiles."""
    analysis = analysis_of(model)
    which, tiles = analysis.all if live is None else live
    _, tokens, width = rows.shape
    _, columns, row_stride = analysis.matrix.shape
    out = torch.empty((len(which), tokens), device=model.device)
    shape = ROUNDED if live is None else EXACT
    count = tiles.shape[1]
    kernels.analyse[(count * triton.cdiv(tokens, shape.tokens),)](
        rows, analysis.matrix, analysis.factor, which, tiles, out, 1 / model.parameters.step(level),
        tokens, width, row_stride, columns, count,
        EXACT=live is not None, EVEN=analysis.even, COLUMNS=COLUMNS, TOKENS=shape.tokens, STEP=shape.step,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return out


def left_out(model: DeviceModel, rows: Tensor, level: int) -> Tensor:
    """`[G, T]`: as `Group.left_out`, of all groups."""
    analysis = analysis_of(model)
    seen = product(model, rows, level, analysis.sketches)
    squares = seen.unflatten(0, (-1, SKETCH)).square_().mean(dim=1)
    return squares / analysis.weights


def survey(
    model: DeviceModel, values: Tensor, level: int, skipped: Tensor
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The kind of each column, and the tokens that are coded apart."""
    parameters, analysis = model.parameters, analysis_of(model)
    columns, tokens = values.shape
    shift = torch.empty(columns, dtype=torch.uint8, device=model.device)
    counts = torch.empty((columns, kinds.FEW + 2), device=model.device)
    squares = torch.empty((2, columns), device=model.device)
    kernels.survey[(triton.cdiv(columns, 4),)](
        values, skipped, shift, counts, squares, tokens, columns,
        MAX_SHIFT=MAX_SHIFT, HALF=MIDDLE, WIDE=WIDE, COLUMNS=4, TOKENS=256,
    )  # fmt: skip
    segments = triton.cdiv(tokens, parameters.segment_tokens)
    found = parameters.kinds.cheapest(shift, counts, squares, analysis.expected[level], segments, analysis.prices)
    chosen, marks = shared.fetch(found, skipped)()
    return chosen, np.flatnonzero(marks)


class Streams:
    """The live columns' symbols and low bits on their way to streams, started on the current stream."""

    def __init__(
        self, model: DeviceModel, rows: Tensor, level: int, chosen: NDArray[np.uint8], skipped: Tensor
    ) -> None:
        self._model, self._skipped, analysis = model, skipped, analysis_of(model)
        self._alive, own, shift = model.parameters.kinds.of_columns(chosen)
        self._wide = np.flatnonzero(shift)
        self.coef: Coded | None = None
        self.fine: Coded | None = None
        if not len(self._alive):
            return
        index = np.full(len(shift), -1, np.int32)
        index[self._wide] = np.arange(len(self._wide))
        tiles = tiles_of(self._alive, model.group_ends, analysis.begins, analysis.counts).ravel()
        parts = (self._alive, tiles, own, shift, index, model.classes + shift[self._wide] - 1)
        which, flat, tables, self._shifts, self._index, low = shared.copy(
            model.device, *(part.astype(np.int32) for part in parts)
        )
        self._tables = model.tables(tables)
        self._values = product(model, rows, level, (which, flat.view(4, -1)))
        symbols, low_bits, self._escaped = self._quantise(_ESCAPES_PER_CHUNK)
        segment_tokens = Parameters.segment_tokens
        self.coef = rans_triton.launch_encode(symbols.T, self._tables, segment_tokens)
        if len(self._wide):
            self.fine = rans_triton.launch_encode(low_bits.T, model.tables(low), segment_tokens)

    def escapes(self, elements: int) -> NDArray[Any]:
        """Waits for the device to count them. Raises UnlikeCalibration for more than a chunk may have."""
        if not len(self._alive):
            return np.empty(0, ESCAPES)
        count, places, steps = self._escaped()
        n = int(count[0])
        escapes.check_count(n, elements)
        if n > len(steps):
            count, places, steps = self._quantise(n)[2]()
        found = np.empty(n, ESCAPES)
        column, found["token"] = places[:, :n]
        found["column"], found["value"] = self._alive[column], whole_steps(steps[:n])
        return found

    def _quantise(self, room: int) -> tuple[Tensor, Tensor, Callable[[], list[NDArray[Any]]]]:
        """Symbols uint8 `[T, A]`, low bits uint8 `[T, W]`; how many escapes there are, and places and values of the
        first `room` of them, on their way to the host."""
        values, analysis, device = self._values, analysis_of(self._model), self._model.device
        columns, tokens = len(self._alive), values.shape[1]
        symbols = torch.empty((tokens, columns), dtype=torch.uint8, device=device)
        fine = torch.empty((tokens, max(1, len(self._wide))), dtype=torch.uint8, device=device)
        count = torch.zeros(1, dtype=torch.int32, device=device)
        places = torch.empty((2, room), dtype=torch.int32, device=device)
        steps = torch.empty(room, dtype=torch.float32, device=device)
        kernels.quantise[(triton.cdiv(columns, 32), triton.cdiv(tokens, 32))](
            values, self._skipped, self._tables.rows, self._shifts, self._index, analysis.thresholds,
            analysis.support, symbols, fine, count, places, steps,
            tokens, columns, fine.shape[1], room,
            THRESHOLDS=analysis.thresholds.shape[1], MIDDLE=MIDDLE, COLUMNS=32, TOKENS=32,
        )  # fmt: skip
        return symbols, fine, shared.fetch(count, places, steps)
