"""A question about a context, as token ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt about a context, and the answer it must get."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
