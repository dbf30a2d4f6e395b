"""A tiny model with random weights, and a store of one context under the raw codec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.testbed.s3_server import S3Server

if TYPE_CHECKING:
    from torch import Tensor

    from kvstream.testbed.engine.model import Model
    from kvstream.testbed.store.questions import Question
    from kvstream.testbed.store.store import Store

CHUNK_TOKENS = 64
TOKENS = 300


def save_tiny_model(folder: Path, **settings: Any) -> Path:
    """A Llama of random weights over bytes, as a folder that `load_model` reads."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(5)
    config = LlamaConfig(
        **{
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 1024,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": None,
            **settings,
        }
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="needs torch, from the extra [run]")
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> Iterator[Model]:
    import torch

    from kvstream.testbed.engine.loading import load_model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model(tiny_folder)
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Stored:
    """A context in a store, and what a receiver must get from it."""

    store: Store
    context: str
    tokens: list[int]
    exact: Tensor
    questions: list[Question]


def store_context(path: Path, model: Model, codec_name: str = "raw", context: str = "ctx") -> Stored:
    import random

    from kvstream.codec import registry
    from kvstream.testbed.encoding.encode import store_kv
    from kvstream.testbed.engine.model import calculate_kv
    from kvstream.testbed.store.questions import Question
    from kvstream.testbed.store.store import Store

    draw = random.Random(3)
    tokens = [draw.randrange(256) for _ in range(TOKENS)]
    exact = calculate_kv(model, tokens)
    codec = registry.make(codec_name)
    store = Store(path)
    distortions = [0.01 * (len(codec.levels) - 1 - level) for level in range(len(codec.levels))]
    questions = [
        Question(tuple(draw.randrange(256) for _ in range(9)), tuple(draw.randrange(256) for _ in range(3)))
        for _ in range(3)
    ]
    store_kv(
        store, context, tokens, model, codec, chunk_tokens=CHUNK_TOKENS, distortions=distortions, kv=exact,
        questions=questions,
    )  # fmt: skip
    return Stored(store, context, tokens, exact, questions)


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory, tiny_model: Model) -> Stored:
    return store_context(tmp_path_factory.mktemp("store"), tiny_model)


@pytest.fixture(scope="session")
def stored_uniform(tmp_path_factory: pytest.TempPathFactory, tiny_model: Model) -> Stored:
    return store_context(tmp_path_factory.mktemp("store"), tiny_model, "uniform", "ctx8")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    for package in ("s3fs", "moto", "flask_cors"):
        pytest.importorskip(package, reason="needs s3fs and moto[server], from the extra [dev]")
    server = S3Server.begin(tmp_path_factory.mktemp("s3") / "log")
    yield server
    server.end()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a place in a new bucket of a real S3 server, which this process and its children find."""
    import secrets

    import s3fs

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"b{secrets.token_hex(6)}"
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(bucket)
    return f"s3://{bucket}/some/place"
