from __future__ import annotations

import pytest
import torch

from kvstream.codec import container, registry
from kvstream.codec.api import Codec
from kvstream.codec.errors import CodecError
from kvstream.codec.targets import StridedTarget
from tests.codec.conformance import Conformance
from tests.codec.synthetic import synthetic_kv


class TestKIVI(Conformance):
    tolerance = (0.3, 0.07)

    @staticmethod
    def build() -> Codec:
        return registry.make("kivi")

    def test_keys_by_channel_and_values_by_token(self, codec: Codec) -> None:
        """By the definition in the paper, written out here: within half a step of each group's own range."""
        kv = synthetic_kv(2, 96, 2, 64, seed=8, dtype=torch.float32)
        for level, steps in enumerate((3, 15)):
            error = (codec.decode(self.encode(codec, kv, level)) - kv).abs()
            keys = kv[:, 0].unflatten(1, (3, 32))
            allowed = (keys.amax(dim=2) - keys.amin(dim=2)) / steps * 0.501
            assert bool((error[:, 0].unflatten(1, (3, 32)) <= allowed[:, :, None]).all())
            values = kv[:, 1].unflatten(3, (2, 32))
            allowed = (values.amax(dim=4) - values.amin(dim=4)) / steps * 0.501
            assert bool((error[:, 1].unflatten(3, (2, 32)) <= allowed[..., None]).all())

    def test_rate_as_published(self, codec: Codec) -> None:
        """2 bits and two numbers of 16 bits a group of 32."""
        kv = synthetic_kv(2, 128, 2, 64, seed=8)
        sizes = container.inspect(self.encode(codec, kv))["sections"]
        assert 8 * sum(sizes.values()) == 3 * kv.numel()

    @pytest.mark.parametrize("recent", [16, 40, 128])
    def test_recent_tokens_are_exact(self, codec: Codec, kv: torch.Tensor, recent: int) -> None:
        """Whoever decodes need not know how many they are."""
        own = registry.make("kivi", {"recent": recent})
        decoded = codec.decode(self.encode(own, kv))
        first = max(0, kv.shape[2] - recent)
        assert torch.equal(decoded[:, :, first:], kv[:, :, first:])
        if first:
            assert torch.equal(decoded[:, :, :first], codec.decode(self.encode(codec, kv[:, :, :first])))

    def test_impossible_settings_and_sections(self, codec: Codec, kv: torch.Tensor) -> None:
        for recent in (-1, 1.5, True, "128"):
            with pytest.raises(CodecError, match="recent is a number of tokens"):
                registry.make("kivi", {"recent": recent})
        chunk = container.parse(self.encode(codec, kv))
        sections = {tag: bytes(content) for tag, content in chunk.sections.items()}
        infinite = b"\x80\x7f" * (len(sections["lows"]) // 2)
        for tag in ("lows", "step"):
            with pytest.raises(CodecError, match="holds"):
                codec.decode(container.pack(chunk.header, sections | {tag: infinite}))
        with pytest.raises(CodecError, match="'exac' has 3 bytes"):
            codec.decode(container.pack(chunk.header, sections | {"exac": b"abc"}))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_cuda(self, codec: Codec, kv: torch.Tensor) -> None:
        data = self.encode(codec, kv)
        assert self.encode(codec, kv.cuda()) == data
        out = torch.empty_like(kv, device="cuda")
        codec.decode(data, StridedTarget(out))
        assert torch.equal(out.cpu(), codec.decode(data))
