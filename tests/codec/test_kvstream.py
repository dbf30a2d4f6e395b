from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstream.codec import container, registry
from kvstream.codec.api import Codec
from kvstream.codec.errors import CodecError
from kvstream.codec.kvstream import KVStream, cpu, fit, fitting
from kvstream.codec.profile import Profile
from kvstream.codec.quantize import ALPHABET, HALF, Classes, design
from kvstream.codec.transform import Rope, restore, vectors
from tests.codec.conformance import Conformance, D, H, L
from tests.codec.profiles import ROPE, SINKS, rotated, stored
from tests.codec.synthetic import synthetic_kv


class TestKVStream(Conformance):
    tolerance = (0.9, 0.02)

    @staticmethod
    def build() -> Codec:
        return registry.make("kvstream", {}, stored("kvstream"))

    def test_positions_matter(self, codec: Codec) -> None:
        """The same keys at other positions: encoded with those positions, they stay small and exact."""
        kv = synthetic_kv(L, 60, 2, 8, seed=4, dtype=torch.float32)
        level = len(codec.levels) - 1
        sizes = []
        for start in (SINKS, 1000, 50_000):
            moved = rotated(kv, start)
            data = codec.encode(moved, level, positions=range(start, start + 60))
            sizes.append(len(data))
            error = (codec.decode(data) - moved).pow(2).mean().sqrt() / moved.std()
            assert float(error) < 0.1
        assert max(sizes) < 1.02 * min(sizes)

    def test_levels_near_their_rates(self, codec: Codec) -> None:
        kv = rotated(synthetic_kv(L, 1000, 2, 8, seed=6), 500)
        for level, info in enumerate(codec.levels):
            data = codec.encode(kv, level, positions=range(500, 1500))
            assert 8 * len(data) / kv.numel() == pytest.approx(
                float(info.name.removesuffix(" bit")), rel=0.15, abs=0.03
            )

    def test_a_cache_that_never_changes(self, codec: Codec) -> None:
        """No column is alive, and the chunk smaller than a container may be."""
        assert isinstance(codec, KVStream)
        tokens = 40_000
        mean = codec.parameters.mean[:, :, None].expand(-1, -1, tokens, -1, -1)
        kv = rotated(mean.contiguous(), 1000)
        data = codec.encode(kv, 0, positions=range(1000, 1000 + tokens))
        assert codec.describe(data)["fallback"]
        assert float((codec.decode(data) - kv).abs().max()) < 0.01 * float(kv.abs().max())

    def test_description_says_what_a_chunk_holds(self, codec: Codec) -> None:
        assert isinstance(codec, KVStream)
        kv = rotated(synthetic_kv(L, 600, H, D, seed=6))
        about = codec.describe(codec.encode(kv, 0, positions=range(600)))
        assert not about["fallback"]
        assert about["tokens_apart"] == SINKS
        assert 0 < about["live_columns"] < about["columns"] == L * 2 * H * D
        share = [len(group.layers) / L for group in codec.parameters.groups]
        assert sum(a * b for a, b in zip(about["bits_by_group"], share, strict=True)) < about["bits_per_element"]
        assert codec.describe(codec.encode(kv, 5, positions=range(600)))["wide_columns"] > 0

    def test_segments_are_decoded_wherever_they_are_cut(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Low bits and escapes end up in the right elements whatever the number of rows at a time."""
        samples = [rotated(synthetic_kv(L, 400, 2, 8, seed=1))]
        codec = KVStream(profile=fit(samples, rope=ROPE, target_bits=(1.2, 7.0), group=3))
        kv = rotated(synthetic_kv(L, 1_300, 2, 8, seed=8, dtype=torch.float32), 100)
        kv[0, 0, 3, 0, 1], kv[1, 1, 511, 1, 2], kv[2, 0, 512, 0, 3], kv[2, 1, 1_299, 1, 0] = 200.0, -150.0, 300.0, 90.0
        for level in (0, 1):
            data = codec.encode(kv, level, positions=range(100, 1_400))
            assert len(container.parse(data).section("escs"))
            assert bool(len(container.parse(data).section("fine"))) == (level == 1)
            decoded = []
            for rows in (100, 128, 512):
                monkeypatch.setattr(cpu, "ROWS", rows)
                decoded.append(codec.decode(data))
            for other in decoded[:2]:
                assert torch.allclose(other, decoded[2], rtol=1e-5, atol=1e-5)
            assert float(decoded[0][2, 0, 512, 0, 3]) == pytest.approx(300, rel=0.02)
            assert float(decoded[0][2, 1, 1_299, 1, 0]) == pytest.approx(90, rel=0.02)

    def test_bits_go_where_the_sensitivity_is(self) -> None:
        samples = [synthetic_kv(2, 300, 2, 8, seed=seed, dtype=torch.float32) for seed in (1, 2)]
        weights = torch.ones(2, 2, 2)
        weights[1, 1, 0] = 100.0
        codec = registry.make("kvstream", {}, fit(samples, sensitivity=weights, target_bits=(4.0,)))
        kv = synthetic_kv(2, 300, 2, 8, seed=3, dtype=torch.float32)
        error = (codec.decode(codec.encode(kv, 0, positions=range(300))) - kv).pow(2).mean(dim=(2, 4))
        others = error[weights == 1].mean()
        assert float(others / error[1, 1, 0]) == pytest.approx(100**fitting.TEMPER, rel=0.4)

    def test_a_metric_within_the_head_is_followed(self) -> None:
        """Errors along directions that the metric calls expensive are smaller, in the ratio of the tempered metric."""
        samples = [synthetic_kv(1, 2000, 1, 8, seed=seed, dtype=torch.float32) for seed in (1, 2)]
        axes = torch.linalg.qr(torch.randn((8, 8), generator=torch.Generator().manual_seed(5)))[0]
        cost = torch.tensor([100.0, 100, 10, 10, 10, 1, 1, 1])
        metric = (axes * cost @ axes.T).expand(1, 2, 1, 8, 8)
        codec = registry.make("kvstream", {}, fit(samples, sensitivity=metric, target_bits=(5.0,)))
        kv = synthetic_kv(1, 2000, 1, 8, seed=3, dtype=torch.float32)
        error = codec.decode(codec.encode(kv, 0, positions=range(2000))) - kv
        along = (error @ axes).pow(2).mean(dim=(0, 1, 2, 3)) * cost**fitting.TEMPER
        assert float(along.max() / along.min()) < 1.5

    def test_escapes_keep_what_no_table_codes(self, codec: Codec) -> None:
        usual = rotated(synthetic_kv(L, 40, H, D, seed=1), 100)
        spiky = usual.clone()
        spiky[1, 1, 3, 0, 0] = 200.0
        before, after = (container.parse(self.encode(codec, x, 3)).section("escs") for x in (usual, spiky))
        assert len(before) < len(after) < len(before) + 200
        assert float(codec.decode(self.encode(codec, spiky, 3))[1, 1, 3, 0, 0]) == pytest.approx(200, rel=0.01)

    @pytest.mark.parametrize("value", [1e6, -9e29])
    def test_a_value_that_nothing_prepares_for_is_exact_and_harms_no_other(self, codec: Codec, value: float) -> None:
        usual = rotated(synthetic_kv(L, 300, H, D, seed=1, dtype=torch.float32), 100)
        for level in range(len(codec.levels)):
            spiky = usual.clone()
            spiky[1, 1, 3, 0, 0] = value
            data = self.encode(codec, spiky, level)
            assert codec.describe(data)["tokens_apart"] == 1
            decoded = codec.decode(data)
            assert torch.equal(decoded[:, :, 3], spiky[:, :, 3])
            assert len(data) < len(self.encode(codec, usual, level)) + 4 * usual[:, :, 3].numel() + 200
            others = [t for t in range(300) if t != 3]
            errors = [
                float((found - usual)[:, :, others].pow(2).mean())
                for found in (decoded, codec.decode(self.encode(codec, usual, level)))
            ]
            assert errors[0] == pytest.approx(errors[1], rel=0.02)

    def test_escapes_beyond_what_they_can_hold_put_their_token_apart(self, codec: Codec) -> None:
        """Within what `apart.find` lets pass, but too many steps."""
        good = stored("kvstream")
        spread = np.full_like(good.tensors["spread"], 1e9)
        lenient = KVStream(profile=Profile({**good.tensors, "spread": spread}, good.metadata))
        kv = rotated(synthetic_kv(L, 300, H, D, seed=1, dtype=torch.float32), 100)
        kv[2, 0, 7, 1, 4] = 1e9
        data = self.encode(lenient, kv, 5)
        assert lenient.describe(data)["tokens_apart"] == 1
        assert torch.equal(lenient.decode(data)[:, :, 7], kv[:, :, 7])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_sinks_come_back_to_the_bit(self, codec: Codec, dtype: torch.dtype) -> None:
        kv = rotated(synthetic_kv(L, 200, H, D, seed=2), 0).to(dtype)
        kv[:, :, 0] *= 30
        for start, exact in ((0, 2), (1, 1), (2, 0)):
            data = codec.encode(kv[:, :, start:], 2, positions=range(start, 200))
            decoded = codec.decode(data)
            assert torch.equal(decoded[:, :, :exact], kv[:, :, start : start + exact])
            assert codec.describe(data)["tokens_apart"] == exact

    @pytest.mark.parametrize("kind", ["wide", "constant", "huge", "tiny"])
    @pytest.mark.parametrize("tokens", [1, 40, 600])
    def test_a_chunk_is_never_larger_than_eight_bits(self, codec: Codec, kind: str, tokens: int) -> None:
        draw = torch.Generator().manual_seed(tokens)
        kv = {
            "wide": 3 * rotated(synthetic_kv(L, tokens, H, D, seed=9)),
            "constant": torch.full((L, 2, tokens, H, D), 5.0),
            "huge": 1e4 * torch.randn((L, 2, tokens, H, D), generator=draw),
            "tiny": 1e-4 * torch.randn((L, 2, tokens, H, D), generator=draw),
        }[kind]
        uniform = registry.make("uniform").encode(kv, 2, positions=range(tokens))
        for start in (0, 700):
            for level in range(len(codec.levels)):
                data = codec.encode(kv, level, positions=range(start, start + tokens))
                assert len(data) < len(uniform) + 300
                decoded = codec.decode(data)
                if "bits" in container.parse(data).sections:
                    expected = registry.make("uniform").decode(uniform)
                    assert torch.equal(decoded, expected)
                    assert codec.describe(data)["fallback"]

    def test_a_profile_of_another_model_of_the_shape_costs_no_more_than_eight_bits(self, codec: Codec) -> None:
        kv = 3 * synthetic_kv(L, 300, H, D, seed=9, channel_seed=99)
        uniform = registry.make("uniform").encode(kv, 2, positions=range(300))
        for level in range(len(codec.levels)):
            data = codec.encode(kv, level, positions=range(300))
            assert len(data) < len(uniform) + 300
            assert torch.isfinite(codec.decode(data)).all()

    def test_dead_columns_have_no_stream(self, codec: Codec) -> None:
        assert isinstance(codec, KVStream)
        kv = rotated(synthetic_kv(L, 600, H, D, seed=6), 100)
        sizes = []
        for level in (0, 5):
            chunk = container.parse(codec.encode(kv, level, positions=range(100, 700)))
            content = cpu.Content.of(codec.parameters, chunk)
            assert content.streams is not None
            assert content.streams.columns == len(content.rest.alive)
            sizes.append(content.streams.columns)
        assert sizes[0] < 0.5 * sizes[1]
        mean = codec.parameters.mean[:, :, None].expand(L, 2, 50, H, D)
        nothing = codec.encode(rotated(mean, 100), 0, positions=range(100, 150))
        assert codec.describe(nothing)["live_columns"] == 0
        assert container.parse(nothing).section("coef") == b""
        assert torch.allclose(codec.decode(nothing), rotated(mean, 100), atol=1e-4)

    def test_other_text_gets_other_kinds(self, codec: Codec) -> None:
        """Columns twice as wide as in calibration are not coded with the tables of calibration."""
        assert isinstance(codec, KVStream)
        parameters = codec.parameters
        mean = parameters.mean[:, :, None]
        usual = synthetic_kv(L, 500, H, D, seed=6, dtype=torch.float32)
        alive = []
        for kv in (mean + 0.3 * (usual - mean), usual, mean + 2.5 * (usual - mean)):
            data = codec.encode(rotated(kv, 100), 2, positions=range(100, 600))
            rest = cpu.Content.of(parameters, container.parse(data)).rest
            alive.append(dict(zip(rest.alive.tolist(), rest.own.tolist(), strict=True)))
        assert len(alive[0]) + 5 < len(alive[1]) < len(alive[2]) - 5
        both = set(alive[1]) & set(alive[2])
        assert sum(alive[1][c] != alive[2][c] for c in both) > 0.8 * len(both)

    @pytest.mark.parametrize(
        ("tag", "content"),
        [
            ("kind", b""),
            ("kind", b"\xff" * 40),
            ("kind", zlib.compress(bytes(95), 6)),
            ("kind", zlib.compress(bytes(97), 6)),
            ("kind", zlib.compress(bytes(1 << 20), 6)),
            ("kind", zlib.compress(bytes([200]) * 96, 6)),
            ("kind", zlib.compress(bytes(96)) + b"x"),
            ("kind", zlib.compress(bytes(96)) + b"\0\0"),
            ("apar", bytes(4)),
            ("apar", b"\1\0\0"),
            ("apar", struct.pack("<II", 1, 40) + bytes(192)),
            ("apar", struct.pack("<III", 2, 3, 3) + bytes(384)),
            ("apar", struct.pack("<III", 2, 3, 2) + bytes(384)),
            ("apar", struct.pack("<II", 1, 3) + b"\xff\x7f" * 96),
            ("apar", struct.pack("<II", 0xFFFFFFFF, 3) + bytes(192)),
            ("escs", bytes(4)),
            ("escs", bytes(5)),
            ("escs", struct.pack("<I", 1) + b"\xff" * 9),
            ("fine", b"x"),
            ("coef", b""),
        ],
    )
    def test_hostile_content_is_refused(self, codec: Codec, kv: torch.Tensor, tag: str, content: bytes) -> None:
        with pytest.raises(CodecError, match=tag if content and tag != "coef" else "fetch the chunk again"):
            codec.decode(resealed(self.encode(codec, kv), {tag: content}))

    @pytest.mark.parametrize(
        "records",
        [
            [(96, 0, 5)],
            [(0, 40, 5)],
            [(0, 5, 1 << 21)],
            [(0, 5, -(1 << 31))],
            [(0, 5, 7), (0, 5, 7)],
            [(0, 5, 7), (0, 4, 7)],
            [(0, 5, 7), (0xFFFFFFFF, 4, 7), (1, 4, 7)],
        ],
    )
    def test_hostile_escapes_are_refused(
        self, codec: Codec, kv: torch.Tensor, records: list[tuple[int, int, int]]
    ) -> None:
        with pytest.raises(CodecError, match="names places"):
            codec.decode(resealed(self.encode(codec, kv), {"escs": escape_section(records)}))

    def test_escapes_in_dead_columns_are_refused(self, codec: Codec) -> None:
        assert isinstance(codec, KVStream)
        data = self.encode(codec, rotated(synthetic_kv(L, 40, H, D, seed=1), 100))
        alive = cpu.Content.of(codec.parameters, container.parse(data)).rest.alive
        dead = int(np.setdiff1d(np.arange(96), alive)[0])
        with pytest.raises(CodecError, match="names places"):
            codec.decode(resealed(data, {"escs": escape_section([(dead, 0, 5)])}))

    def test_more_escapes_than_a_chunk_may_have_are_refused_before_they_are_unpacked(
        self, codec: Codec, kv: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A megabyte of zeros takes a kilobyte: what a section claims is checked before it takes memory."""
        data = self.encode(codec, kv)
        bomb = struct.pack("<I", 400_000) + zlib.compress(bytes(4_000_000), 6)
        with pytest.raises(CodecError, match="claims 400000 escapes"):
            codec.decode(resealed(data, {"escs": bomb}))
        most = kv.numel() // 16
        with pytest.raises(CodecError, match=f"hold {10 * most} bytes"):
            codec.decode(resealed(data, {"escs": struct.pack("<I", most) + zlib.compress(bytes(4_000_000))}))

    def test_sections_in_another_order_are_refused(self, codec: Codec, kv: torch.Tensor) -> None:
        data = self.encode(codec, kv)
        chunk = container.parse(data)
        coded = {tag: bytes(content) for tag, content in chunk.sections.items()}
        plain = {tag: bytes(c) for tag, c in container.parse(self.encode(codec, 1e5 * kv)).sections.items()}
        assert list(plain) == ["scal", "bits"]
        for sections in (
            dict(reversed(coded.items())), {"coef": coded["coef"], **coded}, coded | {"more": b""}, coded | plain,
            dict(reversed(plain.items())), plain | {"coef": b""},
        ):  # fmt: skip
            with pytest.raises(CodecError, match="in this order"):
                codec.decode(container.pack(chunk.header, sections))

    def test_short_segments_are_refused(self, codec: Codec) -> None:
        """A few bytes could claim a stream for every token and column, each of which takes a decoder its time."""

        def empty(columns: int, tokens: int) -> bytes:
            groups = -(-columns * tokens // 32)
            return struct.pack("<III", tokens, 1, 0) + bytes(3 * groups + -3 * groups % 4 + 2)

        assert isinstance(codec, KVStream)
        kv = rotated(synthetic_kv(L, 600, 2, 8, seed=6))
        data = codec.encode(kv, 5, positions=range(600))
        rest = cpu.Content.of(codec.parameters, container.parse(data)).rest
        for tag, columns in (("coef", len(rest.alive)), ("fine", np.count_nonzero(rest.shift))):
            assert columns
            with pytest.raises(CodecError, match="segments of 1 tokens"):
                codec.decode(resealed(data, {tag: empty(columns, 600)}))

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
        damage: tuple[tuple[str, float], ...] = (
            ("expected", 255), ("kind_class", 255), ("kind_shift", 8), ("steps", -1.0), ("mean", np.nan),
            ("spread", -1.0), ("spread", np.nan), ("values", np.inf), ("tables", 7), ("basis.0", np.nan),
            ("metric", np.nan), ("metric_scale", np.inf),
        )  # fmt: skip
        for name, value in damage:
            tensors = dict(good.tensors)
            tensors[name] = np.full_like(tensors[name], value)
            with pytest.raises(CodecError):
                registry.make("kvstream", {}, Profile(tensors, good.metadata))
        for name, fact in (
            ("sinks", -1), ("sinks", "many"), ("group_layers", 0), ("levels", ["one"]), ("codec_format", 1),
        ):  # fmt: skip
            with pytest.raises(CodecError):
                registry.make("kvstream", {}, Profile(good.tensors, {**good.metadata, name: fact}))

    @pytest.mark.parametrize(("name", "value"), [("metric", 0.0), ("basis.0", 0.0), ("scale", 1e-45)])
    def test_profiles_whose_basis_says_nothing_are_refused(self, name: str, value: float) -> None:
        good = stored("kvstream")
        tensors = {**good.tensors, name: np.full_like(good.tensors[name], value)}
        codec = registry.make("kvstream", {}, Profile(tensors, good.metadata))
        kv = synthetic_kv(L, 20, H, D, seed=1)
        with pytest.raises(CodecError, match="calibrate again"):
            self.encode(codec, kv)

    @pytest.mark.parametrize("name", ["root", "root_scale"])
    def test_profiles_whose_metric_is_no_number_are_refused(self, name: str) -> None:
        good = fit([synthetic_kv(2, 64, 2, 8)], target_bits=(4.0,))
        without = {k: v for k, v in good.tensors.items() if k != name}
        with pytest.raises(CodecError, match="has no tensor"):
            registry.make("kvstream", {}, Profile(without, good.metadata))
        damaged = {**good.tensors, name: np.full_like(good.tensors[name], np.nan)}
        with pytest.raises(CodecError):
            registry.make("kvstream", {}, Profile(damaged, good.metadata))

    def test_steps_that_give_no_numbers_fall_back_to_eight_bits(self) -> None:
        good = stored("kvstream")
        steps = np.full_like(good.tensors["steps"], 1e-45)
        codec = registry.make("kvstream", {}, Profile({**good.tensors, "steps": steps}, good.metadata))
        assert codec.describe(self.encode(codec, synthetic_kv(L, 20, H, D, seed=1)))["fallback"]

    @pytest.mark.parametrize(("name", "value"), [("steps", 3e38), ("scale", 3e38), ("scale", 1e28), ("mean", 3e38)])
    def test_profiles_that_give_impossible_values_are_refused(self, name: str, value: float) -> None:
        """What they decode to would not be finite."""
        good = stored("kvstream")
        tensors = {**good.tensors, name: np.full_like(good.tensors[name], value)}
        with pytest.raises(CodecError, match="beyond 1e\\+30"):
            registry.make("kvstream", {}, Profile(tensors, good.metadata))

    def test_levels_fit_into_a_byte(self) -> None:
        good = stored("kvstream")
        many = {n: np.repeat(good.tensors[n][:1], 300, axis=0) for n in ("steps", "expected")}
        facts = {**good.metadata, "levels": [str(level) for level in range(300)]}
        with pytest.raises(CodecError, match="impossible steps"):
            registry.make("kvstream", {}, Profile({**good.tensors, **many}, facts))


def resealed(data: bytes, changed: dict[str, bytes]) -> bytes:
    """The chunk with other content in some sections, its checksums right."""
    chunk = container.parse(data)
    return container.pack(chunk.header, {tag: bytes(content) for tag, content in chunk.sections.items()} | changed)


def escape_section(records: list[tuple[int, int, int]]) -> bytes:
    """Records of (difference of columns, token, steps)."""
    columns, tokens, steps = (
        np.array([record[i] for record in records], kind) for i, kind in enumerate(("<u4", "<u2", "<i4"))
    )
    return struct.pack("<I", len(records)) + zlib.compress(columns.tobytes() + tokens.tobytes() + steps.tobytes(), 6)


def test_layers_that_say_the_same_share_a_basis() -> None:
    """Calibration chooses larger groups where layers are correlated, and no others; so the bits fall."""
    rates = {}
    for shared in (0.0, 0.97):
        samples = [synthetic_kv(4, 500, 1, 4, seed=seed, shared=shared) for seed in (1, 2)]
        kv = synthetic_kv(4, 500, 1, 4, seed=3, shared=shared)
        for group in (1, None):
            profile = fit(samples, group=group, target_bits=(1.0,))
            codec = KVStream(profile=profile)
            data = codec.encode(kv, 0, positions=range(500))
            error = (codec.decode(data).float() - kv.float()).pow(2).mean()
            rates[shared, group] = len(data), float(error), profile.metadata["group_layers"]
    assert rates[0.0, None][2] == 1
    assert rates[0.97, None][2] > 1
    assert rates[0.97, None][1] < 0.7 * rates[0.97, 1][1]
    assert rates[0.97, None][0] < 1.1 * rates[0.97, 1][0]


@pytest.mark.parametrize("dim", [192, 256])
def test_large_heads_come_back_whatever_the_number_of_threads(dim: int) -> None:
    """`torch.linalg.inv` of a batch of matrices above 150 is wrong after `set_num_threads`: nothing may depend on it.

    Sensitive in a few directions, as real metrics are.
    """
    draw = torch.Generator().manual_seed(dim)
    scale = torch.logspace(0.5, -1.5, dim)
    kv = (torch.randn((2, 2, 400, 1, dim), generator=draw) * scale)[..., torch.randperm(dim, generator=draw)]
    factor = torch.randn((2, 2, 1, dim, dim), generator=draw) * torch.logspace(0, -1, dim)
    rope = Rope(10_000.0 ** -(torch.arange(dim // 2) / (dim // 2)).repeat(2, 1))
    threads = torch.get_num_threads()
    decoded = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            profile = fit([kv], rope=rope, sensitivity=factor @ factor.mT / dim, target_bits=(6.0,), group=1)
            codec = KVStream(profile=profile)
            decoded.append(codec.decode(codec.encode(kv, 0, positions=range(400))))
            group = codec.parameters.groups[1]
            product = group.basis.double() @ group.analysis.double().T
            assert float((product - torch.eye(len(product))).abs().max()) < 1e-3
    finally:
        torch.set_num_threads(threads)
    for found in decoded:
        assert float((found - kv).pow(2).mean().sqrt()) < 0.05 * float(kv.std())


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_metric_of_few_directions_survives_being_stored(dim: int) -> None:
    """Gradients of a large model: few directions matter a thousand times as much as others, and a basis is long where
    nothing matters. A profile that kept the metric itself in float16 lost that it is positive definite."""
    draw = torch.Generator().manual_seed(dim)
    kv = torch.randn((1, 2, 600, 1, dim), generator=draw)
    few = torch.full((dim,), 1e-5).index_fill_(0, torch.arange(2), 1.0)
    factor = torch.randn((1, 2, 1, dim, dim), generator=draw) * few
    codec = KVStream(profile=fit([kv], sensitivity=factor @ factor.mT / dim, target_bits=(6.0,)))
    group = codec.parameters.groups[0]
    rows = group.basis.unflatten(1, group.stored_basis.shape[1:])
    gram = torch.einsum("klshd,lshde,jlshe->kj", *(x.double() for x in (rows, group.metric, rows)))
    weights = torch.linalg.eigvalsh(gram)
    assert float(weights[0]) > 0.95
    assert float(weights[-1]) < 1.05
    decoded = codec.decode(codec.encode(kv, 0, positions=range(600)))
    error, exact = (torch.einsum("lsthd,lshde->lsthe", x, factor) for x in (decoded - kv, kv))
    assert float(error.pow(2).mean().sqrt()) < 0.05 * float(exact.pow(2).mean().sqrt())


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), start=st.integers(0, 100_000), tokens=st.integers(1, 12), first=st.integers(0, 2))
def test_vectors_are_restored(seed: int, start: int, tokens: int, first: int) -> None:
    kv = torch.randn((3, 2, tokens, 2, 8), generator=torch.Generator().manual_seed(seed))
    mean = torch.randn((3, 2, 2, 8), generator=torch.Generator().manual_seed(seed + 1))
    layers, positions = range(first, 3), range(start, start + tokens)
    rows = vectors(kv, layers, ROPE, positions, mean)
    assert rows.shape == (tokens, len(layers) * 32)
    assert torch.allclose(restore(rows, layers, ROPE, positions, mean), kv[first:], atol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_matches_its_definition(interleaved: bool) -> None:
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


def test_quantiser_is_optimal_for_its_tables() -> None:
    """No other symbol has a lower cost of squared error plus weighted bits (where thresholds are not clipped)."""
    from kvstream.codec.quantize import RATE_WEIGHT

    generator = np.random.default_rng(1)
    values = (generator.laplace(size=(20, 3000)) * np.geomspace(0.2, 3, 20)[:, None]).astype(np.float32)
    found = design(values, [1.0], np.ones((1, 20), bool), 8)
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
    """Symbol, low bits and escapes together are the value rounded to whole steps, whatever its size."""
    generator = np.random.default_rng(seed)
    fitted = (generator.normal(size=(6, 400)) * np.array([[0.5], [2], [30], [100], [500], [2000]])).astype(np.float32)
    found = design(fitted, [1.0], np.ones((1, 6), bool), 8)
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
    values = np.random.default_rng(0).normal(size=(4, 500)).astype(np.float32)
    classes = design(values, [1.0], np.ones((1, 4), bool), 4).classes
    with pytest.raises(CodecError, match="not finite"):
        Classes(classes.tables, np.full_like(classes.values, np.nan))
    with pytest.raises(CodecError, match="symbols"):
        Classes(classes.tables, classes.values[:, :5])


def test_fitting_checks_its_samples() -> None:
    with pytest.raises(CodecError, match="at least one"):
        fit([])
    with pytest.raises(CodecError, match="different shapes"):
        fit([synthetic_kv(2, 20, 2, 8), synthetic_kv(3, 20, 2, 8)])
    kv = synthetic_kv(2, 20, 2, 8)
    for factor in (float("nan"), float("inf"), 1e20, 1e30):
        with pytest.raises(CodecError, match="a KV sample holds NaN"):
            fit([kv.float() * factor])
    with pytest.raises(CodecError, match="the sensitivity holds NaN"):
        fit([kv], sensitivity=torch.full((2, 2, 2), torch.nan))
    with pytest.raises(CodecError, match="none beside its 20 sinks"):
        fit([kv], sinks=20)
