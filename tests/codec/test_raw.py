from __future__ import annotations

import pytest
import torch

from kvstream.codec import registry
from kvstream.codec.api import Codec
from tests.codec.conformance import Conformance


class TestRaw(Conformance):
    tolerance = (0.0, 0.0)

    @staticmethod
    def build() -> Codec:
        return registry.make("raw")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_every_bit_is_kept(self, codec: Codec, kv: torch.Tensor, dtype: torch.dtype) -> None:
        exact = torch.randn(kv.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        assert torch.equal(codec.decode(self.encode(codec, exact)), exact)
