"""Write golden bitstreams that are missing (python -m tests.codec.write_golden); existing ones are never changed."""

from __future__ import annotations

from codec import container, registry
from tests.codec.conformance import GOLDEN, write_golden
from tests.codec.synthetic import synthetic_kv


def main() -> None:
    for name in ("raw", "uniform", "fp8"):
        if not (GOLDEN / f"{name}-v{container.VERSION}-level0.bin").exists():
            write_golden(registry.make(name), name, synthetic_kv(2, 21, 2, 4, seed=5))


if __name__ == "__main__":
    main()
