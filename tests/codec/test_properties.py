"""Any shape, dtype and magnitude: what is decoded is within the codec's step, or encoding was refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstream.codec import container, registry
from kvstream.codec.artifact import half_of_layer
from kvstream.codec.errors import CodecError
from kvstream.codec.targets import DTYPES


@st.composite
def caches(draw: st.DrawFn) -> torch.Tensor:
    shape = tuple(draw(st.integers(1, most)) for most in (3, 3, 30, 3, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    kv = torch.randn((shape[0], 2, *shape[2:]), generator=generator, dtype=torch.float64)
    kv *= torch.exp(draw(st.floats(0, 3)) * torch.randn((*kv.shape[:2], 1, *kv.shape[3:]), generator=generator))
    kv *= 10.0 ** draw(st.integers(-42, 26))
    if draw(st.booleans()):
        kv[:, :, draw(st.integers(0, shape[2] - 1))] = 0
    return kv.to(DTYPES[draw(st.sampled_from(sorted(DTYPES)))])


def half_step(name: str, level: int, layers: int) -> torch.Tensor:
    """Half a step of each layer, as a fraction of the largest magnitude of a token."""
    halves = {"uniform": [(3, 7, 127)[level]] * layers, "artifact": half_of_layer(layers, min(level, 2))}[name]
    return 0.5 / torch.tensor(halves)[:, None, None]


@pytest.mark.parametrize("name", ["uniform", "artifact"])
@settings(deadline=None, max_examples=60)
@given(kv=caches(), data=st.data())
def test_errors_stay_within_the_step(name: str, kv: torch.Tensor, data: st.DataObject) -> None:
    codec = registry.make(name)
    level = data.draw(st.integers(0, 2))
    start = data.draw(st.integers(0, 1 << 30))
    positions = range(start, start + kv.shape[2])
    if not bool((kv.float().abs() <= 1e30).all()):
        with pytest.raises(CodecError, match="NaN, infinities"):
            codec.encode(kv, level, positions=positions)
        return
    coded = codec.encode(kv, level, positions=positions)
    assert container.parse(coded).header.start == start
    decoded = codec.decode(coded, torch.empty(kv.shape, dtype=torch.float32))
    exact = kv.float().flatten(3)
    largest = exact.abs().amax(dim=3)
    error = (decoded.flatten(3) - exact).abs().amax(dim=3)
    # Below the smallest normal number float32 itself rounds.
    assert bool((error <= 1.001 * half_step(name, level, len(kv)) * largest + 1e-37).all())


@settings(deadline=None, max_examples=40)
@given(kv=caches())
def test_raw_keeps_every_bit(kv: torch.Tensor) -> None:
    codec = registry.make("raw")
    decoded = codec.decode(codec.encode(kv, 0, positions=range(kv.shape[2])))
    assert torch.equal(decoded.view(torch.uint8), kv.view(torch.uint8))


@settings(deadline=None, max_examples=40)
@given(kv=caches())
def test_fp8_keeps_three_bits(kv: torch.Tensor) -> None:
    codec = registry.make("fp8")
    positions = range(kv.shape[2])
    if not bool((kv.float().abs() <= 1e30).all()):
        with pytest.raises(CodecError, match="NaN, infinities"):
            codec.encode(kv, 0, positions=positions)
        return
    coded = codec.encode(kv, 0, positions=positions)
    decoded = codec.decode(coded, torch.empty(kv.shape, dtype=torch.float32))
    largest = kv.float().abs().amax(dim=(2, 4), keepdim=True)
    # E4M3 has three bits after the leading one, down to 2^-6 of 448; below that its steps are 2^-9 / 448 of the scale.
    bound = torch.maximum(kv.float().abs() / 16, largest * 2**-10 / 448)
    assert bool(((decoded - kv.float()).abs() <= 1.01 * bound + 1e-37).all())
