"""Running a model on a KV cache that was computed elsewhere.

The paper's two calls (CacheGen, section 6) are `calculate_kv` and `generate_with_kv`. A `KVCache` is one preallocated
tensor: codecs decode into its view `[L, 2, T, H, D]`, and a Hugging Face model attends to per-layer views
`[1, H, T, D]` of the same memory, so nothing is copied between arrival and attention, and appending a token never
moves the context.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from kvstream.codec.targets import DTYPES
from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.manifest import KVShape
from kvstream.testbed.store.questions import Question

SCORED_TOKENS = 8
"""The KL of an answer is taken over at most this many first tokens."""
ROWS = 32
"""Positions whose divergence is computed at a time: those of a large vocabulary leave a processor's cache."""
SIDE_BY_SIDE_TOKENS = 288
"""Questions are batched up to this many tokens: enough to share the cost of a pass over the cache."""


class _Layer(CacheLayerMixin):
    """One layer's keys and values `[1, H, capacity, D]` in a `KVCache`'s memory; full length also where the model's
    attention slides (the mask hides the rest)."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._all_keys, self._all_values = keys, values
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        return None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        if end > self._all_keys.shape[-2]:
            raise SpecError(f"the cache holds {self._all_keys.shape[-2]} tokens, {end} are needed; allocate more")
        self._all_keys[:, :, self.length : end] = key_states
        self._all_values[:, :, self.length : end] = value_states
        self.length = end
        return self._all_keys[:, :, :end], self._all_values[:, :, :end]

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """`query` is how many tokens come, or, in older versions of transformers, their positions."""
        return self.length + (len(query) if isinstance(query, Tensor) else query), 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """As `get_max_length`, for older versions of transformers."""
        return -1


class KVCache:
    """Room for `capacity` tokens; `length` says how many at the front are valid, and may be set."""

    def __init__(self, shape: KVShape, capacity: int, device: torch.device | str = "cpu") -> None:
        self.shape = shape
        self.capacity = capacity
        dtype = DTYPES[shape.dtype]
        self.storage = torch.zeros((shape.layers, 2, shape.heads, capacity, shape.head_dim), dtype=dtype, device=device)
        self._layers = [_Layer(pair[0][None], pair[1][None]) for pair in self.storage]
        self.hugging_face = Cache(layers=list(self._layers))

    @property
    def length(self) -> int:
        return self._layers[0].length

    @length.setter
    def length(self, tokens: int) -> None:
        if not 0 <= tokens <= self.capacity:
            raise SpecError(f"a cache of {self.capacity} tokens cannot have length {tokens}")
        for layer in self._layers:
            layer.length = tokens

    def view(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Tokens [start, stop) as `[L, 2, T, H, D]`, in place; by default all valid ones."""
        stop = self.length if stop is None else stop
        if not 0 <= start <= stop <= self.capacity:
            raise SpecError(f"tokens [{start}, {stop}) are outside a cache of {self.capacity}")
        return self.storage[:, :, :, start:stop].permute(0, 1, 3, 2, 4)

    def poison(self) -> None:
        """Forget everything: memory that is then used without having been written gives NaN, never an old answer."""
        self.storage.fill_(float("nan"))
        self.length = 0


def cache_argument(network: Any) -> str:
    """What a network's `forward` and `generate` call the cache: another name since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"


class Model:
    """A causal language model with its tokenizer, on one device in one dtype."""

    def __init__(self, network: Any, tokenizer: Any, name: str, fingerprint: str) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint
        """SHA-256 of configuration and weights: what a manifest's `model` must equal."""
        self.device = network.device
        self.vocabulary = int(network.get_input_embeddings().weight.shape[0])
        self._cache_argument = cache_argument(network)
        self.kv = _kv_shape(self)

    @property
    def positions(self) -> int:
        """Longest sequence that the model supports."""
        return int(getattr(self.network.config, "max_position_embeddings", 1 << 31))

    @property
    def attends_to_all(self) -> bool:
        """Whether no layer has a window, so that an external boolean mask is all that restricts attention."""
        config = self.network.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        has_window = getattr(config, "sliding_window", None) is not None or kinds != {"full_attention"}
        return not has_window and config._attn_implementation == "sdpa"

    def new_cache(self, capacity: int) -> KVCache:
        return KVCache(self.kv, capacity, self.device)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids)))

    def forward(self, cache: KVCache, token_ids: Sequence[int], keep: int = 1) -> Tensor:
        """Append tokens to the cache; logits `[keep, vocabulary]` in float32 of the last `keep` positions."""
        return self._run(cache, token_ids, cache.length + len(token_ids), logits_to_keep=keep)

    def forward_side_by_side(self, cache: KVCache, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Several continuations of one cache in one pass, unseen by each other: the logits of each, all positions.

        Only for models whose layers all attend to everything; the cache is left as it was.
        """
        context, total = cache.length, sum(map(len, sequences))
        lengths = torch.tensor([len(s) for s in sequences])
        owner = torch.repeat_interleave(torch.arange(len(sequences)), lengths)
        positions = context + torch.cat([torch.arange(len(s)) for s in sequences])
        sees = torch.ones((total, context + total), dtype=torch.bool)
        sees[:, context:] = (owner[:, None] == owner) & (positions[:, None] >= positions)
        logits = self._run(
            cache,
            [token for sequence in sequences for token in sequence],
            context + int(lengths.max()),
            position_ids=positions[None].to(self.device),
            attention_mask=sees[None, None].to(self.device),
        )
        cache.length = context
        return list(logits.split(lengths.tolist()))

    def call(self, ids: Tensor, cache: Cache, **arguments: Any) -> Any:
        """The network's output for tokens int64 `[1, N]`, which are appended to the cache."""
        return self.network(input_ids=ids, use_cache=True, **{self._cache_argument: cache}, **arguments)

    def next_token(self, cache: KVCache, ids: Tensor) -> Tensor:
        """Append tokens int64 `[1, N]` on the device; the most likely next one, still on the device."""
        output = self.call(ids, cache.hugging_face, logits_to_keep=1)
        return output.logits[0, -1].float().argmax()

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Raise SpecError for no tokens, and for tokens outside the vocabulary."""
        if not token_ids:
            raise SpecError("no tokens were given to the model")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.vocabulary:
            bad = low if low < 0 else high
            raise SpecError(f"token id {bad} is outside the vocabulary of {self.vocabulary}; is it from another model?")

    @torch.inference_mode()
    def _run(self, cache: KVCache, token_ids: Sequence[int], end: int, **arguments: Any) -> Tensor:
        self.check_ids(token_ids)
        if end > self.positions:
            raise SpecError(f"{end} tokens are more than the {self.positions} positions of {self.name}")
        ids = torch.tensor([list(token_ids)], device=self.device)
        output = self.call(ids, cache.hugging_face, **arguments)
        return output.logits[0].float()


def calculate_kv(model: Model, token_ids: Sequence[int]) -> Tensor:
    """The exact KV cache of a text, `[L, 2, T, H, D]` in the model's dtype (the paper's API)."""
    cache = model.new_cache(len(token_ids))
    model.forward(cache, token_ids)
    return cache.view()


def extend_kv(model: Model, cache: KVCache, token_ids: Sequence[int]) -> None:
    """Recompute a chunk that came as text, after the `cache.length` tokens already there."""
    model.forward(cache, token_ids)


def first_token(model: Model, cache: KVCache, prompt_ids: Sequence[int]) -> int:
    """Prefill the prompt over the cache; the most likely next token."""
    return int(model.forward(cache, prompt_ids)[-1].argmax())


def generate_with_kv(model: Model, kv: KVCache | Tensor, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy continuation of the prompt over a cache (the paper's API). A tensor `[L, 2, T, H, D]` is copied first;
    a `KVCache` is extended."""
    if isinstance(kv, Tensor):
        cache = model.new_cache(kv.shape[2] + len(prompt_ids) + max_new_tokens)
        cache.length = kv.shape[2]
        cache.view().copy_(kv)
    else:
        cache = kv
    answer = [first_token(model, cache, prompt_ids)] if max_new_tokens > 0 else []
    while len(answer) < max_new_tokens:
        answer.append(first_token(model, cache, answer[-1:]))
    return answer


@dataclass(frozen=True, slots=True)
class Score:
    """Answers under one cache."""

    right: tuple[bool, ...]
    """[question]: the most likely token is the answer's at every position, so greedy decoding gives the answer."""
    log_probs: Tensor
    """`[positions, vocabulary]`: next-token log-probabilities (nats) over all but the passage's last token, then at the
    first SCORED_TOKENS of every answer."""


def score(model: Model, cache: KVCache, questions: Sequence[Question], passage: Sequence[int] = ()) -> Score:
    """Score a passage and the teacher-forced answers to every question over the cache, which is left as it was.

    Questions run side by side as far as the cache has room and the model allows it.
    """
    right: list[bool] = []
    rows: list[Tensor] = []
    context = cache.length
    if passage:
        rows.append(model.forward(cache, passage[:-1], keep=len(passage) - 1).log_softmax(dim=-1))
        cache.length = context
    for group in _groups(questions, cache.capacity - cache.length if model.attends_to_all else 0):
        sequences = [[*q.prompt_ids, *q.answer_ids[:-1]] for q in group]
        if len(group) > 1:
            results = model.forward_side_by_side(cache, sequences)
        else:
            results = [model.forward(cache, sequences[0], keep=len(group[0].answer_ids))]
            cache.length = context
        for question, logits in zip(group, results, strict=True):
            logits = logits[-len(question.answer_ids) :]
            right.append(logits.argmax(dim=-1).tolist() == list(question.answer_ids))
            rows.append(logits[:SCORED_TOKENS].log_softmax(dim=-1))
    return Score(tuple(right), torch.cat(rows) if rows else torch.empty(0, model.vocabulary))


def _groups(questions: Sequence[Question], room: int) -> Iterator[list[Question]]:
    """Runs of questions of at most `room` and SIDE_BY_SIDE_TOKENS tokens; a run has at least one."""
    group: list[Question] = []
    taken = 0
    for question in questions:
        tokens = len(question.prompt_ids) + len(question.answer_ids)
        if group and taken + tokens > min(room, SIDE_BY_SIDE_TOKENS):
            yield group
            group, taken = [], 0
        group.append(question)
        taken += tokens
    if group:
        yield group


def mean_kl(exact: Tensor, other: Tensor) -> float:
    """Mean KL divergence (nats) of `other` from `exact`, log-probabilities `[positions, vocabulary]`."""
    if exact.shape != other.shape:
        raise SpecError(f"log-probabilities of shape {tuple(other.shape)} do not match {tuple(exact.shape)}")
    total = 0.0
    for rows in range(0, len(exact), ROWS):
        wanted, seen = (part[rows : rows + ROWS].double().cpu() for part in (exact, other))
        total += float((wanted.exp() * (wanted - seen)).sum())
    # rounding may make a divergence of zero negative
    return max(0.0, total / max(1, len(exact)))


def _kv_shape(model: Model) -> KVShape:
    """Shape of one token's cache, taken from a forward pass of one token."""
    cache = DynamicCache()
    with torch.inference_mode():
        model.call(torch.zeros((1, 1), dtype=torch.long, device=model.device), cache)
    sides = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    seen = [side for side in sides if isinstance(side, Tensor)]
    shapes = {tuple(side.shape) for side in seen}
    layers, config = len(cache.layers), model.network.config
    is_latent = getattr(config, "kv_lora_rank", None) is not None
    if is_latent or len(shapes) != 1 or len(seen) != len(sides) or layers != config.num_hidden_layers:
        raise SpecError(
            f"model {model.name}: keys and values differ in shape between layers ({shapes}); "
            "models with MLA latents, linear attention or unequal layers are not supported"
        )
    _, heads, _, head_dim = shapes.pop()
    dtype = str(seen[0].dtype).removeprefix("torch.")
    return KVShape(layers=layers, heads=heads, head_dim=head_dim, dtype=dtype)
