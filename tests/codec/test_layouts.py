from __future__ import annotations

from typing import Any

import pytest
import torch

from kvstream.codec import registry
from kvstream.codec.errors import CodecError
from kvstream.codec.layouts import from_huggingface, from_lmcache, from_paged, huggingface_layers, stacked
from kvstream.codec.targets import HuggingFaceTarget, LMCacheTarget, PagedTarget
from tests.codec.synthetic import synthetic_kv

L, T, H, D = 3, 40, 2, 8
KV = synthetic_kv(L, T, H, D, seed=1)
RAW = registry.make("raw")
DATA = RAW.encode(KV, 0, positions=range(T))


def dynamic_cache(kv: torch.Tensor) -> Any:
    """As a model leaves it: a separate tensor per layer."""
    cache_utils = pytest.importorskip("transformers.cache_utils", reason="needs transformers, from the extra [run]")
    cache = cache_utils.DynamicCache()
    for index, (keys, values) in enumerate(kv):
        cache.update(keys.transpose(0, 1)[None].clone(), values.transpose(0, 1)[None].clone(), index)
    return cache


def test_a_models_cache_and_back() -> None:
    cache = dynamic_cache(KV)
    assert torch.equal(from_huggingface(cache), KV)
    assert torch.equal(from_huggingface(cache, 3, 30), KV[:, :, 3:33])
    assert RAW.encode(from_huggingface(cache), 0, positions=range(T)) == DATA
    empty = dynamic_cache(torch.zeros_like(KV))
    assert RAW.decode(DATA, empty) is empty
    assert torch.equal(from_huggingface(empty), KV)


def test_a_contiguous_cache_becomes_a_view() -> None:
    pytest.importorskip("transformers.cache_utils", reason="needs transformers, from the extra [run]")
    target = HuggingFaceTarget.allocate((L, 2, T, H, D), KV.dtype)
    RAW.decode(DATA, target)
    cache = target.dynamic_cache()
    first, last = target._layers[0][0], target._layers[-1][1]
    assert cache.layers[0].keys.data_ptr() == first.data_ptr()
    assert cache.layers[-1].values.data_ptr() == last.data_ptr()
    seen = from_huggingface(cache, 1)
    assert torch.equal(seen, KV[:, :, 1:])
    seen.zero_()
    assert not bool(last[:, :, 1:].any())
    assert cache.get_seq_length() == T
    cache.update(torch.ones(1, H, 2, D), torch.ones(1, H, 2, D), 0)
    assert cache.get_seq_length() == T + 2


def test_a_static_cache() -> None:
    """Its capacity is not its length."""
    cache_utils = pytest.importorskip("transformers.cache_utils", reason="needs transformers, from the extra [run]")
    cache = cache_utils.Cache(layers=[cache_utils.StaticLayer(64) for _ in range(L)])
    for index, (keys, values) in enumerate(KV):
        cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], index)
    assert torch.equal(from_huggingface(cache), KV)
    HuggingFaceTarget(huggingface_layers(cache), 20, T).write(0, 1, KV[2, 0])
    assert torch.equal(cache.layers[0].values[0, :, 20:60].transpose(0, 1), KV[2, 0])
    with pytest.raises(CodecError, match=r"tokens \[30, 41\) are not in a cache of 40"):
        from_huggingface(cache, 30, 11)
    with pytest.raises(CodecError, match="the target"):
        RAW.decode(DATA, cache)


def test_empty_and_sliding_window_caches_are_refused() -> None:
    cache_utils = pytest.importorskip("transformers.cache_utils", reason="needs transformers, from the extra [run]")
    with pytest.raises(CodecError, match="no layers yet"):
        RAW.decode(DATA, cache_utils.DynamicCache())
    with pytest.raises(CodecError, match="layer 0 of the cache has no keys and values"):
        RAW.decode(DATA, cache_utils.Cache(layers=[cache_utils.DynamicLayer()]))
    two = torch.zeros(2, H, T, D)
    batch = cache_utils.DynamicCache()
    batch.update(two, two, 0)
    with pytest.raises(CodecError, match=r"\[1, heads, tokens, head_dim\]"):
        from_huggingface(batch)
    sliding = cache_utils.DynamicSlidingWindowLayer(sliding_window=16)
    sliding.update(two[:1], two[:1])
    with pytest.raises(CodecError, match="keeps only a sliding window"):
        from_huggingface(cache_utils.Cache(layers=[sliding]))


def test_lmcache_and_paged_blocks() -> None:
    lmcache = torch.empty(L, 2, T, H * D, dtype=KV.dtype)
    RAW.decode(DATA, LMCacheTarget(lmcache, H))
    seen = from_lmcache(lmcache, H)
    assert seen.data_ptr() == lmcache.data_ptr()
    assert torch.equal(seen, KV)
    blocks = [torch.zeros(2, 9, 16, H, D, dtype=KV.dtype) for _ in range(L)]
    where = (blocks, [4, 1, 7, 3], 11, T)
    RAW.decode(DATA, PagedTarget(*where))
    assert torch.equal(from_paged(*where), KV)
    with pytest.raises(CodecError, match="do not fit"):
        from_paged(blocks, [4, 1], 11, T)


def test_unequal_layers_are_refused() -> None:
    sides = [torch.zeros(4, 2, 8), torch.zeros(4, 2, 8)]
    for other in (torch.zeros(3, 2, 8), torch.zeros(4, 2, 8, dtype=torch.float16)):
        with pytest.raises(CodecError, match="unequal"):
            stacked([*sides, other, other])
    assert stacked(sides).shape == (1, 2, 4, 2, 8)
