"""KVTC (Staniszewski and Lancucki, ICLR 2026, arXiv 2511.01815): PCA, bits by dynamic programming, Deflate.

Keys, with RoPE undone, and values are transformed apart, each by a PCA of a token's vector over all layers and heads.
Components, the largest variance first, form groups of 1, 16, 64, 256 or 1,024; in each token, a group has a 16-bit
shift and a 16-bit scale and is coded as 2- or 4-bit integers or FP8 (E4M3), or not at all. A dynamic programme chooses
groups and types so that the squared error on the calibration's caches is least within a budget: 16 bits an element
over the level's factor, for keys and values alike, Deflate not counted. Deflate codes what results. The first four
tokens of a context, attention sinks, are exact.

Its code is not public. Filled in where the paper is silent: integers span a group's smallest to its largest
coefficient, FP8 its largest deviation from their middle; shift and scale are float16. The PCA is exact up to 8,192
values a token, beyond that randomised with eight iterations, as theirs. Groups of 16 and less may begin at any
component, larger ones at multiples of 16. What follows the last group is not coded: there are no gaps. A group's bytes
for all tokens follow each other, shifts and scales with their high and low bytes apart, and zlib's level 9 codes keys
and values separately. There is no escape: what lies outside the components kept is lost, as published.

What a chunked stream changes. The paper keeps the last 128 tokens exact too, of a cache that goes on being used. A
context that is streamed is followed by a prompt that its receiver computes itself: these are the recent tokens, exact
under every codec. An encoder does not know which chunk will be a context's last either. So no token of a chunk counts
as recent, which is the smaller of two readings (the paper's rates do not count them); `recent=128` is the other, and
keeps the last 128 tokens of every chunk exact.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.api import Codec, Level, Setting, check_finite
from kvstream.codec.container import Chunk, Header
from kvstream.codec.errors import CodecError
from kvstream.codec.exact import checked_recent, exact_tokens, write_exact
from kvstream.codec.kvstream.parameters import rope_of_profile
from kvstream.codec.profile import Profile
from kvstream.codec.raw import frombuffer
from kvstream.codec.targets import CacheTarget
from kvstream.codec.transform import Rope
from kvstream.codec.uniform import as_bytes, pack_bits, unpack_bits

RATIOS = (64, 32, 16, 8)
"""Levels, smallest first: 16 bits over the budget an element."""
SINKS = 4
SIZES = (1, 16, 64, 256, 1024)
BITS = (2, 4, 8)
"""Of the types; 8 is FP8."""
SIDE_BITS = 32
"""A group's shift and scale in one token."""
LARGEST_FP8 = 448.0
MAX_COMPONENTS = 10_000
EXACT_PCA = 8_192
"""Most values of a token's keys for which all eigenvectors are found."""
BUDGET_STEPS = 8_192
"""Most budgets that the dynamic programme tells apart."""
SAMPLE_TOKENS = 384
"""Tokens on which the error of groups is measured."""
PIECE = 1024
"""Tokens that a decoder holds in float32 at a time."""
SIDES = ("keys", "vals")
MAX_INFLATION = 1032
"""Deflate cannot make more bytes of one."""


@dataclass(frozen=True)
class Group:
    """Consecutive components that are coded alike."""

    first: int
    size: int
    bits: int

    @property
    def token_bits(self) -> int:
        return SIDE_BITS + self.size * self.bits

    def nbytes(self, tokens: int) -> int:
        return 4 * tokens + -(-tokens * self.size // 8) * self.bits


class KVTC(Codec):
    """Sections `exac` (the first four tokens of a context and recent ones, `[L, 2, n, H, D]`), `keys` and `vals`
    (Deflate of a side's groups, one after the other: high bytes of the shifts, of the scales, low bytes, symbols)."""

    codec_id = "kvtc"
    needs_profile = True
    fit_takes = frozenset({"rope"})
    levels = tuple(Level(f"{ratio}x", {"ratio": ratio}) for ratio in RATIOS)

    def __init__(self, *, profile: Profile | None = None, recent: int = 0) -> None:
        super().__init__(profile=profile)
        assert self.profile is not None
        self._recent = checked_recent(recent)
        if self.profile.codec_id != self.codec_id:
            raise CodecError(f"profile is for codec {self.profile.codec_id}, not {self.codec_id}: calibrate again")
        self._shape = tuple(self.profile.number(name) for name in ("layers", "heads", "head_dim"))
        self._rope = rope_of_profile(self.profile)
        layers, heads, dim = self._shape
        width = layers * heads * dim
        self._mean = [torch.tensor(self.profile.tensor(f"{side}.mean", np.float32, (width,))) for side in SIDES]
        self._basis = [torch.tensor(self.profile.tensor(f"{side}.basis", np.float16, (None, width))) for side in SIDES]
        self._groups = [[self._plan(side, level) for level in range(len(RATIOS))] for side in range(len(SIDES))]

    @classmethod
    def fit(cls, kv_samples: Iterable[Tensor], *, metadata: Mapping[str, Any], **of_model: Any) -> Profile:
        return fit(kv_samples, metadata=metadata, **of_model)

    def settings(self) -> dict[str, Setting]:
        return {"recent": self._recent}

    def _plan(self, side: int, level: int) -> list[Group]:
        """The groups of a level, checked: they cover the first components without gaps."""
        assert self.profile is not None
        table = self.profile.tensor(f"{SIDES[side]}.groups.{level}", np.uint32, (None, 2)).tolist()
        groups, first = [], 0
        for size, bits in table:
            if size not in SIZES or bits not in BITS:
                break
            groups.append(Group(first, size, bits))
            first += size
        if not groups or len(groups) < len(table) or first > len(self._basis[side]):
            raise CodecError(f"profile {self.profile.sha256[:12]} has impossible groups of components; calibrate again")
        return groups

    def _encode(self, kv: Tensor, level: int, header: Header) -> dict[str, bytes]:
        self._check_shape(header)
        sinks = _sinks(header)
        stop = max(sinks, header.tokens - self._recent)
        kv = kv.cpu()
        sections = {"exac": as_bytes(torch.cat((kv[:, :, :sinks], kv[:, :, stop:]), dim=2))}
        positions = range(header.start + sinks, header.start + stop)
        for side, tag in enumerate(SIDES):
            groups = self._groups[side][level]
            kept = groups[-1].first + groups[-1].size
            pieces = []
            for at in range(sinks, stop, PIECE):
                end = min(at + PIECE, stop)
                own = range(header.start + at, header.start + end)
                rows = rows_of(kv[:, side, at:end], self._rope if side == 0 else None, own) - self._mean[side]
                pieces.append(rows @ self._basis[side][:kept].float().T)
            coefficients = torch.cat(pieces) if positions else torch.empty((0, kept))
            sections[tag] = zlib.compress(b"".join(_pack(coefficients, group) for group in groups), 9)
        return sections

    def _check_chunk(self, chunk: Chunk) -> None:
        header = chunk.header
        self._check_shape(header)
        if exact_tokens(chunk) < _sinks(header):
            raise CodecError("section 'exac' lacks the first tokens of the context; encode again")
        coded = header.tokens - exact_tokens(chunk)
        for side, tag in enumerate(SIDES):
            wanted = sum(group.nbytes(coded) for group in self._groups[side][header.level])
            if wanted > MAX_INFLATION * len(chunk.section(tag)):
                raise CodecError(f"section '{tag}' is too short for {coded} tokens; encode again")

    def _decode(self, chunk: Chunk, target: CacheTarget) -> None:
        header = chunk.header
        sinks = _sinks(header)
        exact = exact_tokens(chunk)
        coded = header.tokens - exact
        for side, tag in enumerate(SIDES):
            groups = self._groups[side][header.level]
            data = _inflate(chunk, tag, sum(group.nbytes(coded) for group in groups))
            parts = [_unpack(own, coded, group, tag) for group, own in _split(data, coded, groups)]
            coefficients = torch.cat(parts, dim=1)
            if not bool(torch.isfinite(coefficients).all()):
                raise CodecError(f"section '{tag}' holds NaN or infinities; encode again")
            basis = self._basis[side][: coefficients.shape[1]].float()
            for at in range(0, coded, PIECE):
                rows = coefficients[at : at + PIECE] @ basis + self._mean[side]
                first = sinks + at
                own = range(header.start + first, header.start + first + len(rows))
                values = restore(rows, self._shape, self._rope if side == 0 else None, own)
                for layer, block in enumerate(values):
                    target.write(layer, side, block.to(target.device), first)
        write_exact(chunk, target, [(0, sinks), (sinks + coded, exact - sinks)])

    def _check_shape(self, header: Header) -> None:
        shape = (header.layers, header.heads, header.head_dim)
        if shape != self._shape:
            raise CodecError(f"the cache has (layers, heads, head_dim) {shape}, the profile's model {self._shape}")


def _sinks(header: Header) -> int:
    """The first so many tokens of a chunk are among the first four of their context."""
    return max(0, min(SINKS - header.start, header.tokens))


def rows_of(side: Tensor, rope: Rope | None, positions: range) -> Tensor:
    """Keys or values `[L, T, H, D]` as float32 `[T, L * H * D]`; with `rope`, rotated back to position 0."""
    part = side.to(torch.float32, copy=True)
    if rope is not None:
        for layer in range(len(part)):
            rope.rotate(part[layer].transpose(0, 1), layer, positions, undo=True)
    return part.permute(1, 0, 2, 3).flatten(1)


def restore(rows: Tensor, shape: Sequence[int], rope: Rope | None, positions: range) -> Tensor:
    """Inverse of `rows_of`, in place: float32 `[L, T, H, D]`."""
    part = rows.unflatten(1, tuple(shape)).permute(1, 0, 2, 3)
    if rope is not None:
        for layer in range(len(part)):
            rope.rotate(part[layer].transpose(0, 1), layer, positions)
    return part


def quantise(values: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shifts and scales float16 `[T]` and symbols uint8 `[T, n]` of a group's coefficients `[T, n]`; FP8 as its bits.

    Raises CodecError for coefficients that float16 cannot hold.
    """
    low, high = values.amin(dim=1), values.amax(dim=1)
    integer = bits < 8
    shift = (low if integer else (low + high) / 2).half()
    span = high - low if integer else torch.maximum(high - shift.float(), shift.float() - low)
    scale = (span / ((1 << bits) - 1 if integer else LARGEST_FP8)).half()
    if not bool(torch.isfinite(shift).all() and torch.isfinite(scale).all()):
        raise CodecError("a coefficient is beyond what float16 can hold (65504); use another codec for this cache")
    scaled = (values - shift.float()[:, None]) / torch.where(scale > 0, scale.float(), torch.inf)[:, None]
    if integer:
        return shift, scale, scaled.round_().clamp_(0, (1 << bits) - 1).to(torch.uint8)
    return shift, scale, scaled.clamp_(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn).view(torch.uint8)


def dequantise(shift: Tensor, scale: Tensor, symbols: Tensor, bits: int) -> Tensor:
    """float32 `[T, n]`: what `quantise` made, but for rounding."""
    steps = symbols.float() if bits < 8 else symbols.view(torch.float8_e4m3fn).float()
    return steps * scale.float()[:, None] + shift.float()[:, None]


def _pack(coefficients: Tensor, group: Group) -> bytes:
    """A group's bytes for all tokens: high bytes of shifts, then of scales, low bytes, symbols (token, component)."""
    own = coefficients[:, group.first : group.first + group.size]
    if not len(own):
        return b""
    shift, scale, symbols = quantise(own, group.bits)
    side = torch.stack((shift, scale)).view(torch.uint8).view(2, -1, 2).flip(2).permute(2, 0, 1)
    return as_bytes(side) + as_bytes(pack_bits(symbols.flatten()[None], group.bits))


def _unpack(data: Tensor, tokens: int, group: Group, tag: str) -> Tensor:
    """The coefficients `[tokens, size]` of a group. Raises CodecError."""
    if not tokens:
        return torch.empty((0, group.size))
    side = data[: 4 * tokens].view(2, 2, tokens).permute(1, 2, 0).flip(2).contiguous().view(torch.float16)[..., 0]
    if not bool(torch.isfinite(side).all()) or float(side[1].min()) < 0:
        raise CodecError(f"section '{tag}' holds impossible shifts or scales; encode again")
    symbols = unpack_bits(data[4 * tokens :], group.bits, tokens * group.size).contiguous().view(tokens, group.size)
    return dequantise(side[0], side[1], symbols, group.bits)


def _split(data: Tensor, tokens: int, groups: Sequence[Group]) -> Iterator[tuple[Group, Tensor]]:
    at = 0
    for group in groups:
        yield group, data[at : at + group.nbytes(tokens)]
        at += group.nbytes(tokens)


def _inflate(chunk: Chunk, tag: str, nbytes: int) -> Tensor:
    """The bytes of a Deflate section, which are `nbytes`; never takes more memory than those. Raises CodecError."""
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(chunk.section(tag), nbytes + 1)
    except zlib.error as error:
        raise CodecError(f"section '{tag}' is not Deflate's: {error}; encode again") from error
    if len(data) != nbytes or not inflater.eof or inflater.unused_data:
        raise CodecError(f"section '{tag}' does not hold {nbytes} bytes as the header's shape needs; encode again")
    return frombuffer(memoryview(data), torch.uint8)


def fit(
    kv_samples: Iterable[Tensor], *, rope: Rope | None = None, metadata: Mapping[str, Any] | None = None
) -> Profile:
    """Calibrate for one model from caches `[L, 2, T, H, D]` of contexts that begin at position 0; their first four
    tokens are left out. `rope` is the model's rotary embedding. Raises CodecError."""
    samples: list[Tensor] = []
    for kv in kv_samples:
        check_finite(kv, "a KV sample")
        if samples and (kv.shape[0], *kv.shape[3:]) != (samples[0].shape[0], *samples[0].shape[3:]):
            raise CodecError(f"KV samples have different shapes: {tuple(samples[0].shape)} and {tuple(kv.shape)}")
        if kv.shape[2] > SINKS:
            samples.append(kv.to("cpu", torch.bfloat16))
    if not samples:
        raise CodecError(f"a profile needs at least one KV sample of more than {SINKS} tokens")
    layers, _, _, heads, dim = samples[0].shape
    tensors: dict[str, NDArray[Any]] = {} if rope is None else {"inv_freq": rope.inv_freq.numpy()}
    for side, tag in enumerate(SIDES):
        own = [rows_of(kv[:, side], None if side else rope, range(kv.shape[2]))[SINKS:] for kv in samples]
        rows = torch.cat(own)
        del own
        mean = rows.mean(dim=0)
        rows -= mean
        basis = principal(rows)
        some = rows[torch.linspace(0, len(rows) - 1, min(SAMPLE_TOKENS, len(rows))).long()] @ basis.T
        plans = allocate(some, [16 * rows.shape[1] // ratio for ratio in RATIOS])
        kept = max(groups[-1].first + groups[-1].size for groups in plans)
        tensors[f"{tag}.mean"], tensors[f"{tag}.basis"] = mean.numpy(), basis[:kept].half().numpy()
        for level, groups in enumerate(plans):
            tensors[f"{tag}.groups.{level}"] = np.array([(group.size, group.bits) for group in groups], np.uint32)
    facts = {
        **(metadata or {}),
        "codec": KVTC.codec_id,
        "layers": layers,
        "heads": heads,
        "head_dim": dim,
        "rope_interleaved": rope is not None and rope.interleaved,
        "calibration_tokens": sum(kv.shape[2] for kv in samples),
    }
    return Profile(tensors, facts)


def principal(rows: Tensor) -> Tensor:
    """Orthonormal directions `[K, N]` of centred `rows` `[T, N]`, the largest variance first."""
    count = min(*rows.shape, MAX_COMPONENTS)
    if rows.shape[1] > EXACT_PCA:
        torch.manual_seed(0)
        return torch.svd_lowrank(rows, q=count, niter=8)[2].T.contiguous()
    return torch.linalg.eigh(rows.T @ rows)[1].flip(1)[:, :count].T.contiguous()


def allocate(coefficients: Tensor, budgets: Sequence[int]) -> list[list[Group]]:
    """For each budget (bits a token), the groups of least squared error on sample `coefficients` `[T, K]`.

    At least one group, even where the budget is less than any takes.
    """
    count = coefficients.shape[1]
    unit = max(2, -(-max(budgets) // BUDGET_STEPS))
    limits = [max(budget // unit, -(-(SIDE_BITS + BITS[0]) // unit)) for budget in budgets]
    most = max(limits)
    best = np.full((count + 1, most + 1), np.inf)
    best[0] = 0.0
    choice = np.zeros((count + 1, most + 1), np.uint8)
    least = 1e-6 * float(coefficients.square().sum())  # what a costlier choice must gain
    options = [(size, bits) for size in SIZES for bits in BITS]
    for first in range(count):
        for number, (size, bits) in enumerate(options):
            if first + size > count or (size > 16 and first % 16):
                continue
            cost = -(-Group(first, size, bits).token_bits // unit)
            if cost > most or not np.isfinite(best[first, most - cost]):
                continue
            own = coefficients[:, first : first + size]
            error = float((dequantise(*quantise(own, bits), bits) - own).square().sum())
            found = best[first, : most + 1 - cost] + error
            better = found < best[first + size, cost:] - least
            best[first + size, cost:][better] = found[better]
            choice[first + size, cost:][better] = number
    energy = coefficients.square().sum(dim=0).double().numpy()
    left = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
    plans = []
    for limit in limits:
        at = 1 + int(np.argmin(best[1:, limit] + left[1:]))
        groups: list[Group] = []
        budget = limit
        while at:
            size, bits = options[choice[at, budget]]
            groups.append(Group(at - size, size, bits))
            at, budget = at - size, budget - -(-groups[-1].token_bits // unit)
        plans.append(groups[::-1])
    return plans
