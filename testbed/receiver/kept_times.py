"""What decoding and recomputing take on this machine: measured at the first fetch of a kind, and kept for the others.

The first fetch of all takes the context's first chunk at every level and decodes each a few times; later ones, in other
processes too, find the result in the cache directory and decode that chunk once, at its smallest level, to load
compiled code. A chunk's time is in proportion to its tokens.

What is kept follows what sessions take: a process that was busy when it measured would else be wrong for ever.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from kvstream.testbed.engine.measure import decode_once, interpolate
from kvstream.testbed.files import write_whole
from kvstream.testbed.host.machine import cache_dir, processor
from kvstream.testbed.net.client import Client
from kvstream.testbed.receiver.cache_engine import CacheEngine
from kvstream.testbed.session.record import SessionRecord
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.store.store import chunk_id, text_bytes

FORMAT: Final = 1
REPEATS: Final = 3
NEAR: Final = 1.25
"""What is kept stays as it is while sessions take up to so many times as long, or as short."""
_warm: set[str] = set()
"""What this process has decoded before."""


async def decode_times(client: Client, manifest: Manifest, engine: CacheEngine) -> tuple[tuple[float, ...], ...]:
    """Seconds of decoding [chunk][level] of a context that is open in the engine, with everything warm afterwards.

    Raises SpecError, OSError, aiohttp.ClientError or CodecError where the first chunk cannot be had.
    """
    key = _decoding_key(manifest, engine)
    known = _read(key, len(manifest.levels))
    tokens = manifest.chunks[0].tokens
    if known is None:
        measured = [await _measure(client, manifest, engine, level, REPEATS) for level in range(len(manifest.levels))]
        known = [seconds / tokens for seconds in measured]
        _write(key, known)
    elif key not in _warm:
        await _measure(client, manifest, engine, 0, 0)
    _warm.add(key)
    return tuple(tuple(chunk.tokens * seconds for seconds in known) for chunk in manifest.chunks)


def learn_decoding(
    manifest: Manifest, engine: CacheEngine, decode_s: Sequence[Sequence[float]], record: SessionRecord
) -> None:
    """Correct what is kept by a session that expected `decode_s` [chunk][level].

    What went faster was expected wrongly. What took longer may have had its reason in that session: it counts half, on
    a scale of factors.
    """
    ratios = [
        chunk.computing_s / decode_s[chunk.chunk][chunk.level]
        for chunk in record.chunks
        if isinstance(chunk.level, int) and chunk.computing_s is not None
    ]
    ratio = statistics.median(ratios) if ratios else 1.0
    if 1.0 / NEAR <= ratio <= NEAR:
        return
    first = manifest.chunks[0].tokens
    key = _decoding_key(manifest, engine)
    _write(key, [seconds / first * min(ratio, math.sqrt(ratio)) for seconds in decode_s[0]])


async def _measure(client: Client, manifest: Manifest, engine: CacheEngine, level: int, repeats: int) -> float:
    """Median seconds of decoding the first chunk at a level, after a first time that does not count."""
    data = await client.get_kv(chunk_id(manifest.context, 0), level, manifest.chunks[0].sizes_bytes[level])
    steps = [await asyncio.wrap_future(engine.submit(decode_once, engine, 0, level, data)) for _ in range(repeats + 1)]
    return statistics.median(step.end_s - step.start_s for step in steps[1:] or steps)


async def recompute_times(manifest: Manifest, token_ids: Sequence[int], engine: CacheEngine) -> tuple[float, ...]:
    """Seconds of recomputing [chunk] of the open context: kept, or measured on the first, middle and last chunk, and
    interpolated by position, since attention grows with the tokens before."""
    chunks = manifest.chunks
    chosen = sorted({0, len(chunks) // 2, len(chunks) - 1})
    places = [(chunk.start, chunk.stop) for chunk in (chunks[index] for index in chosen)]
    key = _key("recomputing", manifest, engine, manifest.model, places)
    known = _read(key, len(places))
    if known is None:
        known = []
        for index, (start, stop) in zip(chosen, places, strict=True):
            data = memoryview(text_bytes(token_ids[start:stop], 1 << 32))
            steps = [await asyncio.wrap_future(engine.submit(engine.recompute, index, data)) for _ in range(2)]
            known.append((steps[-1].end_s - steps[-1].start_s) / (stop - start))
        _write(key, known)
    points = [(start, seconds) for (start, _), seconds in zip(places, known, strict=True)]
    return tuple(interpolate(points, chunk.start) * chunk.tokens for chunk in chunks)


def _decoding_key(manifest: Manifest, engine: CacheEngine) -> str:
    return _key("decoding", manifest, engine, engine.target_kind, dict(manifest.codec))


def _key(step: str, manifest: Manifest, engine: CacheEngine, *more: Any) -> str:
    """What the time of a step depends on, besides a chunk's tokens."""
    device = engine.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    facts = [FORMAT, step, asdict(manifest.kv), device.type, name, torch.get_num_threads(), *more]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _file(key: str) -> Path:
    return cache_dir() / "times" / f"{key}.json"


def _read(key: str, count: int) -> list[float] | None:
    """Seconds a token, if they were measured here before."""
    try:
        found = [float(seconds) for seconds in json.loads(_file(key).read_bytes())]
    except (OSError, ValueError, RecursionError, TypeError):
        return None
    return found if len(found) == count and all(0.0 < seconds < math.inf for seconds in found) else None


def _write(key: str, seconds: list[float]) -> None:
    with suppress(OSError):  # a folder that cannot be written only costs the next process the same
        write_whole(_file(key), json.dumps(seconds).encode())
