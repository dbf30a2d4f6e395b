"""`kvstream.fetch` and the Hugging Face connector with caches on a CUDA device."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from transformers import AutoModelForCausalLM  # noqa: E402

import kvstream  # noqa: E402
from kvstream.codec.targets import PagedTarget  # noqa: E402
from kvstream.connectors import huggingface  # noqa: E402
from kvstream.policies.api import TEXT  # noqa: E402
from kvstream.testbed.engine.loading import bundled_model_path, rope_arguments  # noqa: E402
from tests.testbed import pipeline  # noqa: E402
from tests.testbed.pipeline import CONTEXT, LEVEL, PROMPT, Kitchen, Plan  # noqa: E402

DEVICE = torch.device("cuda", 0)
LEVELS = (LEVEL, 0, LEVEL, 1, LEVEL, 2)


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kitchen]:
    made = pipeline.make(tmp_path_factory.mktemp("store"), "cuda")
    yield made
    made.engine.close()


@pytest.fixture(scope="module")
def url(kitchen: Kitchen, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        command = [sys.executable, "-m", "kvstream.testbed.net.sender", "--store", str(kitchen.store.path)]
        process = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}"
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def model() -> Any:
    folder = bundled_model_path()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **rope_arguments(folder)).to(DEVICE)


def check(kitchen: Kitchen, got: Any) -> None:
    """As the CPU decodes the same bytes, within float32's rounding."""
    torch.testing.assert_close(got.cpu().float(), kitchen.decoded(LEVELS).float(), atol=1e-3, rtol=1e-3)


def test_a_new_tensor_on_the_device(kitchen: Kitchen, url: str) -> None:
    got = kvstream.fetch(url, CONTEXT, Plan(LEVELS), 5.0, device=DEVICE)
    assert got.cache.device == DEVICE  # type: ignore[union-attr]
    assert got.record.levels == LEVELS
    check(kitchen, got.cache)


def test_straight_into_blocks(kitchen: Kitchen, url: str) -> None:
    manifest = kitchen.store.manifest(CONTEXT)
    kv, blocks = manifest.kv, -(-manifest.tokens // 16)
    pages = [torch.zeros(2, blocks, 16, kv.heads, kv.head_dim, device=DEVICE) for _ in range(kv.layers)]
    table = torch.randperm(blocks)
    kvstream.fetch(url, CONTEXT, Plan(LEVELS), 5.0, PagedTarget(pages, table, 0, manifest.tokens))
    at = torch.arange(manifest.tokens)
    check(kitchen, torch.stack([page[:, table[at // 16], at % 16] for page in pages]))


def continued(model: Any, inputs: dict[str, Any]) -> list[int]:
    length = inputs["input_ids"].shape[1]
    return model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, length:].tolist()


def test_a_models_cache_here_and_offloaded(kitchen: Kitchen, url: str, model: Any) -> None:
    here = huggingface.fetch(url, CONTEXT, model, Plan(LEVEL), 5.0)
    away = huggingface.fetch(url, CONTEXT, model, Plan(LEVEL), 5.0, offload=True)
    cache = away.cache()
    assert [layer.keys.device.type for layer in cache.layers[:3]] == ["cuda", "cpu", "cpu"]
    expected = continued(model, here.inputs(list(PROMPT)))
    for _ in range(2):
        assert continued(model, away.inputs(list(PROMPT))) == expected


def test_text_is_recomputed_on_the_device(kitchen: Kitchen, url: str, model: Any) -> None:
    mixed = huggingface.fetch(url, CONTEXT, model, Plan((TEXT, LEVEL, TEXT, TEXT, LEVEL, TEXT)), 5.0, recompute=True)
    coded = huggingface.fetch(url, CONTEXT, model, Plan(LEVEL), 5.0)
    assert TEXT in mixed.record.levels
    assert continued(model, mixed.inputs(list(PROMPT))) == continued(model, coded.inputs(list(PROMPT)))
