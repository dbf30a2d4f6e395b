from __future__ import annotations

import numpy as np
import pytest
import torch

from kvstream.codec import cachegen, container, registry
from kvstream.codec.api import Codec
from kvstream.codec.cachegen import SCALES, columns_first, symbols_of
from kvstream.codec.errors import CodecError
from kvstream.codec.profile import Profile
from tests.codec.conformance import Conformance
from tests.codec.profiles import stored
from tests.codec.synthetic import synthetic_kv


class TestCacheGen(Conformance):
    tolerance = (0.25, 0.05)
    entropy_coded = True

    @staticmethod
    def build() -> Codec:
        return registry.make("cachegen", {}, stored("cachegen"))

    def test_anchors_are_8_bit_and_errors_stay_in_their_bins(self, codec: Codec, kv: torch.Tensor) -> None:
        """By the definition in the paper: anchors within half a step of 1/127, differences within half a bin."""
        exact = kv.float()
        for level, scale in enumerate(SCALES):
            decoded = codec.decode(self.encode(codec, exact, level))
            error = (decoded - exact).abs().flatten(3).amax(dim=3)
            anchors = exact.flatten(3)[:, :, ::10]
            assert bool((error[:, :, ::10] <= anchors.abs().amax(dim=3) / 127 * 0.501).all())
            restored = decoded.flatten(3)[:, :, ::10].repeat_interleave(10, dim=2)[:, :, : kv.shape[2]]
            largest = (exact.flatten(3) - restored).abs().amax(dim=3)
            bins = torch.tensor(cachegen.BINS)[:, None, None] * scale / cachegen.BINS_PER_MAGNITUDE
            is_delta = torch.arange(kv.shape[2]) % 10 != 0
            assert bool((error <= largest * bins * 0.501)[:, :, is_delta].all())

    def test_bins_grow_with_depth(self) -> None:
        steps = cachegen.delta_steps(9, 1.0)
        assert (steps / steps[0]).tolist() == pytest.approx([1, 1, 1, 2, 2, 2, 3, 3, 3])

    def test_no_symbol_leaves_the_alphabet(self) -> None:
        """Adversarial statistics: a profile never needs an escape, whatever the data."""
        kv = torch.randn((3, 2, 33, 2, 8), generator=torch.Generator().manual_seed(1)) ** 9 * 1e4
        for scale in SCALES:
            _, anchors, _, deltas = symbols_of(kv, scale)
            assert int(anchors.max()) <= 254
            assert int(deltas.max()) <= 2 * cachegen.halves_of(3, scale)[0]

    def test_distributions_are_per_column(self) -> None:
        """The size is near the empirical entropy of each column's own histogram, not that of a shared one."""
        codec = self.build()
        kv = synthetic_kv(3, 2000, 2, 8, seed=77)
        data = container.parse(codec.encode(kv, 2, positions=range(2000)))
        symbols = columns_first(symbols_of(kv, SCALES[2])[3])
        bits = 0.0
        for column in symbols:
            p = np.bincount(column) / len(column)
            bits -= len(column) * float((p[p > 0] * np.log2(p[p > 0])).sum())
        assert bits < 8 * len(data.section("delt")) < 1.06 * bits

    def test_profiles_of_others_are_refused(self, codec: Codec, kv: torch.Tensor) -> None:
        with pytest.raises(CodecError, match="calibrate"):
            registry.make("cachegen")
        with pytest.raises(CodecError, match="profile is for codec"):
            registry.make("cachegen", {}, stored("kvstream"))
        other = cachegen.fit([synthetic_kv(3, 50, 2, 8, seed=9)])
        with pytest.raises(CodecError, match="needs profile"):
            registry.make("cachegen", {}, other).decode(self.encode(codec, kv))
        with pytest.raises(CodecError, match="the profile's model"):
            codec.encode(synthetic_kv(2, 20, 2, 8), 0, positions=range(20))

    def test_segments_are_the_encoders(self, codec: Codec, kv: torch.Tensor) -> None:
        chunk = container.parse(self.encode(codec, kv))
        sections = {tag: bytearray(content) for tag, content in chunk.sections.items()}
        sections["delt"][4:8] = (1).to_bytes(4, "little")
        with pytest.raises(CodecError, match="segments of 1 tokens"):
            codec.decode(container.pack(chunk.header, {tag: bytes(x) for tag, x in sections.items()}))

    def test_damaged_profiles_are_refused(self) -> None:
        good = stored("cachegen")
        for name in ("anchor", "delta0"):
            tensors = {k: v for k, v in good.tensors.items() if k != name}
            with pytest.raises(CodecError, match="has no tensor"):
                registry.make("cachegen", {}, Profile(tensors, good.metadata))
            tensors[name] = np.ones_like(good.tensors[name])
            match = "sum to" if name == "anchor" else r"'delta0' to symbols that layer 1 does not have.*--fresh"
            with pytest.raises(CodecError, match=match):
                registry.make("cachegen", {}, Profile(tensors, good.metadata))

    def test_slots_are_for_symbols_that_a_layer_can_have(self, codec: Codec) -> None:
        assert codec.profile is not None
        for level, scale in enumerate(SCALES):
            tables = codec.profile.tensors[f"delta{level}"].reshape(3, 2 * 2 * 8, -1)
            for table, half in zip(tables, cachegen.halves_of(3, scale), strict=True):
                assert bool((table[:, : 2 * half + 1] > 0).all())
                assert not bool(table[:, 2 * half + 1 :].any())

    def test_piece_size_makes_no_difference(self, codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
        data = self.encode(codec, synthetic_kv(3, 57, 2, 8, seed=8), 3)
        whole = codec.decode(data)
        for piece in (10, 20, 50, 60):
            monkeypatch.setattr(cachegen, "PIECE", piece)
            assert torch.equal(codec.decode(data), whole)

    def test_unknown_coders_are_named(self) -> None:
        with pytest.raises(CodecError, match="choose from"):
            registry.make("cachegen", {"coder": "zip"}, stored("cachegen"))


class TestCacheGenArithmetic(Conformance):
    tolerance = (0.25, 0.05)
    entropy_coded = True

    @staticmethod
    def build() -> Codec:
        return registry.make("cachegen", {"coder": "ac"}, stored("cachegen"))

    def golden_name(self, codec: Codec) -> str:
        return "cachegen-ac"

    def test_coders_agree(self, codec: Codec, kv: torch.Tensor) -> None:
        """The entropy coder changes the bytes, but not the values, and hardly the size."""
        other = registry.make("cachegen", {}, stored("cachegen"))
        for level in range(len(codec.levels)):
            mine, theirs = self.encode(codec, kv, level), self.encode(other, kv, level)
            assert torch.equal(codec.decode(mine), other.decode(theirs))
            assert len(mine) == pytest.approx(len(theirs), rel=0.1)


@pytest.mark.parametrize("coder", ["rans", "ac"])
def test_models_of_many_columns(coder: str) -> None:
    """Llama-2-7B has 262,144 of them, and a coder's tables are at most 65,536."""
    layers, width = 33, 1_024

    def flat(halves: list[int], widest: int) -> np.ndarray:
        tables = np.zeros((layers, 2 * width, 2 * widest + 1), np.uint16)
        for table, half in zip(tables, halves, strict=True):
            table[:, : 2 * half + 1] = 1024 // (2 * half + 1)
            table[:, half] += 1024 % (2 * half + 1)
        return tables.reshape(-1, 2 * widest + 1)

    tensors = {"anchor": flat([cachegen.ANCHOR_HALF] * layers, cachegen.ANCHOR_HALF)}
    for level, scale in enumerate(SCALES):
        halves = cachegen.halves_of(layers, scale)
        tensors[f"delta{level}"] = flat(halves, halves[0])
    facts = {"codec": "cachegen", "layers": layers, "heads": 1, "head_dim": width}
    codec = registry.make("cachegen", {"coder": coder}, Profile(tensors, facts))
    kv = torch.randn((layers, 2, 11, 1, width), generator=torch.Generator().manual_seed(0))
    error = codec.decode(codec.encode(kv, 4, positions=range(11))) - kv
    assert float(error.pow(2).mean().sqrt()) < 0.05


def test_differences_beyond_the_caches_dtype_are_refused() -> None:
    """Its scale would be infinite, or clipped and the values silently wrong."""
    codec = registry.make("cachegen", {}, stored("cachegen"))
    kv = torch.zeros((3, 2, 20, 2, 8))
    kv[:, :, 0], kv[:, :, 1] = -60_000, 60_000
    with pytest.raises(CodecError, match=r"more than torch.float16 can hold \(65504\)"):
        codec.encode(kv.half(), 0, positions=range(20))
    assert float(codec.decode(codec.encode(kv, 4, positions=range(20)))[0, 0, 1, 0, 0]) == pytest.approx(6e4, rel=0.01)


def test_fitting_checks_its_samples() -> None:
    with pytest.raises(CodecError, match="at least one"):
        cachegen.fit([])
    with pytest.raises(CodecError, match="different shapes"):
        cachegen.fit([synthetic_kv(2, 20, 2, 8), synthetic_kv(3, 20, 2, 8)])
    with pytest.raises(CodecError, match="a KV sample holds NaN"):
        cachegen.fit([synthetic_kv(2, 20, 2, 8) * float("nan")])
