"""What is measured once per model by running it: codec profiles, and the distortion of every level.

Profiles are fitted on the contexts under `contexts/calibration`, distortion is measured on those under
`contexts/heldout`: texts that share nothing. Both are cached by model and codec.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from codec import registry
from codec.api import Codec
from codec.profile import Profile
from testbed import workload
from testbed.llm import KVCache, Model, Question, calculate_kv, mean_kl, score
from testbed.machine import cache_dir
from testbed.plugs import codec_spec

CALIBRATION = workload.BUNDLED_CONTEXTS / "calibration"
HELD_OUT = workload.BUNDLED_CONTEXTS / "heldout"
FORMAT = 1
"""Counts changes of what is measured, so that old caches are left alone."""

SCORED_TOKENS = 256
"""The last tokens of a held-out context are not encoded: they are the text that distortion is measured on."""

Say = Callable[[str], None]


def make_codec(text: str, model: Model, say: Say = lambda line: None) -> Codec:
    """The codec of a spec, with this model's profile if it needs one."""
    name, settings = codec_spec(text)
    needs = registry.codec_class(name).needs_profile
    return registry.make(name, settings, profile_for(model, name, say) if needs else None)


def profile_for(model: Model, codec: str, say: Say = lambda line: None) -> Profile:
    """This model's profile for a codec: from the cache, else fitted now."""
    file = cache_dir() / "profiles" / f"v{FORMAT}-{model.fingerprint[:16]}-{codec}.safetensors"
    if not file.is_file():
        say(f"calibrating {codec} for {model.name}")
        _write(file, fit(model, codec).to_bytes())
    return Profile.load(file)


def fit(model: Model, codec: str) -> Profile:
    """Fit a codec's profile on the calibration contexts."""
    from codec import cachegen

    fitters = {"cachegen": cachegen.fit}
    return fitters[codec](caches(model))


def caches(model: Model) -> Iterator[Tensor]:
    """The exact caches `[L, 2, T, H, D]` of the calibration contexts."""
    for context in workload.load_contexts(CALIBRATION):
        yield calculate_kv(model, model.encode(context.text.decode())[: model.positions])


def distortions(model: Model, codec: Codec, chunk_tokens: int, say: Say = lambda line: None) -> list[float]:
    """Mean KL (nats) of every level against the exact cache, over held-out text and questions in equal parts."""
    facts = json.dumps([FORMAT, model.fingerprint, codec.get_config(), chunk_tokens], sort_keys=True)
    file = cache_dir() / "distortions" / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.json"
    if not file.is_file():
        say(f"measuring the distortion of {len(codec.levels)} levels of {codec.codec_id}")
        measured = [measure(model, codec, level, chunk_tokens) for level in range(len(codec.levels))]
        # finite samples can put two near-lossless levels the wrong way round; the ladder must fall
        ladder = [max(measured[level:]) for level in range(len(measured))]
        _write(file, json.dumps(ladder).encode())
    return [float(value) for value in json.loads(file.read_text())]


def measure(model: Model, codec: Codec, level: int, chunk_tokens: int) -> float:
    """Mean KL (nats) of one level over the held-out contexts."""
    total = 0.0
    samples = _held_out(model)
    for sample in samples:
        for start in range(0, sample.coded, chunk_tokens):
            span = range(start, min(start + chunk_tokens, sample.coded))
            data = codec.encode(sample.exact[:, :, span.start : span.stop], level, positions=span)
            codec.decode(data, sample.cache.view(span.start, span.stop))
        sample.cache.length = sample.coded
        total += sample.kl(model)
    return total / len(samples)


class _Sample:
    """A held-out context: what is coded, what is scored, and the exact answers to compare with."""

    def __init__(self, model: Model, context: workload.Context) -> None:
        tokens = model.encode(context.text.decode())[: model.positions - SCORED_TOKENS]
        self.coded = len(tokens) - SCORED_TOKENS
        self._text = tokens[self.coded :]
        coded_text = context.text.decode()
        self._questions = [
            Question(tuple(model.encode(q.prompt.decode())), tuple(model.encode(q.answer.decode())))
            for q in context.questions
            if len(model.encode(coded_text[: coded_text.index((q.prompt + q.answer).decode())])) < self.coded - 64
        ]
        self.exact = calculate_kv(model, tokens[: self.coded])
        self.cache: KVCache = model.new_cache(self.coded + SCORED_TOKENS)
        self.cache.length = self.coded
        self.cache.view().copy_(self.exact)
        self._exact_text, self._exact_answers = self._score(model)

    def kl(self, model: Model) -> float:
        text, answers = self._score(model)
        return (mean_kl(self._exact_text, text) + mean_kl(self._exact_answers, answers)) / 2

    def _score(self, model: Model) -> tuple[Tensor, Tensor]:
        answers = score(model, self.cache, self._questions).log_probs
        text = model.forward(self.cache, self._text, keep=len(self._text)).log_softmax(dim=-1)
        self.cache.length = self.coded
        return text, answers


@lru_cache(maxsize=1)
def _held_out(model: Model) -> list[_Sample]:
    with torch.inference_mode():
        return [_Sample(model, context) for context in workload.load_contexts(HELD_OUT)]


def _write(file: Path, data: bytes) -> None:
    from testbed.store import write_whole

    write_whole(file, data)
