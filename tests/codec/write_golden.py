"""Write golden bitstreams that are missing (python -m tests.codec.write_golden); existing ones are never changed."""

from __future__ import annotations

from kvstream.codec import container, registry
from tests.codec import profiles
from tests.codec.conformance import GOLDEN, D, H, L, write_golden
from tests.codec.synthetic import synthetic_kv


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name, fit in (
        ("cachegen", profiles.fit_cachegen),
        ("kvstream", profiles.fit_kvstream),
        ("kvtc", profiles.fit_kvtc),
    ):
        path = GOLDEN / f"{name}.profile"
        if not path.exists():
            path.write_bytes(fit().to_bytes())
    for name in ("raw", "uniform", "fp8", "artifact", "kivi"):
        if not _written(name):
            write_golden(registry.make(name), name, synthetic_kv(2, 21, 2, 4, seed=5))
    for name, codec, settings in (
        ("cachegen", "cachegen", {}),
        ("cachegen-ac", "cachegen", {"coder": "ac"}),
        ("kvstream", "kvstream", {}),
        ("kvtc", "kvtc", {}),
    ):
        if not _written(name):
            write_golden(
                registry.make(codec, settings, profiles.stored(codec)), name, synthetic_kv(L, 21, H, D, seed=5)
            )


def _written(name: str) -> bool:
    return (GOLDEN / f"{name}-v{container.VERSION}-level0.bin").exists()


if __name__ == "__main__":
    main()
