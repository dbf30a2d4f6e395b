"""Running a model to calibrate codecs for it, and to measure what their levels cost.

A profile is fitted on text of `calibration/fit.txt.xz`, a level's distortion is measured on text of `check.txt.xz`; the
two share no document. Both are mixed with key-value lines and followed by questions about them, because what a
cache needs to recall a number is not what it needs to continue a text. Results are kept in the cache directory and
found again by model, codec and settings.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

from codec import registry
from codec.api import Codec
from codec.profile import Profile
from testbed.errors import SpecError
from testbed.llm import Model, calculate_kv, mean_kl
from testbed.machine import cache_dir
from testbed.plugs import codec_spec
from testbed.store import write_whole
from testbed.workload import make_context

if TYPE_CHECKING:
    from codec.transform import Rope

Say = Callable[[str], None]
Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""Gives the items of a sequence one by one and says how far it is; `progress.track` draws a bar."""
TEXTS = Path(__file__).parent / "calibration"
SHIPPED = TEXTS / "shipped"
"""Profiles and distortions of the bundled model, made by `scripts/ship.py`: the first run need not measure them."""
FORMAT = 1
"""Counts changes of what is calibrated or measured here, so that old results are left alone."""
FIT_SAMPLES, CHECK_SAMPLES = 16, 8
CONTEXT_TOKENS, SUFFIX_TOKENS = 1_536, 256
PASSAGE_TOKENS = 64
TOKENS_A_LINE = 112
"""One key-value line for so many tokens of context."""
ASKED = 5


@dataclass(frozen=True)
class Sample:
    """A context, and what follows it: some more text, then questions with their answers."""

    context_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]


def make_codec(text: str, model: Model, say: Say = lambda line: None) -> Codec:
    """The codec of a spec such as `cachegen,coder=ac`, calibrated for the model where it needs that."""
    name, settings = codec_spec(text)
    profile = profile_of(name, model, say) if registry.codec_class(name).needs_profile else None
    return registry.make(name, settings, profile)


def untracked(items: Sequence[Any], about: str) -> Iterable[Any]:
    """A `Track` that says nothing."""
    return items


def profile_of(
    codec_name: str, model: Model, say: Say = lambda line: None, track: Track = untracked, *, fresh: bool = False
) -> Profile:
    """The model's profile for a codec: the one that was calibrated before, unless `fresh`, or a new one."""
    name = f"profiles/v{FORMAT}-{codec_name}-{model.fingerprint[:16]}.safetensors"
    if not fresh and (known := _known(name)) is not None:
        return Profile.load(known)
    say(f"calibrating {codec_name} for {model.name}: {FIT_SAMPLES} contexts of {CONTEXT_TOKENS} tokens")
    profile = calibrate(codec_name, model, track)
    write_whole(cache_dir() / name, profile.to_bytes())
    if (SHIPPED / name).is_file():
        say(f"{model.name} comes with a profile for {codec_name}, which other commands go on using")
    return profile


def known_profile(sha256: str) -> Profile | None:
    """The profile of this hash, if it came with kvstream or was calibrated on this machine."""
    for folder in (SHIPPED, cache_dir()):
        for file in sorted((folder / "profiles").glob("*.safetensors")):
            if hashlib.sha256(file.read_bytes()).hexdigest() == sha256:
                return Profile.load(file)
    return None


def calibrate(codec_name: str, model: Model, track: Track = untracked) -> Profile:
    """Fit a codec's profile to a model. Raises SpecError for a codec that has none, CodecError if it has no `fit`."""
    cls = registry.codec_class(codec_name)
    if not cls.needs_profile:
        raise SpecError(f"codec {codec_name} needs no calibration")
    facts = {"model": model.fingerprint, "model_name": model.name}
    fitted = list(samples(model, "fit", FIT_SAMPLES))
    if codec_name == "kvstream":  # which wants to know more of a model than its caches
        from codec import kvstream

        rope = rope_of(model)
        shown = track(fitted, "computing caches")
        kv = [calculate_kv(model, sample.context_ids).to("cpu", torch.bfloat16) for sample in shown]
        metric = sensitivity(model, fitted, rope, track)
        return kvstream.fit(kv, rope=rope, sensitivity=metric, metadata=facts)
    shown = track(fitted, "fitting to caches")
    return cls.fit((calculate_kv(model, sample.context_ids) for sample in shown), metadata=facts)


def sensitivity(model: Model, fitted: Sequence[Sample], rope: Rope | None, track: Track = untracked) -> Tensor:
    """What an error in the cache costs: `[L, 2, H, D, D]`, in the space of keys turned back to position 0 and values.

    For each sample, labels are drawn from the model's own predictions over the suffix; the mean outer product of the
    gradient of their log-probability with respect to each cached vector is the Fisher information, half of which is
    the KL divergence that a small error causes (per cached token, summed over the suffix).
    """
    total: Tensor | None = None
    tokens = 0
    for seed, sample in enumerate(track(fitted, "measuring the sensitivity")):
        gradient = _gradient(model, calculate_kv(model, sample.context_ids), sample.suffix_ids, seed).float().cpu()
        for layer in range(len(gradient)):
            if rope is not None:
                rope.rotate(gradient[layer, 0].permute(1, 0, 2), layer, range(gradient.shape[2]), undo=True)
        outer = torch.einsum("lsthd,lsthe->lshde", gradient, gradient).double()
        total = outer if total is None else total + outer
        tokens += gradient.shape[2]
    if total is None:
        raise SpecError("the sensitivity needs at least one sample")
    return (total / tokens).float()


def _gradient(model: Model, kv: Tensor, suffix_ids: Sequence[int], seed: int) -> Tensor:
    """Gradient `[L, 2, T, H, D]` of the log-probability of labels drawn from the predictions over the suffix."""
    leaf = kv.detach().clone().requires_grad_(True)
    cache = DynamicCache()
    for index, (keys, values) in enumerate(leaf):
        cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], index)
    ids = torch.tensor([list(suffix_ids)], device=leaf.device)
    logits = model.network(input_ids=ids, past_key_values=cache, use_cache=True).logits[0].float()
    log_p = logits.log_softmax(dim=-1)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).to(leaf.device)
    (gradient,) = torch.autograd.grad(log_p.gather(1, labels).sum(), leaf)
    return gradient


def rope_of(model: Model) -> Rope | None:
    """The rotary embedding of a model's keys, found by experiment: None if it has none that we can undo.

    A single token attends only to itself, so its key at position p is its key at position 0 turned by p, in every
    layer. Each frequency table that the network holds is tried, with either pairing of dimensions.
    """
    from codec.transform import Rope

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
    model.network(input_ids=ids, position_ids=torch.full_like(ids, position), past_key_values=cache, use_cache=True)
    return torch.stack([layer.keys[0].float().cpu() for layer in cache.layers])


def _close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm()) <= 0.02 * float(expected.norm())


def distortions(model: Model, codec: Codec, chunk_tokens: int, say: Say = lambda line: None) -> tuple[float, ...]:
    """Each level's mean KL divergence (nats) of the next-token distribution from that of the exact cache.

    Contexts are coded in chunks of `chunk_tokens`, all at the same level, and the tokens after them are scored.
    """
    text = hashlib.sha256((TEXTS / "check.txt.xz").read_bytes()).hexdigest()
    settings = [FORMAT, codec.get_config(), model.fingerprint, chunk_tokens, CHECK_SAMPLES, text]
    facts = json.dumps(settings, sort_keys=True)
    name = f"distortions/{hashlib.sha256(facts.encode()).hexdigest()[:24]}.json"
    if (known := _known(name)) is not None:
        return tuple(json.loads(known.read_text()))
    say(f"measuring the distortion of {codec.codec_id}: {len(codec.levels)} levels on {CHECK_SAMPLES} contexts")
    total = [0.0] * len(codec.levels)
    for sample in samples(model, "check", CHECK_SAMPLES):
        exact = calculate_kv(model, sample.context_ids)
        wanted = log_probs(model, exact, sample.suffix_ids)
        for level in range(len(codec.levels)):
            coded = round_trip(codec, exact, level, chunk_tokens)
            total[level] += max(0.0, mean_kl(wanted, log_probs(model, coded, sample.suffix_ids))) / CHECK_SAMPLES
    write_whole(cache_dir() / name, json.dumps(total).encode())
    return tuple(total)


def _known(name: str) -> Path | None:
    """The file of an earlier calibration: one that comes with kvstream, or one made here."""
    return next((folder / name for folder in (SHIPPED, cache_dir()) if (folder / name).is_file()), None)


def round_trip(codec: Codec, kv: Tensor, level: int, chunk_tokens: int) -> Tensor:
    """The cache `[L, 2, T, H, D]` as a receiver gets it when every chunk comes at one level."""
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
    """Contexts of the split's text with key-value lines, and what is scored after them. The same ones every time."""
    texts = _texts(split)
    probe = texts[0][:2_000].decode()
    bytes_a_token = len(probe) / len(model.encode(probe))
    wanted = context_tokens + SUFFIX_TOKENS
    for seed in range(count):
        n_bytes = int(wanted * bytes_a_token * 1.1) + 64
        n_lines = max(2, n_bytes // int(TOKENS_A_LINE * max(1.0, bytes_a_token)))
        context = make_context(seed, n_bytes, texts, n_lines)
        ids = model.encode(context.text.decode())[:wanted]
        seen = model.decode(ids[:context_tokens]).encode()
        asked = [q for q in context.questions if q.prompt + q.answer in seen]
        suffix = list(ids[context_tokens:])
        for question in asked[:: max(1, len(asked) // ASKED)][:ASKED]:
            suffix += model.encode("\n" + question.prompt.decode() + question.answer.decode())
        yield Sample(tuple(ids[:context_tokens]), tuple(suffix))


def passage(model: Model) -> tuple[int, ...]:
    """Text of the check split that is read after a session, to see what its cache is worth beside the answers."""
    return next(samples(model, "check", 1)).suffix_ids[:PASSAGE_TOKENS]


@cache
def _texts(split: str) -> tuple[bytes, ...]:
    return tuple(lzma.decompress((TEXTS / f"{split}.txt.xz").read_bytes()).split(b"\0"))
