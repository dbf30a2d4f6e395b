"""Compile what is compiled when first used, so that the first run is like every other: `python -m testbed.warm`."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys


def main() -> int:
    """Warm the numba kernels and, where it is installed, the C++ of torchac."""
    from codec.warm import warm_up_cpu

    warm_up_cpu()
    # torchac builds its C++ on import and prints the compiler's output
    with contextlib.suppress(ModuleNotFoundError), contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("torchac")
    return 0


if __name__ == "__main__":
    sys.exit(main())
