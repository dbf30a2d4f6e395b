"""Profiles for tests: fitted to synthetic caches once and stored, so that golden bitstreams never change."""

from __future__ import annotations

import torch

from kvstream.codec import cachegen, kvtc
from kvstream.codec.kvstream import fit
from kvstream.codec.profile import Profile
from kvstream.codec.transform import Rope
from tests.codec.conformance import GOLDEN, D, H, L
from tests.codec.synthetic import synthetic_kv

ROPE = Rope((100.0 ** (-torch.arange(3) / 3)).repeat(L, 1))
"""Partial: 6 of the 8 dimensions rotate."""
SINKS = 2
TARGET_BITS = (0.1, 0.35, 1.0, 2.0, 4.0, 6.5)


def stored(name: str) -> Profile:
    return Profile.load(GOLDEN / f"{name}.profile")


def rotated(kv: torch.Tensor, start: int = 0) -> torch.Tensor:
    """The cache with RoPE applied to its keys."""
    turned = kv.float().clone()
    for layer in range(len(kv)):
        ROPE.rotate(turned[layer, 0].permute(1, 0, 2), layer, range(start, start + kv.shape[2]))
    return turned.to(kv.dtype)


def fit_cachegen() -> Profile:
    return cachegen.fit(synthetic_kv(L, 400, H, D, seed=seed) for seed in range(100, 105))


def fit_kvstream() -> Profile:
    samples = [rotated(synthetic_kv(L, 400, H, D, seed=seed)) for seed in range(100, 105)]
    weights = torch.rand((L, 2, H), generator=torch.Generator().manual_seed(3)) + 0.5
    # Two layers share a basis, the last has its own; the finest level has wide columns.
    return fit(samples, rope=ROPE, sensitivity=weights, sinks=SINKS, group=2, target_bits=TARGET_BITS)


def fit_kvtc() -> Profile:
    return kvtc.fit([rotated(synthetic_kv(L, 400, H, D, seed=seed)) for seed in range(100, 105)], rope=ROPE)
