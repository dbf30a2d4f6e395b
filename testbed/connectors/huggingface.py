"""Contexts for models of the transformers library, 4.56 and later.

    context = huggingface.fetch("http://127.0.0.1:8700", "docs", model)
    output = model.generate(**context.inputs(tokenizer("And then?").input_ids), max_new_tokens=20)

The cache lies in memory of its own that no question changes, so one context serves any number of them, also at the
same time. What arrives is decoded into that memory, in the model's dtype, on its device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvstream.codec.targets import DTYPES
from kvstream.policies.api import Policy
from kvstream.testbed.engine.loading import fingerprint as fingerprint_of_folder
from kvstream.testbed.engine.loading import rope_arguments
from kvstream.testbed.engine.model import KVCache, cache_argument
from kvstream.testbed.errors import SpecError
from kvstream.testbed.receiver import fetch as one_call
from kvstream.testbed.session.record import SessionRecord
from kvstream.testbed.store.manifest import Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class HuggingFaceContext:
    """A context whose cache is here."""

    token_ids: list[int]
    """Of the T tokens in the cache."""
    record: SessionRecord
    """Levels, bytes and times of the session; `ttft_s` is when the cache was complete."""
    manifest: Manifest
    _memory: Tensor = field(repr=False)
    """`[L, 2, H, T, D]`."""
    _device: torch.device
    """The model's."""
    _cache_argument: str

    def cache(self) -> DynamicCache:
        """A cache of one sequence, T tokens long, over the context's memory: for one question."""
        offload = self._memory.device != self._device
        made = DynamicCache(offloading=offload)
        for index, (keys, values) in enumerate(self._memory):
            # an offloaded cache fetches each layer while the one before computes, but not the first
            device = self._device if index == 0 else self._memory.device
            made.layers.append(_Layer(keys[None].to(device), values[None].to(device), self._device))
        return made

    def inputs(self, prompt_ids: Sequence[int]) -> dict[str, Any]:
        """Arguments of the model's `generate` for a prompt after the context.

        `input_ids` are the context's and the prompt's, `[1, T + P]`, with an attention mask and a new cache. Raises
        SpecError for a prompt without tokens, and for several.
        """
        if not len(prompt_ids):
            raise SpecError("a prompt needs at least one token after the context")
        if not all(isinstance(token, int) for token in prompt_ids):
            raise SpecError("give the token ids of one prompt, as a list of integers; a batch needs a cache for each")
        ids = torch.tensor([[*self.token_ids, *prompt_ids]], device=self._device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), self._cache_argument: self.cache()}


def fetch(
    url: str,
    context: str,
    model: PreTrainedModel,
    policy: str | Policy = "kvstream",
    deadline_s: float = 1.0,
    *,
    recompute: bool = False,
    offload: bool = False,
    fingerprint: str | None = None,
) -> HuggingFaceContext:
    """Fetch a context's cache for a model: `kvstream.fetch`, whose arguments and errors it shares.

    With `recompute`, a policy may choose text, which the model then computes. With `offload`, for a model on a GPU,
    the cache stays in the host's memory, and each layer is copied to the GPU when it is needed. `fingerprint` is the
    model's, where its weights are not those of the folder that it was loaded from: a cache of another model is refused.
    """
    memory = _Memory(model, offload, fingerprint, recompute)
    fetched = one_call.fetch(
        url, context, policy, deadline_s, memory.target, recompute=memory.recompute if recompute else None
    )
    return memory.context(fetched)


async def afetch(
    url: str,
    context: str,
    model: PreTrainedModel,
    policy: str | Policy = "kvstream",
    deadline_s: float = 1.0,
    *,
    recompute: bool = False,
    offload: bool = False,
    fingerprint: str | None = None,
) -> HuggingFaceContext:
    """As `fetch`, awaited."""
    memory = _Memory(model, offload, fingerprint, recompute)
    fetched = await one_call.afetch(
        url, context, policy, deadline_s, memory.target, recompute=memory.recompute if recompute else None
    )
    return memory.context(fetched)


def fingerprint_of(model: PreTrainedModel) -> str:
    """The fingerprint of the folder that a model was loaded from. Raises SpecError where there is none."""
    source = str(model.name_or_path)
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, local_files_only=True))
        except (OSError, ValueError) as error:
            raise SpecError(
                f"the folder of model {source!r} is not here, so its weights cannot be compared with the context's; "
                "give its fingerprint if you know that they are the same"
            ) from error
    for name, value in rope_arguments(folder).items():
        if getattr(model.config, name, None) != value:
            raise SpecError(
                f"transformers {transformers.__version__} has misread the rotary embedding of {source}, which a newer "
                f"version has saved; load it by from_pretrained(..., {name}={value!r})"
            )
    return _fingerprint(folder, tuple(sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())))


@cache
def _fingerprint(folder: Path, files: tuple[tuple[str, int], ...]) -> str:
    """Read once, as long as the files stay the same: weights are large."""
    return fingerprint_of_folder(folder)


class _Memory:
    """Where a context goes before it is one."""

    def __init__(self, model: PreTrainedModel, offload: bool, fingerprint: str | None, recompute: bool) -> None:
        if offload and model.device.type != "cuda":
            raise SpecError(f"offload is for a model on a GPU; this one is on {model.device}: omit offload")
        if offload and recompute:
            raise SpecError("a cache that is offloaded is not where the model could recompute: omit one of the two")
        if model.dtype not in DTYPES.values():
            raise SpecError(f"a model of {model.dtype} has no cache that can be fetched; load it as bfloat16")
        self._model = model
        self._device = torch.device("cpu") if offload else model.device
        self._fingerprint = fingerprint or fingerprint_of(model)
        self._argument = cache_argument(model)
        self._cache: KVCache | None = None

    def target(self, manifest: Manifest) -> Tensor:
        """Memory for a context of this model `[L, 2, T, H, D]`. Raises SpecError for one of another."""
        if manifest.model != self._fingerprint:
            raise SpecError(
                f"it was computed with model {manifest.model[:12]}, this is {self._model.name_or_path} "
                f"({self._fingerprint[:12]})"
            )
        kv, wanted = manifest.kv, _shape_of(self._model)
        if (kv.layers, kv.heads, kv.head_dim) != wanted:
            raise SpecError(f"its cache is {kv}, the model's has (layers, heads, head_dim) {wanted}")
        dtype = str(self._model.dtype).removeprefix("torch.")
        self._cache = KVCache(replace(manifest.kv, dtype=dtype), manifest.tokens, self._device)
        return self._cache.view(0, manifest.tokens)

    @torch.inference_mode()
    def recompute(self, token_ids: Sequence[int], start: int) -> None:
        """Compute a chunk that came as text, after the `start` tokens already there."""
        assert self._cache is not None
        self._cache.length = start
        ids = torch.tensor([list(token_ids)], device=self._device)
        self._model(input_ids=ids, use_cache=True, logits_to_keep=1, **{self._argument: self._cache.hugging_face})

    def context(self, fetched: one_call.FetchedContext) -> HuggingFaceContext:
        assert self._cache is not None
        return HuggingFaceContext(
            fetched.token_ids,
            fetched.record,
            fetched.manifest,
            self._cache.storage,
            self._model.device,
            self._argument,
        )


def _shape_of(model: PreTrainedModel) -> tuple[int, int, int]:
    """Layers, heads and head_dim of a model's cache, as its configuration says."""
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, head_dim


class _Layer(DynamicLayer):
    """A layer that begins with a context's keys and values `[1, H, T, D]`, and leaves them as they are."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, device: torch.device) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        have, given = len(self.keys), len(key_states)
        if have != given:
            raise SpecError(
                f"the cache holds {have} sequence{'s' * (have != 1)}, the model was given a batch of {given}: ask one "
                f"question at a time, or repeat the cache first: cache.batch_repeat_interleave({given})"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        """As a layer without tokens; the context's memory stays, which other caches share."""
        self.keys, self.values = self.keys[:, :, :0], self.values[:, :, :0]
