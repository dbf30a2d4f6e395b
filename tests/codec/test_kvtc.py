from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from kvstream.codec import container, kvtc, registry
from kvstream.codec.api import Codec
from kvstream.codec.errors import CodecError
from kvstream.codec.kvtc import Group
from kvstream.codec.profile import Profile
from tests.codec.conformance import Conformance, D, H, L
from tests.codec.profiles import ROPE, rotated, stored
from tests.codec.synthetic import synthetic_kv

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class TestKVTC(Conformance):
    tolerance = (0.95, 0.7)
    """Of 24 independent channels a side, which no basis makes fewer, 2 bits each."""

    @staticmethod
    def build() -> Codec:
        return registry.make("kvtc", {}, stored("kvtc"))

    def test_outliers_are_never_silently_wrong(self, codec: Codec, kv: torch.Tensor) -> None:
        """They are, as published: what lies outside the components kept is lost. Nothing else is."""
        spiky = kv.clone()
        spiky[0, 0, 7, 1, 2] = 3000.0
        data = self.encode(codec, spiky, 3)
        other = torch.arange(kv.shape[2]) != 7
        assert torch.equal(codec.decode(data)[:, :, other], codec.decode(self.encode(codec, kv, 3))[:, :, other])
        with pytest.raises(CodecError, match="beyond what float16 can hold"):
            self.encode(codec, spiky.float() * 1e9, 3)

    @pytest.mark.parametrize(("start", "sinks"), [(0, 4), (2, 2), (3, 1), (4, 0), (100, 0)])
    def test_sinks_are_the_first_four_of_a_context(
        self, codec: Codec, kv: torch.Tensor, start: int, sinks: int
    ) -> None:
        decoded = codec.decode(self.encode(codec, kv, 0, start))
        equal = (decoded == kv).flatten(3).all(dim=3).all(dim=1).all(dim=0)
        assert equal.tolist() == [True] * sinks + [False] * (kv.shape[2] - sinks)
        if sinks:  # a chunk of nothing else
            alone = kv[:, :, :sinks]
            assert torch.equal(codec.decode(self.encode(codec, alone, 0, start)), alone)

    @pytest.mark.parametrize("recent", [16, 128])
    def test_recent_tokens_are_exact(self, codec: Codec, kv: torch.Tensor, recent: int) -> None:
        own = registry.make("kvtc", {"recent": recent}, codec.profile)
        decoded = codec.decode(self.encode(own, kv, 3, 0))
        first = max(4, kv.shape[2] - recent)
        assert torch.equal(decoded[:, :, first:], kv[:, :, first:])
        assert torch.equal(decoded[:, :, :first], codec.decode(self.encode(codec, kv[:, :, :first], 3, 0)))

    def test_what_the_basis_spans_is_kept(self) -> None:
        """Caches of few directions, turned by RoPE: the components that carry them are found and coded."""
        mix = torch.randn((5, L * 2 * H * D), generator=torch.Generator().manual_seed(1))

        def cache(seed: int) -> torch.Tensor:
            drawn = torch.randn((300, 5), generator=torch.Generator().manual_seed(seed)) @ mix
            return rotated(drawn.view(300, L, 2, H, D).permute(1, 2, 0, 3, 4))

        codec = registry.make("kvtc", {}, kvtc.fit([cache(1), cache(2)], rope=ROPE))
        kv = cache(3)
        error = codec.decode(codec.encode(kv, 3, positions=range(300))) - kv
        assert float(error.pow(2).mean().sqrt() / kv.std()) < 0.1
        flat = registry.make("kvtc", {}, kvtc.fit([cache(1), cache(2)]))
        worse = flat.decode(flat.encode(kv, 3, positions=range(300))) - kv
        assert float(worse.pow(2).mean()) > 4 * float(error.pow(2).mean())

    def test_bombs_are_refused(self, codec: Codec, kv: torch.Tensor) -> None:
        chunk = container.parse(self.encode(codec, kv))
        sections = {tag: bytes(content) for tag, content in chunk.sections.items()}
        right = zlib.decompress(sections["keys"])
        for content, match in (
            (zlib.compress(bytes(1 << 26), 9), "does not hold"),
            (zlib.compress(right + b"\0"), "does not hold"),
            (zlib.compress(right[:-1]), "does not hold"),
            (zlib.compress(right) + b"\0", "does not hold"),
            (zlib.compress(right)[:-1], "does not hold"),
            (b"\0" * len(right), "not Deflate's"),
            (b"", "too short"),
            (zlib.compress(b"\xff" * len(right)), "impossible shifts"),
        ):
            with pytest.raises(CodecError, match=match):
                codec.decode(container.pack(chunk.header, sections | {"keys": content}))

    def test_context_beginnings_need_their_sinks(self, codec: Codec, kv: torch.Tensor) -> None:
        chunk = container.parse(self.encode(codec, kv, 0, 0))
        with pytest.raises(CodecError, match="lacks the first tokens"):
            codec.decode(container.pack(chunk.header, {**chunk.sections, "exac": b""}))

    def test_profiles_of_others_are_refused(self, codec: Codec) -> None:
        with pytest.raises(CodecError, match="calibrate"):
            registry.make("kvtc")
        with pytest.raises(CodecError, match="profile is for codec"):
            registry.make("kvtc", {}, stored("cachegen"))
        with pytest.raises(CodecError, match="the profile's model"):
            codec.encode(synthetic_kv(2, 20, 2, 8), 0, positions=range(20))

    @pytest.mark.parametrize("groups", [[], [(2, 4)], [(16, 3)], [(16, 4), (1024, 2)]])
    def test_impossible_groups_are_refused(self, groups: list[tuple[int, int]]) -> None:
        good = stored("kvtc")
        table = np.array(groups, np.uint32).reshape(-1, 2)
        with pytest.raises(CodecError, match="impossible groups"):
            registry.make("kvtc", {}, Profile({**good.tensors, "vals.groups.1": table}, good.metadata))

    @CUDA
    def test_cuda(self, codec: Codec, kv: torch.Tensor) -> None:
        data = self.encode(codec, kv)
        assert self.encode(codec, kv.cuda()) == data
        out = torch.empty_like(kv, device="cuda")
        codec.decode(data, out)
        assert torch.equal(out.cpu(), codec.decode(data))


def test_groups_are_the_best_within_the_budget() -> None:
    """Against every combination, for few components."""
    sample = torch.randn((50, 3), generator=torch.Generator().manual_seed(2)) * torch.tensor([9.0, 3.0, 1.0])
    for budget in (36, 80, 120):
        (found,) = kvtc.allocate(sample, [budget])
        assert sum(group.token_bits for group in found) <= budget

        def error(bits: tuple[int, ...]) -> float:
            left = sample.clone()
            for index, own in enumerate(bits):
                part = sample[:, index : index + 1]
                left[:, index : index + 1] -= kvtc.dequantise(*kvtc.quantise(part, own), own)
            return float(left.square().sum())

        counts = [n for n in (1, 2, 3) if 34 * n <= budget]
        best = min(error((2,) * n) for n in counts)
        assert error(tuple(group.bits for group in found)) <= best * 1.001 + 1e-3 * float(sample.square().sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantisers(bits: int) -> None:
    values = torch.randn((40, 16), generator=torch.Generator().manual_seed(3)) * 7
    values[3] = 2.5
    error = (kvtc.dequantise(*kvtc.quantise(values, bits), bits) - values).abs()
    span = values.amax(dim=1) - values.amin(dim=1)
    assert bool((error <= span[:, None] * {2: 0.17, 4: 0.035, 8: 0.02}[bits] + 1e-2 * (span > 0)[:, None]).all())
    assert Group(0, 16, bits).token_bits == 32 + 16 * bits


def test_fitting_checks_its_samples() -> None:
    with pytest.raises(CodecError, match="at least one KV sample"):
        kvtc.fit([synthetic_kv(2, 4, 2, 8)])
    with pytest.raises(CodecError, match="different shapes"):
        kvtc.fit([synthetic_kv(2, 20, 2, 8), synthetic_kv(3, 20, 2, 8)])
    with pytest.raises(CodecError, match="a KV sample holds NaN"):
        kvtc.fit([synthetic_kv(2, 20, 2, 8) * float("nan")])
