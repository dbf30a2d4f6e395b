"""Observations made by hand."""

from __future__ import annotations

from typing import Any

from kvstream.policies.api import Observation, Transfer


def observation(
    n_chunks: int = 4,
    sizes: tuple[int, ...] = (100_000, 200_000, 400_000),
    done: int = 0,
    recompute: float | None = None,
    decode: float = 0.0,
    **fields: Any,
) -> Observation:
    """`n_chunks` equal chunks of which `done` have been asked for; distortion halves with each level."""
    left = n_chunks - done
    values: dict[str, Any] = {
        "chunk": done,
        "n_chunks": n_chunks,
        "now_s": 0.1,
        "deadline_s": 1.0,
        "remaining": tuple(range(done, n_chunks)),
        "tokens": (100,) * left,
        "sizes_bytes": (sizes,) * left,
        "distortion": (tuple(0.1 / 2**level for level in range(len(sizes))),) * left,
        "text_bytes": (400,) * left,
        "recompute_s": None if recompute is None else (recompute,) * left,
        "decode_s": ((decode,) * len(sizes),) * left,
        "prefill_s": 0.0,
    }
    return Observation(**{**values, **fields})


def arrived(
    n: int, goodput_bps: float, size: int = 100_000, begin_s: float = 0.02, rtt_s: float = 0.0
) -> tuple[Transfer, ...]:
    """`n` transfers of `size` bytes, back to back at one rate."""
    took_s = size * 8 / goodput_bps
    return tuple(
        Transfer(
            i, 0, size, begin_s + i * took_s, begin_s + i * took_s + rtt_s, begin_s + (i + 1) * took_s, goodput_bps
        )
        for i in range(n)
    )
