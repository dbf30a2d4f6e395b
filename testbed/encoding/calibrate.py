"""Calibrating codecs for a model, and measuring the distortion of their levels.

A profile is fitted to contexts of several kinds of text (`texts.FIT`); a level's distortion is measured on a text that
shares no document with them. All are mixed with key-value lines and followed by questions about them, because what a
cache needs to recall a number is not what it needs to continue a text. Results are kept in the cache directory by
model, codec and settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvstream.codec import registry
from kvstream.codec.api import Codec
from kvstream.codec.profile import Profile
from kvstream.testbed.config.build import codec_spec
from kvstream.testbed.encoding import texts
from kvstream.testbed.encoding.gradients import sensitivity
from kvstream.testbed.encoding.tracking import Say, Track, untracked
from kvstream.testbed.engine.model import Model, calculate_kv, mean_kl
from kvstream.testbed.errors import SpecError
from kvstream.testbed.files import write_whole
from kvstream.testbed.host.machine import cache_dir
from kvstream.testbed.workloads.contexts import Context, make_context

if TYPE_CHECKING:
    from kvstream.codec.transform import Rope

SHIPPED = texts.FOLDER / "shipped"
"""Profiles and distortions of the bundled model, made by `scripts/ship.py`: the first run need not measure them."""
FORMAT = 2
"""Version of what is calibrated or measured here; results of other versions are ignored."""
FIT_SAMPLES, CHECK_SAMPLES = 16, 8
GRADIENT_SAMPLES = 8
"""Of FIT_SAMPLES, those whose gradients are taken."""
HELD_OUT_SAMPLES = 2
"""Of the text on which distortions are measured, contexts that say what ordinary text takes."""
CONTEXT_TOKENS, SUFFIX_TOKENS = 1_536, 256
QUESTION_TOKENS = 256
"""Room for the questions after the suffix."""
FEWEST_POSITIONS = 128
PASSAGE_TOKENS = 64
TOKENS_PER_LINE = 112
"""Tokens of context per key-value line."""
ASKED = 5


@dataclass(frozen=True)
class Sample:
    """A context, and its suffix: more text, then questions with their answers."""

    context_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]


def make_codec(
    text: str, model: Model, say: Say = lambda line: None, track: Track = untracked, *,
    profile: Profile | None = None, force: bool = False,
) -> Codec:  # fmt: skip
    """The codec of a spec such as `cachegen,coder=ac`, with `profile` if that is of this codec, else calibrated for the
    model if it needs that. Raises CodecError for a profile of another model, unless `force`.
    """
    name, settings = codec_spec(text)
    if not registry.codec_class(name).needs_profile:
        return registry.make(name, settings)
    if profile is None or profile.codec_id != name:
        profile = profile_of(name, model, say, track)
    if not force:
        profile.check_model(model.fingerprint)
    return registry.make(name, settings, profile)


def profile_of(
    codec_name: str, model: Model, say: Say = lambda line: None, track: Track = untracked, *, fresh: bool = False
) -> Profile:
    """The model's profile for a codec: an existing one, unless `fresh`, or a new one."""
    name = _profile_name(codec_name, model.fingerprint)
    if not fresh and (known := existing_profile(codec_name, model.fingerprint)) is not None:
        return known
    say(f"calibrating {codec_name} for {model.name}: {FIT_SAMPLES} contexts of {CONTEXT_TOKENS} tokens")
    profile = calibrate(codec_name, model, say, track)
    write_whole(cache_dir() / name, profile.to_bytes())
    if (SHIPPED / name).is_file():
        say(f"{model.name} comes with a profile for {codec_name}, which other commands keep using")
    return profile


def existing_profile(codec_name: str, fingerprint: str) -> Profile | None:
    """A codec's profile of the model with this fingerprint, if it is shipped or was calibrated on this machine."""
    known = _known(_profile_name(codec_name, fingerprint))
    return None if known is None else Profile.load(known)


def _profile_name(codec_name: str, fingerprint: str) -> str:
    version = "".join(f"-{part}" for part in (registry.version(codec_name),) if part)
    return f"profiles/v{FORMAT}-{codec_name}{version}-{fingerprint[:16]}.safetensors"


def known_profile(sha256: str) -> Profile | None:
    """The profile with this hash, if it is shipped with kvstream or was calibrated on this machine."""
    for folder in (SHIPPED, cache_dir()):
        for file in sorted((folder / "profiles").glob("*.safetensors")):
            if hashlib.sha256(file.read_bytes()).hexdigest() == sha256:
                return Profile.load(file)
    return None


def calibrate(codec_name: str, model: Model, say: Say = lambda line: None, track: Track = untracked) -> Profile:
    """Fit a codec's profile to a model. Raises SpecError for a codec that has none, CodecError if it has no `fit`."""
    cls = registry.codec_class(codec_name)
    if not cls.needs_profile:
        raise SpecError(f"codec {codec_name} needs no calibration")
    facts = {"model": model.fingerprint, "model_name": model.name}
    fitted = list(samples(model, "fit", FIT_SAMPLES))
    shown = track(fitted, "computing caches")
    if not cls.fit_takes:
        return cls.fit((calculate_kv(model, sample.context_ids) for sample in shown), metadata=facts)
    known: dict[str, Any] = {"rope": rope_of(model), "say": say}
    kv = [calculate_kv(model, sample.context_ids).to("cpu", torch.bfloat16) for sample in shown]
    if cls.fit_takes & {"sensitivity", "sinks"}:
        suffixes = [sample.suffix_ids for sample in fitted[:GRADIENT_SAMPLES]]
        about = "measuring the sensitivity"
        some = kv[:GRADIENT_SAMPLES]
        cost = sensitivity(model, some, suffixes, known["rope"], lambda items: track(items, about))
        say(f"attention sinks: {cost.sinks or 'none'}")
        known |= {"sensitivity": cost.metric, "sinks": cost.sinks}
    if "held_out" in cls.fit_takes:
        others = track(list(samples(model, "check", HELD_OUT_SAMPLES)), "computing caches of held-out text")
        known["held_out"] = [calculate_kv(model, sample.context_ids).to("cpu", torch.bfloat16) for sample in others]
    if unknown := cls.fit_takes - known.keys():
        raise SpecError(f"codec {codec_name}: fit_takes names {', '.join(unknown)}; choose from {', '.join(known)}")
    return cls.fit(kv, metadata=facts, **{name: known[name] for name in sorted(cls.fit_takes)})


def rope_of(model: Model) -> Rope | None:
    """The rotary embedding of a model's keys, found by experiment; None if there is none that can be undone.

    A single token attends only to itself, so its key at position p is its key at position 0 turned by p, in every
    layer. Each frequency table that the network holds is tried, with either pairing of dimensions.
    """
    from kvstream.codec.transform import Rope

    tables = [
        buffer.detach().float().cpu()
        for name, buffer in model.network.named_buffers()
        if name.endswith("inv_freq") and buffer.dim() == 1 and 2 * len(buffer) <= model.kv.head_dim
    ]
    probes = (1, 37, 601)
    try:
        still, *moved = (_keys_at(model, position) for position in (0, *probes))
    except (TypeError, ValueError, IndexError, RuntimeError):
        return None
    for interleaved in (False, True):
        chosen: list[Tensor] = []
        for layer in range(model.kv.layers):
            for table in tables:
                rope = Rope(table[None], interleaved)
                if all(
                    _close(rope.rotate(still[layer].clone(), 0, range(p, p + 1)), there[layer])
                    for p, there in zip(probes, moved, strict=True)
                ):
                    chosen.append(table)
                    break
        if len(chosen) == model.kv.layers and len({len(table) for table in chosen}) == 1:
            return Rope(torch.stack(chosen), interleaved)
    return None


@torch.inference_mode()
def _keys_at(model: Model, position: int) -> Tensor:
    """Keys `[L, H, 1, D]` of one token alone at a position."""
    cache: Any = DynamicCache()
    ids = torch.full((1, 1), model.vocabulary // 2, device=model.device)
    model.call(ids, cache, position_ids=torch.full_like(ids, position))
    return torch.stack([layer.keys[0].float().cpu() for layer in cache.layers])


def _close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm()) <= 0.02 * float(expected.norm())


def distortions(
    model: Model, codec: Codec, chunk_tokens: int, say: Say = lambda line: None, track: Track = untracked,
    text: str = "check",
) -> tuple[float, ...]:  # fmt: skip
    """Each level's mean KL divergence (nats) of the next-token distribution from that of the exact cache.

    Contexts are coded in chunks of `chunk_tokens`, all at the same level, and the tokens after them are scored.
    """
    known = existing_distortions(model.fingerprint, codec, chunk_tokens, text)
    if known is not None:
        return known
    say(f"measuring the distortion of {codec.codec_id}: {len(codec.levels)} levels on {CHECK_SAMPLES} contexts, {text}")
    total = [0.0] * len(codec.levels)
    checked = list(samples(model, text, CHECK_SAMPLES))
    for sample in track(checked, f"coding with {codec.codec_id}"):
        exact = calculate_kv(model, sample.context_ids)
        wanted = log_probs(model, exact, sample.suffix_ids)
        for level in range(len(codec.levels)):
            coded = round_trip(codec, exact, level, chunk_tokens)
            total[level] += max(0.0, mean_kl(wanted, log_probs(model, coded, sample.suffix_ids))) / CHECK_SAMPLES
    name = _distortions_name(model.fingerprint, codec, chunk_tokens, text)
    write_whole(cache_dir() / name, json.dumps(total).encode())
    return tuple(total)


def existing_distortions(
    fingerprint: str, codec: Codec, chunk_tokens: int, text: str = "check"
) -> tuple[float, ...] | None:
    """What `distortions` gave for the model with this fingerprint, if it is shipped or was measured on this machine."""
    known = _known(_distortions_name(fingerprint, codec, chunk_tokens, text))
    return None if known is None else tuple(json.loads(known.read_text()))


def _distortions_name(fingerprint: str, codec: Codec, chunk_tokens: int, text: str) -> str:
    settings = [FORMAT, registry.identity(codec), fingerprint, chunk_tokens, CHECK_SAMPLES, texts.digest(text)]
    facts = json.dumps(settings, sort_keys=True)
    return f"distortions/{hashlib.sha256(facts.encode()).hexdigest()[:24]}.json"


def _known(name: str) -> Path | None:
    """The file of an earlier calibration: shipped with kvstream, or made on this machine."""
    return next((folder / name for folder in (SHIPPED, cache_dir()) if (folder / name).is_file()), None)


def round_trip(codec: Codec, kv: Tensor, level: int, chunk_tokens: int) -> Tensor:
    """The cache `[L, 2, T, H, D]` as received with every chunk at one level."""
    coded = torch.empty_like(kv)
    for start in range(0, kv.shape[2], chunk_tokens):
        part = kv[:, :, start : start + chunk_tokens]
        data = codec.encode(part, level, positions=range(start, start + part.shape[2]))
        codec.decode(data, coded[:, :, start : start + chunk_tokens])
    return coded


def log_probs(model: Model, kv: Tensor, suffix_ids: Sequence[int]) -> Tensor:
    """Log-probabilities `[S, vocabulary]` of the tokens after each of `suffix_ids`, over a cache `[L, 2, T, H, D]`."""
    room = model.new_cache(kv.shape[2] + len(suffix_ids))
    room.length = kv.shape[2]
    room.view().copy_(kv)
    return model.forward(room, suffix_ids, keep=len(suffix_ids)).log_softmax(dim=-1)


def samples(model: Model, split: str, count: int, context_tokens: int = CONTEXT_TOKENS) -> Iterator[Sample]:
    """Contexts of the split's text with key-value lines, and the suffixes to score. Deterministic."""
    context_tokens, suffix_tokens, room = _lengths(model, context_tokens)
    wanted = context_tokens + suffix_tokens
    for seed in range(count):
        documents = texts.fit_texts(seed) if split == "fit" else texts.documents(split)
        context, ids = _context_of(model, seed, documents, wanted)
        seen = model.decode(ids[:context_tokens]).encode()
        answered = [q for q in context.questions if q.prompt + q.answer in seen]
        questions: list[int] = []
        for question in answered[:: max(1, len(answered) // ASKED)][:ASKED]:
            asked = model.encode("\n" + question.prompt.decode() + question.answer.decode())
            if len(questions) + len(asked) <= room:
                questions += asked
        yield Sample(tuple(ids[:context_tokens]), (*ids[context_tokens:], *questions))


def _context_of(model: Model, seed: int, documents: Sequence[bytes], tokens: int) -> tuple[Context, list[int]]:
    """A context of a text and its first `tokens` token ids."""
    probe = documents[0][:2_000].decode(errors="ignore")
    bytes_per_token = len(probe.encode()) / len(model.encode(probe))
    while True:
        n_bytes = int(tokens * bytes_per_token * 1.1) + 64
        n_lines = max(2, n_bytes // int(TOKENS_PER_LINE * max(1.0, bytes_per_token)))
        context = make_context(seed, n_bytes, documents, n_lines)
        ids = model.encode(context.text.decode(errors="ignore"))
        if len(ids) >= tokens:
            return context, ids[:tokens]
        bytes_per_token *= 1.2  # its documents have longer tokens than the first one's beginning


def _lengths(model: Model, context_tokens: int) -> tuple[int, int, int]:
    """Tokens of context, suffix and questions that fit into the model's positions. Raises SpecError for a model too
    small to calibrate."""
    if model.positions < FEWEST_POSITIONS:
        raise SpecError(
            f"{model.name} has {model.positions} positions; calibration needs a model with {FEWEST_POSITIONS} or more"
        )
    suffix, questions = (min(most, model.positions // 4) for most in (SUFFIX_TOKENS, QUESTION_TOKENS))
    return min(context_tokens, model.positions - suffix - questions), suffix, questions


def passage(model: Model) -> tuple[int, ...]:
    """Text of the check split that is scored after a session, to measure its cache in addition to the answers."""
    return next(samples(model, "check", 1)).suffix_ids[:PASSAGE_TOKENS]
