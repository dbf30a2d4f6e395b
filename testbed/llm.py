"""Running a model with a KV cache that came from elsewhere.

The paper's two calls (CacheGen, section 6) are `calculate_kv` and `generate_with_kv`. A `KVCache` is one preallocated
tensor: codecs decode into its view `[L, 2, T, H, D]`, and a Hugging Face model attends to per-layer views
`[1, H, T, D]` of the same memory, so nothing is copied between arrival and attention, and appending a token never
moves the context.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils import logging as transformers_logging

from codec.targets import DTYPES
from testbed import random_model
from testbed.errors import SpecError
from testbed.manifest import KVShape

MODELS = Path(__file__).parent / "models"
SCORED_TOKENS = 8
"""An answer's KL is taken over at most its first so many tokens."""
SIDE_BY_SIDE_TOKENS = 288
"""Questions are asked together up to so many tokens: enough to share what a pass over the cache costs."""


def bundled_model_path() -> Path:
    """Folder of the model that comes with the project. Raises SpecError if it is not there."""
    for config in sorted(MODELS.glob("*/config.json")):
        return config.parent
    raise SpecError(f"no bundled model under {MODELS}; give a model with --model PATH_OR_NAME")


class _Layer(CacheLayerMixin):
    """One layer's keys and values `[1, H, capacity, D]` in a `KVCache`'s memory; full length also where the model's
    attention slides (the mask hides the rest)."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._all_keys, self._all_values = keys, values
        self.length = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        if end > self._all_keys.shape[-2]:
            raise SpecError(f"the cache holds {self._all_keys.shape[-2]} tokens, {end} are needed; allocate more")
        self._all_keys[:, :, self.length : end] = key_states
        self._all_values[:, :, self.length : end] = value_states
        self.length = end
        return self._all_keys[:, :, :end], self._all_values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
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
        """Forget everything: what is then used without having been written gives NaN, never an old answer."""
        self.storage.fill_(float("nan"))
        self.length = 0


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
        self.kv = _kv_shape(self)

    @classmethod
    def load(
        cls, source: str | Path | None = None, *, device: torch.device | str = "cpu", dtype: str | None = None
    ) -> Model:
        """Load from a folder (no network is used) or by name; None or 'bundled' takes the bundled model, and
        `random:mistral-7b` builds one of that size with random weights (`testbed.random_model`).

        On a CPU the default dtype is float32: it is exact and about as fast as bfloat16 there; elsewhere the dtype in
        which the weights are stored. Raises SpecError for a missing folder and for models whose cache is not one
        `[H, T, D]` for keys and values of every layer.
        """
        source = bundled_model_path() if source in (None, "bundled") else source
        assert source is not None
        if str(source).startswith(random_model.PREFIX):
            return random_model.build(str(source).removeprefix(random_model.PREFIX), device, dtype)
        folder = _folder(source)
        transformers_logging.disable_progress_bar()
        on_cpu = torch.device(device).type == "cpu"
        wanted = dtype or ("float32" if on_cpu else "auto")
        if wanted != "auto" and wanted not in DTYPES:
            raise SpecError(f"dtype {wanted!r} is unknown; use one of {', '.join(DTYPES)}")
        try:
            network = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype="auto" if wanted == "auto" else DTYPES[wanted],
            )
            network = network.to(device).eval()  # type: ignore[arg-type]  # transformers wraps torch's method
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise SpecError(f"model {source} cannot be loaded: {_first_line(error)}") from error
        return cls(network, tokenizer, Path(str(source)).name, fingerprint(folder))

    @property
    def positions(self) -> int:
        """Longest sequence the model was made for."""
        return int(getattr(self.network.config, "max_position_embeddings", 1 << 31))

    @property
    def attends_to_all(self) -> bool:
        """Whether no layer has a window, so that a boolean mask given from outside is the whole truth."""
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
        """Several continuations of one cache in one pass, none of which sees another: logits of each, all positions.

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

    def next_token(self, cache: KVCache, ids: Tensor) -> Tensor:
        """Append tokens int64 `[1, N]` that are on the device: the most likely next one, still there."""
        output = self.network(input_ids=ids, past_key_values=cache.hugging_face, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1].float().argmax()

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Raise SpecError for no tokens, and for what is none of this model's."""
        if not token_ids:
            raise SpecError("no tokens were given to the model")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.vocabulary:
            bad = low if low < 0 else high
            raise SpecError(f"token id {bad} is outside the vocabulary of {self.vocabulary}; is it another model's?")

    @torch.inference_mode()
    def _run(self, cache: KVCache, token_ids: Sequence[int], end: int, **arguments: Any) -> Tensor:
        self.check_ids(token_ids)
        if end > self.positions:
            raise SpecError(f"{end} tokens are more than the {self.positions} positions of {self.name}")
        ids = torch.tensor([list(token_ids)], device=self.device)
        output = self.network(input_ids=ids, past_key_values=cache.hugging_face, use_cache=True, **arguments)
        return output.logits[0].float()


def calculate_kv(model: Model, token_ids: Sequence[int]) -> Tensor:
    """The exact KV cache of a text, `[L, 2, T, H, D]` in the model's dtype (the paper's API)."""
    cache = model.new_cache(len(token_ids))
    model.forward(cache, token_ids)
    return cache.view()


def extend_kv(model: Model, cache: KVCache, token_ids: Sequence[int]) -> None:
    """Recompute a chunk that came as text, on top of the `cache.length` tokens that are there."""
    model.forward(cache, token_ids)


def first_token(model: Model, cache: KVCache, prompt_ids: Sequence[int]) -> int:
    """Prefill the prompt over the cache and give the most likely next token."""
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
class Question:
    """A prompt about a context, and the answer it must get."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Answers under one cache."""

    right: tuple[bool, ...]
    """[question]: the most likely token is the answer's at every position, so greedy decoding gives the answer."""
    log_probs: Tensor
    """`[positions, vocabulary]`: next-token log-probabilities (nats) over the passage but its last token, then at the
    first SCORED_TOKENS of every answer."""


def score(model: Model, cache: KVCache, questions: Sequence[Question], passage: Sequence[int] = ()) -> Score:
    """Let the model read a passage over the cache, and ask it every question, answers teacher-forced. The cache is left
    as it was.

    Questions are asked side by side as far as the cache has room and the model allows it.
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
    exact, other = exact.double().cpu(), other.double().cpu()
    # rounding may take a divergence of zero below it
    return max(0.0, float((exact.exp() * (exact - other)).sum(dim=-1).mean()))


def fingerprint(folder: Path) -> str:
    """SHA-256 of a model folder's configuration and safetensors files, in order of their names."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise SpecError(f"model {folder} has no *.safetensors file")
    digest = hashlib.sha256(json.dumps(json.loads((folder / "config.json").read_text()), sort_keys=True).encode())
    for path in weights:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _folder(source: str | Path) -> Path:
    """The folder of a model given by path, or by name from the local Hugging Face cache or its hub."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SpecError(f"model folder {path} has no config.json")
        return path
    if isinstance(source, Path) or path.is_absolute() or str(source).startswith("."):
        raise SpecError(f"model folder {path} does not exist")
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except (OSError, ValueError) as error:
        raise SpecError(f"model {source} is neither a folder nor a known name: {_first_line(error)}") from error


def _kv_shape(model: Model) -> KVShape:
    """Shape of one token's cache, seen on a forward pass of one token."""
    cache = DynamicCache()
    with torch.inference_mode():
        model.network(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), past_key_values=cache)
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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
