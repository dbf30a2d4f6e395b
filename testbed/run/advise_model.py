"""What `kvstream advise` measures on a model: what its cache takes under each codec, and what computing takes here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from kvstream.codec.api import Codec
from kvstream.testbed.encoding import calibrate, exam
from kvstream.testbed.engine.model import Model, calculate_kv, extend_kv
from kvstream.testbed.host.machine import processor
from kvstream.testbed.results import words
from kvstream.testbed.run.advise import CHUNK_TOKENS, RAW, Basis, Option, default_of_cachegen, of_ours
from kvstream.testbed.store.manifest import LevelInfo
from kvstream.testbed.store.store import text_bytes
from kvstream.testbed.workloads import synthetic

LADDER_TOKENS: Final = 256
"""Of a chunk, where distortions are measured: those of the store's default, which are kept."""
PROMPT_TOKENS: Final = 32
REPEATS: Final = 3
DTYPE: Final = torch.bfloat16
"""Caches are coded as engines keep them, whatever the model computes in."""


def of_model(model: Model, say: Callable[[str], None] = lambda line: None) -> Basis:
    """Encode a held-out text at every level that matters, decode it, and run the model over positions far and near."""
    sample = next(calibrate.samples(model, "check", 1))
    kv = calculate_kv(model, sample.context_ids).to(DTYPE)
    peer_codec, ours_codec = (calibrate.make_codec(name, model, say) for name in ("cachegen", "kvstream"))
    ladders = {codec.codec_id: _ladder(model, codec, say) for codec in (peer_codec, ours_codec)}
    peer = default_of_cachegen(ladders["cachegen"])
    options = []
    for name in (RAW, "fp8"):
        codec = calibrate.make_codec(name, model, say)
        say(f"measuring {name}")
        [level] = _ladder(model, codec, say)
        options.append(_option(codec, 0, level, kv))
    for codec, wanted in ((peer_codec, [peer]), (ours_codec, of_ours(ladders["kvstream"], peer))):
        for level in wanted:
            say(f"measuring {codec.codec_id} at {level.name}")
            options.append(_option(codec, ladders[codec.codec_id].index(level), level, kv))
    ids = sample.context_ids
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else processor()
    cores = "" if model.device.type == "cuda" else f", {words.many(torch.get_num_threads(), 'thread')}"
    return Basis(
        model=model.name,
        compute=f"{device}{cores}",
        options=tuple(options),
        text_bytes_per_token=len(text_bytes(ids, model.vocabulary)) / len(ids),
        forward_s=_forward(model, say),
        prompt_tokens=PROMPT_TOKENS,
        about=f"sizes, KL and times measured here on {len(ids)} tokens of held-out text, in chunks of {CHUNK_TOKENS}",
    )


def workload_of(model: Model, compute: str) -> synthetic.Workload:
    """The model on the GPUs of a compute profile. Raises SpecError for an unknown one."""
    kv = model.kv
    shape = {
        "parameters": sum(weights.numel() for weights in model.network.parameters()),
        "hidden": model.network.config.get_text_config().hidden_size,
        **{"layers": kv.layers, "kv_heads": kv.heads, "head_dim": kv.head_dim},
    }
    return synthetic.workload_of(model.name, shape, synthetic.Settings(compute, PROMPT_TOKENS))


def _ladder(model: Model, codec: Codec, say: Callable[[str], None]) -> list[LevelInfo]:
    if codec.lossless:
        return [LevelInfo(level.name, 0.0, 0.0) for level in codec.levels]
    measured = calibrate.distortions(model, codec, LADDER_TOKENS, say)
    return [LevelInfo(level.name, nats, 0.0) for level, nats in zip(codec.levels, measured, strict=True)]


def _option(codec: Codec, number: int, level: LevelInfo, kv: Tensor) -> Option:
    _, sizes = exam.through(codec, kv, number, CHUNK_TOKENS)
    part = kv[:, :, :CHUNK_TOKENS]
    data = codec.encode(part, number, positions=range(part.shape[2]))
    out = torch.empty_like(part)
    decode_s = _median_s(lambda: codec.decode(data, out, device=kv.device), kv.device)
    tokens = kv.shape[2]
    name = {RAW: "16 bit", "fp8": "8 bit"}.get(codec.codec_id, level.name)
    return Option(codec.codec_id, name, sizes.total / tokens, level.distortion, decode_s / part.shape[2])


def _forward(model: Model, say: Callable[[str], None]) -> Callable[[int, int], float]:
    """Seconds of a pass over tokens [start, stop): a pass takes a fixed time, one for each token, and one for each pair
    of tokens that attend. Three passes say which."""
    say("measuring the model's forward pass")
    last = model.positions - CHUNK_TOKENS
    whole, few = min(CHUNK_TOKENS, model.positions // 4), PROMPT_TOKENS
    far = min(8 * CHUNK_TOKENS, last)
    cache = model.new_cache(far + whole)
    cache.storage.normal_()
    ids = [index % model.vocabulary for index in range(whole)]

    def seconds(start: int, tokens: int) -> float:
        def run() -> None:
            cache.length = start
            extend_kv(model, cache, ids[:tokens])

        return _median_s(run, model.device)

    points = [(0, whole), (far, whole), (0, few)]
    rows = np.array([_terms(start, start + tokens) for start, tokens in points])
    found = np.array([seconds(*point) for point in points])
    # never less than nothing, whatever the noise
    fixed, each, pair = np.maximum(np.linalg.solve(rows, found), 0.0)
    return lambda start, stop: float(np.dot(_terms(start, stop), (fixed, each, pair)))


def _terms(start: int, stop: int) -> tuple[float, float, float]:
    tokens = stop - start
    return 1.0, float(tokens), tokens * (start + stop) / 2


def _median_s(work: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 1):
        start_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start_s)
    return statistics.median(times[1:])
