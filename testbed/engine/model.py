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
SIDE_BY_SIDE_TOKENS = 512
"""What is scored goes in batches of up to this many tokens: enough to share the cost of a pass over the cache."""


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

    def forward_side_by_side(
        self, cache: KVCache, sequences: Sequence[Sequence[int]], keep: Sequence[int]
    ) -> list[Tensor]:
        """Several continuations of one cache in one pass, unseen by each other: for each the logits
        `[keep, vocabulary]` of its last `keep` positions. What sequences begin with alike is computed once.

        Only for models whose layers all attend to everything; the cache is left as it was.
        """
        context = cache.length
        rows, paths = _prefix_tree(sequences)
        positions = torch.empty(len(rows), dtype=torch.long)
        # added to the scores: a layer would make as much of a boolean mask, each for itself
        mask = torch.zeros((len(rows), context + len(rows)), dtype=DTYPES[self.kv.dtype])
        mask[:, context:] = -torch.inf
        for path in map(torch.tensor, paths):
            positions[path] = context + torch.arange(len(path))
            mask[path[:, None], context + path] = torch.full((len(path), len(path)), -torch.inf, dtype=mask.dtype).triu(
                1
            )
        wanted = [row for path, kept in zip(paths, keep, strict=True) for row in path[-kept:]]
        logits = self._run(
            cache,
            rows,
            context + max(map(len, paths)),
            position_ids=positions[None].to(self.device),
            attention_mask=mask[None, None].to(self.device),
            logits_to_keep=torch.tensor(wanted, device=self.device),
        )
        cache.length = context
        return list(logits.split(list(keep)))

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

    They run side by side as far as the cache has room and the model allows it.
    """
    sequences = [[*q.prompt_ids, *q.answer_ids[:-1]] for q in questions]
    keep = [len(q.answer_ids) for q in questions]
    ahead = passage[:-1]
    if ahead:
        sequences.insert(0, list(ahead))
        keep.insert(0, len(ahead))
    found = _logits(model, cache, sequences, keep)
    rows = [found.pop(0)] if ahead else []
    right = [
        logits.argmax(dim=-1).tolist() == list(question.answer_ids)
        for question, logits in zip(questions, found, strict=True)
    ]
    rows += [logits[:SCORED_TOKENS] for logits in found]
    log_probs = torch.cat(rows).log_softmax(dim=-1) if rows else torch.empty(0, model.vocabulary)
    return Score(tuple(right), log_probs)


def _logits(model: Model, cache: KVCache, sequences: Sequence[Sequence[int]], keep: Sequence[int]) -> list[Tensor]:
    """The logits of every sequence's last `keep` positions, all over the same cache."""
    context = cache.length
    found: list[Tensor] = []
    for group in _groups(sequences, cache.capacity - context if model.attends_to_all else 0):
        kept = keep[len(found) : len(found) + len(group)]
        if len(group) > 1:
            found += model.forward_side_by_side(cache, group, kept)
        else:
            found.append(model.forward(cache, group[0], keep=kept[0]))
            cache.length = context
    return found


def _groups(sequences: Sequence[Sequence[int]], room: int) -> Iterator[list[Sequence[int]]]:
    """Runs of sequences of at most `room` and SIDE_BY_SIDE_TOKENS tokens; a run has at least one."""
    group: list[Sequence[int]] = []
    taken = 0
    for sequence in sequences:
        if group and taken + len(sequence) > min(room, SIDE_BY_SIDE_TOKENS):
            yield group
            group, taken = [], 0
        group.append(sequence)
        taken += len(sequence)
    if group:
        yield group


def _prefix_tree(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The tokens of sequences with those of common beginnings once, and where each sequence's lie."""
    rows: dict[tuple[int, int], int] = {}
    """[row before, or -1; token]: its row."""
    paths: list[list[int]] = []
    for sequence in sequences:
        row, path = -1, []
        for token in sequence:
            row = rows.setdefault((row, token), len(rows))
            path.append(row)
        paths.append(path)
    return [token for _, token in rows], paths


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
