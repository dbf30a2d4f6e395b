"""The lossless level of codec `kvstream`, on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstream.codec import container, registry
from kvstream.codec.errors import CodecError
from kvstream.codec.kvstream import KVStream, fit, lossless
from kvstream.codec.targets import PagedTarget
from tests.codec.synthetic import synthetic_kv

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST = {torch.bfloat16: 0.75, torch.float16: 0.92, torch.float32: 0.92}
"""Of the bytes of a real cache."""


@pytest.fixture(scope="module")
def codec() -> KVStream:
    """Calibrated on values unlike those that it codes here."""
    profile = fit([synthetic_kv(2, 300, 2, 8, seed=1, dtype=torch.float32)], target_bits=(1.0, 4.0))
    return KVStream(lossless=1, profile=profile)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, size, generator=draw, dtype=torch.uint8).view(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def encode(codec: KVStream, kv: torch.Tensor) -> bytes:
    return codec.encode(kv, len(codec.levels) - 1, positions=range(40, 40 + kv.shape[2]))


def test_it_is_the_last_level_where_asked_for(codec: KVStream) -> None:
    plain = KVStream(profile=codec.profile)
    assert plain.levels == codec.levels[:-1]
    assert not plain.is_lossless(1)
    assert KVStream.from_config(codec.get_config(), codec.profile).levels == codec.levels
    with pytest.raises(CodecError, match="lossless=2 must be 0 or 1"):
        KVStream(lossless=2, profile=codec.profile)
    assert [level.name for level in codec.levels] == ["1 bit", "4 bit", "lossless"]
    assert codec.levels[-1].settings == {}
    assert [codec.is_lossless(level) for level in range(3)] == [False, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_bits(codec: KVStream, dtype: torch.dtype) -> None:
    """NaN with all their payloads, infinities, both zeros; nothing can be saved, and hardly anything is spent."""
    kv = random_bits((2, 2, 700, 2, 8), dtype)
    data = encode(codec, kv)
    assert same_bits(codec.decode(data), kv)
    assert len(data) < kv.nbytes + 600
    if dtype == torch.bfloat16:
        assert bool(kv.isnan().any())


@given(
    dtype=st.sampled_from(DTYPES), tokens=st.integers(1, 40), kinds=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_mixture_of_channels(codec: KVStream, dtype: torch.dtype, tokens: int, kinds: list[int], seed: int) -> None:
    """Constant, narrow, usual, wide and random channels side by side."""
    kv = random_bits((2, 2, tokens, 2, 8), dtype, seed)
    draw = torch.Generator().manual_seed(seed)
    usual = torch.randn(kv.shape, generator=draw)
    for d, kind in enumerate(kinds):
        part = usual[..., d]
        made = (torch.full_like(part, float(d)), 3 + part / 100, part, part**5)
        if kind < 4:
            kv[..., d] = made[kind].to(dtype)
    assert same_bits(codec.decode(encode(codec, kv)), kv)


def test_constants_cost_next_to_nothing(codec: KVStream) -> None:
    kv = torch.full((2, 2, 4_000, 2, 8), 1.25, dtype=torch.bfloat16)
    data = encode(codec, kv)
    assert len(data) < kv.nbytes / 100
    assert same_bits(codec.decode(data), kv)


def test_targets(codec: KVStream) -> None:
    """Paged blocks, strides, and another dtype."""
    kv = synthetic_kv(2, 600, 2, 8, seed=3, dtype=torch.float16)
    data = encode(codec, kv)
    blocks = [torch.zeros((2, 50, 16, 2, 8), dtype=torch.float16) for _ in range(2)]
    table = torch.randperm(50, generator=torch.Generator().manual_seed(1))[:40]
    codec.decode(data, PagedTarget(blocks, table, 3, 600))
    for layer, block in enumerate(blocks):
        assert same_bits(block[:, table].flatten(1, 2)[:, 3:603], kv[layer])
    strided = torch.zeros((600, 2, 8, 2, 2), dtype=torch.float32).permute(4, 3, 0, 1, 2)
    assert torch.equal(codec.decode(data, strided), kv.float())


def test_a_streaming_decoder(codec: KVStream) -> None:
    kv = synthetic_kv(2, 600, 2, 8, seed=3, dtype=torch.bfloat16)
    data = encode(codec, kv)
    out = torch.empty_like(kv)
    decoder = codec.decoder(out, total_bytes=len(data))
    for first in range(0, len(data), 1_000):
        decoder.feed(memoryview(data)[first : first + 1_000])
    decoder.finish()
    assert same_bits(out, kv)


def test_description(codec: KVStream) -> None:
    kv = synthetic_kv(2, 600, 2, 8, seed=3, dtype=torch.bfloat16)
    said = codec.describe(encode(codec, kv))
    assert said["lossless"]
    assert not said["fallback"]
    assert said["coded_columns_by_byte"][0] == 2 * 2 * 2 * 8
    assert not codec.describe(codec.encode(kv, 0, positions=range(600)))["lossless"]


def test_hostile_sections(codec: KVStream) -> None:
    """Tables that do not sum up, columns with tables that are not there, sections of other lengths or other levels."""
    kv = synthetic_kv(2, 600, 2, 8, seed=3, dtype=torch.bfloat16)
    chunk = container.parse(encode(codec, kv))
    sections = {tag: bytes(content) for tag, content in chunk.sections.items()}
    bad = [
        sections | {"tabs": lossless.zlib.compress(bytes(512))},
        sections | {"tabs": lossless.zlib.compress(bytes(1 << 20))},
        sections | {"tabs": b"no"},
        sections | {"cols": lossless.zlib.compress(b"\xff" * 128)},
        sections | {"cols": lossless.zlib.compress(bytes(128))},
        sections | {"cols": lossless.zlib.compress(bytes(127))},
        sections | {"kept": sections["kept"][:-1]},
        sections | {"rans": b""},
        sections | {"rans": sections["rans"][:-2]},
        {tag: content for tag, content in sections.items() if tag != "tabs"},
    ]
    for case in bad:
        with pytest.raises(CodecError):
            codec.decode(container.pack(chunk.header, case))
    lossy = container.parse(codec.encode(kv, 0, positions=range(600)))
    for header, other in ((chunk.header, lossy.sections), (lossy.header, chunk.sections)):
        with pytest.raises(CodecError, match="has no section"):
            codec.decode(container.pack(header, other))


def test_other_levels_still_refuse_nan(codec: KVStream) -> None:
    kv = synthetic_kv(2, 20, 2, 8, seed=3)
    kv[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(CodecError, match="NaN"):
        codec.encode(kv, 1, positions=range(20))
    assert same_bits(codec.decode(encode(codec, kv)), kv)


@pytest.mark.parametrize("dtype", DTYPES)
def test_size_on_a_real_cache(codec: KVStream, dtype: torch.dtype) -> None:
    """Of the bundled model: the limits, and less than Deflate at its best."""
    from kvstream.testbed.encoding import calibrate
    from kvstream.testbed.engine.loading import load_model
    from kvstream.testbed.engine.model import calculate_kv

    model = load_model()
    kv = calculate_kv(model, next(iter(calibrate.samples(model, "check", 1, 512))).context_ids).to(dtype)
    sections = lossless.encode(kv)
    size = sum(map(len, sections.values()))
    assert size <= MOST[dtype] * kv.nbytes
    assert size < len(lossless.zlib.compress(kv.view(torch.uint8).numpy().tobytes(), 9))


def test_the_registry_makes_it(codec: KVStream) -> None:
    assert registry.make("kvstream", {"lossless": 1}, codec.profile).levels[-1].name == "lossless"
