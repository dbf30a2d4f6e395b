"""The lossless level decoded by kernels: on a CUDA device where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from kvstream.codec import container  # noqa: E402
from kvstream.codec.container import Chunk, Header  # noqa: E402
from kvstream.codec.errors import CodecError  # noqa: E402
from kvstream.codec.kvstream import lossless, lossless_triton  # noqa: E402
from kvstream.codec.kvstream.lossless import Content  # noqa: E402
from kvstream.codec.targets import LayeredTarget, PagedTarget, StridedTarget, as_target  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (2, 2, 20, 3, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Content, "segment_tokens", 8)


def cache(dtype: torch.dtype) -> torch.Tensor:
    """Channels whose first byte is coded, whose second is too, and those that are kept."""
    draw = torch.Generator().manual_seed(1)
    kv = torch.randn(SHAPE, generator=draw).to(dtype)
    kv[..., 1] = 1.25
    noise = torch.randint(0, 256, (*SHAPE[:-1], dtype.itemsize), generator=draw, dtype=torch.uint8)
    kv[..., 2] = noise.view(dtype)[..., 0]
    kv[1, 1, :, 1:, 3:] = torch.nan
    return kv


def chunk_of(kv: torch.Tensor) -> Chunk:
    layers, _, tokens, heads, dim = kv.shape
    header = Header("kvstream", 1, 0, layers, tokens, heads, dim, str(kv.dtype).removeprefix("torch."))
    return container.parse(container.pack(header, lossless.encode(kv)))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_decodes_to_the_bit(dtype: torch.dtype) -> None:
    kv = cache(dtype)
    chunk = chunk_of(kv)
    own = Content.of(chunk).own.reshape(4, dtype.itemsize, -1)
    assert own[:, 0].any()
    assert own[:, 1].any()
    assert (own == 0).any()
    out = torch.zeros(SHAPE, dtype=dtype, device=DEVICE)
    lossless_triton.decode(chunk, as_target(out))
    assert same_bits(out, kv)


def test_random_bits() -> None:
    """Nothing is coded."""
    draw = torch.Generator().manual_seed(1)
    kv = torch.randint(0, 256, (*SHAPE[:-1], 16), generator=draw, dtype=torch.uint8).view(torch.bfloat16)
    chunk = chunk_of(kv)
    assert Content.of(chunk).tables is None
    out = torch.zeros(SHAPE, dtype=torch.bfloat16, device=DEVICE)
    lossless_triton.decode(chunk, as_target(out))
    assert same_bits(out, kv)


@pytest.mark.parametrize("dtype", DTYPES)
def test_paged_and_layered_targets(dtype: torch.dtype) -> None:
    kv = cache(dtype)
    chunk = chunk_of(kv)
    table = torch.randperm(9, generator=torch.Generator().manual_seed(2))[:6]
    blocks = [torch.zeros((2, 9, 4, 3, 8), dtype=dtype, device=DEVICE) for _ in range(2)]
    paged = PagedTarget(blocks, table, 2, 20)
    assert paged.placement is not None
    lossless_triton.decode(chunk, paged)
    for layer, block in enumerate(blocks):
        assert same_bits(block[:, table].flatten(1, 2)[:, 2:22], kv[layer])
    parts = [torch.zeros((1, *SHAPE[1:]), dtype=dtype, device=DEVICE) for _ in range(2)]
    lossless_triton.decode(chunk, LayeredTarget([StridedTarget(part) for part in parts]))
    assert same_bits(torch.cat(parts), kv)


def test_strides_and_another_dtype() -> None:
    kv = cache(torch.float16)
    chunk = chunk_of(kv)
    out = torch.zeros((20, 8, 3, 2, 2), dtype=torch.float16, device=DEVICE).permute(4, 3, 0, 2, 1)
    lossless_triton.decode(chunk, as_target(out))
    assert same_bits(out, kv)
    wide = torch.zeros(SHAPE, device=DEVICE)
    lossless_triton.decode(chunk, as_target(wide))
    assert torch.equal(wide.nan_to_num(), kv.to(DEVICE).float().nan_to_num())


def test_damage_is_reported() -> None:
    chunk = chunk_of(cache(torch.bfloat16))
    coded = bytearray(chunk.section("rans"))
    coded[-6] ^= 0x40
    damaged = container.pack(chunk.header, {**chunk.sections, "rans": bytes(coded)})
    with pytest.raises(CodecError, match="damaged"):
        lossless_triton.decode(
            container.parse(damaged), as_target(torch.zeros(SHAPE, dtype=torch.bfloat16, device=DEVICE))
        )
