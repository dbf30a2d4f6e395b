"""Compile everything that is compiled on first use, so that the first run is like every other.

python -m kvstream.codec.warm
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys

import torch


def warm_up_cpu() -> None:
    """Compile both entropy coders and the quantiser, or load them from numba's cache, and run torch's kernels once."""
    from kvstream.codec import quantize, registry
    from kvstream.codec.entropy import arithmetic, rans

    rans.warm_up()
    arithmetic.warm_up()
    quantize.warm_up()
    kv = torch.linspace(-1.0, 1.0, 2 * 16 * 2 * 8).view(1, 2, 16, 2, 8).to(torch.bfloat16)
    for name in ("raw", "uniform", "artifact"):
        codec = registry.make(name)
        codec.decode(codec.encode(kv, 0, positions=range(16)))


def main() -> int:
    """Warm the numba kernels and, where it is installed, the C++ of torchac."""
    from kvstream.codec.entropy import torchac_reference

    warm_up_cpu()
    torchac_reference.await_build()
    # torchac builds its C++ on import and prints the compiler's output
    with contextlib.suppress(ModuleNotFoundError), contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("torchac")
    return 0


if __name__ == "__main__":
    sys.exit(main())
