"""The Triton codec against the CPU codec: on a CUDA device where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import random
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from benchmarks import gpu_chunk  # noqa: E402
from kvstream.codec import container  # noqa: E402
from kvstream.codec.api import Codec  # noqa: E402
from kvstream.codec.errors import CodecError  # noqa: E402
from kvstream.codec.kvstream import KVStream, fit, kinds, places, streaming, triton_encode, triton_job  # noqa: E402
from kvstream.codec.kvstream.codec import SECTIONS  # noqa: E402
from kvstream.codec.kvstream.cpu import Content  # noqa: E402
from kvstream.codec.kvstream.parameters import Parameters  # noqa: E402
from kvstream.codec.targets import CacheTarget, HuggingFaceTarget, LayeredTarget, PagedTarget, as_target, saturate  # noqa: E402
from kvstream.codec.transform import Rope, restore, vectors  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T, START = 40, 100
# The interpreter is slow, and has no native bfloat16.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32, torch.float16]
SHAPES = [
    # layers, heads, dimensions, rotary dimensions, interleaved
    (2, 2, 16, 16, False),
    (1, 1, 32, 16, True),
    (1, 1, 20, 12, False),
    (1, 1, 16, 0, False),
]


def make(
    layers: int, heads: int, dim: int, rotary: int, interleaved: bool, *, group: int = 1, sinks: int = 0
) -> tuple[KVStream, Any]:
    """A codec whose levels have few live columns, most, and wide ones; a cache with escapes and a token apart."""
    draw = torch.Generator().manual_seed(dim + rotary)
    shape = (layers, 2, 300, heads, dim)
    mixing = torch.randn((layers, 2, heads, dim, dim), generator=draw) * torch.logspace(1, -1.5, dim)
    kv = torch.einsum("lsthd,lshed->lsthe", torch.randn(shape, generator=draw), mixing / dim**0.5)
    kv += 3 * torch.randn((layers, 2, 1, heads, dim), generator=draw)
    rope = Rope(torch.rand((layers, rotary // 2), generator=draw), interleaved) if rotary else None
    profile = fit([kv], rope=rope, target_bits=(0.8, 2.0, 3.7), group=group, sinks=sinks)
    chunk = kv[:, :, :T].clone()
    chunk[0, 0, 3, 0, 1], chunk[0, 1, 7, -1, 2] = 40.0, -60.0
    chunk[-1, 1, 11, 0, 0] = 1e5
    return KVStream(profile=profile), chunk


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def case(request: pytest.FixtureRequest) -> tuple[KVStream, Any]:
    return make(*request.param)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parameters, "segment_tokens", 16)


def on_device(codec: KVStream, data: bytes, target: CacheTarget) -> None:
    """Decode with the kernels, even where `decode` would not."""
    streaming.decode(streaming.shares(codec.on_device, target, target.device), codec._open(data))


def streaming_decoder(
    codec: KVStream, out: Any, *, total_bytes: int | None = None, layers: range | None = None
) -> streaming.StreamingDecoder:
    """What `codec.decoder` returns for a CUDA device, on any."""
    shares = streaming.shares(codec.on_device, as_target(out), torch.empty(0, device=DEVICE).device, layers)
    return streaming.StreamingDecoder(codec, out, shares, total_bytes)


def assert_close(out: Any, wanted: Any) -> None:
    """Within the larger of one unit in the last place and 2^-14 of the column's root mean square."""
    spacing = torch.finfo(out.dtype).eps * wanted.abs()
    rms = wanted.pow(2).mean(dim=2, keepdim=True).sqrt()
    assert ((out.cpu().float() - wanted).abs() <= torch.maximum(spacing, rms * 2**-14)).all()


@pytest.mark.parametrize("level", [0, 2])
def test_decodes_as_the_cpu_does(case: tuple[KVStream, Any], level: int) -> None:
    codec, kv = case
    data = codec.encode(kv, level, positions=range(START, START + T))
    wanted = codec.decode(data, torch.empty(kv.shape))
    for dtype in DTYPES:
        out = torch.full(kv.shape, torch.nan, dtype=dtype, device=DEVICE)
        on_device(codec, data, as_target(out))
        assert_close(out, saturate(wanted, dtype))


@pytest.mark.parametrize("level", [0, 2])
def test_encodes_as_the_cpu_does(case: tuple[KVStream, Any], level: int) -> None:
    """The same kinds and symbols, but for values exactly on a threshold and columns between two kinds."""
    codec, kv = case
    positions = range(START, START + T)
    chunk = codec._open(codec.encode(kv, level, positions=positions))
    parts = triton_encode.encode(codec.on_device(DEVICE), kv.to(DEVICE), level, positions)
    assert tuple(parts) == SECTIONS
    assert parts["apar"] == chunk.section("apar")
    usual = Content.of(codec.parameters, chunk)
    data = container.pack(chunk.header, parts)
    other = Content.of(codec.parameters, codec._open(data))
    kinds = [
        dict(zip(found.rest.alive.tolist(), zip(found.rest.own, found.rest.shift, strict=True), strict=True))
        for found in (usual, other)
    ]
    assert len(set(kinds[0].items()) ^ set(kinds[1].items())) <= 0.05 * len(kinds[0])
    assert abs(len(usual.rest.escapes) - len(other.rest.escapes)) <= 2
    assert sum(map(len, parts.values())) == pytest.approx(sum(map(len, chunk.sections.values())), rel=0.02)
    values = codec.decode(data, torch.empty(kv.shape))
    error, wanted = (
        float((x - kv).pow(2).mean()) for x in (values, codec.decode(container.pack(chunk.header, chunk.sections)))
    )
    assert error == pytest.approx(wanted, rel=0.02)


def test_the_cases_have_everything(case: tuple[KVStream, Any]) -> None:
    codec, kv = case
    found = [
        Content.of(codec.parameters, codec._open(codec.encode(kv, level, positions=range(START, START + T)))).rest
        for level in range(3)
    ]
    assert len(found[0].alive) < len(found[2].alive)
    assert not found[0].shift.any()
    assert found[2].shift.any()
    if codec.parameters.shape == (1, 1, 16):  # what would escape there is what no column expresses: coded apart
        assert {3, 7, 11} == set(found[0].apart.tokens.tolist())
    else:
        assert len(found[1].escapes)
        assert found[0].apart.tokens.tolist() == [11]


def test_a_joint_basis_and_sinks() -> None:
    """Groups of two layers and one of a single layer; the first tokens of a context come back to the bit."""
    codec, kv = make(3, 2, 16, 12, False, group=2, sinks=2)
    for level in (0, 1):
        data = codec.encode(kv, level, positions=range(T))
        parts = triton_encode.encode(codec.on_device(DEVICE), kv.to(DEVICE), level, range(T))
        assert parts["apar"] == codec._open(data).section("apar")
        out = torch.full(kv.shape, torch.nan, device=DEVICE)
        on_device(codec, data, as_target(out))
        assert torch.equal(out.cpu()[:, :, [0, 1, 11]], kv[:, :, [0, 1, 11]])
        assert_close(out, codec.decode(data, torch.empty(kv.shape)))
        for layers in (range(1), range(1, 3), range(2, 3)):
            part = torch.full((len(layers), *kv.shape[1:]), torch.nan, device=DEVICE)
            decoder = streaming_decoder(codec, part, layers=layers)
            decoder.feed(memoryview(data))
            decoder.finish()
            assert torch.equal(part, out[layers.start : layers.stop])


def test_absurd_values_are_put_apart(case: tuple[KVStream, Any]) -> None:
    codec, kv = case
    absurd = kv.clone()
    absurd[0, 1, 5] = 9e29
    parts = triton_encode.encode(codec.on_device(DEVICE), absurd.to(DEVICE), 1, range(START, START + T))
    chunk = codec._open(codec.encode(absurd, 1, positions=range(START, START + T)))
    assert parts["apar"] == chunk.section("apar")
    for sections in (parts, chunk.sections):
        out = torch.full(kv.shape, torch.nan, device=DEVICE)
        on_device(codec, container.pack(chunk.header, sections), as_target(out))
        assert torch.equal(out.cpu()[:, :, [5, 11]], absurd[:, :, [5, 11]])
        assert torch.isfinite(out).all()


def test_escapes_that_float16_does_not_hold(case: tuple[KVStream, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their second parts are multiplied by way of the basis; here those of all escapes."""
    codec, kv = case
    for level in (0, 2):
        data = codec.encode(kv, level, positions=range(START, START + T))
        found = []
        for largest in (places.LARGEST, 0):
            monkeypatch.setattr(places, "LARGEST", largest)
            found.append(torch.full(kv.shape, torch.nan, device=DEVICE))
            on_device(codec, data, as_target(found[-1]))
        assert_close(found[1], codec.decode(data, torch.empty(kv.shape)))
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)


def test_positions_from_anywhere(case: tuple[KVStream, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosines and sines are kept for the next chunk: after, before and within what is kept."""
    monkeypatch.setattr(triton_job, "TURNED_AHEAD", 100)
    codec, kv = case
    for start in (0, 40, 70, 5, 100_000, 100_060, 30):
        data = codec.encode(kv, 2, positions=range(start, start + T))
        out = torch.full(kv.shape, torch.nan, device=DEVICE)
        on_device(codec, data, as_target(out))
        assert_close(out, codec.decode(data, torch.empty(kv.shape)))


def test_a_chunk_without_live_columns(case: tuple[KVStream, Any]) -> None:
    codec, kv = case
    layers, _, _, heads, dim = kv.shape
    mean = restore(
        torch.zeros(T, layers * 2 * heads * dim), range(layers), codec.parameters.rope, range(START, START + T),
        codec.parameters.mean,
    )  # fmt: skip
    data = codec.encode(mean, 0, positions=range(START, START + T))
    parts = triton_encode.encode(codec.on_device(DEVICE), mean.to(DEVICE), 0, range(START, START + T))
    assert parts == {tag: bytes(content) for tag, content in codec._open(data).sections.items()}
    assert not parts["coef"]
    for decode in (decode_at_once, lambda codec, data, out: on_device(codec, data, as_target(out))):
        out = torch.full(kv.shape, torch.nan, device=DEVICE)
        decode(codec, data, out)
        assert_close(out, codec.decode(data))


def test_a_chunk_without_the_transform() -> None:
    codec, kv = make(*SHAPES[0])
    data = codec.encode(1e4 * kv, 1, positions=range(START, START + T))
    assert codec.describe(data)["fallback"]
    decoder = codec.decoder(torch.empty(kv.shape), total_bytes=len(data))
    decoder.feed(memoryview(data))
    assert torch.equal(decoder.finish(), codec.decode(data))
    streamed = streaming_decoder(codec, torch.full(kv.shape, torch.nan, device=DEVICE))
    for first in range(0, len(data), 500):
        streamed.feed(memoryview(data)[first : first + 500])
    found = streamed.finish()
    assert torch.equal(found, codec.decode(data, torch.empty_like(found)))
    torch.testing.assert_close(found.cpu(), codec.decode(data))  # a GPU may round a division differently


@pytest.mark.parametrize("name", ["hugging face", "paged", "strided", "other"])
def test_layouts(name: str) -> None:
    codec, kv = make(*SHAPES[0])
    layers, _, _, heads, dim = kv.shape
    data = codec.encode(kv, 1, positions=range(START, START + T))

    def target(device: Any) -> tuple[CacheTarget, list[Any]]:
        if name == "hugging face":
            pairs = [tuple(torch.zeros((1, heads, T + 9, dim), device=device) for _ in (0, 1)) for _ in range(layers)]
            return HuggingFaceTarget(pairs, 5, T), [side for pair in pairs for side in pair]
        if name == "paged":
            blocks = [torch.zeros((2, 6, 8, heads, dim), device=device) for _ in range(layers)]
            return PagedTarget(blocks, [3, 1, 0, 5, 2, 4], 3, T), blocks
        memory = torch.zeros((T, heads, layers, 2, 2 * dim), device=device)
        view = as_target(memory[..., ::2].permute(2, 3, 0, 1, 4))
        return (view if name == "strided" else OnlyWrites(view)), [memory]

    found, memory = target(DEVICE)
    on_device(codec, data, found)
    other, wanted = target("cpu")
    codec.decode(data, other)
    for mine, its in zip(memory, wanted, strict=True):
        assert torch.allclose(mine.cpu(), its, rtol=1e-4, atol=1e-3)


class OnlyWrites(CacheTarget):
    """A third-party target, without a placement for kernels."""

    def __init__(self, inner: CacheTarget) -> None:
        self.inner, self.shape, self.dtype, self.device = inner, inner.shape, inner.dtype, inner.device

    def write(self, layer: int, kv: int, values: Any, first: int = 0) -> None:
        self.inner.write(layer, kv, values, first)


@pytest.mark.parametrize(("piece", "level"), [(1, 0), (7, 1), (64, 2), (1 << 20, 1)])
def test_decodes_as_bytes_arrive(piece: int, level: int) -> None:
    codec, kv = make(*SHAPES[0])
    data = codec.encode(kv, level, positions=range(START, START + T))
    wanted = codec.decode(data, torch.empty(kv.shape))
    out = torch.full(kv.shape, torch.nan, device=DEVICE)
    decoder = streaming_decoder(codec, out)
    assert not decoder.only_waits
    begun, done = [], []
    for first in range(0, len(data), piece):
        part = memoryview(data)[first : first + piece]
        held = torch.frombuffer(bytearray(part), dtype=torch.uint8).to(DEVICE) if first % 2 else None
        decoder.feed(part, held)
        begun.append(decoder.segments_begun)
        done.append(decoder.tokens_done)
    assert decoder.only_waits
    assert decoder.finish() is out
    assert_close(out, wanted)
    assert begun == sorted(begun)
    assert begun[-1] == 3
    assert set(done) == ({0, 16, 32, T} if piece < 100 else {T})


def test_sections_in_another_order_are_refused() -> None:
    codec, kv = make(*SHAPES[0])
    chunk = codec._open(codec.encode(kv, 2, positions=range(START, START + T)))
    for order in (("coef", "fine", "escs", "apar", "kind"), ("kind", "apar", "escs", "coef", "fine")):
        data = container.pack(chunk.header, {tag: chunk.section(tag) for tag in order})
        out = torch.empty(kv.shape, device=DEVICE)
        with pytest.raises(CodecError, match="follows 'coef'"):
            decode_at_once(codec, data, out)
    swapped = container.pack(chunk.header, {t: chunk.section(t) for t in ("apar", "kind", "escs", "fine", "coef")})
    with pytest.raises(CodecError, match="in this order"):
        decode_at_once(codec, swapped, out)


@pytest.mark.parametrize("only_writes", [False, True])
def test_decoders_can_split_the_layers(only_writes: bool) -> None:
    """As on two GPUs, each with its part of the cache."""
    codec, kv = make(3, 2, 16, 16, False)
    kv[2, 0, 5, 1, 3], kv[1, 1, 12, 0, 0] = 50.0, -45.0
    for level in (0, 2):
        data = codec.encode(kv, level, positions=range(START, START + T))
        whole = torch.full(kv.shape, torch.nan, device=DEVICE)
        decode_at_once(codec, data, whole)
        for layers in (range(1), range(1, 3)):
            part = torch.full((len(layers), *kv.shape[1:]), torch.nan, device=DEVICE)
            target = OnlyWrites(as_target(part)) if only_writes else part
            decoder = streaming_decoder(codec, target, layers=layers)
            for first in range(0, len(data), 600):
                decoder.feed(memoryview(data)[first : first + 600])
            decoder.finish()
            # products of other shapes add in another order
            torch.testing.assert_close(part, whole[layers.start : layers.stop], rtol=1e-6, atol=1e-5)


def test_a_layered_target_is_decoded_part_by_part() -> None:
    codec, kv = make(3, 2, 16, 16, False)
    kv[2, 0, 5, 1, 3] = 50.0
    data = codec.encode(kv, 2, positions=range(START, START + T))
    whole = torch.full(kv.shape, torch.nan, device=DEVICE)
    decode_at_once(codec, data, whole)
    parts = [torch.full((n, *kv.shape[1:]), torch.nan, device=DEVICE) for n in (1, 2)]
    target = LayeredTarget([as_target(part) for part in parts])
    decode_at_once(codec, data, target)
    assert torch.equal(torch.cat(parts), whole)
    for part in parts:
        part.fill_(torch.nan)
    on_device(codec, data, target)
    assert torch.equal(torch.cat(parts), whole)
    with pytest.raises(CodecError, match="omit layers"):
        streaming_decoder(codec, target, layers=range(3))


@pytest.mark.parametrize("counts", [(1, 1), (2, 2)])
def test_parts_with_other_layers_than_the_model_are_refused(counts: tuple[int, int]) -> None:
    codec, kv = make(3, 2, 16, 16, False)
    target = LayeredTarget([as_target(torch.empty((n, *kv.shape[1:]), device=DEVICE)) for n in counts])
    with pytest.raises(CodecError, match="layers, the profile's model 3"):
        streaming_decoder(codec, target)


def test_several_tiles_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very last one is partial, and begins within a segment."""
    monkeypatch.setattr(Parameters, "segment_tokens", 64)
    monkeypatch.setattr(triton_job, "BLOCK", 16)
    codec, kv = make(1, 2, 16, 16, False)
    kv = kv.repeat(1, 1, 2, 1, 1)[:, :, :71].contiguous()
    for level in (1, 2):
        data = codec.encode(kv, level, positions=range(START, START + 71))
        out = torch.full(kv.shape, torch.nan, device=DEVICE)
        decode_at_once(codec, data, out)
        assert_close(out, codec.decode(data, torch.empty(kv.shape)))


def test_the_encoders_product_in_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """All columns nearly, live ones as good as in float32; the last tiles of columns, tokens and values are partial."""
    monkeypatch.setattr(triton_encode, "COLUMNS", 16)
    monkeypatch.setattr(triton_encode, "ROUNDED", triton_encode.Shape(16, 32, 4, 2))
    monkeypatch.setattr(triton_encode, "EXACT", triton_encode.Shape(32, 16, 4, 2))
    codec, kv = make(3, 1, 20, 12, False, group=2)
    model, positions = codec.on_device(DEVICE), range(START, START + T)
    skipped = torch.zeros(T, dtype=torch.uint8, device=DEVICE)
    rows = triton_encode.rows(model, kv.to(DEVICE), positions, skipped)
    assert skipped.nonzero().flatten().tolist() == [11]
    parameters, level = codec.parameters, 1
    wanted = torch.cat([
        group.analysis @ vectors(kv, group.layers, parameters.rope, positions, parameters.mean).T
        for group in parameters.groups
    ]) / parameters.step(level)  # fmt: skip
    found = triton_encode.product(model, rows, level).cpu()
    usual = [t for t in range(T) if t != 11]
    assert (found - wanted)[:, usual].abs().max() < 2**-9 * wanted[:, usual].abs().max()
    live = np.flatnonzero(np.arange(parameters.n_columns) % 3 > 0).astype(np.int32)
    kept = triton_encode.analysis_of(model)
    tiles = triton_encode.tiles_of(live, model.group_ends, kept.begins, kept.counts)
    some = (torch.from_numpy(live).to(DEVICE), torch.from_numpy(tiles).to(DEVICE))
    exact = triton_encode.product(model, rows, level, some).cpu()
    assert (exact - wanted[live])[:, usual].abs().max() < 2**-18 * wanted[:, usual].abs().max()


def test_a_failed_chunk_stays_failed() -> None:
    codec, kv = make(*SHAPES[0])
    chunk = codec._open(codec.encode(kv, 1, positions=range(START, START + T)))
    parts = {**chunk.sections, "escs": bytes(chunk.section("escs")[::-1])}  # a valid checksum, but invalid escapes
    data = memoryview(container.pack(chunk.header, parts))
    head = len(data) - len(parts["coef"]) - len(parts["fine"]) - 1
    decoder = streaming_decoder(codec, torch.empty(kv.shape, device=DEVICE))
    decoder.feed(data[:head])
    for _ in range(2):
        with pytest.raises(CodecError, match="'escs'"):
            decoder.feed(data[head:])
    with pytest.raises(CodecError, match="'escs'"):
        decoder.finish()


def test_layers_the_model_lacks_are_refused() -> None:
    codec, kv = make(*SHAPES[0])
    data = codec.encode(kv, 1, positions=range(T))
    part = torch.empty((1, *kv.shape[1:]), device=DEVICE)
    for layers in (range(1, 3), range(0), range(1, -1, -1), range(0, 2, 2)):
        with pytest.raises(CodecError, match="not a range of consecutive layers of a model with 2"):
            streaming_decoder(codec, part, layers=layers)
    with pytest.raises(CodecError, match="the target has 1 layers, the profile's model 2"):
        streaming_decoder(codec, part).feed(memoryview(data))
    with pytest.raises(CodecError, match="decodes all layers at once on cpu"):
        codec.decoder(part, layers=range(1))


@pytest.mark.parametrize("how", ["fallback", "lossless"])
def test_some_layers_of_a_chunk_without_coefficients(how: str) -> None:
    whole, kv = make(3, 2, 16, 16, False)
    codec = KVStream(profile=whole.profile, lossless=1)
    level = 3 if how == "lossless" else 0
    chunk = kv if how == "lossless" else 1e4 * torch.randn(kv.shape, generator=torch.Generator().manual_seed(1))
    data = codec.encode(chunk, level, positions=range(START, START + T))
    assert codec.describe(data)[how]
    wanted = codec.decode(data)
    for layers in (range(1), range(1, 3), range(3)):
        part = torch.full((len(layers), *kv.shape[1:]), torch.nan, device=DEVICE)
        decoder = streaming_decoder(codec, part, layers=layers)
        for at in range(0, len(data), 1_000):
            decoder.feed(memoryview(data)[at : at + 1_000])
        assert decoder.finish() is part
        # eight bits times a scale: a GPU may round the sum with the mean once less
        torch.testing.assert_close(
            part.cpu(), wanted[layers.start : layers.stop], rtol=1e-6 * (how == "fallback"), atol=0
        )
    decoder = streaming_decoder(codec, torch.empty((2, *kv.shape[1:]), device=DEVICE), layers=range(1))
    decoder.feed(memoryview(data))
    with pytest.raises(CodecError, match="the target has 2 layers, not the 1"):
        decoder.finish()


def decode_at_once(codec: KVStream, data: bytes, target: Any) -> None:
    decoder = streaming_decoder(codec, target)
    decoder.feed(memoryview(data))
    decoder.finish()


def test_the_steps_that_the_benchmark_times_are_those_of_decoding(case: tuple[KVStream, Any]) -> None:
    codec, kv = case
    data = codec.encode(kv, 1, positions=range(START, START + T))
    out = torch.full(kv.shape, torch.nan, device=DEVICE)
    gpu_chunk.decode_by_stages(codec, data, out, gpu_chunk.Clock())
    assert_close(out, codec.decode(data, torch.empty(kv.shape)))


def test_an_announced_size_is_enforced_before_allocation() -> None:
    codec, kv = make(*SHAPES[3])
    data = codec.encode(kv, 1, positions=range(T))
    decoder = streaming_decoder(codec, torch.empty(kv.shape, device=DEVICE), total_bytes=len(data) - 1)
    with pytest.raises(CodecError, match="were announced"):
        decoder.feed(memoryview(data)[:300])
    assert decoder._shares[0].coef is None


def test_a_target_on_another_device_is_refused() -> None:
    codec, kv = make(*SHAPES[3])
    with pytest.raises(CodecError, match="the target is on meta"):
        streaming_decoder(codec, torch.empty(kv.shape, device="meta"))


def test_damage_is_an_error_and_harmless() -> None:
    codec, kv = make(*SHAPES[0])
    data = codec.encode(kv, 1, positions=range(START, START + T))
    out = torch.empty(kv.shape, device=DEVICE)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 5
    longer = torch.empty((2, 2, T + 1, 2, 16), device=DEVICE)
    cases = [(bytes(flipped), out), (data[:-3], out), (data + b"x", out), (data[:50], out), (b"x" * 500, out)]
    for hostile, target in [*cases, (data, longer)]:
        with pytest.raises(CodecError):
            decode_at_once(codec, hostile, target)
    on_device(codec, data, as_target(out))
    assert_close(out, codec.decode(data, torch.empty(kv.shape)))


@pytest.mark.parametrize("seed", range(3))
def test_cpu_and_device_accept_and_refuse_the_same_chunks(seed: int) -> None:
    """Sections damaged behind valid checksums: decoded as a whole, in pieces and on the CPU."""
    codec, kv = make(*SHAPES[3])
    draw = random.Random(seed)
    chunks = [codec._open(codec.encode(kv, level, positions=range(START, START + T))) for level in range(3)]
    taken = 0
    for _ in range(10):
        chunk = draw.choice(chunks)
        parts = {tag: bytearray(content) for tag, content in chunk.sections.items()}
        harm(parts[draw.choice(list(parts))], draw)
        data = container.pack(chunk.header, {tag: bytes(content) for tag, content in parts.items()})
        wanted = decoded(lambda out, data=data: codec.decode(data, out), torch.empty(kv.shape))
        there = torch.empty(kv.shape, device=DEVICE)
        whole = decoded(lambda out, data=data: on_device(codec, data, as_target(out)), there.clone())
        pieces = decoded(lambda out, data=data: decode_at_once(codec, data, out), there)
        assert (wanted is None) == (whole is None) == (pieces is None)
        if wanted is not None:
            assert torch.allclose(whole.cpu(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
            assert torch.equal(whole, pieces)
            taken += 1
    assert taken < 10


def harm(content: bytearray, draw: random.Random) -> None:
    """Change a section: anywhere, in its header and lengths, its end, or its tokens per segment."""
    match draw.randrange(5):
        case 0 if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        case 1 if content:
            content[draw.randrange(min(len(content), 28))] = draw.choice((0, 1, 2, 16, 17, 255))
        case 2:
            del content[draw.randrange(len(content) + 1) :]
        case 3:
            content.extend(draw.randbytes(draw.randrange(1, 40)))
        case _ if len(content) >= 8:
            content[4:8] = draw.choice((1, 2, 15, 16, 39, 40, 41, 1 << 31)).to_bytes(4, "little")


def decoded(decode: Any, out: Any) -> Any:
    """The target after `decode`; None if it was refused."""
    try:
        decode(out)
    except CodecError:
        return None
    return out


def test_streams_of_other_tables_are_detected() -> None:
    """Damage that only the kernels can see: they stay in bounds and report it."""
    codec, kv = make(*SHAPES[3])
    chunk = codec._open(codec.encode(kv, 1, positions=range(T)))
    own = codec.parameters.expected[1]
    kinds_of = kinds.parse(chunk.section("kind"), own, codec.parameters.kinds.count)
    other = np.where(kinds_of > 0, np.where(kinds_of < 10, 25, 2), 0).astype(np.uint8)
    data = container.pack(chunk.header, {**chunk.sections, "kind": kinds.pack(other, own), "fine": b"", "escs": b""})
    for decode in (decode_at_once, lambda codec, data, out: on_device(codec, data, as_target(out))):
        with pytest.raises(CodecError, match="is damaged or belongs to other tables"):
            decode(codec, data, torch.empty(kv.shape, device=DEVICE))


def test_a_cuda_target_goes_through_the_kernels() -> None:
    if DEVICE.type != "cuda":
        pytest.skip("needs a CUDA device")
    codec, kv = make(*SHAPES[0])
    data = codec.encode(kv.cuda(), 1, positions=range(T))
    assert isinstance(codec, Codec)
    assert codec.decodes_pieces("cuda")
    assert_close(codec.decode(data, device="cuda"), codec.decode(data, torch.empty(kv.shape)))
