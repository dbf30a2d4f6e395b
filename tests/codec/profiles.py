"""Profiles for tests: fitted to synthetic caches once and stored, so that golden bitstreams stay what they are."""

from __future__ import annotations

import torch

from codec import cachegen, kvstream
from codec.profile import Profile
from codec.transform import Rope
from tests.codec.conformance import GOLDEN, D, H, L
from tests.codec.synthetic import synthetic_kv

ROPE = Rope((100.0 ** (-torch.arange(3) / 3)).repeat(L, 1))
"""Partial: 6 of the 8 dimensions turn."""


def stored(name: str) -> Profile:
    return Profile.load(GOLDEN / f"{name}.profile")


def rotated(kv: torch.Tensor, start: int = 0) -> torch.Tensor:
    """The cache with RoPE put on its keys."""
    turned = kv.float().clone()
    for layer in range(len(kv)):
        ROPE.rotate(turned[layer, 0].permute(1, 0, 2), layer, range(start, start + kv.shape[2]))
    return turned.to(kv.dtype)


def fit_cachegen() -> Profile:
    return cachegen.fit(synthetic_kv(L, 400, H, D, seed=seed) for seed in range(100, 105))


def fit_kvstream() -> Profile:
    samples = [rotated(synthetic_kv(L, 400, H, D, seed=seed)) for seed in range(100, 105)]
    weights = torch.rand((L, 2, H), generator=torch.Generator().manual_seed(3)) + 0.5
    return kvstream.fit(samples, rope=ROPE, sensitivity=weights)
