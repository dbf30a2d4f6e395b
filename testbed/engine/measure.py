"""What decoding, recomputing and prefill take on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvstream.policies.api import TEXT, LevelOrText
from kvstream.testbed.engine.api import Step
from kvstream.testbed.engine.decoding import DecodingEngine
from kvstream.testbed.engine.model_engine import ModelEngine
from kvstream.testbed.session.costs import IN_SESSIONS, Costs
from kvstream.testbed.store.manifest import Manifest

REPEATS = 5


def measure_costs(
    engine: ModelEngine, manifest: Manifest, get: Callable[[int, LevelOrText], bytes], prompt_ids: Sequence[int]
) -> Costs:
    """Median seconds of each step on this machine, with everything warm afterwards. `get` gives a chunk's bytes."""
    engine.open(manifest, len(prompt_ids))
    recompute_s, prefill_s = measure_model(engine, manifest, get, prompt_ids)
    return Costs(measure_decoding(engine, manifest, get), recompute_s, prefill_s, IN_SESSIONS)


def measure_decoding(
    engine: ModelEngine, manifest: Manifest, get: Callable[[int, LevelOrText], bytes]
) -> tuple[tuple[float, ...], ...]:
    """Seconds of decoding [chunk][level] of the open context, measured on the first chunk of every size."""
    levels = range(len(manifest.levels))
    decode_s: dict[int, tuple[float, ...]] = {}
    for index, chunk in enumerate(manifest.chunks):
        if chunk.tokens not in decode_s:
            decode_s[chunk.tokens] = tuple(_median_s(decode_once, engine, index, x, get(index, x)) for x in levels)
    engine.context.cache.poison()
    return tuple(decode_s[chunk.tokens] for chunk in manifest.chunks)


def measure_model(
    engine: ModelEngine, manifest: Manifest, get: Callable[[int, LevelOrText], bytes], prompt_ids: Sequence[int]
) -> tuple[tuple[float, ...], float]:
    """Seconds of recomputing [chunk] and of the prefill in the open context; the codec does not matter.

    Recomputing is measured on the first, middle and last chunk and interpolated by position, since attention grows
    with the tokens before.
    """
    chunks = manifest.chunks
    # earlier tokens must be numbers, not NaN, whose arithmetic may be slower or faster
    cache = engine.context.cache
    cache.storage.normal_()
    points = []
    for index in sorted({0, len(chunks) // 2, len(chunks) - 1}):
        chunk_s = _median_s(engine.recompute, index, memoryview(get(index, TEXT)))
        points.append((chunks[index].start, chunk_s / chunks[index].tokens))
    prefill_s = _median_s(engine.prefill, prompt_ids)
    cache.poison()
    return tuple(interpolate(points, chunk.start) * chunk.tokens for chunk in chunks), prefill_s


def decode_once(engine: DecodingEngine, chunk: int, level: int, data: bytes) -> Step:
    """Decode a chunk whose bytes arrive at once; the time includes their copy to the device, where there is one."""
    incoming = engine.take(chunk, level, len(data))
    try:
        incoming.view[:] = data
        incoming.arrived(len(data))
        return engine.decode(incoming)
    finally:
        incoming.release()


def _median_s(step: Callable[..., Step], *arguments: Any) -> float:
    times: list[float] = []
    for _ in range(REPEATS + 1):
        done = step(*arguments)
        times.append(done.end_s - done.start_s)
    return statistics.median(times[1:])


def interpolate(points: Sequence[tuple[int, float]], x: int) -> float:
    """Piecewise linear through the points (ascending), flat outside."""
    return float(np.interp(x, [p[0] for p in points], [p[1] for p in points]))
