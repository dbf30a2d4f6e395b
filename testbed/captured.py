"""A prompt's prefill as one CUDA graph: launching the few hundred kernels of a forward pass of some tokens takes a
processor several times as long as the device needs to run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from testbed.llm import KVCache, Model

WARM_UPS = 2


class CapturedPrefill:
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
        """The first output token, as `llm.first_token` gives it; on the current stream."""
        with torch.inference_mode():
            self._ids.copy_(torch.tensor([list(prompt_ids)]))
            self._graph.replay()
            self._cache.length = self._end
            return int(self._token)
