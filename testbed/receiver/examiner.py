"""What a model makes of the cache that arrived: after a session, and no part of TTFT."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from kvstream.testbed.engine.model import Score, generate_with_kv, score
from kvstream.testbed.engine.model_engine import ModelEngine
from kvstream.testbed.store.questions import Question


def examine(engine: ModelEngine, questions: Sequence[Question], passage: Sequence[int] = ()) -> Score:
    """Score a passage and the answers to questions over the open context, on every core."""
    context = engine.context
    context.cache.length = context.manifest.tokens
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        return score(engine.model, context.cache, questions, passage)
    finally:
        torch.set_num_threads(threads)


def answer(engine: ModelEngine, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy continuation of a prompt over the open context."""
    context = engine.context
    context.cache.length = context.manifest.tokens
    return generate_with_kv(engine.model, context.cache, prompt_ids, max_new_tokens)
