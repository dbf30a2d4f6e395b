"""Contexts that look like a large model's cache: the bits are the real cache's, and the codec takes them for real."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch, from the extra [run]")

import numpy as np
import torch

from kvstream.codec import registry
from kvstream.testbed.encoding import lookalike
from kvstream.testbed.encoding.lookalike import Lookalike, Source
from kvstream.testbed.engine import random_model
from kvstream.testbed.engine.loading import load_model
from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.manifest import KVShape
from kvstream.testbed.store.store import Store
from kvstream.testbed.workloads import synthetic

SHAPE = KVShape(16, 4, 32, "bfloat16")


@pytest.fixture(scope="module")
def source() -> Source:
    return lookalike.source_of(load_model(), 512, 512, keep=(1, 3))


def test_bits_are_the_real_caches(source: Source, tmp_path: Path) -> None:
    made = Lookalike(source, SHAPE, lookalike.rotary(32, 1e4))
    ids = lookalike.store_lookalike(
        Store(tmp_path), made, tokens=1000, chunk_tokens=512, codecs=["kvstream", "uniform"], model="m", vocabulary=300,
        prompt_tokens=5,
    )  # fmt: skip
    assert set(ids) == {"kvstream", "uniform"}
    manifest = Store(tmp_path).manifest(ids["kvstream"])
    assert [chunk.tokens for chunk in manifest.chunks] == [512, 488]
    assert [level.name for level in manifest.levels] == [level.name for level in source.levels]
    for level, real in zip(manifest.levels, source.levels, strict=True):
        assert level.bits_per_element == pytest.approx(real.bits_per_element, rel=0.03)
        assert level.distortion == real.distortion
    assert "timing only" in lookalike.facts(manifest, source)["label"]
    codec = registry.from_config(manifest.codec, made.profile)
    kv = made.kv(512, 1000)
    decoded = codec.decode(Store(tmp_path).get_kv(f"{ids['kvstream']}/1", 1))
    assert isinstance(decoded, torch.Tensor)
    error = (decoded.float() - kv.float()).pow(2).mean() / kv.float().var()
    assert 0 < float(error) < 0.3
    assert len(Store(tmp_path).questions(ids["uniform"])[0].prompt_ids) == 5


def test_every_column_of_a_group_is_used_alike(source: Source) -> None:
    made = Lookalike(source, SHAPE, lookalike.rotary(32, 1e4))
    for layer, own in enumerate(made._from):
        group = source.groups[layer * len(source.groups) // SHAPE.layers]
        uses = np.bincount(own - group.columns.start, minlength=group.columns.stop - group.columns.start)
        assert uses.max() - uses.min() <= 1
        assert len(uses) == group.columns.stop - group.columns.start


@pytest.mark.parametrize("name", ["mistral-7b", "llama-34b", "llama-70b"])
def test_a_random_model_has_the_size_of_the_real_one(name: str) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(random_model.config_of(name))
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(
        synthetic.shape_of(name)["parameters"], rel=1e-3
    )


def test_a_random_model_says_so_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"layers": 2, "hidden": 32, "kv_heads": 2, "head_dim": 8, "query_heads": 4, "intermediate": 48}
    small |= {"vocabulary": 300, "rope_theta": 1e4, "parameters": 1e4}
    monkeypatch.setattr(synthetic, "shape_of", lambda name: small)
    model = load_model("random:small", dtype="float32")
    assert "timing only" in model.name
    fingerprint, shape, vocabulary, theta = random_model.shape_for("small", "float32")
    assert (model.fingerprint, model.kv, model.vocabulary, theta) == (fingerprint, shape, vocabulary, 1e4)
    assert model.decode(model.encode("hé")) == "hé"
    assert fingerprint != random_model.shape_for("small")[0]
    monkeypatch.undo()
    with pytest.raises(SpecError, match="unknown workload 'small'"):
        load_model("random:small")
