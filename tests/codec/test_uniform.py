from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstream.codec import registry
from kvstream.codec.api import Codec
from kvstream.codec.uniform import pack_bits, unpack_bits
from tests.codec.conformance import Conformance


class TestUniform(Conformance):
    tolerance = (0.45, 0.02)

    @staticmethod
    def build() -> Codec:
        return registry.make("uniform")

    def test_error_is_within_half_a_step(self, codec: Codec, kv: torch.Tensor) -> None:
        exact = kv.float()
        for level, half in enumerate((3, 7, 127)):
            decoded = codec.decode(self.encode(codec, exact, level))
            step = exact.flatten(3).abs().amax(dim=3) / half
            assert bool(((decoded - exact).abs().flatten(3) <= step[..., None] * 0.50001).all())

    def test_sizes_are_the_bits(self, codec: Codec) -> None:
        kv = torch.randn(2, 2, 16, 4, 8)
        for level, bits in enumerate((3, 4, 8)):
            data = self.encode(codec, kv, level)
            assert len(data) == 84 + 2 * 16 + 4 + 2 * 2 * 16 * 4 + kv.numel() * bits // 8


class TestFP8(Conformance):
    tolerance = (0.04, 0.04)

    @staticmethod
    def build() -> Codec:
        return registry.make("fp8")


@settings(deadline=None, max_examples=50)
@given(bits=st.sampled_from([3, 4, 8]), count=st.integers(1, 40), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_bit_packing_round_trip(bits: int, count: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    symbols = torch.randint(0, 1 << bits, (rows, count), generator=generator, dtype=torch.uint8)
    packed = pack_bits(symbols, bits)
    assert packed.shape == (rows, -(-count // 8) * bits)
    for row in range(rows):
        assert torch.equal(unpack_bits(packed[row], bits, count), symbols[row])


def test_bit_packing_order() -> None:
    symbols = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    word = sum(int(s) << (3 * i) for i, s in enumerate(symbols[0]))
    assert bytes(pack_bits(symbols, 3)[0].tolist()) == word.to_bytes(3, "little")
    assert bytes(pack_bits(symbols, 4)[0].tolist()) == bytes([0x21, 0x43, 0x65, 0x07])
