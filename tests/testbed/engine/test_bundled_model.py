"""The bundled model and the shipped contexts: sizes, tokenizer, and that the one answers questions on the other."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvstream.testbed.errors import SpecError
from kvstream.testbed.workloads.contexts import Context, Question, load_contexts, make_context

MODEL = Path(__file__).parents[3] / "testbed" / "engine" / "models" / "tiny-kv"
CONTEXTS = load_contexts()


def test_files_stay_within_their_limits() -> None:
    shards = list(MODEL.glob("*.safetensors"))
    assert shards
    assert max(shard.stat().st_size for shard in shards) <= 12_000_000
    assert sum(shard.stat().st_size for shard in shards) <= 20_000_000


def test_tokenizer_maps_every_byte_to_itself() -> None:
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(MODEL, local_files_only=True)
    assert len(tokenizer) == 256
    assert tokenizer.all_special_ids == []
    text = "".join(map(chr, range(0x250))) + "  \n\n\t line red-fox: REGISTER is <12345>\r\n  é中😀 </s><unk>"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert set(tokenizer.get_vocab().values()) == set(range(256))


def test_three_contexts_or_more_of_4096_tokens_hold_their_answers() -> None:
    assert len(CONTEXTS) >= 3
    assert {"docs", "code", "prose"} <= {context.name for context in CONTEXTS}
    for context in CONTEXTS:
        assert len(context.text) == 4_096
        assert len(context.questions) >= 8
        assert "PSF-2.0" in context.source
        places = [context.text.index(prompt + answer) for prompt, answer in context.questions]
        assert all(context.text.count(prompt) == 1 for prompt, _ in context.questions)
        assert min(places) < 1_024
        assert max(places) > 3_072


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True, dtype=torch.float32).eval()


def right_answers(model, context: Context) -> int:  # type: ignore[no-untyped-def]
    """Questions whose every byte is the model's first choice, all asked of one exact cache in one batch."""
    import torch

    rows = [prompt + answer for prompt, answer in context.questions]
    longest = max(map(len, rows))
    with torch.inference_mode():
        cache = model(input_ids=torch.tensor([list(context.text)]), logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(rows))
        asked = torch.tensor([list(row.ljust(longest, b"\n")) for row in rows])
        best = model(input_ids=asked, past_key_values=cache).logits.argmax(-1)
    spans = (
        (row, slice(len(question.prompt) - 1, len(question.prompt) + len(question.answer) - 1), question.answer)
        for row, question in enumerate(context.questions)
    )
    return sum(bytes(best[row, span].tolist()) == answer for row, span, answer in spans)


def test_the_model_has_room_for_a_context_and_its_answer(model) -> None:  # type: ignore[no-untyped-def]
    assert model.config.model_type == "llama"
    assert model.config.max_position_embeddings >= 4_608
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.vocab_size == 256


def test_the_model_answers_from_an_exact_cache(model) -> None:  # type: ignore[no-untyped-def]
    contexts = [context for context in CONTEXTS if context.name in ("docs", "code")]
    right = sum(right_answers(model, context) for context in contexts)
    assert right >= 0.99 * sum(len(context.questions) for context in contexts)


def test_the_model_does_not_answer_without_the_line(model) -> None:  # type: ignore[no-untyped-def]
    texts = [b"Nothing of this text is a line with a number.\n" * 40]
    context = make_context(7, 512, texts, n_lines=4)
    elsewhere = make_context(8, 512, texts, n_lines=4)
    moved = Context("moved", elsewhere.text, context.questions)
    assert right_answers(model, context) >= 3
    assert right_answers(model, moved) <= 1


def test_make_context_is_exact_reproducible_and_keeps_its_lines_whole() -> None:
    draw = random.Random(0)
    texts = [bytes(draw.choice(b"abc \n") for _ in range(900)) for _ in range(4)]
    for seed in range(20):
        n_tokens, n_lines = draw.randint(700, 2_000), draw.randint(0, 12)
        context = make_context(seed, n_tokens, texts, n_lines)
        assert context == make_context(seed, n_tokens, texts, n_lines)
        assert len(context.text) == n_tokens
        assert context.text.endswith(b"\n")
        assert len(set(context.questions)) == n_lines
        lines = context.text.splitlines()
        assert all(prompt + answer + b">" in lines for prompt, answer in context.questions)
        places = [context.text.index(prompt) for prompt, _ in context.questions]
        assert places == sorted(places)


def test_a_context_survives_json() -> None:
    context = make_context(1, 600, [b"some text\n" * 100], 5, "five")
    assert Context.from_json(context.to_json()) == context


def test_impossible_contexts_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"20 key-value lines need .* the context has 300"):
        make_context(0, 300, [b"text\n" * 100], 20)
    with pytest.raises(SpecError, match="the texts hold 10 bytes"):
        make_context(0, 300, [b"text\ntext\n"], 1)
    with pytest.raises(SpecError, match="names"):
        make_context(0, 300, [b"text\n"], 10**6)
    with pytest.raises(SpecError, match="no contexts"):
        load_contexts(tmp_path)
    with pytest.raises(SpecError, match="not a context"):
        Context.from_json("[1]", "here.json")
    lying = Context("lying", b"text\n", (Question(b"line red-fox: REGISTER is <", b"12345"),))
    with pytest.raises(SpecError, match=r"here\.json: the answer to 'line red-fox"):
        Context.from_json(lying.to_json(), "here.json")
