"""`kvstream codec insight`: the three observations behind CacheGen (SIGCOMM 2024, section 5.1), on any model.

1. Tokens near each other have similar keys and values, so deltas vary less than originals. Measured as the variance of
   each channel over that of its deltas, to the token before and to the anchor of the group of ten; above 1 deltas pay.
2. Some layers bear less loss than others. Measured as the KL divergence of the next-token distribution when the keys
   or the values of one layer alone are rounded in steps of their standard deviation.
3. A value says more about others of its layer and channel than about others of its token. Measured as the entropy of
   rounded values when each group of them has a distribution of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.cachegen import GROUP
from kvstream.codec.entropy.tables import column_counts
from kvstream.testbed.encoding import calibrate
from kvstream.testbed.encoding.tracking import Track, untracked
from kvstream.testbed.engine.model import Model, calculate_kv, mean_kl

CONTEXTS = 3
STEPS_PER_DEVIATION = 4
"""Entropies are of values rounded in steps of a quarter of their layer's standard deviation."""
HALF = 127
SIDES = ("keys", "values")


@dataclass(frozen=True)
class Deltas:
    """[channel]: variance of the originals over that of the deltas, layers one after another."""

    to_previous: tuple[float, ...]
    to_anchor: tuple[float, ...]


@dataclass(frozen=True)
class Insight:
    """The measurements of one model."""

    model: str
    contexts: int
    tokens: int
    """Of each context."""
    deltas: Mapping[str, Deltas]
    """[keys as cached, keys with RoPE undone, values]."""
    sensitivity: tuple[tuple[float, float], ...]
    """[layer]: KL (nats) of rounding its keys, its values."""
    entropy: Mapping[str, tuple[float, float]]
    """[grouping]: bit per element of keys, of values."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; deltas as quartiles over channels and the share of channels above 1."""
        return asdict(self) | {
            "deltas": {
                name: {"to_previous": spread(found.to_previous), "to_anchor": spread(found.to_anchor)}
                for name, found in self.deltas.items()
            }
        }


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Quartiles over channels, and the share of channels in which deltas pay off."""
    low, median, high = (float(q) for q in np.quantile(ratios, (0.25, 0.5, 0.75)))
    return {"q25": low, "median": median, "q75": high, "above_1": float(np.mean(np.array(ratios) > 1))}


def measure(model: Model, track: Track = untracked, contexts: int = CONTEXTS) -> Insight:
    """Measure the caches of a few held-out contexts."""
    samples = list(calibrate.samples(model, "check", contexts))
    shown = track(samples, "computing caches")
    caches = [calculate_kv(model, sample.context_ids).float().cpu() for sample in shown]
    rope = calibrate.rope_of(model)
    kinds = {"keys": [kv[:, 0] for kv in caches], "values": [kv[:, 1] for kv in caches]}
    if rope is not None:
        turned = [kv[:, 0].permute(0, 2, 1, 3).clone() for kv in caches]
        for kv in turned:
            for layer, keys in enumerate(kv):
                rope.rotate(keys, layer, range(kv.shape[2]), undo=True)
        kinds = {"keys": kinds["keys"], "keys, RoPE undone": [kv.permute(0, 2, 1, 3) for kv in turned]} | kinds
    return Insight(
        model=model.name,
        contexts=contexts,
        tokens=len(samples[0].context_ids),
        deltas={name: _deltas(parts) for name, parts in kinds.items()},
        sensitivity=_sensitivity(model, samples, caches, track),
        entropy=_entropies(torch.cat(caches, dim=2)),
    )


def _deltas(parts: Sequence[Tensor]) -> Deltas:
    """Of contexts `[L, T, H, D]`."""
    rows = [part.flatten(2).double() for part in parts]
    at = torch.arange(rows[0].shape[1])
    anchored = at % GROUP != 0
    whole = torch.stack([x.var(dim=1) for x in rows]).mean(dim=0)
    to_previous = torch.stack([x.diff(dim=1).var(dim=1) for x in rows]).mean(dim=0)
    to_anchor = torch.stack([(x - x[:, at // GROUP * GROUP])[:, anchored].var(dim=1) for x in rows]).mean(dim=0)
    ratios = ((whole / below.clamp(min=1e-30)).flatten().tolist() for below in (to_previous, to_anchor))
    return Deltas(*(tuple(ratio) for ratio in ratios))


def _sensitivity(
    model: Model, samples: Sequence[calibrate.Sample], caches: Sequence[Tensor], track: Track
) -> tuple[tuple[float, float], ...]:
    found = np.zeros((len(caches[0]), 2))
    exact = [calibrate.log_probs(model, kv, s.suffix_ids) for kv, s in zip(caches, samples, strict=True)]
    for layer in track(range(len(found)), "rounding one layer at a time"):
        for side in (0, 1):
            for kv, sample, wanted in zip(caches, samples, exact, strict=True):
                rounded = kv.clone()
                step = float(kv[layer, side].std())
                rounded[layer, side] = (kv[layer, side] / step).round() * step
                kl = mean_kl(wanted, calibrate.log_probs(model, rounded, sample.suffix_ids))
                found[layer, side] += kl / len(caches)
    return tuple((float(keys), float(values)) for keys, values in found)


def _entropies(kv: Tensor) -> dict[str, tuple[float, float]]:
    """Of `[L, 2, T, H, D]`."""
    layers, _, tokens, heads, dim = kv.shape
    deviation = kv.std(dim=(2, 3, 4), keepdim=True)
    steps = (kv * (STEPS_PER_DEVIATION / deviation)).round().clamp(-HALF, HALF)
    symbols = (steps + HALF).to(torch.uint8).flatten(3)
    by_side = symbols.transpose(0, 1)  # [2, L, T, C]
    groupings = {
        "one distribution": by_side.reshape(2, 1, -1),
        "by token": by_side.transpose(1, 2).reshape(2, tokens, -1),
        "by layer": by_side.reshape(2, layers, -1),
        "by channel": by_side.permute(0, 3, 1, 2).reshape(2, heads * dim, -1),
        "by layer and channel": by_side.permute(0, 1, 3, 2).reshape(2, layers * heads * dim, -1),
    }
    return {name: (_entropy(pair[0].numpy()), _entropy(pair[1].numpy())) for name, pair in groupings.items()}


def _entropy(groups: NDArray[np.uint8]) -> float:
    """Mean bits per symbol of groups `[G, N]`, with Miller and Madow's correction for small samples."""
    counts = column_counts(np.ascontiguousarray(groups), 2 * HALF + 1)
    p = counts / groups.shape[1]
    plain = -(p * np.log2(np.where(p > 0, p, 1))).sum(axis=1)
    return float((plain + ((counts > 0).sum(axis=1) - 1) / (2 * np.log(2) * groups.shape[1])).mean())


def text(found: Insight) -> str:
    """The measurements as tables."""
    lines = [
        f"{found.model}: {found.contexts} contexts of {found.tokens:,} tokens",
        "",
        "1. variance of the originals over that of deltas, median (quartiles) over channels; above 1 deltas pay",
        f"   {'':<20} {'to the token before':<22} {'to the anchor of ten':<22} channels where anchors pay",
    ]
    for name, deltas in found.deltas.items():
        before, anchor = spread(deltas.to_previous), spread(deltas.to_anchor)
        cells = (f"{s['median']:.2f} ({s['q25']:.2f} to {s['q75']:.2f})" for s in (before, anchor))
        lines.append(f"   {name:<20} " + " ".join(f"{cell:<22}" for cell in cells) + f" {anchor['above_1']:.0%}")
    lines += ["", "2. KL (nats) of rounding one layer in steps of its standard deviation"]
    lines.append(f"   {'layer':<8} {'keys':>10} {'values':>10}")
    lines += [f"   {layer:<8} {keys:>10.2g} {values:>10.2g}" for layer, (keys, values) in enumerate(found.sensitivity)]
    lines.append(f"   {factor(found):.0f} times between the most and the least sensitive")
    lines += ["", "3. entropy (bit/element) of rounded values, each group with a distribution of its own"]
    lines.append(f"   {'grouping':<22} {'keys':>8} {'values':>8}")
    lines += [f"   {name:<22} {keys:>8.2f} {values:>8.2f}" for name, (keys, values) in found.entropy.items()]
    return "\n".join(lines)


def factor(found: Insight) -> float:
    """Sensitivity of the most sensitive keys or values of a layer over that of the least."""
    every = [kl for pair in found.sensitivity for kl in pair]
    return max(every) / max(min(every), 1e-12)
