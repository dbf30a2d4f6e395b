from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codec import container, kvstream, registry
from codec.api import Codec
from codec.errors import CodecError
from codec.profile import Profile
from codec.quantize import ALPHABET, HALF, Classes, design
from codec.transform import Rope, analyse, synthesise
from tests.codec.conformance import Conformance, L
from tests.codec.profiles import ROPE, rotated, stored
from tests.codec.synthetic import synthetic_kv


class TestKVStream(Conformance):
    tolerance = (0.6, 0.1)
    entropy_coded = True

    @staticmethod
    def build() -> Codec:
        return registry.make("kvstream", {}, stored("kvstream"))

    def test_positions_matter(self, codec: Codec) -> None:
        """The same keys at other positions are another chunk: encoded where they are, they stay small and exact."""
        kv = synthetic_kv(L, 60, 2, 8, seed=4, dtype=torch.float32)
        level = len(codec.levels) - 1
        sizes = []
        for start in (0, 1000, 50_000):
            moved = rotated(kv, start)
            data = codec.encode(moved, level, positions=range(start, start + 60))
            sizes.append(len(data))
            error = (codec.decode(data) - moved).pow(2).mean().sqrt() / moved.std()
            assert float(error) < 0.1
        assert max(sizes) < 1.02 * min(sizes)

    def test_levels_near_their_rates(self, codec: Codec) -> None:
        kv = rotated(synthetic_kv(L, 1000, 2, 8, seed=6))
        for level, info in enumerate(codec.levels):
            data = codec.encode(kv, level, positions=range(1000))
            assert 8 * len(data) / kv.numel() == pytest.approx(float(info.name.removesuffix(" bit")), rel=0.15)

    def test_pieces_that_a_decoder_takes_make_no_difference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Further bits and escapes are put where they belong in each of them."""
        samples = [rotated(synthetic_kv(L, 400, 2, 8, seed=1))]
        codec = kvstream.KVStream(profile=kvstream.fit(samples, rope=ROPE, target_bits=(1.2, 8.0)))
        kv = rotated(synthetic_kv(L, 1_300, 2, 8, seed=8, dtype=torch.float32))
        kv[0, 0, 3, 0, 1], kv[1, 1, 511, 1, 2], kv[2, 0, 512, 0, 3], kv[2, 1, 1_299, 1, 0] = 200.0, -150.0, 300.0, 90.0
        assert codec.columns(1)[1].any()
        for level in (0, 1):
            data = codec.encode(kv, level, positions=range(100, 1_400))
            assert len(container.parse(data).section("escs"))
            decoded = []
            for piece in (512, 1_024, 1_536):
                monkeypatch.setattr(kvstream, "PIECE", piece)
                decoded.append(codec.decode(data))
            for other in decoded[:2]:
                assert torch.allclose(other, decoded[2], rtol=1e-5, atol=1e-5)

    def test_bits_go_where_the_sensitivity_is(self) -> None:
        samples = [synthetic_kv(2, 300, 2, 8, seed=seed, dtype=torch.float32) for seed in (1, 2)]
        weights = torch.ones(2, 2, 2)
        weights[1, 1, 0] = 100.0
        codec = registry.make("kvstream", {}, kvstream.fit(samples, sensitivity=weights))
        kv = synthetic_kv(2, 300, 2, 8, seed=3, dtype=torch.float32)
        error = (codec.decode(codec.encode(kv, 2, positions=range(300))) - kv).pow(2).mean(dim=(2, 4))
        others = error[weights == 1].mean()
        assert float(others / error[1, 1, 0]) == pytest.approx(100**kvstream.TEMPER, rel=0.4)

    def test_a_metric_within_the_head_is_followed(self) -> None:
        """Errors along directions that the metric calls expensive are smaller, in the ratio of the tempered metric."""
        samples = [synthetic_kv(1, 2000, 1, 8, seed=seed, dtype=torch.float32) for seed in (1, 2)]
        axes = torch.linalg.qr(torch.randn((8, 8), generator=torch.Generator().manual_seed(5)))[0]
        cost = torch.tensor([100.0, 100, 10, 10, 10, 1, 1, 1])
        metric = (axes * cost @ axes.T).expand(1, 2, 1, 8, 8)
        codec = registry.make("kvstream", {}, kvstream.fit(samples, sensitivity=metric))
        kv = synthetic_kv(1, 2000, 1, 8, seed=3, dtype=torch.float32)
        error = codec.decode(codec.encode(kv, 5, positions=range(2000))) - kv
        along = (error @ axes).pow(2).mean(dim=(0, 1, 2, 3)) * cost**kvstream.TEMPER
        assert float(along.max() / along.min()) < 1.5

    def test_escapes_keep_what_no_table_codes(self, codec: Codec, kv: torch.Tensor) -> None:
        usual = rotated(kv, 100)
        spiky = usual.clone()
        spiky[1, 1, 3, 0, 0] = 200.0
        before, after = (container.parse(self.encode(codec, x, 3)).section("escs") for x in (usual, spiky))
        assert 0 < len(after) - len(before) <= 8 * 8
        assert len(before) <= 8 * 8
        assert float(codec.decode(self.encode(codec, spiky, 3))[1, 1, 3, 0, 0]) == pytest.approx(200, rel=0.01)

    def test_values_beyond_escapes_are_refused(self, codec: Codec, kv: torch.Tensor) -> None:
        with pytest.raises(CodecError, match="steps from what the profile was calibrated on"):
            self.encode(codec, kv * 1e7, len(codec.levels) - 1)

    def test_hostile_escapes(self, codec: Codec, kv: torch.Tensor) -> None:
        chunk = container.parse(self.encode(codec, kv))
        sections = {tag: bytes(content) for tag, content in chunk.sections.items()}
        for bad in (b"\xff" * 8, b"\0" * 16, b"\0" * 7, b"\0\0\0\0\xff\xff\0\0"):
            with pytest.raises(CodecError, match="escape"):
                codec.decode(container.pack(chunk.header, sections | {"escs": bad}))

    def test_short_segments_are_refused(self, codec: Codec) -> None:
        """A few bytes could claim a stream for every token and column, each of which takes a decoder its time."""

        def empty(columns: int, tokens: int) -> bytes:
            groups = -(-columns * tokens // 32)
            return struct.pack("<III", tokens, 1, 0) + bytes(3 * groups + -3 * groups % 4 + 2)

        assert isinstance(codec, kvstream.KVStream)
        kv = rotated(synthetic_kv(L, 600, 2, 8, seed=6))
        chunk = container.parse(codec.encode(kv, 5, positions=range(600)))
        sections = {tag: bytes(content) for tag, content in chunk.sections.items()}
        own, shift = codec.columns(5)
        forged = {"coef": empty(len(own), 600)}
        if shift.any():
            forged["fine"] = empty(np.count_nonzero(shift), 600)
        for tag, content in forged.items():
            with pytest.raises(CodecError, match="segments of 1 tokens"):
                codec.decode(container.pack(chunk.header, sections | {tag: content}))

    def test_other_models_are_refused(self, codec: Codec, kv: torch.Tensor) -> None:
        with pytest.raises(CodecError, match="the profile's model"):
            codec.encode(synthetic_kv(2, 20, 2, 8), 0, positions=range(20))
        chunk = container.parse(self.encode(codec, kv))
        header = replace(chunk.header, heads=1, head_dim=16)
        with pytest.raises(CodecError, match="the profile's model"):
            codec.decode(container.pack(header, {t: bytes(c) for t, c in chunk.sections.items()}))

    def test_damaged_profiles_are_refused(self) -> None:
        good = stored("kvstream")
        for name in good.tensors:
            if name == "inv_freq":
                continue
            without = {k: v for k, v in good.tensors.items() if k != name}
            with pytest.raises(CodecError, match="has no tensor"):
                registry.make("kvstream", {}, Profile(without, good.metadata))
        for name, value in (("classes", 255), ("steps", -1.0), ("mean", np.nan), ("values", np.inf), ("tables", 7)):
            tensors = dict(good.tensors)
            tensors[name] = np.full_like(tensors[name], value)
            with pytest.raises(CodecError):
                registry.make("kvstream", {}, Profile(tensors, good.metadata))

    @pytest.mark.parametrize(("name", "value"), [("steps", 3e38), ("scale", 3e38), ("scale", 1e28), ("mean", 3e38)])
    def test_profiles_of_values_that_no_cache_has_are_refused(self, name: str, value: float) -> None:
        """What they decode to would not be finite."""
        good = stored("kvstream")
        tensors = {**good.tensors, name: np.full_like(good.tensors[name], value)}
        with pytest.raises(CodecError, match="beyond 1e\\+30"):
            registry.make("kvstream", {}, Profile(tensors, good.metadata))

    def test_levels_fit_into_a_byte(self) -> None:
        good = stored("kvstream")
        many = {n: np.repeat(good.tensors[n][:1], 300, axis=0) for n in ("steps", "classes", "shifts")}
        facts = {**good.metadata, "levels": [str(level) for level in range(300)]}
        with pytest.raises(CodecError, match="impossible steps"):
            registry.make("kvstream", {}, Profile({**good.tensors, **many}, facts))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_the_models(interleaved: bool) -> None:
    """Against the definition: pair i at position p turns by p * theta^(-2i/R), the other dimensions stay."""
    theta, rotary, dim = 10_000.0, 6, 8
    rope = Rope((theta ** (-torch.arange(0, rotary, 2) / rotary))[None], interleaved)
    keys = torch.randn((2, 5, dim), generator=torch.Generator().manual_seed(0))
    turned = rope.rotate(keys.clone(), 0, range(40, 45))
    for t, position in enumerate(range(40, 45)):
        for i in range(rotary // 2):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + rotary // 2)
            angle = position * theta ** (-2 * i / rotary)
            turn = np.exp(1j * angle) * (keys[:, t, a].double() + 1j * keys[:, t, b].double()).numpy()
            assert np.allclose(turned[:, t, a], turn.real, atol=1e-4)
            assert np.allclose(turned[:, t, b], turn.imag, atol=1e-4)
    assert torch.equal(turned[..., rotary:], keys[..., rotary:])
    assert torch.allclose(rope.rotate(turned, 0, range(40, 45), undo=True), keys, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), start=st.integers(0, 100_000), tokens=st.integers(1, 12))
def test_analysis_and_synthesis_are_inverse(seed: int, start: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn((3, 2, tokens, 2, 8), generator=generator)
    basis = torch.randn((2, 8, 8), generator=generator) + 4 * torch.eye(8)
    mean = torch.randn((2, 8), generator=generator)
    positions = range(start, start + tokens)
    for side in (0, 1):
        coefficients = analyse(kv, 1, side, mean, torch.linalg.inv(basis), ROPE, positions)
        restored = synthesise(coefficients.transpose(1, 2), 1, side, mean, basis, ROPE, positions)
        assert torch.allclose(restored, kv[1, side], atol=1e-3)


def test_quantiser_is_optimal_for_its_tables() -> None:
    """No other symbol has a lower cost of squared error plus weighted bits (where thresholds are not clipped)."""
    from codec.quantize import RATE_WEIGHT

    generator = np.random.default_rng(1)
    values = (generator.laplace(size=(20, 3000)) * np.geomspace(0.2, 3, 20)[:, None]).astype(np.float32)
    found = design(values, [1.0], 8)
    classes, own = found.classes, found.class_of_column[0]
    symbols, fine, escapes = classes.quantise(values, own, found.shift_of_column[0])
    assert len(escapes) < 10
    assert len(fine) == 0
    cost = classes.tables.cost_bits[own]
    points = classes.values[own]
    taken = np.abs(symbols.astype(int) - HALF)
    chosen = (values - np.take_along_axis(points, symbols.astype(int), 1)) ** 2
    chosen += RATE_WEIGHT * np.take_along_axis(cost, symbols.astype(int), 1)
    for change in (-1, 1):
        other = np.clip(symbols.astype(int) + change, 0, ALPHABET - 1)
        price = (values - np.take_along_axis(points, other, 1)) ** 2
        price += RATE_WEIGHT * np.take_along_axis(cost, other, 1)
        worse = price >= chosen - 1e-5
        assert worse[taken < 3].mean() > 0.98


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), spread=st.floats(1, 1e4))
def test_wide_columns_keep_whole_steps(seed: int, spread: float) -> None:
    """Symbol, further bits and escapes together are the value rounded to whole steps, whatever its size."""
    generator = np.random.default_rng(seed)
    fitted = (generator.normal(size=(6, 400)) * np.array([[0.5], [2], [30], [100], [500], [2000]])).astype(np.float32)
    found = design(fitted, [1.0], 8)
    shift = found.shift_of_column[0]
    assert (shift > 0).sum() >= 3
    values = (generator.normal(size=(6, 50)) * spread).astype(np.float32).clip(-30_000, 30_000)
    symbols, fine, escapes = found.classes.quantise(values, found.class_of_column[0], shift)
    wide = np.flatnonzero(shift)
    whole = ((symbols[wide].astype(int) - HALF) << shift[wide, None]) + fine - (1 << shift[wide, None].astype(int) - 1)
    restored = dict(zip(wide, whole, strict=True))
    for escape in escapes:
        if escape["column"] in restored:
            restored[escape["column"]][escape["token"]] = escape["value"]
    for column, found_steps in restored.items():
        assert np.abs(found_steps - values[column]).max() <= 0.5001


def test_quantiser_refuses_bad_classes() -> None:
    classes = design(np.random.default_rng(0).normal(size=(4, 500)).astype(np.float32), [1.0], 4).classes
    with pytest.raises(CodecError, match="not finite"):
        Classes(classes.tables, np.full_like(classes.values, np.nan))
    with pytest.raises(CodecError, match="symbols"):
        Classes(classes.tables, classes.values[:, :5])


def test_fitting_checks_its_samples() -> None:
    with pytest.raises(CodecError, match="at least one"):
        kvstream.fit([])
    with pytest.raises(CodecError, match="different shapes"):
        kvstream.fit([synthetic_kv(2, 20, 2, 8), synthetic_kv(3, 20, 2, 8)])
    kv = synthetic_kv(2, 20, 2, 8)
    for factor in (float("nan"), float("inf"), 1e30):
        with pytest.raises(CodecError, match="a KV sample holds NaN"):
            kvstream.fit([kv.float() * factor])
    with pytest.raises(CodecError, match="the sensitivity holds NaN"):
        kvstream.fit([kv], sensitivity=torch.full((2, 2, 2), torch.nan))
