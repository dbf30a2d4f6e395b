"""Contexts in the shape of a large model's cache, with the statistics of a real one, and no run of the large model.

What a chunk costs in bytes and in decoding depends on the distribution of its coefficients. Here every column of the
large cache has those of a column of the bundled model, of the same part of the network and about the same rank: its
kinds and steps, and as values the coefficients that kvstream's transform finds in the bundled model's cache of real
text, begun at a place of the column's own. A random rotation of each layer's keys and values, and rotary embedding,
turn them into a cache, so that the whole codec has its real work. Bits per element then agree with the bundled model's,
level by level (`Source.bits_per_element` says what those are). Nothing of this means anything to the large model: for
timing only, and labelled so.
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

from kvstream.codec import registry
from kvstream.codec.kvstream.parameters import Group, Parameters
from kvstream.codec.profile import Profile
from kvstream.codec.targets import DTYPES
from kvstream.codec.transform import Rope, restore, vectors
from kvstream.policies.api import TEXT
from kvstream.testbed.encoding import calibrate
from kvstream.testbed.encoding.tokens import context_ids
from kvstream.testbed.engine.model import Model, calculate_kv
from kvstream.testbed.store.api import ContextStore
from kvstream.testbed.store.manifest import ChunkInfo, KVShape, LevelInfo, Manifest
from kvstream.testbed.store.questions import Question
from kvstream.testbed.store.store import text_bytes
from kvstream.testbed.workloads import contexts

if TYPE_CHECKING:
    from kvstream.codec.api import Codec

LABEL: Final = "synthetic KV with the statistics of {model}: for timing only"
BUILDERS: Final = 4
"""Chunks made in parallel: each step of one uses only some of the cores."""


@dataclass(frozen=True)
class Source:
    """Statistics of a real cache, the bundled model's, under kvstream."""

    model: str
    profile: Profile
    levels: tuple[LevelInfo, ...]
    """With what was measured here: bits per element on the real cache."""
    coefficients: NDArray[np.float32]
    """`[C, N]` of N tokens of real text, for the columns that the profile keeps."""
    groups: tuple[Group, ...]

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
    parameters = Parameters.of(profile)
    found: list[Tensor] = []
    bits, coded, n = [0] * len(codec.levels), 0, 0
    for context in contexts.load_contexts():
        kv = calculate_kv(model, context_ids(model, context))
        span = range(kv.shape[2])
        rows = [
            group.analysis @ vectors(kv, group.layers, parameters.rope, span, parameters.mean).T
            for group in parameters.groups
        ]
        found.append(torch.cat(rows))
        for start, stop in itertools.pairwise([*range(0, len(span), chunk_tokens), len(span)]):
            for level in keep:
                bits[level] += 8 * len(codec.encode(kv[:, :, start:stop], level, positions=range(start, stop)))
        coded += len(span) * model.kv.elements_per_token
        n += len(span)
        if n >= tokens:
            break
    levels = tuple(LevelInfo(codec.levels[i].name, distortions[i], bits[i] / coded) for i in keep)
    kept = {name: profile.tensors[name][list(keep)] for name in ("steps", "expected")}
    facts = dict(profile.metadata) | {"levels": [level.name for level in levels]}
    coefficients = torch.cat(found, dim=1).numpy()
    return Source(model.name, Profile({**profile.tensors, **kept}, facts), levels, coefficients, parameters.groups)


class Lookalike:
    """A cache of `shape` with a source's statistics; keys turned by `inv_freq` float32 `[D / 2]`."""

    def __init__(self, source: Source, shape: KVShape, inv_freq: Tensor, *, seed: int = 0) -> None:
        self.shape = shape
        self._source = source
        draw = np.random.default_rng(seed)
        width = 2 * shape.heads * shape.head_dim
        self._from = [self._columns(layer, width) for layer in range(shape.layers)]
        self._shift = [draw.integers(0, source.coefficients.shape[1], len(own)) for own in self._from]
        turned = torch.linalg.qr(torch.from_numpy(draw.standard_normal((width, width), np.float32))).Q
        scale = turned.abs().amax()
        stored = (turned / scale).half()
        self._basis = stored.float() * scale
        self._rope = Rope(inv_freq.float().repeat(shape.layers, 1))
        old = source.profile
        per_value = (shape.layers, 2, shape.heads, shape.head_dim)
        bases = {
            f"basis.{layer}": stored[: len(own)].view(-1, 1, *per_value[1:]).numpy()
            for layer, own in enumerate(self._from)
        }
        spread = np.concatenate([source.coefficients[own].std(axis=1) for own in self._from]).max()
        eye = np.broadcast_to(np.eye(shape.head_dim, dtype=np.float16), (*per_value, shape.head_dim))
        self.profile = Profile(
            {
                **bases,
                "mean": np.zeros(per_value, np.float32),
                "spread": np.full(per_value, spread, np.float32),
                "scale": np.full(per_value[:3], float(scale), np.float32),
                "root": np.ascontiguousarray(eye),
                "root_scale": np.ones(per_value[:3], np.float32),
                "inv_freq": self._rope.inv_freq.numpy(),
                "expected": old.tensors["expected"][:, np.concatenate(self._from)],
                **{name: old.tensors[name] for name in ("tables", "values", "steps", "kind_class", "kind_shift")},
            },
            {
                **{name: old.metadata[name] for name in ("codec", "codec_format", "levels")},
                "layers": shape.layers,
                "heads": shape.heads,
                "head_dim": shape.head_dim,
                "group_layers": 1,
                "sinks": 0,
                "rope_interleaved": False,
                "label": LABEL.format(model=source.model),
            },
        )

    def _columns(self, layer: int, width: int) -> NDArray[np.int64]:
        """The source's columns that those of a layer are like, by rank: of the group at the same relative depth, each
        as often as any other, and as large a share of all directions as that group keeps."""
        groups = self._source.groups
        group = groups[layer * len(groups) // self.shape.layers]
        columns = group.columns.stop - group.columns.start
        kept = max(1, width * columns // group.basis_values)
        # Amid its share each: columns fall off so steeply that the first of each share would be far too large.
        return group.columns.start + (2 * np.arange(kept) + 1) * columns // (2 * kept)

    def kv(self, start: int, stop: int) -> Tensor:
        """The cache `[L, 2, T, H, D]` of tokens [start, stop)."""
        shape = self.shape
        source = self._source.coefficients
        at = np.arange(start, stop)
        out = torch.empty((shape.layers, 2, len(at), shape.heads, shape.head_dim), dtype=DTYPES[shape.dtype])
        mean = torch.zeros((shape.layers, 2, shape.heads, shape.head_dim))
        for layer, (own, shift) in enumerate(zip(self._from, self._shift, strict=True)):
            values = source[own[:, None], (shift[:, None] + at) % source.shape[1]]
            rows = torch.from_numpy(values).T @ self._basis[: len(own)]
            out[layer] = restore(rows, range(layer, layer + 1), self._rope, range(start, stop), mean)[0]
        return out


def store_lookalike(
    store: ContextStore,
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
    """Encode a context under every codec into a store: `{codec: context id}`. `model` is the fingerprint of
    the model that will receive it."""
    draw = np.random.default_rng(1)
    ids = draw.integers(0, vocabulary, tokens + prompt_tokens).tolist()
    bounds = list(itertools.pairwise([*range(0, tokens, chunk_tokens), tokens]))
    made: dict[str, Codec] = {
        name: registry.make(name, {}, lookalike.profile if registry.codec_class(name).needs_profile else None)
        for name in codecs
    }
    drafts = {name: store.draft(context_of(name)) for name in codecs}

    def build(index: int) -> dict[str, ChunkInfo]:
        start, stop = bounds[index]
        kv = lookalike.kv(start, stop)
        text = text_bytes(ids[start:stop], vocabulary)
        infos = {}
        for name, codec in made.items():
            drafts[name].put_chunk(index, TEXT, text)
            sizes = []
            for level in range(len(codec.levels)):
                data = codec.encode(kv, level, positions=range(start, stop))
                drafts[name].put_chunk(index, level, data)
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
        question = Question(tuple(ids[tokens:]), (ids[0],))
        drafts[name].put_evaluation([question], (), torch.zeros(1, vocabulary), 0)
        drafts[name].publish(manifest)
        drafts[name].discard()
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
