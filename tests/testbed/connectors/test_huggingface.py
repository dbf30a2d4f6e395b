"""Contexts into caches of the installed transformers: `generate` answers from them as from a prefill of its own.

`scripts/transformers.sh` runs this file under other versions.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from aiohttp.test_utils import TestServer
from transformers import AutoModelForCausalLM, DynamicCache

from kvstream import SessionFailed, SpecError
from kvstream.codec.layouts import from_huggingface
from kvstream.connectors import huggingface
from kvstream.policies.api import TEXT, Choice, LevelOrText, Observation
from kvstream.testbed.encoding import calibrate
from kvstream.testbed.encoding.encode import store_kv
from kvstream.testbed.encoding.tokens import context_ids, question_ids
from kvstream.testbed.engine import loading
from kvstream.testbed.engine.loading import bundled_model_path, load_model, rope_arguments
from kvstream.testbed.engine.model import Model, calculate_kv
from kvstream.testbed.net.sender import Sender
from kvstream.testbed.store.store import Store
from kvstream.testbed.workloads.contexts import find_contexts
from tests.testbed.conftest import TOKENS, Stored, save_tiny_model
from tests.testbed.link import Link

PROMPTS = ([7, 200, 13, 99, 4], [1], [42] * 9)


class Plan:
    """The levels of the chunks in turn."""

    def __init__(self, *levels: LevelOrText) -> None:
        self.levels = levels

    def choose(self, obs: Observation) -> Choice:
        return Choice(self.levels[obs.chunk % len(self.levels)])


@pytest.fixture(scope="module", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Measurements of decoding are kept here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@contextmanager
def sending(store: Store) -> Iterator[str]:
    """A sender process."""
    command = [sys.executable, "-m", "kvstream.testbed.net.sender", "--store", str(store.path), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}"
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def url(stored: Stored) -> Iterator[str]:
    with sending(stored.store) as address:
        yield address


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    """As a user would load it."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def context(url: str, model: Any) -> huggingface.HuggingFaceContext:
    return huggingface.fetch(url, "ctx", model, Plan(0), 5.0)


def continued(model: Any, count: int = 6, **inputs: Any) -> list[list[int]]:
    """The `count` tokens that generate adds to each row."""
    length = inputs["input_ids"].shape[1]
    made = model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return [row[length:] for row in made.tolist()]


def plain(model: Any, *rows: list[int]) -> list[list[int]]:
    """What the model continues without our cache."""
    ids = torch.tensor(rows)
    return continued(model, input_ids=ids, attention_mask=torch.ones_like(ids))


# --- questions


def test_several_questions_on_one_cache(context: huggingface.HuggingFaceContext, model: Any, stored: Stored) -> None:
    before = context._memory.clone()
    for prompt in (*PROMPTS, PROMPTS[0]):
        assert continued(model, **context.inputs(prompt)) == plain(model, [*stored.tokens, *prompt])
    assert torch.equal(context._memory, before)


def test_the_cache_is_a_dynamic_cache_of_the_context(
    context: huggingface.HuggingFaceContext, model: Any, stored: Stored
) -> None:
    cache = context.cache()
    assert type(cache) is DynamicCache
    assert cache.get_seq_length() == TOKENS == len(context.token_ids)
    assert torch.equal(from_huggingface(cache), stored.exact)
    assert cache.layers[0].keys.data_ptr() == context._memory.data_ptr()  # no copy
    assert context.token_ids == stored.tokens
    assert context.record.levels == (0,) * 5


def test_questions_take_turns(context: huggingface.HuggingFaceContext, model: Any, stored: Stored) -> None:
    """Each has a cache of its own, which another's tokens do not reach."""
    asked = [context.inputs(prompt) for prompt in PROMPTS]
    for prompt, inputs in zip(reversed(PROMPTS), reversed(asked), strict=True):
        assert continued(model, **inputs) == plain(model, [*stored.tokens, *prompt])


def test_what_is_done_to_a_cache_stays_in_it(context: huggingface.HuggingFaceContext, model: Any) -> None:
    before = context._memory.clone()
    cache = context.cache()
    for layer in cache.layers:
        layer.reset()
    assert cache.get_seq_length() == 0
    other = context.cache()
    other.crop(-10)
    assert other.get_seq_length() == TOKENS - 10
    assert torch.equal(context._memory, before)
    assert context.cache().get_seq_length() == TOKENS


def test_in_an_event_loop(url: str, model: Any, stored: Stored) -> None:
    got = asyncio.run(huggingface.afetch(url, "ctx", model, Plan(0), 5.0))
    assert continued(model, **got.inputs(PROMPTS[0])) == plain(model, [*stored.tokens, *PROMPTS[0]])


def test_text_is_recomputed_by_the_model(url: str, model: Any, stored: Stored) -> None:
    got = huggingface.fetch(url, "ctx", model, Plan(TEXT, 0, TEXT), 5.0, recompute=True)
    assert got.record.levels == (TEXT, 0, TEXT, TEXT, 0)
    assert torch.allclose(got._memory.transpose(2, 3), stored.exact, atol=1e-5)
    assert continued(model, **got.inputs(PROMPTS[0])) == plain(model, [*stored.tokens, *PROMPTS[0]])


def test_the_cache_has_the_models_dtype(url: str, tiny_folder: Path, stored: Stored) -> None:
    half = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    got = huggingface.fetch(url, "ctx", half, Plan(0), 5.0)
    assert got._memory.dtype == torch.bfloat16
    assert torch.equal(got._memory.transpose(2, 3), stored.exact.to(torch.bfloat16))


# --- what is refused


def test_batches_are_refused_in_words(context: huggingface.HuggingFaceContext, model: Any, stored: Stored) -> None:
    inputs = context.inputs(PROMPTS[0])
    twice = {name: inputs[name].repeat(2, 1) for name in ("input_ids", "attention_mask")}
    with pytest.raises(SpecError, match=r"holds 1 sequence, the model was given a batch of 2: ask one question at a"):
        continued(model, **(inputs | twice))
    with pytest.raises(SpecError, match="one prompt, as a list of integers; a batch needs a cache for each"):
        context.inputs([PROMPTS[0], PROMPTS[0]])  # type: ignore[list-item]
    with pytest.raises(SpecError, match="at least one token"):
        context.inputs([])
    inputs = context.inputs(PROMPTS[0])
    next(cache for cache in inputs.values() if isinstance(cache, DynamicCache)).batch_repeat_interleave(2)
    assert continued(model, **(inputs | twice)) == plain(model, [*stored.tokens, *PROMPTS[0]]) * 2


def test_offload_needs_a_gpu(url: str, model: Any) -> None:
    with pytest.raises(SpecError, match="offload is for a model on a GPU; this one is on cpu"):
        huggingface.fetch(url, "ctx", model, offload=True)


def test_a_model_of_other_weights_is_refused(url: str, tmp_path: Path, model: Any, tiny_folder: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "other", initializer_range=0.2))
    with pytest.raises(SpecError, match="it was computed with model"):
        huggingface.fetch(url, "ctx", other)
    wider = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "wider", num_hidden_layers=4))
    with pytest.raises(SpecError, match=r"the model's has \(layers, heads, head_dim\) \(4, 2, 16\)"):
        huggingface.fetch(url, "ctx", wider, fingerprint=loading.fingerprint(tiny_folder))


def test_a_model_without_a_folder_says_what_it_is(url: str, tiny_folder: Path, stored: Stored) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    loaded.config._name_or_path = loaded.name_or_path = "nobody/nothing"
    with pytest.raises(SpecError, match="the folder of model 'nobody/nothing' is not here"):
        huggingface.fetch(url, "ctx", loaded)
    got = huggingface.fetch(url, "ctx", loaded, Plan(0), 5.0, fingerprint=loading.fingerprint(tiny_folder))
    assert torch.equal(got._memory.transpose(2, 3), stored.exact)


def test_a_misread_rotary_embedding_is_noticed(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 4 ignores what version 5 has saved of it."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        config.pop(name, None)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500_000.0}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    assert rope_arguments(folder) == {"rope_theta": 500_000.0, "rope_scaling": None}
    found = SimpleNamespace(rope_theta=10_000.0, rope_scaling=None)
    loaded: Any = SimpleNamespace(name_or_path=str(folder), config=found)
    with pytest.raises(SpecError, match=r"load it by from_pretrained\(..., rope_theta=500000.0\)"):
        huggingface.fingerprint_of(loaded)
    found.rope_theta = 500_000.0
    assert huggingface.fingerprint_of(loaded) == loading.fingerprint(folder)


def test_a_damaged_chunk_gives_no_context(stored: Stored, model: Any) -> None:
    async def scenario() -> None:
        async with TestServer(Sender(stored.store).app()) as server, Link(server.port or 0) as link:
            await huggingface.afetch(link.url, "ctx", model, Plan(0), 5.0)
            link.change = lambda data: data[:-1] + bytes([data[-1] ^ (b"KVST" not in data and len(data) > 1000)])
            await huggingface.afetch(link.url, "ctx", model, Plan(0), 5.0)

    with pytest.raises((SessionFailed, SpecError)):
        asyncio.run(scenario())


def test_the_short_name_leads_to_the_connectors() -> None:
    from kvstream import connectors
    from kvstream.testbed.connectors import huggingface as the_same

    assert huggingface is the_same
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = connectors.nothing


# --- the bundled model


def test_a_real_model_answers_from_what_arrived(tmp_path: Path) -> None:
    """The bundled model, our codec and our policy: every question about the context is answered right."""
    ours: Model = load_model()
    [about] = find_contexts(["docs"])
    tokens = context_ids(ours, about)
    codec = calibrate.make_codec("kvstream", ours)
    store = Store(tmp_path / "store")
    ladder = [0.1 / 2**level for level in range(len(codec.levels))]
    kv = calculate_kv(ours, tokens)
    store_kv(store, "docs", tokens, ours, codec, chunk_tokens=512, distortions=ladder, kv=kv)
    folder = bundled_model_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **rope_arguments(folder)).eval()
    with sending(store) as url:
        context = huggingface.fetch(url, "docs", model, deadline_s=5.0)
    assert 0.0 < context.record.distortion < 0.1
    for question in question_ids(ours, about)[:4]:
        answer = continued(model, len(question.answer_ids), **context.inputs(question.prompt_ids))
        assert answer == [list(question.answer_ids)]
