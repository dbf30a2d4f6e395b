"""A model of a known architecture and size with random weights: only for timing what real weights would take.

Its name says so wherever it is shown. Its answers mean nothing, and its cache has none of a real cache's statistics;
what is streamed instead is made by `kvstream.testbed.encoding.lookalike`.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

import torch

from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.manifest import KVShape
from kvstream.testbed.workloads import synthetic

if TYPE_CHECKING:
    from kvstream.testbed.engine.model import Model

PREFIX: Final = "random:"
"""`random:mistral-7b` as a model's source."""
POSITIONS: Final = 131_072


class ByteTokenizer:
    """One token per byte, so that any text can be tokenised."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token % 256 for token in token_ids).decode(errors="replace")


def config_of(name: str) -> Any:
    """The Hugging Face configuration of one of the workloads' models (all have Llama's architecture)."""
    from transformers import LlamaConfig

    model = synthetic.shape_of(name)
    return LlamaConfig(
        hidden_size=model["hidden"],
        intermediate_size=model["intermediate"],
        num_hidden_layers=model["layers"],
        num_attention_heads=model["query_heads"],
        num_key_value_heads=model["kv_heads"],
        head_dim=model["head_dim"],
        vocab_size=model["vocabulary"],
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": model["rope_theta"]},
        bos_token_id=None,
        eos_token_id=None,
    )


def shape_for(name: str, dtype: str = "bfloat16") -> tuple[str, KVShape, int, float]:
    """Fingerprint, cache shape, vocabulary and rotary base of the model, without building it."""
    model = synthetic.shape_of(name)
    shape = KVShape(model["layers"], model["kv_heads"], model["head_dim"], dtype)
    return _fingerprint(name, dtype), shape, model["vocabulary"], model["rope_theta"]


def _fingerprint(name: str, dtype: str) -> str:
    facts = {"random": name, "dtype": dtype, "shape": synthetic.shape_of(name)}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def build(name: str, device: torch.device | str, dtype: str | None = None) -> Model:
    """The model, made on the device. Raises SpecError for an unknown model and one that does not fit."""
    from transformers import AutoModelForCausalLM

    from kvstream.testbed.engine.model import DTYPES, Model

    config = config_of(name)
    wanted = dtype or "bfloat16"
    if wanted not in DTYPES:
        raise SpecError(f"unknown dtype {wanted!r}; choose from {', '.join(DTYPES)}")
    torch.manual_seed(0)
    try:
        with torch.device(device):
            network = AutoModelForCausalLM.from_config(config, dtype=DTYPES[wanted]).eval()
    except torch.OutOfMemoryError as error:
        raise SpecError(f"{name} does not fit into the memory of {device}: {str(error).splitlines()[0]}") from error
    return Model(network, ByteTokenizer(), f"{name}, random weights (timing only)", _fingerprint(name, wanted))
