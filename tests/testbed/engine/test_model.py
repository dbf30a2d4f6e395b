"""A cache put together from chunks is the cache; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvstream.codec import registry
from kvstream.testbed.engine.loading import load_model
from kvstream.testbed.engine.model import (
    KVCache,
    Model,
    Score,
    calculate_kv,
    extend_kv,
    first_token,
    generate_with_kv,
    mean_kl,
    score,
)
from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.manifest import KVShape
from kvstream.testbed.store.questions import Question
from kvstream.testbed.workloads.contexts import make_context
from tests.testbed.conftest import CHUNK_TOKENS, Stored, save_tiny_model

PROMPT = [7, 200, 13, 99, 4]


def filled(model: Model, kv: torch.Tensor, room: int = 64) -> KVCache:
    cache = model.new_cache(kv.shape[2] + room)
    cache.poison()
    cache.length = kv.shape[2]
    cache.view().copy_(kv)
    return cache


def test_cache_has_the_canonical_shape(tiny_model: Model, stored: Stored) -> None:
    assert stored.exact.shape == (3, 2, len(stored.tokens), 2, 16)
    assert stored.exact.dtype == torch.float32
    assert tiny_model.kv == KVShape(layers=3, heads=2, head_dim=16, dtype="float32")


def test_cache_equals_what_transformers_computes(tiny_model: Model, stored: Stored) -> None:
    with torch.inference_mode():
        output = tiny_model.network(input_ids=torch.tensor([stored.tokens]), use_cache=True)
    for layer, theirs in enumerate(output.past_key_values.layers):
        assert torch.equal(stored.exact[layer, 0], theirs.keys[0].transpose(0, 1))
        assert torch.equal(stored.exact[layer, 1], theirs.values[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cache_from_raw_chunks_continues_like_the_uninterrupted_run(tiny_folder: Path, dtype: str) -> None:
    model = load_model(tiny_folder, dtype=dtype)
    tokens = [(i * 37 + i // 7) % 256 for i in range(200)]
    exact = calculate_kv(model, tokens)
    raw = registry.make("raw")
    cache = model.new_cache(200 + len(PROMPT))
    cache.poison()
    for start in range(0, 200, CHUNK_TOKENS):
        span = range(start, min(start + CHUNK_TOKENS, 200))
        data = raw.encode(exact[:, :, span.start : span.stop], 0, positions=span)
        raw.decode(data, cache.view(span.start, span.stop))
    cache.length = 200
    assert torch.equal(cache.view(), exact)
    logits = model.forward(cache, PROMPT, keep=len(PROMPT))

    uninterrupted = model.new_cache(200 + len(PROMPT))
    model.forward(uninterrupted, tokens)
    assert torch.equal(logits, model.forward(uninterrupted, PROMPT, keep=len(PROMPT)))
    in_one_go = model.forward(model.new_cache(200 + len(PROMPT)), tokens + PROMPT, keep=len(PROMPT))
    tolerance = 1e-4 if dtype == "float32" else 0.1 * float(in_one_go.abs().max())
    torch.testing.assert_close(logits, in_one_go, atol=tolerance, rtol=0)


def test_text_chunks_are_recomputed_in_place(tiny_model: Model, stored: Stored) -> None:
    cache = tiny_model.new_cache(len(stored.tokens))
    cache.poison()
    cache.view(0, 64).copy_(stored.exact[:, :, :64])
    cache.length = 64
    before = cache.storage.data_ptr()
    extend_kv(tiny_model, cache, stored.tokens[64:128])
    extend_kv(tiny_model, cache, stored.tokens[128:])
    assert cache.storage.data_ptr() == before
    torch.testing.assert_close(cache.view(), stored.exact, atol=1e-4, rtol=1e-4)


def test_generating_is_greedy_and_takes_tensor_or_cache(tiny_model: Model, stored: Stored) -> None:
    sequence = [*stored.tokens, *PROMPT]
    expected = []
    with torch.inference_mode():
        for _ in range(6):
            logits = tiny_model.network(input_ids=torch.tensor([sequence])).logits
            expected.append(int(logits[0, -1].argmax()))
            sequence.append(expected[-1])
    assert generate_with_kv(tiny_model, stored.exact, PROMPT, 6) == expected
    assert generate_with_kv(tiny_model, filled(tiny_model, stored.exact), PROMPT, 6) == expected
    assert first_token(tiny_model, filled(tiny_model, stored.exact), PROMPT) == expected[0]
    assert generate_with_kv(tiny_model, stored.exact, PROMPT, 0) == []


def test_score_agrees_with_generating(tiny_model: Model, stored: Stored) -> None:
    answer = generate_with_kv(tiny_model, stored.exact, PROMPT, 4)
    wrong = [answer[0], (answer[1] + 1) % 256, *answer[2:]]
    cache = filled(tiny_model, stored.exact)
    result = score(tiny_model, cache, [Question(tuple(PROMPT), tuple(answer)), Question(tuple(PROMPT), tuple(wrong))])
    assert result.right == (True, False)
    assert result.log_probs.shape == (8, 256)
    torch.testing.assert_close(result.log_probs.exp().sum(dim=1), torch.ones(8))
    assert cache.length == len(stored.tokens)
    assert torch.equal(cache.view(), stored.exact)


def test_a_passage_is_scored_beside_the_answers(tiny_model: Model, stored: Stored) -> None:
    cache = filled(tiny_model, stored.exact, room=90)
    passage = [7, 9, 200, 31, 5]
    alone = score(tiny_model, cache, stored.questions)
    both = score(tiny_model, cache, stored.questions, passage)
    assert both.right == alone.right
    torch.testing.assert_close(both.log_probs[len(passage) - 1 :], alone.log_probs, atol=1e-5, rtol=1e-5)
    logits = tiny_model.forward(cache, passage, keep=len(passage))
    torch.testing.assert_close(
        both.log_probs[: len(passage) - 1], logits[:-1].log_softmax(dim=-1), atol=1e-4, rtol=1e-4
    )
    cache.length = len(stored.tokens)
    assert torch.equal(cache.view(), stored.exact)


def test_questions_side_by_side_do_not_see_each_other(tiny_model: Model, stored: Stored) -> None:
    questions = [Question(tuple(range(k, k + 5 + k)), (k, 9, 7)) for k in range(1, 12)]
    apart = score(tiny_model, filled(tiny_model, stored.exact, room=20), questions)
    cache = filled(tiny_model, stored.exact, room=90)
    together = score(tiny_model, cache, questions)
    assert together.right == apart.right
    torch.testing.assert_close(together.log_probs, apart.log_probs, atol=1e-4, rtol=1e-4)
    assert torch.equal(cache.view(), stored.exact)


def test_what_questions_begin_with_alike_is_computed_once(
    tiny_model: Model, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [
        Question((*prompt, *end), (7, 9))
        for prompt in (PROMPT, PROMPT[:2], [5])
        for end in ((1, 2), (1, 3), (2,), (2, 2, 2))
    ]
    passage = (*PROMPT, 1, 8, 9)

    def apart(kv: torch.Tensor) -> Score:
        cache = filled(tiny_model, kv)
        scores = [score(tiny_model, cache, [], passage), *(score(tiny_model, cache, [one]) for one in questions)]
        return Score(sum((one.right for one in scores), ()), torch.cat([one.log_probs for one in scores]))

    exact, computed = apart(stored.exact), []
    call = tiny_model.call
    monkeypatch.setattr(
        tiny_model, "call", lambda ids, *given, **more: computed.append(ids.shape[1]) or call(ids, *given, **more)
    )
    together = score(tiny_model, filled(tiny_model, stored.exact, room=200), questions, passage)
    begun = {
        tuple(sequence[:end])
        for sequence in ([*passage[:-1]], *([*q.prompt_ids, *q.answer_ids[:-1]] for q in questions))
        for end in range(1, len(sequence) + 1)
    }
    assert computed == [len(begun)]
    assert together.right == exact.right
    torch.testing.assert_close(together.log_probs, exact.log_probs, atol=1e-5, rtol=1e-5)
    for damage in (0.5, 0.9):
        damaged = stored.exact * damage
        at_once = score(tiny_model, filled(tiny_model, damaged, room=200), questions, passage)
        kl = mean_kl(exact.log_probs, apart(damaged).log_probs)
        assert mean_kl(exact.log_probs, at_once.log_probs) == pytest.approx(kl, rel=1e-6)


def test_kl_is_zero_for_the_exact_cache_and_grows_with_damage(tiny_model: Model, stored: Stored) -> None:
    exact = score(tiny_model, filled(tiny_model, stored.exact), stored.questions).log_probs
    assert mean_kl(exact, exact) == 0.0
    damaged = [
        mean_kl(exact, score(tiny_model, filled(tiny_model, stored.exact * f), stored.questions).log_probs)
        for f in (0.99, 0.5)
    ]
    assert 0 < damaged[0] < damaged[1]
    with pytest.raises(SpecError, match="do not match"):
        mean_kl(exact, exact[:2])


def test_unwritten_parts_of_a_cache_are_seen(tiny_model: Model, stored: Stored) -> None:
    cache = filled(tiny_model, stored.exact)
    cache.view(64, 128).fill_(float("nan"))
    assert bool(tiny_model.forward(cache, PROMPT).isnan().all())


def test_sliding_layers_are_kept_at_full_length(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    save_tiny_model(tmp_path)
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, sliding_window=16, initializer_range=0.3,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    tokens = [(i * 31) % 256 for i in range(60)]
    kv = calculate_kv(model, tokens)
    assert kv.shape[2] == 60
    cache = filled(model, kv)
    with torch.inference_mode():
        expected = model.network(input_ids=torch.tensor([tokens + PROMPT])).logits[0, -1]
    torch.testing.assert_close(model.forward(cache, PROMPT)[-1], expected, atol=1e-4, rtol=1e-4)
    cache.length = 60
    scored = score(model, cache, [Question(tuple(PROMPT), (1,))] * 2).log_probs
    torch.testing.assert_close(scored, expected.log_softmax(0).expand(2, -1), atol=1e-4, rtol=1e-4)


def test_mla_is_refused_clearly(tmp_path: Path) -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    save_tiny_model(tmp_path)
    config = DeepseekV3Config(
        vocab_size=256, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=2, num_experts_per_tok=1, n_group=1,
        topk_group=1, first_k_dense_replace=2, kv_lora_rank=16, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=12,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(SpecError, match="not supported"):
        load_model(tmp_path)


def test_bad_models_and_tokens_are_refused(
    tiny_model: Model, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SpecError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(SpecError, match=r"no config\.json"):
        load_model(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SpecError, match="neither a folder nor a known name"):
        load_model("no-such-organisation/no-such-model")
    with pytest.raises(SpecError, match="dtype"):
        load_model(tiny_folder, dtype="int4")
    cache = tiny_model.new_cache(4)
    with pytest.raises(SpecError, match="outside the vocabulary"):
        tiny_model.forward(cache, [256])
    with pytest.raises(SpecError, match="outside the vocabulary"):
        tiny_model.forward(cache, [-1])
    with pytest.raises(SpecError, match="no tokens"):
        tiny_model.forward(cache, [])
    with pytest.raises(SpecError, match="allocate more"):
        tiny_model.forward(cache, [1] * 5)
    with pytest.raises(SpecError, match="positions"):
        tiny_model.forward(tiny_model.new_cache(2000), [1] * 1025)


def test_fingerprint_depends_on_weights_and_configuration(tiny_model: Model, tiny_folder: Path, tmp_path: Path) -> None:
    same = save_tiny_model(tmp_path / "same")
    assert load_model(same).fingerprint == tiny_model.fingerprint
    assert load_model(tiny_folder, dtype="bfloat16").fingerprint == tiny_model.fingerprint
    config = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps(config | {"rope_theta": 123.0}))
    assert load_model(same).fingerprint != tiny_model.fingerprint


def test_the_bundled_model_answers_over_a_cache_from_chunks() -> None:
    model = load_model()
    assert model.encode("line é\n") == list("line é\n".encode())
    text = "A paragraph of plain text about nothing in particular, to fill the context a little. " * 4
    context = make_context(3, 768, [text.encode() * 3], n_lines=4)
    exact = calculate_kv(model, model.encode(context.text.decode()))
    questions = [Question(tuple(q.prompt), tuple(q.answer)) for q in context.questions]
    raw = registry.make("raw")
    cache = model.new_cache(768 + 40)
    cache.poison()
    for start in range(0, 768, 256):
        data = raw.encode(exact[:, :, start : start + 256], 0, positions=range(start, start + 256))
        raw.decode(data, cache.view(start, start + 256))
    cache.length = 768
    assert score(model, cache, questions).right == (True,) * 4
    answer = generate_with_kv(model, cache, questions[2].prompt_ids, 5)
    assert bytes(answer) == context.questions[2].answer
    cache.length = 768
    cache.view()[:, 1] = exact[:, 1].flip(1)  # every key now has another token's value
    assert not any(score(model, cache, questions).right)
