"""The codec on caches of other models: what transformers computes, calibrated, coded, and continued from.

Tiny configurations with random weights: nothing here says how well a codec does on a family, only that its cache goes
through every stage unharmed.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch, from the extra [run]")
transformers = pytest.importorskip("transformers", reason="needs transformers, from the extra [run]")

from kvstream.codec import registry  # noqa: E402
from kvstream.codec.kvstream import fit  # noqa: E402
from kvstream.codec.targets import HuggingFaceTarget, LMCacheTarget, PagedTarget  # noqa: E402
from kvstream.testbed.encoding import calibrate  # noqa: E402
from kvstream.testbed.encoding.gradients import sensitivity  # noqa: E402
from kvstream.testbed.engine.model import Model, calculate_kv, generate_with_kv, mean_kl  # noqa: E402

COMMON: dict[str, Any] = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA: dict[str, Any] = COMMON | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA | {"head_dim": 8}),
    "Mistral": ("MistralConfig", "MistralForCausalLM", LLAMA | {"head_dim": 8, "sliding_window": 32}),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", LLAMA | {"head_dim": 16}),
    "Gemma 3": (
        "Gemma3TextConfig", "Gemma3ForCausalLM",
        LLAMA | {"head_dim": 8, "sliding_window": 32,
                 "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", COMMON | {
        "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 1024, "initializer_range": 0.3}),
    "Phi": ("PhiConfig", "PhiForCausalLM", LLAMA | {"num_key_value_heads": 4}),
}  # fmt: skip
TOKENS = 90


def build(name: str, dtype: torch.dtype) -> Model:
    config_class, model_class, settings = FAMILIES[name]
    torch.manual_seed(1)
    network = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
    return Model(network.to(dtype).eval(), None, name, "0" * 64)


def text(seed: int, tokens: int) -> list[int]:
    return torch.randint(0, 64, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bfloat16") for name in FAMILIES), ("Llama", "float16"), ("Phi", "float32")]
)
def test_a_family_goes_through_every_stage(name: str, dtype: str) -> None:
    model = build(name, getattr(torch, dtype))
    rope = calibrate.rope_of(model)
    assert (rope is None) == (name == "GPT-2")
    samples = [calibrate.Sample(tuple(text(seed, TOKENS)), tuple(text(seed + 50, 20))) for seed in range(4)]
    caches = [calculate_kv(model, sample.context_ids) for sample in samples]
    assert caches[0].shape[2] == TOKENS  # of sliding layers too
    cost = sensitivity(model, caches, [sample.suffix_ids for sample in samples], rope)
    profile = fit(caches, rope=rope, sensitivity=cost.metric, target_bits=(1.2, 6.0))
    codec = registry.make("kvstream", {}, profile)

    ids, prompt = text(9, TOKENS), text(10, 12)
    exact = calculate_kv(model, ids)
    chunks = [
        codec.encode(exact[:, :, start : start + 40], 1, positions=range(start, min(start + 40, TOKENS)))
        for start in range(0, TOKENS, 40)
    ]
    decoded = torch.cat([codec.decode(chunk) for chunk in chunks], dim=2)
    assert decoded.dtype == exact.dtype == getattr(torch, dtype)
    error = (decoded.float() - exact.float()).pow(2).mean() / exact.float().var()
    assert float(error) < 0.01
    wanted = calibrate.log_probs(model, exact, prompt)
    assert mean_kl(wanted, calibrate.log_probs(model, decoded, prompt)) < 0.05
    assert len(generate_with_kv(model, decoded, prompt, 3)) == 3

    layers, _, _, heads, dim = exact.shape
    first = codec.decode(chunks[0])
    huggingface = HuggingFaceTarget.allocate((layers, 2, 40, heads, dim), exact.dtype)
    codec.decode(chunks[0], huggingface)
    lmcache = torch.empty((layers, 2, 40, heads * dim), dtype=exact.dtype)
    codec.decode(chunks[0], LMCacheTarget(lmcache, heads))
    blocks = [torch.zeros((2, 5, 16, heads, dim), dtype=exact.dtype) for _ in range(layers)]
    codec.decode(chunks[0], PagedTarget(blocks, [3, 0, 4], offset=0, tokens=40))
    assert torch.equal(lmcache, first.flatten(3))
    for layer, held in enumerate(huggingface.dynamic_cache().layers):
        assert torch.equal(held.keys[0].transpose(0, 1), first[layer, 0])
        assert torch.equal(blocks[layer][1, [3, 0, 4]].flatten(0, 1)[:40], first[layer, 1])
