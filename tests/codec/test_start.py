"""Finding where a chunk began, on real caches; buffers longer than their chunk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstream.codec import container
from kvstream.codec.errors import CodecError
from kvstream.codec.kvstream import KVStream, fit
from kvstream.codec.kvstream.start import find_start
from kvstream.codec.transform import Rope
from kvstream.testbed.encoding import calibrate
from kvstream.testbed.engine.loading import load_model
from kvstream.testbed.engine.model import calculate_kv
from tests.codec.synthetic import synthetic_kv

SECOND = Path(__file__).parents[2] / "benchmarks" / "models" / "second"
Case = tuple[KVStream, Tensor, Rope]


@pytest.fixture(scope="module", params=[None, SECOND], ids=["bundled", "second"])
def case(request: pytest.FixtureRequest) -> Case:
    """A codec, a cache of text on which it was not calibrated, and the model's rotation."""
    model = load_model(request.param)
    rope = calibrate.rope_of(model)
    assert rope is not None
    sample = next(iter(calibrate.samples(model, "fit", 1, 256)))
    profile = fit([calculate_kv(model, sample.context_ids)], rope=rope, target_bits=(1.0,), group=1)
    other = next(iter(calibrate.samples(model, "check", 1, 512)))
    return KVStream(profile=profile), calculate_kv(model, other.context_ids), rope


def moved(kv: Tensor, by: int, rope: Rope) -> Tensor:
    """The cache that it would be so many positions later."""
    kv = kv.clone()
    for layer in range(len(kv)):
        rope.rotate(kv[layer, 0].unsqueeze(-2), layer, range(by, by + 1))
    return kv


@pytest.mark.parametrize(("first", "by"), [(0, 0), (256, 0), (256, 10_240), (256, 32_000)])
def test_multiples_of_the_chunk(case: Case, first: int, by: int) -> None:
    codec, kv, rope = case
    part = moved(kv[:, :, first : first + 256], by, rope)
    assert find_start(codec, part, range(0, 128 * 256, 256)) == first + by


def test_arbitrary_candidates(case: Case) -> None:
    codec, kv, rope = case
    draw = torch.Generator().manual_seed(1)
    others = torch.randint(0, 30_000, (127,), generator=draw).tolist()
    part = moved(kv[:, :, 100:300], 777, rope)
    assert find_start(codec, part, [*others, 877]) == 877


def test_ambiguity_is_refused(case: Case) -> None:
    codec, kv, _ = case
    noise = torch.randn(kv[:, :, :8].shape, generator=torch.Generator().manual_seed(1))
    with pytest.raises(CodecError, match="could begin at"):
        find_start(codec, noise, range(0, 128 * 256, 256))
    with pytest.raises(CodecError, match="needs candidates"):
        find_start(codec, kv, [])
    with pytest.raises(CodecError, match="not of the profile's model"):
        find_start(codec, kv[:-1], [0])


def test_keys_without_rotation_are_refused() -> None:
    kv = synthetic_kv(2, 300, 2, 8, seed=1)
    with pytest.raises(CodecError, match="do not depend on their positions"):
        find_start(KVStream(profile=fit([kv], target_bits=(1.0,))), kv, [0, 256])


def test_padded_buffers(case: Case) -> None:
    codec, kv, _ = case
    data = codec.encode(kv[:, :, :64], 0, positions=range(64))
    padded = data + bytes(4096 - len(data) % 4096)
    assert container.length_of(padded) == container.length_of(data) == len(data)
    assert torch.equal(codec.decode(padded[: container.length_of(padded)]), codec.decode(data))
    with pytest.raises(CodecError, match="cut a padded buffer"):
        codec.decode(padded)
    with pytest.raises(CodecError, match="truncated"):
        container.length_of(data[:-1])
