"""A GGUF file of Llama's architecture as a folder that `transformers` loads.

Weights are dequantised to float32, exactly what the file says. The tokenizer splits digits one by one, as the model was
trained.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstream.testbed.errors import SpecError

ARCHITECTURE: Final = ("llama", "gpt2", "smollm")
"""Network, vocabulary and way of splitting text of the files that are read."""
CONTROL: Final = 3
"""Type of a token that is not text."""
_OUTSIDE: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(path: Path, folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer's files. Raises SpecError for another architecture."""
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(path)
    facts: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    keys = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    found = tuple(facts.get(key) for key in keys)
    if found != ARCHITECTURE:
        raise SpecError(f"{path} holds {found}; only models of {ARCHITECTURE} can be converted")
    weights: dict[str, NDArray[np.float32]] = {}
    for tensor in reader.tensors:
        name = name_of(tensor.name)
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        heads = {"q_proj": "head_count", "k_proj": "head_count_kv"}.get(name.split(".")[-2])
        if heads:
            values = halves(values, facts[f"llama.attention.{heads}"])
        weights[name] = np.ascontiguousarray(values)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config_of(facts, tied="lm_head.weight" not in weights))
    _write_tokenizer(facts, folder)


def name_of(tensor: str) -> str:
    """`blk.3.attn_q.weight` as `transformers` calls it. Raises SpecError."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor)
    layer, part = match.groups() if match else (None, "")
    if layer is None and part in _OUTSIDE:
        return f"{_OUTSIDE[part]}.weight"
    if layer is not None and part in _IN_LAYER:
        return f"model.layers.{layer}.{_IN_LAYER[part]}.weight"
    raise SpecError(f"tensor {tensor} is not one of a Llama's; this file cannot be converted")


def halves(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of queries or keys in `transformers`' order: GGUF has the two dimensions that rotate together side by side,
    `transformers` has one in either half of the head."""
    pairs = weights.reshape(heads, -1, 2, weights.shape[1])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def config_of(facts: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts["llama.rope.dimension_count"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": facts["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": facts["llama.rope.freq_base"],
        "vocab_size": facts["llama.vocab_size"],
        "tie_word_embeddings": tied,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def _write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config = {f"{name}_token": tokens[facts[f"tokenizer.ggml.{key}_token_id"]] for name, key in named.items()}
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": facts["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": facts.get("tokenizer.chat_template"),
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
