"""A prompt's prefill as one CUDA graph: launching the few hundred kernels of a forward pass over some tokens takes a
processor several times as long as the device needs to run them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from kvstream.testbed.engine.model import KVCache, Model

WARM_UPS: Final = 2


class PrefillGraph:
    """Prefill of prompts of one length over one length of one cache, whose memory must stay."""

    def __init__(self, model: Model, cache: KVCache, context_tokens: int, prompt_tokens: int) -> None:
        self._cache, self._end = cache, context_tokens + prompt_tokens
        with torch.inference_mode():
            self._ids = torch.zeros((1, prompt_tokens), dtype=torch.long, device=model.device)
            stream = torch.cuda.Stream(model.device)

            def forward() -> Any:
                cache.length = context_tokens
                return model.next_token(cache, self._ids)

            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    forward()
            torch.cuda.synchronize(model.device)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._token = forward()

    def __call__(self, prompt_ids: Sequence[int]) -> int:
        """The first output token, as `model.first_token` gives it; on the current stream."""
        with torch.inference_mode():
            self._ids.copy_(torch.tensor([list(prompt_ids)]))
            self._graph.replay()
            self._cache.length = self._end
            return int(self._token)


class PrefillGraphs:
    """The graphs captured on one cache, by (tokens of the context, tokens of the prompt)."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, int], PrefillGraph] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """The cache is gone, and the graphs with it."""
        self._graphs.clear()

    def capture(self, model: Model, cache: KVCache, context_tokens: int, prompt_tokens: int) -> None:
        """Capture such prefills, where the device and the model allow it; the cache is poisoned afterwards."""
        key = context_tokens, prompt_tokens
        if model.device.type != "cuda" or key in self._graphs:
            return
        # a model that does something no graph can hold runs without one
        with suppress(RuntimeError):
            self._graphs[key] = PrefillGraph(model, cache, *key)
        cache.poison()

    def get(self, context_tokens: int, prompt_tokens: int) -> PrefillGraph | None:
        return self._graphs.get((context_tokens, prompt_tokens))
