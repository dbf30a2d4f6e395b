"""What a cache still answers after it went through a codec: contexts of both kinds, each with its questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from kvstream.codec.api import Codec, Shift
from kvstream.codec.container import Chunk, parse
from kvstream.testbed.encoding import tokens
from kvstream.testbed.engine.model import SIDE_BY_SIDE_TOKENS, Model, Score, calculate_kv, mean_kl, score
from kvstream.testbed.store.questions import Question
from kvstream.testbed.workloads.contexts import Context

QUESTION_TOKENS: Final = 64
"""Of a model's positions, those kept free for a question and its answer."""


@dataclass(frozen=True, eq=False)
class Exam:
    """A context's exact cache `[L, 2, T, H, D]`, and the questions that it answers right."""

    kv: Tensor
    questions: tuple[Question, ...]
    log_probs: Tensor
    """Of the exact cache, at the answers."""


@dataclass(frozen=True)
class Result:
    """Of all chunks at one level, over the contexts of a kind."""

    bits_per_element: float
    kl: float
    """Mean over the answers' positions (nats)."""
    right: int
    asked: int


def prepare(model: Model, contexts: Iterable[Context]) -> list[Exam]:
    """Exams that the exact cache passes. A context longer than the model's positions is cut.

    None at all where the exact cache of the first has less than half of the answers: the model cannot read such text.
    """
    found: list[Exam] = []
    for context in contexts:
        ids = tokens.context_ids(model, context)[: max(1, model.positions - QUESTION_TOKENS)]
        seen = model.decode(ids).encode()
        inside = tuple(q for q in context.questions if q.prompt + q.answer in seen)
        questions = tokens.question_ids(model, replace(context, questions=inside))
        kv = calculate_kv(model, ids)
        answered = _score(model, kv, questions)
        kept = tuple(question for question, is_right in zip(questions, answered.right, strict=True) if is_right)
        if not found and 2 * len(kept) < max(1, len(questions)):
            return []
        if kept:
            answered = answered if all(answered.right) else _score(model, kv, kept)
            found.append(Exam(kv, kept, answered.log_probs))
    return found


def sit(model: Model, codec: Codec, level: int, chunk_tokens: int, exams: Sequence[Exam]) -> Result | None:
    """All exams with every chunk at one level; None where there are none."""
    if not exams:
        return None
    coded_bytes = right = 0
    divergence = 0.0
    for exam in exams:
        kv, sizes = through(codec, exam.kv, level, chunk_tokens)
        answered = _score(model, kv, exam.questions)
        coded_bytes += sizes.total
        right += sum(answered.right)
        divergence += mean_kl(exam.log_probs, answered.log_probs) * len(exam.log_probs)
    positions = sum(len(exam.log_probs) for exam in exams)
    asked = sum(len(exam.questions) for exam in exams)
    elements = sum(exam.kv.numel() for exam in exams)
    return Result(8 * coded_bytes / elements, divergence / positions, right, asked)


@dataclass(frozen=True)
class Sizes:
    """Bytes of coded chunks: all, and `payload_bytes`; and how far the chunks lie from the codec's calibration."""

    total: int
    payload: int
    shifts: tuple[Shift, ...] = ()
    """Of each chunk; none where the codec does not say."""


def through(codec: Codec, kv: Tensor, level: int, chunk_tokens: int) -> tuple[Tensor, Sizes]:
    """The cache `[L, 2, T, H, D]` as received with every chunk at one level, and what it took."""
    coded = torch.empty_like(kv)
    total = payload = 0
    shifts: list[Shift] = []
    for start in range(0, kv.shape[2], chunk_tokens):
        part = kv[:, :, start : start + chunk_tokens]
        data = codec.encode(part, level, positions=range(start, start + part.shape[2]))
        codec.decode(data, coded[:, :, start : start + chunk_tokens])
        total += len(data)
        payload += payload_bytes(parse(data))
        if (shift := codec.shift(data)) is not None:
            shifts.append(shift)
    return coded, Sizes(total, payload, tuple(shifts))


def payload_bytes(chunk: Chunk) -> int:
    """Bytes without the header and without the tables and lengths that `artifact` adds to symbols and scales."""
    return sum(len(content) for tag, content in chunk.sections.items() if tag not in ("cdfs", "lens"))


def _score(model: Model, kv: Tensor, questions: Sequence[Question]) -> Score:
    longest = max((len(q.prompt_ids) + len(q.answer_ids) for q in questions), default=0)
    cache = model.new_cache(kv.shape[2] + max(longest, SIDE_BY_SIDE_TOKENS))
    cache.length = kv.shape[2]
    cache.view().copy_(kv)
    return score(model, cache, questions)
