"""kvstream's own codec: transform coding with one scalar step a level.

Keys are turned back to position 0 (RoPE undone), the mean of every channel is removed, and each head's vector is
expressed in a basis in which its coefficients are uncorrelated and an error of one step costs the same whatever
coefficient of whatever head it hits: the eigenvectors of the covariance measured in the metric of the model's own
sensitivity. So one step a level serves all of them, and how many bits a coefficient gets follows from its variance.
Coefficients are quantised with a dead zone and centroids (`quantize`) and rANS coded with one of a few shared tables
each.

All that depends on the model is in the profile; a chunk holds the coded coefficients and the few exceptions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codec.api import LARGEST_MAGNITUDE, Codec, Decoder, Level
from codec.container import Chunk, Header
from codec.entropy import escapes, rans
from codec.entropy.sections import join
from codec.entropy.tables import PROB_SCALE, Tables
from codec.errors import CodecError
from codec.profile import Profile
from codec.quantize import ALPHABET, MAX_SHIFT, Classes, column_entropy, design
from codec.sharing import share_out
from codec.targets import CacheTarget, KVTarget
from codec.transform import Rope, analyse, synthesise

if TYPE_CHECKING:
    from codec.kvstream_triton import DeviceModel

TARGET_BITS = (0.3, 0.5, 0.8, 1.2, 1.8, 2.6, 3.6)
"""Default ladder: bits per element that the levels' steps are chosen for, smallest first."""
RIDGE = 1e-3
"""Part of a head's mean sensitivity that every direction has at least: bounds the noise that unused ones get."""
TEMPER = 0.75
"""Power to which the sensitivity is taken. Mean outer products of gradients are dominated by the rare tokens whose
prediction hangs on one direction; there the KL divergence of a real error stays far below the second-order one."""
UNIFORM = Tables(
    np.stack([
        np.where(np.arange(1 << MAX_SHIFT) < 1 << bits, PROB_SCALE >> bits, 0) for bits in range(1, MAX_SHIFT + 1)
    ]).astype(np.uint16)
)  # fmt: skip
"""Tables of the further bits of wide columns: table k - 1 has 2^k symbols."""
SEGMENT_TOKENS = 512
"""A longer chunk's columns are cut into streams of this many tokens, so that a few layers of it fill a GPU."""
PIECE = 2 * SEGMENT_TOKENS
"""Tokens of a layer's keys or values that a decoder holds in float32 at a time."""
MAX_LEVELS = 256
"""A chunk's header has one byte for its level."""
LARGEST_COEFFICIENT = float(1 << 16 + MAX_SHIFT)
"""In steps: a reconstruction value, which is a float16, with all the further bits of a wide column."""
_SAMPLE_TOKENS = 3_000


class KVStream(Codec):
    """Sections `coef` (rANS, columns in order (layer, K or V, head, coefficient)), `fine` (rANS, the further bits of
    wide columns; empty where there are none) and `escs` (coefficients that no table can code, in whole steps)."""

    codec_id = "kvstream"
    needs_profile = True

    def __init__(self, *, profile: Profile | None = None) -> None:
        super().__init__(profile=profile)
        assert self.profile is not None
        found = self.profile
        if found.codec_id != self.codec_id:
            raise CodecError(f"profile is for codec {found.codec_id}, not {self.codec_id}: calibrate again")
        layers, heads, dim = (found.number(name) for name in ("layers", "heads", "head_dim"))
        self.shape = (layers, heads, dim)
        columns = layers * 2 * heads * dim
        self.mean = torch.tensor(found.tensor("mean", np.float32, (layers, 2, heads, dim)))
        self.stored_basis = torch.tensor(found.tensor("basis", np.float16, (layers, 2, heads, dim, dim)))
        self.scale = torch.tensor(found.tensor("scale", np.float32, (layers, 2, heads)))
        self._basis = self.stored_basis.float() * self.scale[..., None, None]
        self.rope = rope_of_profile(found)
        frequencies = found.tensor("tables", np.uint16, (None, ALPHABET))
        # Rounded to what a GPU's matrix units take without rounding: all decoders then have the same operands.
        with np.errstate(over="ignore"):  # what becomes infinite is refused with the classes
            values = found.tensor("values", np.float32, frequencies.shape).astype(np.float16).astype(np.float32)
        self.classes = Classes(Tables(frequencies), values)
        self._steps = found.tensor("steps", np.float32, (None,))
        self._class_of_column = found.tensor("classes", np.uint8, (len(self._steps), columns))
        self._shift_of_column = found.tensor("shifts", np.uint8, self._class_of_column.shape)
        if (
            not 1 <= len(self._steps) <= MAX_LEVELS
            or not (self._steps > 0).all()
            or int(self._class_of_column.max()) >= len(frequencies)
            or int(self._shift_of_column.max()) > MAX_SHIFT
            or not self.classes.whole[self._class_of_column[self._shift_of_column > 0]].all()
        ):
            raise CodecError(f"profile {found.sha256[:12]} has impossible steps, classes or shifts; calibrate again")
        farthest = float(self._basis.abs().sum(dim=4).max()) * float(self._steps.max()) * LARGEST_COEFFICIENT
        if not farthest + float(self.mean.abs().max()) <= LARGEST_MAGNITUDE:  # so written, infinity is refused too
            raise CodecError(
                f"profile {found.sha256[:12]} gives values beyond {LARGEST_MAGNITUDE:g}, which no cache has; "
                "calibrate again"
            )
        names = found.metadata.get("levels")
        if not isinstance(names, list) or len(names) != len(self._steps):
            raise CodecError(f"profile {found.sha256[:12]} does not name {len(self._steps)} levels; calibrate again")
        self.levels = tuple(
            Level(str(name), {"step": float(step)}) for name, step in zip(names, self._steps, strict=True)
        )
        self._on_device: dict[torch.device, DeviceModel] = {}

    @cached_property
    def inverse(self) -> Tensor:
        """float32 `[L, 2, H, D, D]`: what maps a value without its mean to its coefficients."""
        try:
            return torch.linalg.inv(self._basis.double()).float()
        except torch.linalg.LinAlgError as error:
            raise CodecError("the profile holds a basis that cannot be inverted; calibrate again") from error

    def step(self, level: int) -> float:
        return float(self._steps[level])

    def columns(self, level: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Class and shift of every column, in the order (layer, K or V, head, coefficient)."""
        return self._class_of_column[level], self._shift_of_column[level]

    def on_device(self, device: torch.device) -> DeviceModel:
        """The profile on a GPU, kept there. Raises CodecError where Triton is missing."""
        device = torch.empty(0, device=device).device  # "cuda" is one of several
        if device not in self._on_device:
            try:
                from codec.kvstream_triton import DeviceModel
            except ImportError as error:
                raise CodecError(
                    f"coding on {device} needs Triton, which is not installed: pip install triton"
                ) from error
            self._on_device[device] = DeviceModel(self, device)
        return self._on_device[device]

    def _describe(self, chunk: Chunk) -> dict[str, Any]:
        header = chunk.header
        own = self._class_of_column[header.level]
        coded = rans.parse(chunk.section("coef"), len(own), header.tokens, SEGMENT_TOKENS)
        words = np.diff(coded.offsets).reshape(coded.segments, header.layers, 2, -1).sum(axis=(0, 3))
        patches = self._patches(chunk)
        symbols = rans.decode_streams(coded, own, self.classes.tables)
        ideal = self._ideal_bits(header.level, slice(None), symbols, len(chunk.section("escs")))
        return {
            "bits_by_layer": (16 * words / (header.elements / header.layers / 2)).tolist(),
            "ideal_bits_per_element": ideal / header.elements,
            "wide_columns": len(patches.wide),
            "escapes": len(patches.column),
        }

    def ideal_bits(self, kv: Tensor, level: int, *, positions: range) -> float:
        """Bits that ideal coding of a chunk's symbols under their tables takes: what the bitstream's size is judged
        by."""
        self._check_level(level)
        total = 0.0
        for number, part in enumerate(self._parts):
            symbols, _, escaped = self._symbols(kv, level, positions, number)
            total += self._ideal_bits(level, part, symbols, escaped.nbytes)
        return total

    def _ideal_bits(self, level: int, part: slice, symbols: NDArray[np.uint8], escape_bytes: int) -> float:
        cost = self.classes.tables.cost_bits[self._class_of_column[level][part, None], symbols]
        further = int(self._shift_of_column[level][part].sum(dtype=np.int64)) * symbols.shape[1]
        return float(cost.sum() + further + 8 * escape_bytes)

    def _encode(self, kv: Tensor, level: int, header: Header) -> dict[str, bytes]:
        self._check_shape(header)
        if kv.is_cuda:
            from codec import kvstream_triton

            return kvstream_triton.encode(self.on_device(kv.device), kv, level, header.positions, SEGMENT_TOKENS)
        own, shift = self.columns(level)
        found: list[Any] = [None] * len(self._parts)

        def some(numbers: range, threads: int) -> None:
            for number in numbers:
                part = self._parts[number]
                symbols, further, escaped = self._symbols(kv, level, header.positions, number)
                settings = {"segment_tokens": SEGMENT_TOKENS, "threads": threads}
                bits = shift[part][shift[part] > 0]
                found[number] = (
                    rans.encode_streams(symbols, own[part], self.classes.tables, **settings),
                    [rans.encode_streams(further, bits - 1, UNIFORM, **settings)] if len(bits) else [],
                    escaped.tobytes(),
                )

        share_out(some, len(self._parts), header.layers)
        coef, fine, escaped = zip(*found, strict=True)
        return {
            "escs": b"".join(escaped),
            "fine": join(list(chain(*fine))) if shift.any() else b"",
            "coef": join(coef),
        }

    @cached_property
    def _parts(self) -> list[slice]:
        """The columns of each layer's keys and values, in order."""
        layers, heads, dim = self.shape
        return [slice(low, low + heads * dim) for low in range(0, layers * 2 * heads * dim, heads * dim)]

    def _symbols(
        self, kv: Tensor, level: int, positions: range, number: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[Any]]:
        """Of a layer's keys (`number` is even) or values: symbols `[H * D, T]`, further bits of wide columns `[W, T]`,
        escapes."""
        layer, side = divmod(number, 2)
        part = self._parts[number]
        mean, inverse = self.mean[layer, side], self.inverse[layer, side]
        coefficients = analyse(kv, layer, side, mean, inverse, self.rope, positions)
        steps = coefficients.flatten(0, 1).mul_(1 / float(self._steps[level])).numpy()
        own, shift = self.columns(level)
        symbols, further, outside = self.classes.quantise(steps, own[part], shift[part])
        outside["column"] += part.start
        return symbols, further, outside

    def _check_chunk(self, chunk: Chunk) -> None:
        chunk.section("coef")
        chunk.section("escs")
        chunk.section("fine", None if self._shift_of_column[chunk.header.level].any() else 0)

    def _decode(self, chunk: Chunk, target: CacheTarget) -> None:
        header = chunk.header
        if target.device.type == "cuda":
            from codec import kvstream_arriving

            escaped = escapes.parse(chunk.section("escs"), self._class_of_column.shape[1], header.tokens)
            parts = {"coef": chunk.section("coef"), "fine": chunk.section("fine"), "escs": escaped}
            kvstream_arriving.decode(self, header, parts, target)
            return
        _, heads, dim = self.shape
        step = float(self._steps[header.level])
        own = self._class_of_column[header.level]
        coded = rans.parse(chunk.section("coef"), len(own), header.tokens, SEGMENT_TOKENS)
        patches = self._patches(chunk)

        def some(numbers: range, threads: int) -> None:
            """A piece at a time, so that what a thread holds does not grow with the chunk."""
            room = np.empty((heads, min(PIECE, header.tokens), dim), np.float32)
            for number in numbers:
                layer, side = divmod(number, 2)
                columns = self._parts[number]
                mean, basis = self.mean[layer, side], self._basis[layer, side] * step
                for first in range(0, header.tokens, PIECE):
                    coefficients = room[:, : header.tokens - first]
                    positions = header.positions[first : first + PIECE]
                    for at in range(0, len(positions), SEGMENT_TOKENS):
                        part = coded.part((first + at) // SEGMENT_TOKENS, columns.start, columns.stop)
                        rans.decode_dequantised(
                            part, own[columns], self.classes.tables, heads * dim, part.tokens,
                            coefficients[:, at : at + part.tokens], values=self.classes.values, threads=threads,
                        )  # fmt: skip
                    patches.apply(coefficients, columns.start, first)
                    values = synthesise(torch.from_numpy(coefficients), layer, side, mean, basis, self.rope, positions)
                    target.write(layer, side, values.to(target.device), first)

        share_out(some, len(self._parts), header.layers)

    def decoder(
        self, out: KVTarget, *, device: torch.device | str = "cpu", total_bytes: int | None = None,
        layers: range | None = None,
    ) -> Decoder:  # fmt: skip
        if not self.decodes_pieces(device):
            return super().decoder(out, device=device, total_bytes=total_bytes, layers=layers)
        from codec.kvstream_arriving import StreamingDecoder

        return StreamingDecoder(self, out, device, total_bytes, layers)

    def decodes_pieces(self, device: torch.device | str) -> bool:
        return torch.device(device).type == "cuda"

    def check_header(self, header: Header) -> None:
        super().check_header(header)
        self._check_shape(header)

    def _patches(self, chunk: Chunk) -> Patches:
        header = chunk.header
        shift = self._shift_of_column[header.level]
        wide = np.flatnonzero(shift)
        fine = np.empty((0, header.tokens), np.uint8)
        if len(wide):
            coded = rans.parse(chunk.section("fine"), len(wide), header.tokens, SEGMENT_TOKENS)
            fine = rans.decode_streams(coded, shift[wide] - 1, UNIFORM)
        escaped = escapes.parse(chunk.section("escs"), len(shift), header.tokens)
        return Patches(wide, shift[wide], fine, escaped["column"].astype(np.int64), escaped["token"], escaped["value"])

    def _check_shape(self, header: Header) -> None:
        shape = (header.layers, header.heads, header.head_dim)
        if shape != self.shape:
            raise CodecError(f"the cache has (layers, heads, head_dim) {shape}, the profile's model {self.shape}")


@dataclass(frozen=True)
class Patches:
    """What is mended in decoded coefficients: the further bits of wide columns, and escapes; both by column."""

    wide: NDArray[np.int64]
    shift: NDArray[np.uint8]
    fine: NDArray[np.uint8]
    column: NDArray[np.int64]
    token: NDArray[np.uint16]
    value: NDArray[np.int16]

    def apply(self, coefficients: NDArray[np.float32], low: int, first: int) -> None:
        """Mend `[B, n, D]`, which holds the columns from `low` and the tokens from `first` on, in place."""
        blocks, tokens, dim = coefficients.shape
        high, last = low + blocks * dim, first + tokens
        for index in range(*np.searchsorted(self.wide, (low, high))):
            block, place = divmod(int(self.wide[index]) - low, dim)
            unit = 1 << int(self.shift[index])
            further = self.fine[index, first:last] - unit / 2
            coefficients[block, :, place] = coefficients[block, :, place] * unit + further
        begin, end = np.searchsorted(self.column, (low, high))
        if begin == end:
            return
        some = slice(begin, end)
        if tokens < self.fine.shape[1]:
            some = begin + np.flatnonzero((self.token[some] >= first) & (self.token[some] < last))
        block, place = np.divmod(self.column[some] - low, dim)
        coefficients[block, self.token[some] - first, place] = self.value[some]


def rope_of_profile(profile: Profile) -> Rope | None:
    """The rotary embedding that a profile's `inv_freq` describes; None for a model without."""
    if "inv_freq" not in profile.tensors:
        return None
    layers, dim = profile.number("layers"), profile.number("head_dim")
    inv_freq = profile.tensor("inv_freq", np.float32, (layers, None))
    if 2 * inv_freq.shape[1] > dim:
        raise CodecError(f"profile {profile.sha256[:12]} rotates more than {dim} dimensions; calibrate again")
    return Rope(torch.tensor(inv_freq), bool(profile.metadata.get("rope_interleaved", False)))


def fit(
    kv_samples: Sequence[Tensor], *, rope: Rope | None = None, sensitivity: Tensor | None = None,
    target_bits: Sequence[float] = TARGET_BITS, klt: bool = True, centre: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> Profile:  # fmt: skip
    """Calibrate for one model.

    `kv_samples` are caches `[L, 2, T, H, D]` of contexts that begin at position 0. `rope` is the model's rotary
    embedding, None to leave keys as they are. `sensitivity` says what an error costs: `[L, 2, H]`, a weight of each
    head, or `[L, 2, H, D, D]`, a metric in the space of keys turned back to position 0 and values (for instance the
    mean outer product of gradients of log p, whose half is the second-order KL divergence); None weighs all alike.
    `klt=False` keeps the channels and `centre=False` their means, to measure what each of these stages brings.
    """
    if not kv_samples:
        raise CodecError("a profile needs at least one KV sample")
    layers, _, _, heads, dim = kv_samples[0].shape
    mean, covariance = _moments(kv_samples, rope, centre)
    if not bool(torch.isfinite(covariance).all()):
        raise CodecError("a KV sample holds NaN, infinities or values whose squares are; look at the model's output")
    if sensitivity is not None and not bool(torch.isfinite(sensitivity).all()):
        raise CodecError("the sensitivity holds NaN or infinities; look at the model's gradients")
    basis = torch.empty((layers, 2, heads, dim, dim))
    for index in np.ndindex(layers, 2, heads):
        metric = _metric(sensitivity, index, dim)
        basis[index] = _basis(covariance[index], metric, klt)
    # The scale of the sensitivity is arbitrary: fix it so that a step is about that of the values.
    basis /= basis.pow(2).mean().sqrt() * dim**0.5
    scale = basis.abs().amax(dim=(3, 4))
    stored = (basis / scale[..., None, None]).half()
    inverse = torch.linalg.inv(stored.double() * scale[..., None, None].double()).float()
    sample = _coefficients(kv_samples, rope, mean, inverse)
    steps = [_step_for(sample, bits) for bits in target_bits]
    found = design(sample, steps)
    tensors: dict[str, NDArray[Any]] = {
        "mean": mean.numpy(),
        "basis": stored.numpy(),
        "scale": scale.numpy(),
        "tables": found.classes.tables.frequencies,
        "values": found.classes.values,
        "steps": np.array(steps, np.float32),
        "classes": found.class_of_column,
        "shifts": found.shift_of_column,
    }
    if rope is not None:
        tensors["inv_freq"] = rope.inv_freq.numpy()
    facts = {
        **(metadata or {}),
        "codec": KVStream.codec_id,
        "layers": layers,
        "heads": heads,
        "head_dim": dim,
        "levels": [f"{bits:g} bit" for bits in target_bits],
        "rope_interleaved": rope is not None and rope.interleaved,
        "calibration_tokens": sum(kv.shape[2] for kv in kv_samples),
    }
    return Profile(tensors, facts)


def _moments(kv_samples: Sequence[Tensor], rope: Rope | None, centre: bool) -> tuple[Tensor, Tensor]:
    """Mean `[L, 2, H, D]` and second moment about it `[L, 2, H, D, D]`, keys turned back."""
    layers, _, _, heads, dim = kv_samples[0].shape
    first = torch.zeros((layers, 2, heads, dim), dtype=torch.float64)
    second = torch.zeros((layers, 2, heads, dim, dim), dtype=torch.float64)
    tokens = 0
    for kv in kv_samples:
        if kv.shape[:2] != (layers, 2) or kv.shape[3:] != (heads, dim):
            raise CodecError(f"KV samples have different shapes: {tuple(kv_samples[0].shape)} and {tuple(kv.shape)}")
        tokens += kv.shape[2]
        for layer in range(layers):
            for side in (0, 1):
                block = kv[layer, side].float().permute(1, 0, 2).clone()
                if side == 0 and rope is not None:
                    rope.rotate(block, layer, range(kv.shape[2]), undo=True)
                first[layer, side] += block.double().sum(dim=1)
                second[layer, side] += (block.transpose(1, 2) @ block).double()
    mean = first / tokens if centre else torch.zeros_like(first)
    second = second / tokens - (mean[..., :, None] * mean[..., None, :] if centre else 0)
    return mean.float(), second


def _metric(sensitivity: Tensor | None, index: tuple[int, ...], dim: int) -> Tensor:
    """The positive definite metric of one head, `[D, D]` in float64."""
    eye = torch.eye(dim, dtype=torch.float64)
    if sensitivity is None:
        return eye
    if sensitivity.dim() == 3:
        floor = RIDGE * float(sensitivity.mean())
        return eye * max(float(sensitivity[index]), floor) ** TEMPER
    whole = float(sensitivity.diagonal(dim1=3, dim2=4).mean())
    own = sensitivity[index].double()
    ridge = RIDGE * max(float(own.diagonal().mean()), RIDGE * whole)
    weight, axes = torch.linalg.eigh((own + own.T) / 2 + max(ridge, 1e-30) * eye)
    return axes @ torch.diag(weight.clamp(min=1e-30) ** TEMPER) @ axes.T


def _basis(covariance: Tensor, metric: Tensor, klt: bool) -> Tensor:
    """Columns that coefficients multiply: `metric^(-1/2) U`, U the eigenvectors of the covariance in that metric."""
    weight, axes = torch.linalg.eigh(metric)
    root = axes @ torch.diag(weight.clamp(min=1e-300).sqrt()) @ axes.T
    back = axes @ torch.diag(weight.clamp(min=1e-300).rsqrt()) @ axes.T
    if not klt:
        return torch.diag(metric.diagonal().rsqrt()).float()
    _, vectors = torch.linalg.eigh(root @ covariance @ root)
    return (back @ vectors.flip(1)).float()


def _coefficients(
    kv_samples: Sequence[Tensor], rope: Rope | None, mean: Tensor, inverse: Tensor
) -> NDArray[np.float32]:
    """Coefficients `[columns, N]` of N tokens spread evenly over the samples."""
    stride = max(1, sum(kv.shape[2] for kv in kv_samples) // _SAMPLE_TOKENS)
    parts = []
    for kv in kv_samples:
        positions = range(kv.shape[2])
        blocks = [
            analyse(kv, layer, side, mean[layer, side], inverse[layer, side], rope, positions)[..., ::stride]
            for layer, side in np.ndindex(len(kv), 2)
        ]
        parts.append(torch.stack(blocks).flatten(0, 2))
    return torch.cat(parts, dim=1).contiguous().numpy()


def _step_for(sample: NDArray[np.float32], bits: float) -> float:
    """The step at which the columns' symbols have an entropy of `bits` on average, by bisection."""
    thinned = np.ascontiguousarray(sample[:, :: max(1, sample.shape[1] // 1_000)])
    low, high = 1e-6, 2 * float(np.abs(thinned).max()) + 1e-6
    for _ in range(24):
        step = (low * high) ** 0.5
        if column_entropy(thinned / np.float32(step)) > bits:
            low = step
        else:
            high = step
    return (low * high) ** 0.5
