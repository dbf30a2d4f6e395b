"""Contexts, costs and links made for tests of sessions, simulator and policies: no model, no files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstream.policies.api import Choice, LevelOrText, Observation
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.store.manifest import ChunkInfo, KVShape, LevelInfo, Manifest
from kvstream.traces.trace import Trace


def manifest(
    sizes_bytes: Sequence[Sequence[int]],
    ladder: Sequence[float],
    tokens: Sequence[int] | None = None,
    text_bytes: int = 400,
) -> Manifest:
    """A context of len(sizes_bytes) chunks; `ladder` is the distortion of each level."""
    edges = np.concatenate(([0], np.cumsum(tokens or [100] * len(sizes_bytes)))).tolist()
    return Manifest(
        context="made",
        model="made",
        codec={"codec": "raw", "settings": {}},
        profile=None,
        kv=KVShape(2, 2, 8, "bfloat16"),
        levels=tuple(LevelInfo(str(i), nats, 1.0 + i) for i, nats in enumerate(ladder)),
        chunks=tuple(
            ChunkInfo(start, stop, tuple(sizes), text_bytes)
            for start, stop, sizes in zip(edges, edges[1:], sizes_bytes, strict=False)
        ),
    )


def even(n_chunks: int = 4, sizes: Sequence[int] = (100_000, 200_000, 400_000)) -> Manifest:
    """Equal chunks; distortion halves with each level."""
    return manifest([sizes] * n_chunks, [0.1 / 2**level for level in range(len(sizes))])


def costs(of: Manifest, decode_s: float = 0.01, recompute_s: float | None = 0.1, prefill_s: float = 0.02) -> Costs:
    n = len(of.chunks)
    return Costs(((decode_s,) * len(of.levels),) * n, None if recompute_s is None else (recompute_s,) * n, prefill_s)


def constant(rate_bps: float) -> Trace:
    return Trace("constant", np.array([1.0]), np.array([rate_bps]))


def held(rates_bps: Sequence[float], hold_s: float) -> Trace:
    return Trace("held", np.full(len(rates_bps), hold_s), np.array(rates_bps))


class Script:
    """Answers from a list, in turn; keeps what it saw."""

    def __init__(self, *answers: LevelOrText | Choice) -> None:
        self.answers = list(answers)
        self.seen: list[Observation] = []

    def choose(self, obs: Observation) -> Choice:
        self.seen.append(obs)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answer if isinstance(answer, Choice) else Choice(answer)
