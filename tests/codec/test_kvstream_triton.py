"""`codec.kvstream_triton` against the CPU codec: on a CUDA device where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from codec import container, kvstream, kvstream_arriving, kvstream_triton  # noqa: E402
from codec.api import Codec  # noqa: E402
from codec.entropy import escapes, rans  # noqa: E402
from codec.errors import CodecError  # noqa: E402
from codec.targets import CacheTarget, HuggingFaceTarget, LayeredTarget, PagedTarget, as_target  # noqa: E402
from codec.transform import Rope  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T, START = 20, 100
# The interpreter is slow, and has no bfloat16 of its own.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32, torch.float16]
SHAPES = [
    # layers, heads, dimensions, rotary dimensions, interleaved
    (2, 2, 16, 16, False),
    (1, 1, 32, 16, True),
    (1, 1, 20, 12, False),
    (1, 1, 16, 0, False),
]


def make(layers: int, heads: int, dim: int, rotary: int, interleaved: bool) -> tuple[kvstream.KVStream, Any]:
    """A codec with levels that have no wide columns, some, and more than a product takes; a cache with spikes."""
    draw = torch.Generator().manual_seed(dim + rotary)
    shape = (layers, 2, 300, heads, dim)
    mixing = torch.randn((layers, 2, heads, dim, dim), generator=draw) * torch.logspace(1, -1.5, dim)
    kv = torch.einsum("lsthd,lshed->lsthe", torch.randn(shape, generator=draw), mixing / dim**0.5)
    kv += 3 * torch.randn((layers, 2, 1, heads, dim), generator=draw)
    rope = Rope(torch.rand((layers, rotary // 2), generator=draw), interleaved) if rotary else None
    codec = kvstream.KVStream(profile=kvstream.fit([kv], rope=rope, target_bits=(0.8, 4.0, 7.5)))
    chunk = kv[:, :, :T].clone()
    chunk[0, 0, 3, 0, 1], chunk[0, 1, 7, -1, 2] = 40.0, -60.0
    return codec, chunk


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def case(request: pytest.FixtureRequest) -> tuple[kvstream.KVStream, Any]:
    return make(*request.param)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstream, "SEGMENT_TOKENS", 8)


def on_device(codec: kvstream.KVStream, data: bytes, target: CacheTarget) -> None:
    """Decode by the kernels, also where that is not what `decode` would do."""
    chunk = codec._open(data)
    header = chunk.header
    parts = {tag: chunk.section(tag) for tag in ("coef", "fine")}
    parts["escs"] = escapes.parse(chunk.section("escs"), len(codec.columns(header.level)[0]), header.tokens)
    kvstream_arriving.decode(codec, header, parts, target)


def assert_close(out: Any, wanted: Any) -> None:
    """Within the larger of one unit in the last place and 2^-14 of the column's root mean square."""
    spacing = torch.finfo(out.dtype).eps * wanted.abs()
    rms = wanted.pow(2).mean(dim=2, keepdim=True).sqrt()
    assert ((out.cpu().float() - wanted).abs() <= torch.maximum(spacing, rms * 2**-14)).all()


@pytest.mark.parametrize("level", [0, 2])
def test_decodes_as_the_cpu_does(case: tuple[kvstream.KVStream, Any], level: int) -> None:
    codec, kv = case
    data = codec.encode(kv, level, positions=range(START, START + T))
    wanted = codec.decode(data, torch.empty(kv.shape))
    for dtype in DTYPES:
        out = torch.full(kv.shape, torch.nan, dtype=dtype, device=DEVICE)
        on_device(codec, data, as_target(out))
        assert_close(out, wanted)


@pytest.mark.parametrize("level", [0, 2])
def test_encodes_as_the_cpu_does(case: tuple[kvstream.KVStream, Any], level: int) -> None:
    """The same symbols, but for values that lie on a threshold to the last digit."""
    codec, kv = case
    positions = range(START, START + T)
    model = codec.on_device(DEVICE)
    symbols, _, escaped = kvstream_triton.launch_quantise(model, kv.to(DEVICE), level, positions)
    chunk = codec._open(codec.encode(kv, level, positions=positions))
    own = codec.columns(level)[0]
    wanted = rans.decode(chunk.section("coef"), own, codec.classes.tables, len(own), T)
    assert float((symbols.T.cpu().numpy() != wanted).mean()) < 0.002
    assert len(escaped) == len(escapes.parse(chunk.section("escs"), len(own), T))
    parts = kvstream_triton.encode(model, kv.to(DEVICE), level, positions, kvstream.SEGMENT_TOKENS)
    values = codec.decode(container.pack(chunk.header, parts), torch.empty(kv.shape))
    error, usual = (
        float((x - kv).pow(2).mean()) for x in (values, codec.decode(container.pack(chunk.header, chunk.sections)))
    )
    assert error == pytest.approx(usual, rel=0.02)


def test_levels_are_of_all_kinds(case: tuple[kvstream.KVStream, Any]) -> None:
    codec, kv = case
    model = codec.on_device(DEVICE)
    assert model.level(0).fine is None
    assert model.level(2).fine is not None
    assert int(model.level(2).wide_first.diff().max()) >= (17 if codec.shape[2] > 16 else 12)
    data = codec.encode(kv, 1, positions=range(START, START + T))
    assert len(codec._open(data).section("escs")) > 0


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
    """A target of somebody else's, which kernels know nothing of."""

    def __init__(self, inner: CacheTarget) -> None:
        self.inner, self.shape, self.dtype, self.device = inner, inner.shape, inner.dtype, inner.device

    def write(self, layer: int, kv: int, values: Any, first: int = 0) -> None:
        self.inner.write(layer, kv, values, first)


@pytest.mark.parametrize(("piece", "level"), [(7, 1), (64, 2), (1 << 20, 1)])
def test_decodes_as_bytes_arrive(piece: int, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvstream_triton, "SYNTHESIS", kvstream_triton.Tiling(block=16, tiles=1, warps=4, stages=1))
    monkeypatch.setattr(kvstream_triton, "SPAN", 16)
    codec, kv = make(*SHAPES[0])
    data = codec.encode(kv, level, positions=range(START, START + T))
    wanted = codec.decode(data, torch.empty(kv.shape))
    out = torch.full(kv.shape, torch.nan, device=DEVICE)
    decoder = kvstream_arriving.StreamingDecoder(codec, out, DEVICE)
    begun, done = [], []
    for first in range(0, len(data), piece):
        part = memoryview(data)[first : first + piece]
        held = torch.frombuffer(bytearray(part), dtype=torch.uint8).to(DEVICE) if first % 2 else None
        decoder.feed(part, held)
        begun.append(decoder.segments_begun)
        done.append(decoder.tokens_done)
    assert decoder.finish() is out
    assert_close(out, wanted)
    assert begun == sorted(begun)
    assert begun[-1] == 3
    if piece < 100:
        assert 1 in begun
    assert set(done) == ({0, 16, T} if piece < 100 else {T})


def test_sections_in_another_order_are_decoded_at_the_end() -> None:
    codec, kv = make(*SHAPES[0])
    chunk = codec._open(codec.encode(kv, 2, positions=range(START, START + T)))
    data = container.pack(chunk.header, {tag: chunk.section(tag) for tag in ("coef", "fine", "escs")})
    out = torch.full(kv.shape, torch.nan, device=DEVICE)
    decode_at_once(codec, data, out)
    assert_close(out, codec.decode(data, torch.empty(kv.shape)))


@pytest.mark.parametrize("only_writes", [False, True])
def test_decoders_can_share_out_the_layers(only_writes: bool) -> None:
    """As two GPUs do, each with its part of the cache."""
    codec, kv = make(3, 2, 16, 16, False)
    kv[2, 0, 5, 1, 3], kv[1, 1, 12, 0, 0] = 50.0, -45.0
    for level in (0, 2):
        data = codec.encode(kv, level, positions=range(START, START + T))
        whole = torch.full(kv.shape, torch.nan, device=DEVICE)
        decode_at_once(codec, data, whole)
        for layers in (range(1), range(1, 3)):
            part = torch.full((len(layers), *kv.shape[1:]), torch.nan, device=DEVICE)
            target = OnlyWrites(as_target(part)) if only_writes else part
            decoder = kvstream_arriving.StreamingDecoder(codec, target, DEVICE, layers=layers)
            for first in range(0, len(data), 600):
                decoder.feed(memoryview(data)[first : first + 600])
            decoder.finish()
            assert torch.equal(part, whole[layers.start : layers.stop])


def test_a_target_of_several_parts_is_decoded_by_parts() -> None:
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
    with pytest.raises(CodecError, match="says itself which layers"):
        kvstream_arriving.StreamingDecoder(codec, target, DEVICE, layers=range(3))


@pytest.mark.parametrize("counts", [(1, 1), (2, 2)])
def test_parts_with_other_layers_than_the_model_are_refused(counts: tuple[int, int]) -> None:
    codec, kv = make(3, 2, 16, 16, False)
    target = LayeredTarget([as_target(torch.empty((n, *kv.shape[1:]), device=DEVICE)) for n in counts])
    with pytest.raises(CodecError, match="layers, the profile's model 3"):
        kvstream_arriving.StreamingDecoder(codec, target, DEVICE)


def test_several_tiles_a_program_and_programs_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile is read ahead within a program; the last tile of all is cut off."""
    monkeypatch.setattr(kvstream, "SEGMENT_TOKENS", 64)
    monkeypatch.setattr(kvstream_triton, "SYNTHESIS", kvstream_triton.Tiling(block=16, tiles=2, warps=4, stages=1))
    monkeypatch.setattr(kvstream_triton, "SPAN", 32)
    codec, kv = make(1, 2, 16, 16, False)
    kv = kv.repeat(1, 1, 4, 1, 1)[:, :, :71].contiguous()
    for level in (1, 2):
        data = codec.encode(kv, level, positions=range(START, START + 71))
        out = torch.full(kv.shape, torch.nan, device=DEVICE)
        decode_at_once(codec, data, out)
        assert_close(out, codec.decode(data, torch.empty(kv.shape)))


def test_nothing_comes_of_a_chunk_that_failed_once() -> None:
    codec, kv = make(*SHAPES[0])
    chunk = codec._open(codec.encode(kv, 1, positions=range(START, START + T)))
    wrong = bytes(chunk.section("escs")[::-1])  # well checked, and no escapes
    parts = {"coef": chunk.section("coef"), "fine": chunk.section("fine"), "escs": wrong}
    data = memoryview(container.pack(chunk.header, parts))
    decoder = kvstream_arriving.StreamingDecoder(codec, torch.empty(kv.shape, device=DEVICE), DEVICE)
    decoder.feed(data[: -len(wrong)])
    for _ in range(2):
        with pytest.raises(CodecError, match="escape section"):
            decoder.feed(data[-len(wrong) :])
    with pytest.raises(CodecError, match="escape section"):
        decoder.finish()


def test_layers_that_a_model_has_not_are_refused() -> None:
    codec, kv = make(*SHAPES[0])
    data = codec.encode(kv, 1, positions=range(T))
    part = torch.empty((1, *kv.shape[1:]), device=DEVICE)
    for layers in (range(1, 3), range(0), range(1, -1, -1), range(0, 2, 2)):
        with pytest.raises(CodecError, match="not consecutive layers of a model that has 2"):
            kvstream_arriving.StreamingDecoder(codec, part, DEVICE, layers=layers)
    with pytest.raises(CodecError, match="the target has 1 layers, the profile's model 2"):
        kvstream_arriving.StreamingDecoder(codec, part, DEVICE).feed(memoryview(data))
    with pytest.raises(CodecError, match="decodes all layers at once on cpu"):
        codec.decoder(part, layers=range(1))


def decode_at_once(codec: kvstream.KVStream, data: bytes, target: Any) -> None:
    decoder = kvstream_arriving.StreamingDecoder(codec, target, DEVICE)
    decoder.feed(memoryview(data))
    decoder.finish()


def test_an_announced_size_is_held_to_before_memory_is_taken() -> None:
    codec, kv = make(*SHAPES[3])
    data = codec.encode(kv, 1, positions=range(T))
    decoder = kvstream_arriving.StreamingDecoder(codec, torch.empty(kv.shape, device=DEVICE), DEVICE, len(data) - 1)
    with pytest.raises(CodecError, match="were announced"):
        decoder.feed(memoryview(data)[:300])
    assert decoder._shares[0].coef is None


def test_a_target_elsewhere_is_refused() -> None:
    codec, kv = make(*SHAPES[3])
    with pytest.raises(CodecError, match="the target lies on meta"):
        kvstream_arriving.StreamingDecoder(codec, torch.empty(kv.shape, device="meta"), DEVICE)


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
def test_cpu_and_device_refuse_and_take_the_same(seed: int) -> None:
    """Sections harmed by someone who knows the checksums: decoded as a whole, in pieces and on the CPU."""
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
    """Change a section: anywhere, in its header and lengths, its end, or its number of tokens a segment."""
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
            content[4:8] = draw.choice((1, 2, 7, 8, 19, 20, 21, 1 << 31)).to_bytes(4, "little")


def decoded(decode: Any, out: Any) -> Any:
    """The target after `decode`; None where that refuses."""
    try:
        decode(out)
    except CodecError:
        return None
    return out


def test_streams_of_other_tables_are_found_out() -> None:
    """Bytes that only the kernels can see are wrong: they stay in bounds and say so."""
    codec, kv = make(*SHAPES[3])
    low, high = (codec._open(codec.encode(kv, level, positions=range(T))) for level in (0, 1))
    parts: dict[str, Any] = {"coef": low.section("coef"), "fine": high.section("fine"),
                             "escs": escapes.parse(b"", 32, T)}  # fmt: skip
    with pytest.raises(CodecError, match="is damaged or belongs to other tables"):
        kvstream_arriving.decode(codec, high.header, parts, as_target(torch.empty(kv.shape, device=DEVICE)))


def test_a_cuda_target_goes_through_the_kernels() -> None:
    if DEVICE.type != "cuda":
        pytest.skip("needs a CUDA device")
    codec, kv = make(*SHAPES[0])
    data = codec.encode(kv.cuda(), 1, positions=range(T))
    assert isinstance(codec, Codec)
    assert codec.decodes_pieces("cuda")
    assert_close(codec.decode(data, device="cuda"), codec.decode(data, torch.empty(kv.shape)))
