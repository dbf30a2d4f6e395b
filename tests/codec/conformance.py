"""What every codec must do. A codec's tests subclass `Conformance` and say how to build it."""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstream.codec import container, registry
from kvstream.codec.api import Codec
from kvstream.codec.errors import CodecError
from kvstream.codec.profile import Profile
from kvstream.codec.targets import HuggingFaceTarget, LMCacheTarget, PagedTarget
from tests.codec.synthetic import synthetic_kv

GOLDEN = Path(__file__).parent / "golden"
L, T, H, D = 3, 40, 2, 8
SHARED = [HealthCheck.differing_executors, HealthCheck.function_scoped_fixture]
"""Tests inherited by several classes; their fixtures are constants."""


class Conformance:
    """`build` comes from the subclass; it is called once per class."""

    tolerance: ClassVar[tuple[float, float]]
    """Largest root mean square error, over the standard deviation, of the (smallest, largest) level."""
    entropy_coded: ClassVar[bool] = False
    """Whether the codec describes bits by layer and the ideal size."""

    @staticmethod
    def build() -> Codec:
        raise NotImplementedError

    @pytest.fixture
    def codec(self) -> Codec:
        return _built(type(self))

    @pytest.fixture
    def kv(self) -> torch.Tensor:
        return synthetic_kv(L, T, H, D, seed=1)

    def encode(self, codec: Codec, kv: torch.Tensor, level: int = 0, start: int = 100) -> bytes:
        return codec.encode(kv, level, positions=range(start, start + kv.shape[2]))

    def test_round_trip_gets_better_with_the_level(self, codec: Codec, kv: torch.Tensor) -> None:
        sizes, errors = [], []
        for level in range(len(codec.levels)):
            data = self.encode(codec, kv, level)
            decoded = codec.decode(data)
            assert decoded.shape == kv.shape
            assert decoded.dtype == kv.dtype
            sizes.append(len(data))
            error = (decoded.float() - kv.float()).pow(2).mean().sqrt() / kv.float().std()
            errors.append(float(error))
        assert sizes == sorted(sizes)
        assert errors == sorted(errors, reverse=True)
        assert errors[0] <= self.tolerance[0]
        assert errors[-1] <= self.tolerance[1]

    def test_encoding_is_deterministic(self, codec: Codec, kv: torch.Tensor) -> None:
        for level in range(len(codec.levels)):
            assert self.encode(codec, kv, level) == self.encode(codec, kv.clone(), level)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_dtypes_in_and_out(self, codec: Codec, kv: torch.Tensor, dtype: torch.dtype) -> None:
        data = self.encode(codec, kv.to(dtype), len(codec.levels) - 1)
        assert codec.decode(data).dtype == dtype
        wide = codec.decode(data, torch.empty(kv.shape, dtype=torch.float32))
        narrow = codec.decode(data, torch.empty(kv.shape, dtype=torch.bfloat16))
        assert torch.equal(wide.to(torch.bfloat16), narrow)

    def test_strides_in_and_out(self, codec: Codec, kv: torch.Tensor) -> None:
        level = len(codec.levels) - 1
        data = self.encode(codec, kv, level)
        strided = kv.permute(4, 0, 3, 1, 2).contiguous().permute(1, 3, 4, 2, 0)
        assert not strided.is_contiguous()
        assert self.encode(codec, strided, level) == data
        outside = torch.full((L, 2, T + 5, H, D + 3), 42.0)
        codec.decode(data, outside[:, :, 3 : T + 3, :, 1 : D + 1])
        expected = codec.decode(data, torch.empty(kv.shape))
        assert torch.equal(outside[:, :, 3 : T + 3, :, 1 : D + 1], expected)
        outside[:, :, 3 : T + 3, :, 1 : D + 1] = 42.0
        assert bool((outside == 42.0).all())

    def test_layouts(self, codec: Codec, kv: torch.Tensor) -> None:
        data = self.encode(codec, kv)
        expected = codec.decode(data)
        lmcache = torch.empty(L, 2, T, H * D, dtype=kv.dtype)
        codec.decode(data, LMCacheTarget(lmcache, H))
        assert torch.equal(lmcache, expected.flatten(3))
        huggingface = HuggingFaceTarget.allocate((L, 2, T, H, D), kv.dtype)
        codec.decode(data, huggingface)
        cache = huggingface.dynamic_cache()
        for layer in range(L):
            assert torch.equal(cache.layers[layer].keys[0], expected[layer, 0].transpose(0, 1))
            assert torch.equal(cache.layers[layer].values[0], expected[layer, 1].transpose(0, 1))
        blocks = [torch.zeros(2, 9, 16, H, D, dtype=kv.dtype) for _ in range(L)]
        table = [4, 1, 7, 3]
        codec.decode(data, PagedTarget(blocks, table, offset=11, tokens=T))
        for layer in range(L):
            sequence = blocks[layer][:, table].flatten(1, 2)
            assert torch.equal(sequence[:, 11 : 11 + T], expected[layer])
            assert not bool(sequence[:, :11].any())

    def test_description_adds_up(self, codec: Codec, kv: torch.Tensor) -> None:
        for level in range(len(codec.levels)):
            data = self.encode(codec, kv, level)
            about = json.loads(json.dumps(codec.describe(data)))
            assert about["codec"] == codec.codec_id
            assert about["level"] == level
            if self.entropy_coded:
                mean = sum(map(sum, about["bits_by_layer"])) / (2 * L)
                assert 0 < mean <= about["bits_per_element"]
                assert 0 < about["ideal_bits_per_element"] < about["bits_per_element"]
        with pytest.raises(CodecError):
            codec.describe(data[:-1])

    def test_chunks_decode_alone(self, codec: Codec, kv: torch.Tensor) -> None:
        """The chunk at 17 needs nothing of the one before it, and stores its position."""
        data = codec.encode(kv[:, :, 17:], 0, positions=range(17, T))
        assert container.parse(data).header.positions == range(17, T)
        assert codec.decode(data).shape == (L, 2, T - 17, H, D)

    @pytest.mark.parametrize("tokens", [1, 2, 9, 10, 11])
    def test_short_chunks(self, codec: Codec, kv: torch.Tensor, tokens: int) -> None:
        for level in range(len(codec.levels)):
            data = self.encode(codec, kv[:, :, :tokens], level)
            assert torch.isfinite(codec.decode(data).float()).all()

    def test_config_rebuilds_the_codec(self, codec: Codec, kv: torch.Tensor) -> None:
        config = json.loads(json.dumps(codec.get_config()))
        profile = None if codec.profile is None else Profile.from_bytes(codec.profile.to_bytes())
        for rebuilt in (registry.from_config(config, profile), type(codec).from_config(config, profile)):
            assert rebuilt.get_config() == codec.get_config()
            assert self.encode(rebuilt, kv) == self.encode(codec, kv)

    def test_constant_and_zero_channels(self, codec: Codec, kv: torch.Tensor) -> None:
        for value in (0.0, 3.0, -1e-30):
            flat = torch.full_like(kv, value)
            decoded = codec.decode(self.encode(codec, flat, len(codec.levels) - 1)).float()
            scale = max(abs(value), float(kv.float().std()))
            assert float((decoded - value).abs().max()) <= scale * max(4 * self.tolerance[1], 0.02)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_values_that_are_not_finite(self, codec: Codec, kv: torch.Tensor, bad: float) -> None:
        broken = kv.clone()
        broken[1, 1, 5, 0, 3] = bad
        if codec.lossless:
            assert torch.equal(codec.decode(self.encode(codec, broken)).view(torch.int16), broken.view(torch.int16))
        else:
            with pytest.raises(CodecError, match="NaN, infinities"):
                self.encode(codec, broken)

    def test_outliers_are_never_silently_wrong(self, codec: Codec, kv: torch.Tensor) -> None:
        """A value a thousand times the others is decoded to within half of the coarsest step."""
        spiky = kv.clone()
        spiky[0, 0, 7, 1, 2] = 3000.0
        spiky[2, 1, 11, 0, 5] = -3000.0
        for level in range(len(codec.levels)):
            decoded = codec.decode(self.encode(codec, spiky, level)).float()
            assert float(decoded[0, 0, 7, 1, 2]) == pytest.approx(3000, rel=0.15)
            assert float(decoded[2, 1, 11, 0, 5]) == pytest.approx(-3000, rel=0.15)

    def test_largest_float16_values_stay_finite(self, codec: Codec) -> None:
        huge = synthetic_kv(L, T, H, D, dtype=torch.float16, seed=3)
        huge[:, :, 3:6] = 65504.0
        for level in range(len(codec.levels)):
            try:
                data = self.encode(codec, huge, level)
            except CodecError:
                continue
            assert torch.isfinite(codec.decode(data)).all()

    def test_bad_arguments(self, codec: Codec, kv: torch.Tensor) -> None:
        for level in (-1, len(codec.levels), 1.5):
            with pytest.raises(CodecError, match="level"):
                codec.encode(kv, level, positions=range(T))  # type: ignore[arg-type]
        for positions in (range(T + 1), range(0, 2 * T, 2), range(T, 0, -1), list(range(T))):
            with pytest.raises(CodecError, match="positions"):
                codec.encode(kv, 0, positions=positions)  # type: ignore[arg-type]
        for tensor in (kv[0], kv[:, :1], kv[:, :, :0], kv.to(torch.float64), kv.to(torch.int8)):
            with pytest.raises(CodecError, match="KV tensor"):
                self.encode(codec, tensor)
        data = self.encode(codec, kv)
        with pytest.raises(CodecError, match="target"):
            codec.decode(data, torch.empty(L, 2, T - 1, H, D))

    def test_every_truncation_is_refused(self, codec: Codec, kv: torch.Tensor) -> None:
        data = self.encode(codec, kv)
        for length in {*range(0, min(len(data), 300)), *range(0, len(data), max(1, len(data) // 100))}:
            with pytest.raises(CodecError):
                codec.decode(data[:length])
        with pytest.raises(CodecError):
            codec.decode(data + b"\0")

    @settings(deadline=None, max_examples=40, suppress_health_check=SHARED)
    @given(draw=st.data())
    def test_flipped_bits_are_refused(self, codec: Codec, kv: torch.Tensor, draw: st.DataObject) -> None:
        data = bytearray(self.encode(codec, kv))
        data[draw.draw(st.integers(0, len(data) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
        with pytest.raises(CodecError):
            codec.decode(bytes(data))

    @settings(deadline=None, max_examples=60, suppress_health_check=SHARED)
    @given(draw=st.data())
    def test_hostile_sections(self, codec: Codec, kv: torch.Tensor, draw: st.DataObject) -> None:
        """Content changed by someone who knows the checksum: an error or finite values, never a crash."""
        level = draw.draw(st.integers(0, len(codec.levels) - 1))
        chunk = container.parse(self.encode(codec, kv, level))
        sections = {tag: bytearray(content) for tag, content in chunk.sections.items()}
        tag = draw.draw(st.sampled_from(sorted(sections)))
        content = sections[tag]
        match draw.draw(st.sampled_from(["change", "fill", "cut", "extend", "drop"])):
            case "change":
                for _ in range(draw.draw(st.integers(1, 8))):
                    if content:
                        content[draw.draw(st.integers(0, len(content) - 1))] = draw.draw(st.integers(0, 255))
            case "fill":
                sections[tag] = bytearray([draw.draw(st.integers(0, 255))]) * len(content)
            case "cut":
                del content[draw.draw(st.integers(0, max(len(content) - 1, 0))) :]
            case "extend":
                content.extend(draw.draw(st.binary(min_size=1, max_size=64)))
            case "drop":
                del sections[tag]
        try:
            data = container.pack(chunk.header, {k: bytes(v) for k, v in sections.items()})
            decoded = codec.decode(data, torch.empty(kv.shape, dtype=torch.float32))
        except CodecError:
            return
        if not codec.lossless:
            assert torch.isfinite(decoded).all()

    def test_lying_shapes(self, codec: Codec, kv: torch.Tensor) -> None:
        """A header that claims another shape than its sections hold is refused before anything is allocated."""
        data = bytearray(self.encode(codec, kv))
        names = ("layers", "tokens", "heads", "head_dim")
        for name in names:
            for value in (0, 1, 7, 4096, 65_535, (1 << 32) - 1):
                lying = forge(data, names.index(name), value)
                if lying == data:
                    continue
                with pytest.raises(CodecError):
                    codec.decode(bytes(lying))

    def test_lying_token_counts_of_several_segments(self, codec: Codec) -> None:
        """Also where the count changes only the last segment, whose streams could go on or end early."""
        kv = synthetic_kv(L, 600, H, D, seed=11)
        for level in range(len(codec.levels)):
            data = bytearray(self.encode(codec, kv, level))
            for tokens in (512, 513, 599, 601, 700, 1024, 1025):
                with pytest.raises(CodecError):
                    codec.decode(bytes(forge(data, 1, tokens)))

    def test_other_codecs_chunks_are_refused(self, codec: Codec, kv: torch.Tensor) -> None:
        name = "uniform" if codec.codec_id == "raw" else "raw"
        foreign = registry.make(name).encode(kv, 0, positions=range(T))
        with pytest.raises(CodecError, match="written by codec"):
            codec.decode(foreign)

    def test_golden(self, codec: Codec) -> None:
        """Bytes written by earlier releases decode to the same values, and today's encoder writes the same bytes."""
        kv = synthetic_kv(2, 21, 2, 4, seed=5) if codec.profile is None else synthetic_kv(L, 21, H, D, seed=5)
        for level in range(len(codec.levels)):
            path = GOLDEN / f"{self.golden_name(codec)}-v{container.VERSION}-level{level}.bin"
            stored = path.read_bytes()
            length = int.from_bytes(stored[:4], "little")
            data, digest = stored[4 : 4 + length], stored[4 + length :]
            decoded = codec.decode(data, torch.empty(kv.shape, dtype=torch.float32))
            assert zlib.crc32(quantised(decoded)).to_bytes(4, "little") == digest, f"{path.name} decodes differently"
            assert codec.encode(kv, level, positions=range(30, 51)) == data, f"{path.name} is encoded differently"

    def golden_name(self, codec: Codec) -> str:
        return codec.codec_id


@cache
def _built(tests: type[Conformance]) -> Codec:
    return tests.build()


def quantised(decoded: torch.Tensor) -> bytes:
    """Decoded values, rounded so that the order of float32 additions does not matter."""
    return (decoded * 256).round().to(torch.int32).contiguous().numpy().tobytes()


def forge(data: bytearray, field: int, value: int) -> bytearray:
    """The chunk with one of its four shape fields replaced and the header's checksum made right again."""
    forged = bytearray(data)
    base = 4 + 4 + 16 + 32 + 8
    forged[base + 4 * field : base + 4 * field + 4] = value.to_bytes(4, "little")
    n_sections = int.from_bytes(forged[base + 16 : base + 20], "little")
    end = base + 20 + 16 * n_sections
    forged[end : end + 4] = zlib.crc32(forged[:end]).to_bytes(4, "little")
    return forged


def write_golden(codec: Codec, name: str, kv: torch.Tensor) -> None:
    """Store golden bitstreams; only for a new codec or format version."""
    GOLDEN.mkdir(exist_ok=True)
    for level in range(len(codec.levels)):
        data = codec.encode(kv, level, positions=range(30, 30 + kv.shape[2]))
        decoded = codec.decode(data, torch.empty(kv.shape, dtype=torch.float32))
        digest = zlib.crc32(quantised(decoded)).to_bytes(4, "little")
        path = GOLDEN / f"{name}-v{container.VERSION}-level{level}.bin"
        path.write_bytes(len(data).to_bytes(4, "little") + data + digest)
