"""Contexts in the shape of a large model's cache, with the statistics of a real one, and no run of the large model.

What a chunk costs in bytes and in decoding depends on the distribution of its coefficients. Here every column of the
large cache has those of a column of the bundled model, which it gets from the same part of the network: the same coding
classes and steps, and as values the coefficients that kvstream's transform finds in the bundled model's cache of real
text, begun at a place of the column's own. A random rotation of each head and rotary embedding turn them into keys and
values, so that the whole codec has its real work. Bits per element then agree with the bundled model's, level by level
(`Source.bits_per_element` says what those are). Nothing of this means anything to the large model: for timing only, and
labelled so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codec import registry
from codec.kvstream import rope_of_profile
from codec.profile import Profile
from codec.targets import DTYPES
from codec.transform import Rope, analyse, synthesise
from policies.api import TEXT
from testbed import calibrate, workload
from testbed.llm import Model, Question, calculate_kv
from testbed.manifest import ChunkInfo, KVShape, LevelInfo, Manifest
from testbed.store import Store, text_bytes

if TYPE_CHECKING:
    from codec.api import Codec

LABEL: Final = "synthetic KV with the statistics of {model}: for timing only"
BUILDERS: Final = 4
"""Chunks made at a time: each step of one uses some of the cores."""


@dataclass(frozen=True)
class Source:
    """What a real cache is like under kvstream: the bundled model's."""

    model: str
    profile: Profile
    levels: tuple[LevelInfo, ...]
    """With what was measured here: bits per element on the real cache."""
    coefficients: NDArray[np.float32]
    """`[L, 2, H, D, N]` of N tokens of real text."""

    @property
    def bits_per_element(self) -> dict[str, float]:
        return {level.name: level.bits_per_element for level in self.levels}


def source_of(model: Model, tokens: int, chunk_tokens: int, keep: Sequence[int] | None = None) -> Source:
    """Measure at least `tokens` tokens of the shipped contexts, coded in chunks; `keep` are the levels wanted."""
    codec = calibrate.make_codec("kvstream", model)
    assert codec.profile is not None
    profile = codec.profile
    distortions = calibrate.distortions(model, codec, 256)
    keep = range(len(codec.levels)) if keep is None else keep
    shape = model.kv
    mean = torch.tensor(profile.tensors["mean"])
    basis = torch.tensor(profile.tensors["basis"]).float() * torch.tensor(profile.tensors["scale"])[..., None, None]
    inverse = torch.linalg.inv(basis.double()).float()
    rope = rope_of_profile(profile)
    found: list[Tensor] = []
    bits, coded, n = [0] * len(codec.levels), 0, 0
    for context in workload.load_contexts():
        kv = calculate_kv(model, context.token_ids)
        span = range(kv.shape[2])
        parts = [
            analyse(kv, layer, side, mean[layer, side], inverse[layer, side], rope, span)
            for layer, side in np.ndindex(shape.layers, 2)
        ]
        found.append(torch.stack(parts).unflatten(0, (shape.layers, 2)))
        for start, stop in itertools.pairwise([*range(0, len(span), chunk_tokens), len(span)]):
            for level in keep:
                bits[level] += 8 * len(codec.encode(kv[:, :, start:stop], level, positions=range(start, stop)))
        coded += len(span) * shape.elements_per_token
        n += len(span)
        if n >= tokens:
            break
    levels = tuple(LevelInfo(codec.levels[i].name, distortions[i], bits[i] / coded) for i in keep)
    kept = {name: profile.tensors[name][list(keep)] for name in ("steps", "classes", "shifts")}
    facts = dict(profile.metadata) | {"levels": [level.name for level in levels]}
    return Source(model.name, Profile({**profile.tensors, **kept}, facts), levels, torch.cat(found, dim=-1).numpy())


class Lookalike:
    """A cache of `shape` with a source's statistics; keys turned by `inv_freq` float32 `[D / 2]`."""

    def __init__(self, source: Source, shape: KVShape, inv_freq: Tensor, *, seed: int = 0) -> None:
        self.shape = shape
        self._source = source
        draw = np.random.default_rng(seed)
        self._from = self._columns()
        self._shift = draw.integers(0, source.coefficients.shape[-1], len(self._from))
        blocks = shape.layers * 2 * shape.heads
        rotations = torch.from_numpy(draw.standard_normal((blocks, shape.head_dim, shape.head_dim), np.float32))
        basis = torch.linalg.qr(rotations).Q.unflatten(0, (shape.layers, 2, shape.heads))
        scale = basis.abs().amax(dim=(3, 4))
        stored = (basis / scale[..., None, None]).half()
        self._basis = stored.float() * scale[..., None, None]
        self._rope = Rope(inv_freq.float().repeat(shape.layers, 1))
        old = source.profile
        self.profile = Profile(
            {
                "mean": np.zeros((shape.layers, 2, shape.heads, shape.head_dim), np.float32),
                "basis": stored.numpy(),
                "scale": scale.numpy(),
                "inv_freq": self._rope.inv_freq.numpy(),
                "classes": old.tensors["classes"][:, self._from],
                "shifts": old.tensors["shifts"][:, self._from],
                **{name: old.tensors[name] for name in ("tables", "values", "steps")},
            },
            {
                "codec": "kvstream",
                "layers": shape.layers,
                "heads": shape.heads,
                "head_dim": shape.head_dim,
                "levels": old.metadata["levels"],
                "rope_interleaved": False,
                "label": LABEL.format(model=source.model),
            },
        )

    def _columns(self) -> NDArray[np.int64]:
        """int64 `[L * 2 * H * D]`: the source's column that each column is like. Of the same side and relative layer,
        about the same rank in its head, and every column of the source as often as any other."""
        layers, _, heads, dim, _ = self._source.coefficients.shape
        mine = self.shape
        layer, side, head, rank = np.indices((mine.layers, 2, mine.heads, mine.head_dim)).reshape(4, -1)
        like = layer * layers // mine.layers
        first = -(-like * mine.layers // layers)
        alike = (-(-(like + 1) * mine.layers // layers) - first) * mine.heads
        number = rank * alike + (layer - first) * mine.heads + head
        rank_of_source, head_of_source = np.divmod(number * (dim * heads) // (alike * mine.head_dim), heads)
        return np.ravel_multi_index((like, side, head_of_source, rank_of_source), (layers, 2, heads, dim))

    def kv(self, start: int, stop: int) -> Tensor:
        """The cache `[L, 2, T, H, D]` of tokens [start, stop)."""
        shape = self.shape
        source = self._source.coefficients.reshape(-1, self._source.coefficients.shape[-1])
        at = np.arange(start, stop)
        out = torch.empty((shape.layers, 2, len(at), shape.heads, shape.head_dim), dtype=DTYPES[shape.dtype])
        columns = np.arange(len(self._from)).reshape(shape.layers, 2, shape.heads, shape.head_dim)
        for layer, side in np.ndindex(shape.layers, 2):
            own = columns[layer, side]
            values = source[self._from[own][..., None], (self._shift[own][..., None] + at) % source.shape[1]]
            out[layer, side] = synthesise(
                torch.from_numpy(values).transpose(1, 2), layer, side, torch.zeros(own.shape),
                self._basis[layer, side], self._rope, range(start, stop),
            )  # fmt: skip
        return out


def store_lookalike(
    store: Store,
    lookalike: Lookalike,
    *,
    tokens: int,
    chunk_tokens: int,
    codecs: Sequence[str],
    model: str,
    vocabulary: int,
    prompt_tokens: int,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, str]:
    """Encode a context under every codec as a sender offers it: `{codec: context id}`. `model` is the fingerprint of
    the model that will receive it."""
    draw = np.random.default_rng(1)
    ids = draw.integers(0, vocabulary, tokens + prompt_tokens).tolist()
    bounds = list(itertools.pairwise([*range(0, tokens, chunk_tokens), tokens]))
    made: dict[str, Codec] = {
        name: registry.make(name, {}, lookalike.profile if registry.codec_class(name).needs_profile else None)
        for name in codecs
    }
    hashes: dict[str, dict[str, str]] = {name: {} for name in codecs}

    def build(index: int) -> dict[str, ChunkInfo]:
        start, stop = bounds[index]
        kv = lookalike.kv(start, stop)
        text = text_bytes(ids[start:stop], vocabulary)
        infos = {}
        for name, codec in made.items():
            context = context_of(name)
            hashes[name][f"{index}/{TEXT}"] = store.put_chunk(context, index, TEXT, text)
            sizes = []
            for level in range(len(codec.levels)):
                data = codec.encode(kv, level, positions=range(start, stop))
                hashes[name][f"{index}/{level}"] = store.put_chunk(context, index, level, data)
                sizes.append(len(data))
            infos[name] = ChunkInfo(start, stop, tuple(sizes), len(text))
        say(f"made chunk {index} of {len(bounds)}")
        return infos

    with ThreadPoolExecutor(BUILDERS) as builders:
        chunks = list(builders.map(build, range(len(bounds))))
    for name, codec in made.items():
        sizes = np.array([info[name].sizes_bytes for info in chunks]).sum(axis=0)
        known = lookalike._source.levels if name == "kvstream" else None
        levels = [
            LevelInfo(level.name, known[i].distortion if known else 0.0, 0.0) for i, level in enumerate(codec.levels)
        ]
        elements = tokens * lookalike.shape.elements_per_token
        manifest = Manifest(
            context=context_of(name),
            model=model,
            codec=codec.get_config(),
            profile=None if codec.profile is None else store.put_profile(codec.profile.to_bytes()),
            kv=lookalike.shape,
            levels=tuple(
                replace(level, bits_per_element=8 * int(size) / elements)
                for level, size in zip(levels, sizes, strict=True)
            ),
            chunks=tuple(info[name] for info in chunks),
        )
        store.announce(manifest, hashes[name])
        question = Question(tuple(ids[tokens:]), (ids[0],))
        store.put_evaluation(context_of(name), [question], (), torch.zeros(1, vocabulary))
    return {name: context_of(name) for name in codecs}


def context_of(codec: str) -> str:
    """Id of the context under a codec."""
    return f"lookalike-{codec}"


def rotary(head_dim: int, theta: float) -> Tensor:
    """float32 `[D / 2]`: the frequencies of an unscaled rotary embedding."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim).float()


def facts(manifest: Manifest, source: Source) -> dict[str, Any]:
    """What a result must say of the bytes that it was measured with."""
    ladder = {level.name: level.bits_per_element for level in manifest.levels}
    return {
        "label": LABEL.format(model=source.model),
        "bits_per_element": ladder,
        "bits_per_element_of_the_real_cache": source.bits_per_element,
        "tokens": manifest.tokens,
        "chunks": len(manifest.chunks),
        "bytes": {
            level.name: sum(c.sizes_bytes[i] for c in manifest.chunks) for i, level in enumerate(manifest.levels)
        },
    }
