"""What a basis has no column for is coded apart, or the whole chunk otherwise: nothing is lost without a sign."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvstream.codec.kvstream import KVStream, apart, fit
from kvstream.codec.kvstream.parameters import SKETCH, Group
from kvstream.codec.transform import vectors
from tests.codec.synthetic import synthetic_kv

L, H, D, T = 2, 1, 16, 300
QUIET = 5
"""A dimension in which calibration saw next to nothing."""


def cache(seed: int, tokens: int = T) -> Tensor:
    kv = synthetic_kv(L, tokens, H, D, seed=seed, dtype=torch.float32)
    kv[..., QUIET] *= 1e-4
    return kv


@pytest.fixture(scope="module")
def codec() -> KVStream:
    return KVStream(profile=fit([cache(seed) for seed in (1, 2, 3)], target_bits=(0.5, 1.5), sinks=2, group=1))


def weight(group: Group, rows: Tensor) -> Tensor:
    """What vectors `[T, N]` weigh in the metric."""
    shaped = rows.unflatten(1, group.stored_basis.shape[1:])
    return torch.einsum("tlshd,lshde,tlshe->t", shaped, group.metric, shaped)


def test_a_sketch_tells_what_no_column_expresses(codec: KVStream) -> None:
    for group in codec.parameters.groups:
        assert len(group.basis) < group.basis_values
        rows = torch.randn((500, group.basis_values), generator=torch.Generator().manual_seed(1))
        rest = rows - rows @ group.analysis.T @ group.basis
        seen = group.sketch @ rows.T
        assert seen.shape == (SKETCH, 500)
        assert float(seen.square().mean()) == pytest.approx(float(weight(group, rest).mean()), rel=0.4)
        expressed = group.sketch @ (rows @ group.analysis.T @ group.basis).T
        assert float(expressed.square().mean()) < 1e-6 * float(seen.square().mean())


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("place", [(0, 0), (1, 1)])
def test_a_value_where_no_column_is_comes_back_exactly(codec: KVStream, level: int, place: tuple[int, int]) -> None:
    kv = cache(9)
    usual = codec.decode(codec.encode(kv, level, positions=range(50, 50 + T)))
    step = codec.parameters.step(level)
    spiky = kv.clone()
    spiky[*place, 7, 0, QUIET] = 60 * step
    data = codec.encode(spiky, level, positions=range(50, 50 + T))
    assert codec.describe(data)["tokens_apart"] == 1
    decoded = codec.decode(data)
    assert isinstance(decoded, Tensor)
    assert isinstance(usual, Tensor)
    assert torch.equal(decoded[:, :, 7], spiky[:, :, 7])
    others = torch.arange(T) != 7
    assert float((decoded - usual)[:, :, others].abs().max()) < 5 * step


@pytest.mark.parametrize("seed", range(4))
def test_the_error_is_bounded_whatever_the_cache_holds(codec: KVStream, seed: int) -> None:
    """Of another model's caches of this shape, and of noise in all directions: half a step in each at most."""
    parameters = codec.parameters
    draw = torch.Generator().manual_seed(seed)
    kv = [
        synthetic_kv(L, T, H, D, seed=seed, channel_seed=99, dtype=torch.float32),
        10.0**seed * torch.randn((L, 2, T, H, D), generator=draw),
        cache(seed) + 0.3 * torch.randn((L, 2, T, H, D), generator=draw),
    ]
    for chunk in kv:
        for level in range(2):
            data = codec.encode(chunk, level, positions=range(50, 50 + T))
            if codec.describe(data)["fallback"]:
                continue
            decoded = codec.decode(data)
            assert isinstance(decoded, Tensor)
            for group in parameters.groups:
                rows = [vectors(x, group.layers, None, range(T), parameters.mean) for x in (decoded, chunk)]
                error = weight(group, rows[0] - rows[1]) / (group.basis_values * parameters.step(level) ** 2)
                assert float(error.mean()) < 0.25


def test_which_tokens_lose_too_much() -> None:
    def found(lost: Tensor) -> list[int]:
        return torch.nonzero(apart.inexpressible(lost)).flatten().tolist()

    lost = torch.full((2, 100), 1e-4)
    assert found(lost) == []
    lost[1, 3] = 1.2
    assert found(lost) == [3]
    lost[0, 10:90] = 0.09  # none too much alone, but all of them together
    tokens = found(lost)
    left = [t for t in range(100) if t not in tokens]
    assert 3 in tokens
    assert float(lost[0, left].sum()) / 100 <= apart.LOST_ON_AVERAGE
    assert 5 < len(tokens) < 80
    for value in (float("inf"), float("nan"), 1e30):
        lost = torch.zeros((2, 4))
        lost[0, 2] = value
        assert found(lost) == [2]


@pytest.mark.parametrize("tokens", [3, 4, 6, 20])
def test_short_chunks_keep_their_sinks_exactly(codec: KVStream, tokens: int) -> None:
    """Two tokens of 16 or 32 bits in a chunk of three are no reason to code them with 8."""
    for dtype in (torch.float32, torch.bfloat16):
        kv = cache(4, tokens).to(dtype)
        kv[:, :, :2] *= 30
        data = codec.encode(kv, 1, positions=range(tokens))
        assert not codec.describe(data)["fallback"]
        decoded = codec.decode(data)
        assert isinstance(decoded, Tensor)
        assert torch.equal(decoded[:, :, :2], kv[:, :, :2])
