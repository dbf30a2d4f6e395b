"""Synthetic workloads: manifests and compute costs for the models of the CacheGen paper.

No model runs, and in the simulator no cache exists (over an emulated link one is drawn at random and encoded:
`kvstream.testbed.encoding.synthetic_store`). Shapes and context lengths are the paper's. Sizes and distortions of
levels are those measured on the bundled model (`data/ladders.json`), per element;
CacheGen's bins are widened until its default level costs the paper's 2.26 bit per element (18.5 KB per token on
Mistral-7B). Seconds of recomputing, decoding and prefill come from a compute profile (`data/compute.toml`).
Sizes and times are near the paper's, while distortions only rank levels. Results are labelled synthetic
wherever they are shown.
"""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from kvstream.testbed.config import specs
from kvstream.testbed.errors import SpecError
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.store.manifest import ChunkInfo, KVShape, LevelInfo, Manifest
from kvstream.traces.grammar import brief

FOLDER: Final = Path(__file__).with_name("data")
CHUNK_TOKENS: Final = 1500
"""The paper's."""
CONTEXT: Final = "longchat"
TRACE: Final = "paper-uniform,seed={seed}"
"""The paper's trace model: a rate for each chunk."""
TEXT_BYTES_PER_TOKEN: Final = 4
ELEMENT_BYTES: Final = 2
UNIFORM_BITS: Final = {"3-bit": 3, "4-bit": 4, "8-bit": 8}
MAX_TOKENS: Final = 1_000_000


@dataclass(frozen=True)
class Settings:
    """What may follow a workload's name: `mistral-7b,compute=h200,prompt=0`."""

    compute: str = "a40"
    prompt: int = 32
    """Tokens of the prompt, whose prefill ends in the first token; 0: the deadline is the cache's, as in the paper."""


@dataclass(frozen=True)
class Workload:
    """A model's shape and size, and the GPUs whose speed its costs assume."""

    model: str
    compute: str
    parameters: float
    hidden: int
    kv: KVShape
    prompt: int
    gpus: int
    flops: float
    """Floating-point operations per second that all GPUs together sustain."""
    memory_bytes_per_s: float
    """Bytes per second that all GPUs together read from memory."""

    @property
    def name(self) -> str:
        """The model's name in rows and tables."""
        return f"synthetic {self.model} on {self.gpus} {self.compute}"

    def manifest(self, context: str, codec: str, chunk_tokens: int) -> Manifest:
        """The manifest of a context under a codec. Raises SpecError for unknown ones."""
        tokens = tokens_of(context)
        bounds = [*range(0, tokens, chunk_tokens), tokens]
        rungs = self.ladder(codec)
        elements = self.kv.elements_per_token
        return Manifest(
            context=f"synthetic-{self.model}-{context}-{codec}",
            model=f"synthetic {self.model}",
            codec={"codec": codec},
            profile=None,
            kv=self.kv,
            levels=rungs,
            chunks=tuple(
                ChunkInfo(
                    start,
                    stop,
                    tuple(round((stop - start) * elements * rung.bits_per_element / 8.0) for rung in rungs),
                    (stop - start) * TEXT_BYTES_PER_TOKEN,
                )
                for start, stop in itertools.pairwise(bounds)
            ),
        )

    def ladder(self, codec: str) -> tuple[LevelInfo, ...]:
        """Levels with bits per element and distortion (nats), smallest first."""
        found = _data("ladders.json")["ladders"]
        if codec not in found:
            raise SpecError(f"workload {self.model} has no codec {brief(codec)}; choose from {', '.join(found)}")
        rungs = [LevelInfo(**rung) for rung in found[codec]]
        if codec == "uniform":  # its rate is known without measuring: one 16-bit scale per vector
            scale = 16.0 / (self.kv.heads * self.kv.head_dim)
            rungs = [LevelInfo(rung.name, rung.distortion, UNIFORM_BITS[rung.name] + scale) for rung in rungs]
        return tuple(rungs)

    def costs(self, manifest: Manifest) -> Costs:
        """Seconds of every compute step."""
        codec = str(manifest.codec["codec"])
        decode = ELEMENT_BYTES * self.kv.elements_per_token / (self.gpus * decode_bytes_per_s(codec, self.compute))
        chunks = manifest.chunks
        return Costs(
            decode_s=tuple((chunk.tokens * decode,) * len(manifest.levels) for chunk in chunks),
            recompute_s=tuple(self.forward_s(chunk.start, chunk.stop) for chunk in chunks),
            prefill_s=self.forward_s(manifest.tokens, manifest.tokens + self.prompt) if self.prompt else 0.0,
        )

    def forward_s(self, start: int, stop: int) -> float:
        """Seconds of one forward pass over tokens [start, stop) of a context.

        Two operations per parameter and token, and for attention four per layer, hidden channel and pair of tokens; at
        least the time to read the weights and the preceding cache.
        """
        tokens = stop - start
        attention = 4.0 * self.kv.layers * self.hidden * tokens * (start + stop) / 2.0
        read = ELEMENT_BYTES * (self.parameters + start * self.kv.elements_per_token)
        return max((2.0 * self.parameters * tokens + attention) / self.flops, read / self.memory_bytes_per_s)

    def describe(self, contexts: Sequence[str], codecs: Sequence[str], chunk_tokens: int) -> dict[str, Any]:
        """For a run's manifest: everything that its numbers are based on."""
        longest = max(contexts, key=tokens_of)
        costs = {codec: self.costs(self.manifest(longest, codec, chunk_tokens)) for codec in codecs}
        first = costs[codecs[0]]
        assert first.recompute_s is not None
        return {
            "name": self.name,
            "synthetic": True,
            "contexts": {context: tokens_of(context) for context in contexts},
            "kb_per_token": {
                codec: {
                    rung.name: round(self.kv.elements_per_token * rung.bits_per_element / 8e3, 2)
                    for rung in self.ladder(codec)
                }
                for codec in codecs
            },
            "decode_s_per_chunk": {codec: found.decode_s[0][0] for codec, found in costs.items()},
            "recompute_s": {"context": longest, "chunks": first.recompute_s, "all": sum(first.recompute_s)},
            "prefill_s": first.prefill_s,
            "text_kb_per_token": TEXT_BYTES_PER_TOKEN / 1e3,
            "distortion": "measured on the bundled model at these bits per element, not on this one",
        }


def parse(text: str) -> Workload:
    """The workload of a spec such as `mistral-7b,compute=h200`. Raises SpecError."""
    spec = specs.parse(text, "workload")
    shape = shape_of(spec.name)
    return workload_of(spec.name, shape, specs.build(Settings, spec.settings, f"workload {spec.name}"))


def workload_of(name: str, shape: Mapping[str, Any], settings: Settings) -> Workload:
    """The workload of a model of any shape: `parameters`, `hidden`, `layers`, `kv_heads` and `head_dim`, as in
    `data/models.toml`. Raises SpecError."""
    machine = _data("compute.toml")
    if settings.compute not in machine["gpus"]:
        raise SpecError(f"unknown compute profile {brief(settings.compute)}; choose from {', '.join(machine['gpus'])}")
    if not 0 <= settings.prompt <= MAX_TOKENS:
        raise SpecError(f"prompt={settings.prompt}; give 0 to {MAX_TOKENS} tokens")
    gpu = machine["gpus"][settings.compute]
    gpus = 1
    while ELEMENT_BYTES * shape["parameters"] > gpus * gpu["memory_bytes"] * machine["weights_share"]:
        gpus *= 2
    speed = gpus * (machine["split"] if gpus > 1 else 1.0)
    return Workload(
        model=name,
        compute=settings.compute,
        parameters=shape["parameters"],
        hidden=shape["hidden"],
        kv=KVShape(shape["layers"], shape["kv_heads"], shape["head_dim"], "float16"),
        prompt=settings.prompt,
        gpus=gpus,
        flops=speed * gpu["flops"] * machine["sustained_flops"],
        memory_bytes_per_s=speed * gpu["memory_bytes_per_s"] * machine["sustained_memory"],
    )


def models() -> tuple[str, ...]:
    """Names of the models of the paper's evaluation."""
    return tuple(_data("models.toml")["models"])


def shape_of(model: str) -> dict[str, Any]:
    """Shape and size of a model of the paper's evaluation (`data/models.toml`). Raises SpecError."""
    models: dict[str, dict[str, Any]] = _data("models.toml")["models"]
    if model not in models:
        raise SpecError(f"unknown workload {brief(model)}; choose from {', '.join(models)}")
    return models[model]


def tokens_of(context: str) -> int:
    """Tokens of a context: one of the paper's data sets, or a number of tokens. Raises SpecError."""
    known = _data("models.toml")["contexts"]
    if context in known:
        return int(known[context])
    if context.isdecimal() and 1 <= int(context) <= MAX_TOKENS:
        return int(context)
    raise SpecError(
        f"context {brief(context)}: choose from {', '.join(known)}, or give a number of tokens up to {MAX_TOKENS}"
    )


def decode_bytes_per_s(codec: str, compute: str) -> float:
    """Bytes of 16-bit cache that one GPU decodes per second."""
    data = _data("compute.toml")
    rates, gpu, measured_on = data["decode_bytes_per_s"], data["gpus"][compute], data["gpus"]["h200"]
    threads = gpu["multiprocessors"] * gpu["clock_hz"] / (measured_on["multiprocessors"] * measured_on["clock_hz"])
    memory = gpu["memory_bytes_per_s"] / measured_on["memory_bytes_per_s"]
    return float(min(rates[codec] * threads, rates["copy"] * memory))


def text(facts: dict[str, Any]) -> str:
    """The output of `describe` as text."""
    lines = [f"SYNTHETIC workload, no model and no cache: {facts['name']}"]
    for codec, rungs in facts["kb_per_token"].items():
        sizes = ", ".join(f"{name} {size:g}" for name, size in rungs.items())
        lines.append(f"  {codec}: {sizes} KB/token; decoding a chunk {facts['decode_s_per_chunk'][codec] * 1e3:.1f} ms")
    recompute = facts["recompute_s"]
    first, last = recompute["chunks"][0], recompute["chunks"][-1]
    lines.append(
        f"  text: {facts['text_kb_per_token'] * 1e3:g} B/token; recomputing {recompute['context']} "
        f"{recompute['all']:.2f} s (first chunk {first:.3f} s, last {last:.3f} s); "
        f"prefill of the prompt {facts['prefill_s'] * 1e3:.0f} ms"
    )
    return "\n".join([*lines, f"  distortion: {facts['distortion']}"])


@cache
def _data(name: str) -> dict[str, Any]:
    body = (FOLDER / name).read_text()
    data: dict[str, Any] = json.loads(body) if name.endswith(".json") else tomllib.loads(body)
    return data
