"""What an error in a model's cache costs, from gradients; and which tokens are attention sinks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvstream.testbed.engine.model import Model
from kvstream.testbed.errors import SpecError

if TYPE_CHECKING:
    from kvstream.codec.transform import Rope

MAX_SINKS = 16
SINK_FACTOR = 100.0
"""A sink's gradients have so many times the energy that 90 % of all tokens stay below. The first token of SmolLM2 has
more than 30,000 times that, the next ones at most twice; the first tokens of models without sinks at most three
times."""


@dataclass(frozen=True)
class Sensitivity:
    """What an error in a cached token costs."""

    metric: Tensor
    """float32 `[L, 2, H, D, D]`, in the space of keys turned back to position 0 and of values; sinks left out."""
    sinks: int
    """The first so many tokens of a context, on which nearly all of the rest depends."""


def sensitivity(
    model: Model, caches: Sequence[Tensor], suffixes: Sequence[Sequence[int]], rope: Rope | None,
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Sensitivity:  # fmt: skip
    """The cost of an error in caches `[L, 2, T, H, D]`, for what the model says over their suffixes.

    For each sample, labels are drawn from the model's own predictions over the suffix; the mean outer product of the
    gradient of their log-probability with respect to each cached vector is the Fisher information, half of which is
    the KL divergence that a small error causes (per cached token, summed over the suffix).
    """
    if not caches:
        raise SpecError("the sensitivity needs at least one sample")
    total = torch.zeros((), dtype=torch.float64)
    first, energies = [], []
    for seed in track(range(len(caches))):
        gradient = _gradient(model, caches[seed], suffixes[seed], seed).float().cpu()
        for layer in range(len(gradient)):
            if rope is not None:
                rope.rotate(gradient[layer, 0].permute(1, 0, 2), layer, range(gradient.shape[2]), undo=True)
        energies.append(token_energy(gradient))
        first.append(gradient[:, :, :MAX_SINKS])
        total = total + _outer(gradient[:, :, MAX_SINKS:])
    sinks = count_sinks(energies)
    for gradient in first:
        total = total + _outer(gradient[:, :, sinks:])
    return Sensitivity((total / sum(len(energy) - sinks for energy in energies)).float(), sinks)


def token_energy(gradient: Tensor) -> Tensor:
    """A gradient's energy `[T]` by token, that of each layer's keys and values in units of its median token's."""
    energy = gradient.square().sum(dim=(3, 4)).flatten(0, 1).double()
    middle = energy.median(dim=1, keepdim=True).values
    known = energy[middle[:, 0] > 0] / middle[middle[:, 0] > 0]
    return known.mean(dim=0) if len(known) else torch.zeros(energy.shape[1], dtype=torch.float64)


def count_sinks(energies: Sequence[Tensor]) -> int:
    """How many first tokens stand apart from all others, in the median sample; `energies` are those of the samples."""
    shortest = min(min(map(len, energies)), MAX_SINKS)
    apart = torch.stack([energy[:shortest] > SINK_FACTOR * energy.quantile(0.9) for energy in energies])
    return int(apart.double().mean(dim=0).gt(0.5).cumprod(dim=0).sum())


def _outer(gradient: Tensor) -> Tensor:
    """Sum of outer products over the tokens, `[L, 2, H, D, D]`."""
    return torch.einsum("lsthd,lsthe->lshde", gradient, gradient).double()


def _gradient(model: Model, kv: Tensor, suffix_ids: Sequence[int], seed: int) -> Tensor:
    """Gradient `[L, 2, T, H, D]` of the log-probability of labels drawn from the predictions over the suffix."""
    leaf = kv.detach().to(model.device, model.network.dtype, copy=True).requires_grad_(True)
    cache = DynamicCache()
    for index, (keys, values) in enumerate(leaf):
        cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], index)
    ids = torch.tensor([list(suffix_ids)], device=leaf.device)
    logits = model.call(ids, cache).logits[0].float()
    log_p = logits.log_softmax(dim=-1)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(leaf.device)
    (gradient,) = torch.autograd.grad(log_p.gather(1, labels).sum(), leaf)
    return gradient
