"""What a profile of this codec holds, checked: everything that coding a chunk needs besides the chunk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.api import LARGEST_MAGNITUDE
from kvstream.codec.entropy.tables import PROB_SCALE, Tables
from kvstream.codec.errors import CodecError
from kvstream.codec.kvstream.kinds import Kinds
from kvstream.codec.profile import Profile
from kvstream.codec.quantize import ALPHABET, LARGEST_ESCAPE, MAX_SHIFT, Classes
from kvstream.codec.transform import Rope

CODEC_ID = "kvstream"
FORMAT = 2
"""Of this codec's profiles and chunks; a chunk names its profile by hash, so the profile's tells both."""
UNIFORM = Tables(
    np.stack([
        np.where(np.arange(1 << MAX_SHIFT) < 1 << bits, PROB_SCALE >> bits, 0) for bits in range(1, MAX_SHIFT + 1)
    ]).astype(np.uint16)
)  # fmt: skip
"""Tables of the low bits of wide columns: table k - 1 has 2^k symbols."""
SKETCH = 16
"""Random directions that say how much of a vector its group's basis cannot express: within a third, mostly."""
MAX_LEVELS = 256
"""A chunk's header has one byte for its level."""


@dataclass(frozen=True, eq=False)
class Group:
    """Consecutive layers whose keys and values share a basis, N = layers · 2 · H · D values a token.

    Its K columns are the coefficients that some level codes; directions that none does are not kept.
    """

    layers: range
    columns: slice
    """Which of the codec's columns are the group's."""
    stored_basis: Tensor
    """float16 `[K, layers, 2, H, D]`, to be multiplied by `scale`: row k is what coefficient k contributes."""
    scale: Tensor
    """float32 `[layers, 2, H]`."""
    metric: Tensor
    """float32 `[layers, 2, H, D, D]`: what an error costs, up to a factor."""

    @property
    def basis_values(self) -> int:
        """N."""
        return self.stored_basis[0].numel()

    @cached_property
    def basis(self) -> Tensor:
        """float32 `[K, N]`: maps coefficients to values without their mean."""
        return (self.stored_basis.float() * self.scale[..., None]).flatten(1)

    @cached_property
    def analysis(self) -> Tensor:
        """float32 `[K, N]`: maps values without their mean to the coefficients whose error, in the metric, is least.

        Rows of the basis are orthonormal in the metric but for their rounding, so the normal equations are as good as
        solved from the start and cannot be ill-conditioned, as an inverse of the basis can.
        """
        rows = self.basis.unflatten(1, self.stored_basis.shape[1:]).double()
        dual = torch.einsum("klshd,lshde->klshe", rows, self.metric.double()).flatten(1)
        gram = dual @ rows.flatten(1).T
        factor, failed = torch.linalg.cholesky_ex((gram + gram.T) / 2)
        found = torch.cholesky_solve(dual, factor).float()
        if int(failed) or not bool(torch.isfinite(found).all()):
            raise CodecError("the profile holds a basis that its metric cannot tell apart; calibrate again")
        return found

    @cached_property
    def sketch(self) -> Tensor:
        """float32 `[SKETCH, N]`: random directions of what no column can express, of which a vector less its mean has
        in each, squared and on average, what its projection on all of them weighs in the metric."""
        weight, axes = torch.linalg.eigh(self.metric.double())
        root = axes * weight.clamp(min=0).sqrt()[..., None, :]
        draw = torch.Generator().manual_seed(0)
        drawn = torch.randn((SKETCH, *self.stored_basis.shape[1:]), generator=draw, dtype=torch.float64)
        seen = torch.einsum("klshd,lshed->klshe", drawn, root).flatten(1)
        return (seen - seen @ self.basis.double().T @ self.analysis.double()).float()

    def left_out(self, rows: Tensor, step: float) -> Tensor:
        """`[T]`: what no column can express of `rows` `[T, N]`, in squared steps for each direction."""
        return (self.sketch @ rows.T).square_().mean(dim=0) / (self.basis_values * max(step, 1e-18) ** 2)


@dataclass(frozen=True, eq=False)
class Parameters:
    """A checked profile. Its C columns are in the order (group, coefficient), the largest variance of a group first."""

    segment_tokens: ClassVar[int] = 512
    """A longer chunk's columns are cut into streams of this many tokens, so that a few layers of it fill a GPU. Part
    of the format, not of the profile."""

    shape: tuple[int, int, int]
    """Layers, heads and head dimension of the model."""
    mean: Tensor
    """float32 `[L, 2, H, D]`."""
    spread: Tensor
    """float32 `[L, 2, H, D]`: standard deviation in calibration."""
    groups: tuple[Group, ...]
    rope: Rope | None
    classes: Classes
    kinds: Kinds
    sinks: int
    """The first so many tokens of a context are coded apart, because every later token attends to them."""
    level_names: tuple[str, ...]
    steps: NDArray[np.float32]
    """float32 `[levels]`."""
    expected: NDArray[np.uint8]
    """uint8 `[levels, C]`: the kind of each column in calibration."""
    usual: NDArray[np.float32] | None
    """float32 `[levels, 3]`, what `usual.measure` found; None in profiles that do not say."""

    @classmethod
    def of(cls, profile: Profile) -> Parameters:
        """Raises CodecError for a profile that no calibration writes."""
        name = f"profile {profile.sha256[:12]}"
        if profile.codec_id != CODEC_ID:
            raise CodecError(f"profile is for codec {profile.codec_id}, not {CODEC_ID}: calibrate again")
        if profile.metadata.get("codec_format") != FORMAT:
            raise CodecError(f"{name} is of another version of codec {CODEC_ID}; calibrate again")
        layers, heads, dim = (profile.number(key) for key in ("layers", "heads", "head_dim"))
        frequencies = profile.tensor("tables", np.uint16, (None, ALPHABET))
        # Rounded to what a GPU's matrix units take without rounding: all decoders then have the same operands.
        with np.errstate(over="ignore"):  # `Classes` refuses what becomes infinite
            values = profile.tensor("values", np.float32, frequencies.shape).astype(np.float16).astype(np.float32)
        classes = Classes(Tables(frequencies), values)
        kind_class = profile.tensor("kind_class", np.uint8, (None,))
        steps = profile.tensor("steps", np.float32, (None,))
        groups = _groups(profile, layers, heads, dim)
        per_value = (layers, 2, heads, dim)
        found = cls(
            shape=(layers, heads, dim),
            mean=torch.tensor(profile.tensor("mean", np.float32, per_value)),
            spread=torch.tensor(profile.tensor("spread", np.float32, per_value)),
            groups=groups,
            rope=rope_of_profile(profile),
            classes=classes,
            kinds=Kinds(classes, kind_class, profile.tensor("kind_shift", np.uint8, kind_class.shape)),
            sinks=_count(profile, "sinks"),
            level_names=_level_names(profile, len(steps)),
            steps=steps,
            expected=profile.tensor("expected", np.uint8, (len(steps), groups[-1].columns.stop)),
            usual=profile.tensor("usual", np.float32, (len(steps), 3)) if "usual" in profile.tensors else None,
        )
        found._check(name)
        return found

    def _check(self, name: str) -> None:
        if (
            not 1 <= len(self.steps) <= MAX_LEVELS
            or not (self.steps > 0).all()
            or not (self.spread >= 0).all()
            or int(self.expected.max()) > self.kinds.count
            or (self.usual is not None and not (self.usual >= 0).all())
        ):
            raise CodecError(f"{name} has impossible steps, spreads, kinds or rates; calibrate again")
        largest = float(self.steps.max()) * LARGEST_ESCAPE
        farthest = max(float(group.basis.abs().sum(dim=0).max()) for group in self.groups) * largest
        if not farthest + float(self.mean.abs().max()) <= LARGEST_MAGNITUDE:  # `not <=`: infinity and NaN fail too
            raise CodecError(f"{name} gives values beyond {LARGEST_MAGNITUDE:g}, which no cache has; calibrate again")

    @property
    def n_columns(self) -> int:
        return self.groups[-1].columns.stop

    def step(self, level: int) -> float:
        return float(self.steps[level])


def group_layers(layers: int, each: int) -> list[range]:
    """The layers of every group: `each`, the last group with what is left."""
    return [range(first, min(first + each, layers)) for first in range(0, layers, each)]


def _groups(profile: Profile, layers: int, heads: int, dim: int) -> tuple[Group, ...]:
    scale = torch.tensor(profile.tensor("scale", np.float32, (layers, 2, heads)))
    metric = _metric(profile, (layers, 2, heads, dim))
    found: list[Group] = []
    first = 0
    for index, own in enumerate(group_layers(layers, profile.number("group_layers"))):
        basis = torch.tensor(profile.tensor(f"basis.{index}", np.float16, (None, len(own), 2, heads, dim)))
        part = slice(own.start, own.stop)
        if not 1 <= len(basis) <= len(own) * 2 * heads * dim:
            raise CodecError(f"profile {profile.sha256[:12]} has {len(basis)} columns in a group; calibrate again")
        found.append(Group(own, slice(first, first + len(basis)), basis, scale[part], metric[part]))
        first += len(basis)
    return tuple(found)


def _metric(profile: Profile, shape: tuple[int, int, int, int]) -> Tensor:
    """float32 `[L, 2, H, D, D]`. Profiles hold its symmetric square root; the first ones held the metric itself."""
    name = "metric" if "metric" in profile.tensors else "root"
    held = torch.tensor(profile.tensor(name, np.float16, (*shape, shape[-1]))).float()
    held *= torch.tensor(profile.tensor(f"{name}_scale", np.float32, shape[:-1]))[..., None, None]
    return held if name == "metric" else held @ held.mT


def _count(profile: Profile, name: str) -> int:
    """A whole number of at least 0 of the metadata. Raises CodecError."""
    value = profile.metadata.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CodecError(f"profile {profile.sha256[:12]}: {name} is {value!r}, not a whole number; calibrate again")
    return value


def _level_names(profile: Profile, count: int) -> tuple[str, ...]:
    names = profile.metadata.get("levels")
    if not isinstance(names, list) or len(names) != count:
        raise CodecError(f"profile {profile.sha256[:12]} does not name {count} levels; calibrate again")
    return tuple(str(name) for name in names)


def rope_of_profile(profile: Profile) -> Rope | None:
    """The rotary embedding that a profile's `inv_freq` describes; None for a model without one."""
    if "inv_freq" not in profile.tensors:
        return None
    layers, dim = profile.number("layers"), profile.number("head_dim")
    inv_freq = profile.tensor("inv_freq", np.float32, (layers, None))
    if 2 * inv_freq.shape[1] > dim:
        raise CodecError(f"profile {profile.sha256[:12]} rotates more than {dim} dimensions; calibrate again")
    return Rope(torch.tensor(inv_freq), bool(profile.metadata.get("rope_interleaved", False)))
