"""Compile what decoding on the CPU uses, before latency matters."""

from __future__ import annotations

import torch

from codec import registry


def warm_up_cpu() -> None:
    """Encode and decode a small chunk with every codec that needs no profile."""
    kv = torch.linspace(-1.0, 1.0, 2 * 16 * 2 * 8).view(1, 2, 16, 2, 8).to(torch.bfloat16)
    for name in ("raw", "uniform"):
        codec = registry.make(name)
        codec.decode(codec.encode(kv, 0, positions=range(16)))
