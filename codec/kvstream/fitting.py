"""Calibration: a profile from sample caches of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.errors import CodecError
from kvstream.codec.kvstream import usual
from kvstream.codec.kvstream.kinds import DEAD, Kinds
from kvstream.codec.kvstream.parameters import CODEC_ID, FORMAT, Parameters, group_layers
from kvstream.codec.profile import Profile
from kvstream.codec.quantize import MAX_SHIFT, Classes, column_entropy, design
from kvstream.codec.transform import Rope, vectors

TARGET_BITS = (0.1, 0.2, 0.35, 0.6, 1.0, 1.6)
"""Default ladder: bits per element that the levels' steps are chosen for, smallest first."""
RIDGE = 1e-3
"""Share of a head's mean sensitivity that every direction has at least: bounds the noise in unused directions."""
TEMPER = 0.85
"""Power to which the sensitivity is raised. Mean outer products of gradients are dominated by the rare tokens whose
prediction depends on one direction; 0.75 is best for the two models that we trained, 1 for SmolLM2 at low rates."""
SAMPLE_TOKENS = 3_000
"""Tokens from which steps and classes are fitted."""
MAX_GROUP_VALUES = 2_048
"""Values a token of the largest group that is tried: a product with its basis still hides behind the link."""
TOKENS_PER_DIRECTION = 4
WORTH = 0.94
"""A larger group is taken where it needs at most this share of the bits: it costs decoders and profiles more."""
LARGEST_SPREAD = 1e15
"""Of samples: float32 holds the sums of their squares."""
WIDE_CLASSES = 3
"""Classes, the broadest that reconstruct whole steps, of which wide columns choose."""


def fit(
    kv_samples: Sequence[Tensor], *, rope: Rope | None = None, sensitivity: Tensor | None = None, sinks: int = 0,
    held_out: Sequence[Tensor] = (), target_bits: Sequence[float] = TARGET_BITS, group: int | None = None,
    klt: bool = True, metadata: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Profile:  # fmt: skip
    """Calibrate for one model.

    `kv_samples` are caches `[L, 2, T, H, D]` of contexts that begin at position 0. `rope` is the model's rotary
    embedding, None to leave keys as they are. `sensitivity` says what an error costs: `[L, 2, H]`, a weight per head,
    or `[L, 2, H, D, D]`, a metric in the space of values and of keys rotated back to position 0 (for instance the mean
    outer product of gradients of log p, half of which is the second-order KL divergence); None weighs all alike.
    `sinks` first tokens of each context are coded apart and left out here. What chunks of `held_out` caches take is
    kept as what ordinary text takes (`Codec.shift`); without them a profile has no expectation. `group` layers share a
    basis; by default as many as pay. `klt=False` keeps the channels as they are, where these are independent. Raises
    CodecError for samples or sensitivities that are not finite, and for samples of different shapes.
    """
    if not kv_samples:
        raise CodecError("a profile needs at least one KV sample")
    layers, _, _, heads, dim = kv_samples[0].shape
    _check_samples(kv_samples, sinks)
    if sensitivity is not None and not bool(torch.isfinite(sensitivity).all()):
        raise CodecError("the sensitivity holds NaN or infinities; check the model's gradients")
    mean, spread = _moments(kv_samples, rope, sinks)
    if not float(spread.max()) <= LARGEST_SPREAD:  # NaN too
        raise CodecError("a KV sample holds NaN, infinities or values whose squares overflow; check the model's output")
    metric = _metrics(sensitivity, (layers, 2, heads), dim)
    samples = _Samples(kv_samples, rope, mean, metric, sinks)
    tokens = sum(kv.shape[2] for kv in kv_samples)
    candidates = [group or 1] if group or not klt else _group_sizes(layers, 2 * heads * dim, tokens)
    chosen = _choose(samples, candidates, target_bits, klt, say)
    steps = [_step_for(chosen.sample, bits) for bits in target_bits]
    kept = [_live(part, steps) for part in chosen.parts]
    sample = np.concatenate([part[own] for part, own in zip(chosen.parts, kept, strict=True)])
    alive = np.stack([_is_live(sample, step) for step in steps])
    found = design(sample, steps, alive)
    kinds, expected = _kinds(found.classes, found.class_of_column, found.shift_of_column, alive)
    bases = [basis[own] for basis, own in zip(chosen.bases, kept, strict=True)]
    scale = torch.cat([basis.abs().amax(dim=(0, 4)) for basis in bases]).clamp(min=1e-30)
    # not the metric: rounded to float16 it would not be positive definite where directions differ a thousandfold
    root = samples.root
    root_scale = root.abs().amax(dim=(3, 4))
    tensors: dict[str, NDArray[Any]] = {
        "mean": mean.numpy(),
        "spread": spread.numpy(),
        "scale": scale.numpy(),
        "root": (root / root_scale[..., None, None]).half().numpy(),
        "root_scale": root_scale.numpy(),
        "tables": found.classes.tables.frequencies,
        "values": found.classes.values,
        "steps": np.array(steps, np.float32),
        "expected": expected,
        "kind_class": kinds.class_of,
        "kind_shift": kinds.shift_of,
    }
    for index, (own, basis) in enumerate(zip(group_layers(layers, chosen.each), bases, strict=True)):
        part = scale[own.start : own.stop]
        tensors[f"basis.{index}"] = (basis / part[..., None]).half().numpy()
    if rope is not None:
        tensors["inv_freq"] = rope.inv_freq.numpy()
    facts = {
        **(metadata or {}),
        "codec": CODEC_ID,
        "codec_format": FORMAT,
        "layers": layers,
        "heads": heads,
        "head_dim": dim,
        "group_layers": chosen.each,
        "sinks": sinks,
        "levels": [f"{bits:g} bit" for bits in target_bits],
        "rope_interleaved": rope is not None and rope.interleaved,
        "calibration_tokens": sum(kv.shape[2] for kv in kv_samples),
    }
    profile = Profile(tensors, facts)
    if not held_out:
        return profile
    say("measuring what chunks of held-out text take")
    return Profile({**tensors, "usual": usual.measure(Parameters.of(profile), held_out)}, facts)


def _check_samples(kv_samples: Sequence[Tensor], sinks: int) -> None:
    layers, _, _, heads, dim = kv_samples[0].shape
    for kv in kv_samples:
        if kv.shape[:2] != (layers, 2) or kv.shape[3:] != (heads, dim):
            raise CodecError(f"KV samples have different shapes: {tuple(kv_samples[0].shape)} and {tuple(kv.shape)}")
        if kv.shape[2] <= sinks:
            raise CodecError(f"a KV sample of {kv.shape[2]} tokens has none beside its {sinks} sinks")


def _moments(kv_samples: Sequence[Tensor], rope: Rope | None, sinks: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[L, 2, H, D]`, keys rotated back."""
    layers, _, _, heads, dim = kv_samples[0].shape
    first, second = torch.zeros((2, layers, 2 * heads * dim), dtype=torch.float64)
    tokens = sum(kv.shape[2] - sinks for kv in kv_samples)
    for kv in kv_samples:
        for layer in range(layers):
            rows = vectors(kv, range(layer, layer + 1), rope, range(kv.shape[2]))[sinks:].double()
            first[layer] += rows.sum(dim=0)
            second[layer] += rows.square().sum(dim=0)
    mean = first / tokens
    spread = (second / tokens - mean.square()).clamp(min=0).sqrt()
    shape = (layers, 2, heads, dim)
    return mean.view(shape).float(), spread.view(shape).float()


def _metrics(sensitivity: Tensor | None, shape: tuple[int, int, int], dim: int) -> Tensor:
    """float32 `[L, 2, H, D, D]`: positive definite, its mean eigenvalue 1."""
    metric = torch.empty((*shape, dim, dim), dtype=torch.float64)
    whole = 0.0 if sensitivity is None or sensitivity.dim() == 3 else float(sensitivity.diagonal(dim1=3, dim2=4).mean())
    for index in np.ndindex(*shape):
        metric[index] = _metric(sensitivity, index, dim, whole)
    return (metric / metric.diagonal(dim1=3, dim2=4).mean()).float()


def _metric(sensitivity: Tensor | None, index: tuple[int, ...], dim: int, whole: float) -> Tensor:
    """The positive definite metric of one head, `[D, D]` in float64."""
    eye = torch.eye(dim, dtype=torch.float64)
    if sensitivity is None:
        return eye
    if sensitivity.dim() == 3:
        floor = RIDGE * float(sensitivity.mean())
        return eye * max(float(sensitivity[index]), floor) ** TEMPER
    own = sensitivity[index].double()
    ridge = RIDGE * max(float(own.diagonal().mean()), RIDGE * whole)
    weight, axes = torch.linalg.eigh((own + own.T) / 2 + max(ridge, 1e-30) * eye)
    return axes @ torch.diag(weight.clamp(min=1e-30) ** TEMPER) @ axes.T


class _Samples:
    """The samples as vectors of a group of layers, taken to where the metric is the identity."""

    def __init__(
        self, kv_samples: Sequence[Tensor], rope: Rope | None, mean: Tensor, metric: Tensor, sinks: int
    ) -> None:
        self._kv, self._rope, self._mean, self._sinks = kv_samples, rope, mean, sinks
        self.layers = len(mean)
        weight, axes = torch.linalg.eigh(metric.double())
        weight = weight.clamp(min=1e-30)
        self.root = ((axes * weight.sqrt()[..., None, :]) @ axes.mT).float()
        self._back = ((axes * weight.rsqrt()[..., None, :]) @ axes.mT).float()

    def whitened(self, layers: range) -> Tensor:
        """float32 `[tokens, N]` of all samples."""
        part = slice(layers.start, layers.stop)
        rows = [vectors(kv, layers, self._rope, range(kv.shape[2]), self._mean)[self._sinks :] for kv in self._kv]
        values = torch.cat(rows).unflatten(1, self._mean[part].shape)
        return torch.einsum("tlshd,lshde->tlshe", values, self.root[part]).flatten(1)

    def unwhitened(self, rows: Tensor, layers: range) -> Tensor:
        """Directions `[K, N]` there as directions `[K, layers, 2, H, D]` of values."""
        part = slice(layers.start, layers.stop)
        directions = rows.unflatten(1, self._mean[part].shape)
        return torch.einsum("klshd,lshde->klshe", directions, self._back[part])


@dataclass(frozen=True)
class _Choice:
    """A group size, and what follows from it."""

    each: int
    bases: list[Tensor]
    """float32 `[N, layers, 2, H, D]` of each group, the direction of the largest variance first."""
    parts: list[NDArray[np.float32]]
    """Coefficients `[N, tokens]` of each group, of SAMPLE_TOKENS tokens spread over the samples."""

    @property
    def sample(self) -> NDArray[np.float32]:
        return np.concatenate(self.parts)


def _group_sizes(layers: int, values: int, tokens: int) -> list[int]:
    """Group sizes worth trying: divisors of the number of layers, up to MAX_GROUP_VALUES values a token and no more
    directions than the samples' tokens can tell."""
    largest = min(MAX_GROUP_VALUES, tokens // TOKENS_PER_DIRECTION) // values
    return [n for n in range(1, layers + 1) if layers % n == 0 and n <= max(1, largest)]


def _choose(
    samples: _Samples, candidates: Sequence[int], target_bits: Sequence[float], klt: bool, say: Callable[[str], None]
) -> _Choice:
    """The smallest group that no larger one betters by more than it costs: compared by what the columns take at the
    step of the smallest size's middle level."""
    best: _Choice | None = None
    least, step = np.inf, 0.0
    for each in candidates:
        tried = _transformed(samples, each, klt)
        if best is None:
            step = _step_for(tried.sample, sorted(target_bits)[len(target_bits) // 2])
        bits = column_entropy(_thinned(tried.sample) / np.float32(step))
        say(f"a basis over {each} layer{'s' * (each > 1)}: {bits:.3f} bit")
        if best is None or bits < WORTH * least:
            best, least = tried, bits
    assert best is not None
    return best


def _transformed(samples: _Samples, each: int, klt: bool) -> _Choice:
    bases, parts = [], []
    for layers in group_layers(samples.layers, each):
        rows = samples.whitened(layers)
        if klt:
            _, axes = torch.linalg.eigh((rows.T @ rows).double() / len(rows))
            directions = axes.flip(1).float()
        else:
            directions = torch.eye(rows.shape[1])[:, rows.square().sum(dim=0).argsort(descending=True)]
        bases.append(samples.unwhitened(directions.T, layers))
        thinned = rows[:: max(1, len(rows) // SAMPLE_TOKENS)]
        parts.append((thinned @ directions).T.contiguous().numpy())
    return _Choice(each, bases, parts)


def _is_live(sample: NDArray[np.float32], step: float) -> NDArray[np.bool_]:
    """bool `[C]`: whether a column has coefficients worth coding, one in 500 at least."""
    return (np.abs(sample) > 0.6 * step).mean(axis=1) > 0.002


def _live(sample: NDArray[np.float32], steps: Sequence[float]) -> slice:
    """The columns of a group that the finest level codes, and those before them: at least one."""
    return slice(0, max(1, int(np.flatnonzero(_is_live(sample, min(steps))).max(initial=0)) + 1))


def _kinds(
    classes: Classes, class_of_column: NDArray[np.uint8], shift_of_column: NDArray[np.uint8],
    alive: NDArray[np.bool_],
) -> tuple[Kinds, NDArray[np.uint8]]:  # fmt: skip
    """Every class without low bits, the broadest whole ones with each number of them, and the kind of each column."""
    plain = np.arange(classes.tables.count)
    mean = (classes.tables.frequencies * np.abs(np.arange(classes.tables.symbols) - classes.tables.symbols // 2)).sum(1)
    whole = np.flatnonzero(classes.whole)
    broad = whole[np.argsort(mean[whole])[-WIDE_CLASSES:]]
    pairs = [(int(k), 0) for k in plain] + [(int(k), s) for s in range(1, MAX_SHIFT + 1) for k in broad]
    kinds = Kinds(classes, *np.array(pairs, np.uint8).T.copy())
    number = {pair: index + 1 for index, pair in enumerate(pairs)}
    nearest = {int(k): int(broad[np.abs(mean[broad] - mean[k]).argmin()]) for k in whole} if len(broad) else {}
    expected = np.zeros(alive.shape, np.uint8)
    for place in zip(*np.nonzero(alive), strict=True):
        own, shift = int(class_of_column[place]), int(shift_of_column[place])
        expected[place] = number[(nearest[own] if shift else own, shift)]
    assert DEAD == 0
    return kinds, expected


def _thinned(sample: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(sample[:, :: max(1, sample.shape[1] // 1_000)])


def _step_for(sample: NDArray[np.float32], bits: float) -> float:
    """The step at which the columns' symbols have an entropy of `bits` on average, by bisection."""
    thinned = _thinned(sample)
    low, high = 1e-6, 2 * float(np.abs(thinned).max()) + 1e-6
    for _ in range(24):
        step = (low * high) ** 0.5
        if column_entropy(thinned / np.float32(step)) > bits:
            low = step
        else:
            high = step
    return (low * high) ** 0.5
