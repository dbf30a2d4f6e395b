"""Compile what coding on the CPU uses, before latency matters."""

from __future__ import annotations

import torch


def warm_up_cpu() -> None:
    """Compile both entropy coders and the quantiser, or load them from numba's cache, and run torch's kernels once."""
    from codec import quantize, registry
    from codec.entropy import arithmetic, rans

    rans.warm_up()
    arithmetic.warm_up()
    quantize.warm_up()
    kv = torch.linspace(-1.0, 1.0, 2 * 16 * 2 * 8).view(1, 2, 16, 2, 8).to(torch.bfloat16)
    for name in ("raw", "uniform", "artifact"):
        codec = registry.make(name)
        codec.decode(codec.encode(kv, 0, positions=range(16)))
