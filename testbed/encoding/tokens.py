"""A context and its questions as a model's token ids."""

from __future__ import annotations

from kvstream.testbed.engine.model import Model
from kvstream.testbed.store.questions import Question
from kvstream.testbed.workloads.contexts import Context, asked


def context_ids(model: Model, context: Context) -> list[int]:
    return model.encode(context.text.decode())


def question_ids(model: Model, context: Context) -> list[Question]:
    """The questions that a session asks, in order."""
    return [
        Question(tuple(model.encode(q.prompt.decode())), tuple(model.encode(q.answer.decode())))
        for q in asked(context.questions)
    ]
