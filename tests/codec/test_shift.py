"""How far a chunk lies from what its codec was calibrated for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvstream.codec import registry
from kvstream.codec.api import Shift
from kvstream.codec.errors import CodecError
from kvstream.codec.kvstream import KVStream, fit
from kvstream.codec.profile import Profile
from tests.codec.conformance import D, H, L
from tests.codec.profiles import ROPE, SINKS, rotated, stored
from tests.codec.synthetic import synthetic_kv


@pytest.fixture(scope="module")
def codec() -> KVStream:
    """Told what ordinary chunks take by caches that it was not fitted to."""
    fitted, held_out = (
        [rotated(synthetic_kv(L, tokens, H, D, seed=seed)) for seed in seeds]
        for tokens, seeds in ((400, range(100, 105)), (1_100, (200, 201)))
    )
    return KVStream(lossless=1, profile=fit(fitted, rope=ROPE, sinks=SINKS, held_out=held_out))


def shift(codec: KVStream, kv: torch.Tensor, level: int, start: int = 0) -> Shift:
    found = codec.shift(codec.encode(kv, level, positions=range(start, start + kv.shape[2])))
    assert found is not None
    return found


@pytest.mark.parametrize("start", [0, 3_000])
@pytest.mark.parametrize("tokens", [100, 300, 1_500])
def test_ordinary_chunks_take_what_is_expected_whatever_their_length(codec: KVStream, tokens: int, start: int) -> None:
    some = [rotated(synthetic_kv(L, tokens, H, D, seed=seed), start) for seed in range(7, 11)]
    for level in range(len(codec.levels) - 1):
        found = [shift(codec, kv, level, start) for kv in some]
        bits, expected = (np.mean([getattr(one, name) for one in found]) for name in ("bits", "expected_bits"))
        a_few_bytes = 8 * 40 / some[0].numel()
        assert bits == pytest.approx(expected, rel=0.15, abs=a_few_bytes)
        assert all(one.escapes < one.expected_escapes + 0.005 for one in found)


def test_wider_values_take_more_bits_and_escapes(codec: KVStream) -> None:
    mean = codec.parameters.mean[:, :, None]
    usual = synthetic_kv(L, 600, H, D, seed=7, dtype=torch.float32)
    for level in range(len(codec.levels) - 1):
        times = [shift(codec, rotated(mean + f * (usual - mean), 50), level, 50).times for f in (1, 2, 4)]
        assert times[0] * 1.3 < times[1] < times[2]


def test_another_models_cache_is_far(codec: KVStream) -> None:
    other = rotated(3 * synthetic_kv(L, 600, H, D, seed=9, channel_seed=99), 50)
    found = [shift(codec, other, level, 50) for level in range(len(codec.levels) - 1)]
    assert all(one.times > 2 for one in found)
    usual, spiky = (rotated(synthetic_kv(L, 600, H, D, seed=7), 50) for _ in range(2))
    spiky[:, 1, ::20] *= 40  # too few for their columns to become wide
    assert shift(codec, spiky, 2, 50).escapes > 4 * shift(codec, usual, 2, 50).escapes


def test_a_fallback_is_eight_bits_and_a_token_apart_counts_as_escaped(codec: KVStream) -> None:
    kv = 1e4 * torch.randn((L, 2, 300, H, D), generator=torch.Generator().manual_seed(1))
    data = codec.encode(kv, 0, positions=range(700, 1_000))
    assert codec.describe(data)["fallback"]
    found = codec.shift(data)
    assert found is not None
    assert found.bits > 8
    assert found.times > 20
    usual = rotated(synthetic_kv(L, 300, H, D, seed=1, dtype=torch.float32), 700)
    usual[1, 1, 3, 0, 0] = 1e6
    assert shift(codec, usual, 0, 700).escapes > 1 / 300 - 1e-6


def test_sinks_are_no_shift(codec: KVStream) -> None:
    kv = rotated(synthetic_kv(L, 300, H, D, seed=2), 0)
    kv[:, :, :SINKS] *= 30
    found = shift(codec, kv, 0)
    assert found.times < 1.3
    assert found.escapes < 1 / 300


def test_nothing_is_said_where_nothing_is_expected(codec: KVStream) -> None:
    kv = rotated(synthetic_kv(L, 40, H, D, seed=2), 0)
    lossless = codec.encode(kv, len(codec.levels) - 1, positions=range(40))
    assert codec.shift(lossless) is None
    silent = registry.make("kvstream", {}, stored("kvstream"))
    assert silent.shift(silent.encode(kv, 0, positions=range(40))) is None
    uniform = registry.make("uniform")
    assert uniform.shift(uniform.encode(kv, 0, positions=range(40))) is None
    with pytest.raises(CodecError):
        codec.shift(silent.encode(kv, 0, positions=range(40)))


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_impossible_expectations_are_refused(codec: KVStream, value: float) -> None:
    assert codec.profile is not None
    tensors = {**codec.profile.tensors, "usual": np.full_like(codec.profile.tensors["usual"], value)}
    with pytest.raises(CodecError, match="calibrate again"):
        KVStream(profile=Profile(tensors, codec.profile.metadata))


def test_a_profile_of_another_model_is_told_apart_by_its_fingerprint() -> None:
    profile = Profile({}, {"codec": "x", "model": "ab" * 32, "model_name": "mine"})
    profile.check_model("ab" * 32)
    Profile({}, {"codec": "x"}).check_model("cd" * 32)
    with pytest.raises(CodecError, match=r"calibrated for model mine .*kvstream codec calibrate.*--force"):
        profile.check_model("cd" * 32)
