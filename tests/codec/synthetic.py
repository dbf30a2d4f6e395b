"""KV caches with the statistics of real ones: unequal channels, correlated tokens, offsets."""

from __future__ import annotations

import torch
from torch import Tensor


def synthetic_kv(
    layers: int = 3,
    tokens: int = 40,
    heads: int = 2,
    head_dim: int = 8,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    channel_seed: int = 7,
    shared: float = 0.0,
) -> Tensor:
    """`[L, 2, T, H, D]`: lognormal standard deviations and offsets per channel (the same for every `seed`, as for the
    contexts of one model), AR(1) along tokens with one coefficient per channel. `shared` is the part of the variance
    that all layers, keys and values have in common."""
    fixed = torch.Generator().manual_seed(channel_seed)
    shape = (layers, 2, 1, heads, head_dim)
    std = torch.exp(0.7 * torch.randn(shape, generator=fixed))
    mean = 1.5 * torch.randn(shape, generator=fixed)
    rho = 0.9 * torch.rand(shape, generator=fixed)
    drawn = torch.Generator().manual_seed(seed)
    noise = torch.randn((layers, 2, tokens, heads, head_dim), generator=drawn)
    if shared:
        common = torch.randn((1, 1, tokens, heads, head_dim), generator=drawn)
        noise = shared**0.5 * common + (1 - shared) ** 0.5 * noise
    series = noise.clone()
    for t in range(1, tokens):
        series[:, :, t] = rho[:, :, 0] * series[:, :, t - 1] + (1 - rho[:, :, 0] ** 2).sqrt() * noise[:, :, t]
    return (mean + std * series).to(dtype)
