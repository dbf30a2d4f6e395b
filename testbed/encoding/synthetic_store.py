"""A synthetic workload as real bytes: a store of encoded chunks that a sender can serve.

Caches are drawn at random (`draw`): every channel is an autoregressive process about a mean of its own, channels
differ in scale. Neighbouring tokens correlate so that their differences have 2.6 times less variance than the values
(the paper finds 2.4 to 2.9 times, SIGCOMM 2024, section 4.1); the spread of the channels' scales is set so that
CacheGen's default level costs the paper's 2.26 bit per element. The codecs themselves calibrate, encode and pack;
distortions are read off the bundled model's curve at the bits per element that came out (`workloads/ladders.json`).

Chunks of equal length carry the same drawn values at their own positions: sizes and bytes are real, the contents mean
nothing, and no model ever sees them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Final

import numpy as np
import torch
from torch import Tensor

from kvstream.codec import cachegen, container, registry
from kvstream.codec.api import Codec
from kvstream.codec.kvstream import fit
from kvstream.codec.targets import DTYPES
from kvstream.policies.api import TEXT
from kvstream.testbed.encoding.prepare import Prepared
from kvstream.testbed.errors import SpecError
from kvstream.testbed.host.machine import cache_dir
from kvstream.testbed.store.api import ContextStore
from kvstream.testbed.store.manifest import ChunkInfo, KVShape, LevelInfo, Manifest
from kvstream.testbed.store.store import Store, text_bytes
from kvstream.testbed.workloads import synthetic

FORMAT: Final = 2
"""Version of what is stored; stores of other versions are ignored."""
CORRELATION: Final = 1.0 - 1.0 / (2.0 * 2.6)
"""Of neighbouring tokens: differences have 2 (1 - r) of the variance."""
MEAN: Final = 0.5
"""Of a channel, in its standard deviations."""
SPREAD: Final = 0.955
"""Standard deviation of the logarithm of the channels' scales."""
FIT_TOKENS: Final = 512
"""Tokens that a profile is fitted on."""
VOCABULARY: Final = 1 << 32
"""Token ids take `synthetic.TEXT_BYTES_PER_TOKEN` bytes."""


def prepare(
    workload_text: str, contexts: Sequence[str], codecs: Sequence[str], chunk_tokens: int,
    say: Callable[[str], None] = lambda line: None,
) -> Prepared:  # fmt: skip
    """A store with all contexts under all codecs, encoded where not cached."""
    workload = synthetic.parse(workload_text)
    store = Store(cache_dir() / "stores" / f"synthetic-v{FORMAT}-{workload.model}-{chunk_tokens}")
    ids: dict[tuple[str, str], str] = {}
    missing: dict[str, list[str]] = {}
    for codec_name in codecs:
        for context in contexts:
            ids[context, codec_name] = context_id(workload, context, codec_name, chunk_tokens)
            if store.fault(ids[context, codec_name]):
                missing.setdefault(codec_name, []).append(context)
    for codec_name, lacking in missing.items():
        say(f"drawing a cache of {workload.model} and encoding it with {codec_name}; this is kept")
        codec = fitted(codec_name, workload.kv)
        encoded: dict[int, list[bytes]] = {}
        for context in lacking:
            store_context(store, ids[context, codec_name], workload, context, codec, chunk_tokens, encoded)
    manifests = {pair: store.manifest(key) for pair, key in ids.items()}
    return Prepared(store.path, "", workload.name, ids, manifests, {}, workload_text)


def context_id(workload: synthetic.Workload, context: str, codec: str, chunk_tokens: int) -> str:
    """`longchat-cachegen-1a2b3c4d5e6f`: readable, and unique by everything the encoding depends on."""
    rungs = [(rung.bits_per_element, rung.distortion) for rung in workload.ladder(codec)]
    facts = repr((workload.model, synthetic.tokens_of(context), codec, chunk_tokens, SPREAD, CORRELATION, MEAN, rungs))
    return f"{context}-{codec}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def draw(shape: KVShape, tokens: int, seed: int, *, channels_seed: int = 0) -> Tensor:
    """A synthetic cache `[L, 2, T, H, D]`. Scales and means of channels are drawn from `channels_seed`: they stand
    for the model, and are the same for every context.
    """
    model, rng = np.random.default_rng(channels_seed), np.random.default_rng([seed, tokens])
    width = shape.heads * shape.head_dim
    quantiles = [NormalDist().inv_cdf((i + 0.5) / width) for i in range(width)]
    out = torch.empty((shape.layers, 2, tokens, shape.heads, shape.head_dim), dtype=DTYPES[shape.dtype])
    for layer in range(shape.layers):
        for side in (0, 1):
            # quantiles, shuffled: every layer has the same scales, so that none costs more by chance
            scale = np.exp(SPREAD * model.permutation(quantiles)).astype(np.float32)
            mean = MEAN * model.standard_normal(width, dtype=np.float32)
            values = rng.standard_normal((tokens, width), dtype=np.float32)
            fresh = math.sqrt(1.0 - CORRELATION**2)
            for token in range(1, tokens):
                values[token] = CORRELATION * values[token - 1] + fresh * values[token]
            block = torch.from_numpy((values + mean) * scale)
            out[layer, side] = block.view(tokens, shape.heads, shape.head_dim).to(out.dtype)
    return out


def fitted(name: str, shape: KVShape) -> Codec:
    """The codec, calibrated on caches of these statistics if it needs a profile."""
    if not registry.codec_class(name).needs_profile:
        return registry.make(name)
    if name not in ("cachegen", "kvstream"):
        raise SpecError(f"codec {name} cannot be calibrated on a synthetic cache; use cachegen, kvstream or uniform")
    sample = draw(shape, FIT_TOKENS, seed=1)
    facts = {"model": "synthetic"}
    if name == "cachegen":
        return registry.make(name, profile=cachegen.fit([sample], metadata=facts))
    # channels are independent: there is nothing for a transform to exploit
    return registry.make(name, profile=fit([sample], klt=False, metadata=facts))


def store_context(
    store: ContextStore, key: str, workload: synthetic.Workload, context: str, codec: Codec, chunk_tokens: int,
    encoded: dict[int, list[bytes]],
) -> None:  # fmt: skip
    """Write a context. `encoded` keeps [tokens] -> every level's bytes at position 0 for the next one."""
    total = synthetic.tokens_of(context)
    with store.draft(key) as draft:
        chunks: list[ChunkInfo] = []
        for index, start in enumerate(range(0, total, chunk_tokens)):
            tokens = min(chunk_tokens, total - start)
            if tokens not in encoded:
                kv = draw(workload.kv, tokens, seed=2)
                encoded[tokens] = [
                    codec.encode(kv, level, positions=range(tokens)) for level in range(len(codec.levels))
                ]
            text = text_bytes([0] * tokens, VOCABULARY)
            draft.put_chunk(index, TEXT, text)
            sizes = []
            for level, data in enumerate(encoded[tokens]):
                moved = moved_to(data, start)
                draft.put_chunk(index, level, moved)
                sizes.append(len(moved))
            chunks.append(ChunkInfo(start, start + tokens, tuple(sizes), len(text)))
        bits = [
            8.0 * sum(chunk.sizes_bytes[level] for chunk in chunks) / (total * workload.kv.elements_per_token)
            for level in range(len(codec.levels))
        ]
        profile = None if codec.profile is None else store.put_profile(codec.profile.to_bytes())
        draft.publish(
            Manifest(
                context=key,
                model=f"synthetic {workload.model}",
                codec=codec.get_config(),
                profile=profile,
                kv=workload.kv,
                levels=tuple(
                    LevelInfo(level.name, distortion_at(rate, workload.ladder(codec.codec_id)), rate)
                    for level, rate in zip(codec.levels, bits, strict=True)
                ),
                chunks=tuple(chunks),
            )
        )


def moved_to(data: bytes, start: int) -> bytes:
    """The same chunk at another position. Of use where nothing in it depends on the position."""
    chunk = container.parse(data)
    return container.pack(replace(chunk.header, start=start), chunk.sections)


def distortion_at(bits: float, ladder: Sequence[LevelInfo]) -> float:
    """Distortion (nats) at a rate in bits per element: log-linear between levels, extrapolated at the ends."""
    x = [rung.bits_per_element for rung in ladder]
    y = [math.log(rung.distortion) for rung in ladder]
    right = min(max(int(np.searchsorted(x, bits)), 1), len(x) - 1)
    share = (bits - x[right - 1]) / (x[right] - x[right - 1])
    return math.exp(y[right - 1] + share * (y[right] - y[right - 1]))


def kb_per_token(prepared: Prepared) -> Mapping[str, Mapping[str, float]]:
    """[codec][level]: kB per token as encoded, everything included."""
    return {
        codec: {
            level.name: round(manifest.kv.elements_per_token * level.bits_per_element / 8e3, 2)
            for level in manifest.levels
        }
        for (_, codec), manifest in prepared.manifests.items()
    }
