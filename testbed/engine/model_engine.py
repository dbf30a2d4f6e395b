"""The engine that runs our model: chunks are decoded into its cache, texts recomputed, the prompt prefilled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvstream.codec.errors import CodecError
from kvstream.testbed.engine.api import Step
from kvstream.testbed.engine.cuda_graph import PrefillGraphs
from kvstream.testbed.engine.decoding import DecodingEngine
from kvstream.testbed.engine.memory import KVMemory
from kvstream.testbed.engine.model import KVCache, Model, extend_kv, first_token
from kvstream.testbed.errors import SpecError
from kvstream.testbed.host.shared_memory import SharedMemory
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.store.store import token_ids

if TYPE_CHECKING:
    from kvstream.codec.targets import KVTarget


@dataclass(frozen=True, slots=True)
class OpenContext:
    """The context whose chunks are taken in."""

    manifest: Manifest
    cache: KVCache


class ModelEngine(DecodingEngine):
    """One model and its cache: an `Engine`."""

    def __init__(
        self,
        model: Model,
        *,
        max_slots: int | None = None,
        pages_on: Sequence[torch.device | str] = (),
        shared: SharedMemory | None = None,
    ) -> None:
        """`pages_on` devices, the model's first, chunks are decoded into pages (`KVMemory`); `shared` memory is where
        they arrive, if another process receives them."""
        super().__init__(model.device, max_slots=max_slots, shared=shared)
        self.model = model
        self._memory = KVMemory(model, pages_on)
        self._settles = len(pages_on) > 0
        self._graphs = PrefillGraphs()

    # --- before a session

    def reserve(self, tokens: int) -> None:
        """Room for a context and its prompt, with its pages touched and every old value gone."""
        if self._memory.reserve(tokens):
            self._graphs.clear()
        self._streams.set_clock()

    def capture(self, context_tokens: int, prompt_tokens: int) -> bool:
        """Make the prefill of such prompts one CUDA graph, in the memory of `reserve`; whether there are graphs."""
        if self._memory.cache is not None:
            self._graphs.capture(self.model, self._memory.cache, context_tokens, prompt_tokens)
        return len(self._graphs) > 0

    def forget(self) -> None:
        self._memory.poison()
        super().forget()

    def open(self, manifest: Manifest, extra_tokens: int, *, overlap: bool = True) -> None:
        if manifest.model != self.model.fingerprint:
            raise SpecError(
                f"context {manifest.context} was computed with model {manifest.model[:12]}, "
                f"this receiver runs {self.model.name} ({self.model.fingerprint[:12]})"
            )
        if manifest.kv != self.model.kv:
            raise SpecError(f"context {manifest.context} has a cache of {manifest.kv}, this receiver {self.model.kv}")
        codec = self._codec_of(manifest)
        needed = manifest.tokens + extra_tokens
        if needed > self.model.positions:
            raise SpecError(f"{needed} tokens are more than the {self.model.positions} positions of {self.model.name}")
        if not self._memory.has_room(needed):
            self.reserve(needed)
        self._take_in(manifest, codec, overlap=overlap)

    @property
    def context(self) -> OpenContext:
        """The open context. Raises SpecError if none is."""
        manifest = self.manifest
        assert self._memory.cache is not None
        return OpenContext(manifest, self._memory.cache)

    def _target(self, start: int, stop: int) -> KVTarget:
        return self._memory.target(start, stop)

    def _settle(self, start: int, stop: int) -> None:
        self._memory.settle(start, stop)

    # --- steps of a session

    def recompute(self, chunk: int, data: memoryview) -> Step:
        context = self.context
        info = context.manifest.chunks[chunk]
        try:
            ids = token_ids(data, info.tokens)
            with self._model_runs() as start:
                context.cache.length = info.start
                extend_kv(self.model, context.cache, ids)
        except SpecError as error:
            raise CodecError(f"text of chunk {chunk}: {error}") from error
        return self._step(start)

    def prefill(self, prompt_ids: Sequence[int]) -> Step:
        context = self.context
        with self._model_runs() as start:
            context.cache.length = context.manifest.tokens
            graph = self._graphs.get(context.manifest.tokens, len(prompt_ids))
            if graph is None:
                token = first_token(self.model, context.cache, prompt_ids)
            else:
                self.model.check_ids(prompt_ids)
                token = graph(prompt_ids)
        return self._step(start, token)
