"""Contexts with questions, before and after a codec."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvstream.codec import registry
from kvstream.testbed.encoding import exam
from kvstream.testbed.engine.loading import load_model
from kvstream.testbed.engine.model import Model
from kvstream.testbed.workloads.contexts import ENGLISH_CONTEXTS, find_contexts, load_contexts


@pytest.fixture(scope="module")
def bundled() -> Model:
    return load_model()


@pytest.fixture(scope="module")
def exams(bundled: Model) -> list[exam.Exam]:
    (context,) = find_contexts(["docs"])
    return exam.prepare(bundled, [replace(context, text=context.text[:1_200], questions=context.questions[:6])])


def test_fine_levels_keep_the_answers_and_coarse_ones_lose_them(bundled: Model, exams: list[exam.Exam]) -> None:
    codec = registry.make("uniform")
    results = [exam.sit(bundled, codec, level, 256, exams) for level in (0, len(codec.levels) - 1)]
    assert all(result is not None for result in results)
    coarse, fine = results
    assert fine.right == fine.asked == coarse.asked > 0
    assert fine.kl < 0.01
    assert fine.kl < coarse.kl
    assert coarse.bits_per_element < fine.bits_per_element


def test_a_wrong_cache_is_noticed(bundled: Model, exams: list[exam.Exam]) -> None:
    (whole,) = exams
    empty = replace(whole, kv=whole.kv * 0)
    result = exam.sit(bundled, registry.make("raw"), 0, 256, [empty])
    assert result is not None
    assert result.right == 0
    assert result.kl > 1


def test_a_model_that_cannot_read_a_text_sits_no_exam(bundled: Model, tiny_model: Model) -> None:
    english = load_contexts(ENGLISH_CONTEXTS)
    short = [replace(english[0], text=english[0].text[:1_500])]
    assert exam.prepare(bundled, short) == []
    # longer than its positions: cut, not refused
    assert len(english[0].text) > tiny_model.positions
    assert exam.prepare(tiny_model, english) == []
    assert exam.sit(tiny_model, registry.make("raw"), 0, 256, []) is None


def test_shipped_prose_has_its_licence_and_enough_questions() -> None:
    for context in load_contexts(ENGLISH_CONTEXTS):
        assert "Apache-2.0" in context.source
        assert 12 <= len(context.questions) <= 16
        for prompt, answer in context.questions:
            assert context.text.count(prompt) == 1
            assert answer.startswith(b" ")
