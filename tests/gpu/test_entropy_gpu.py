"""Both coders on a CUDA device at a size that fills it: agreement with numba to the bit, and memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from kvstream.codec.entropy import arithmetic, arithmetic_triton, rans, rans_triton  # noqa: E402
from kvstream.codec.entropy.tables import laplace_family  # noqa: E402
from kvstream.codec.errors import CodecError  # noqa: E402

COLUMNS, TOKENS, BLOCKS, SEGMENT = 16_384, 512, 16, 256


@pytest.fixture(scope="module")
def symbols() -> tuple[Any, np.ndarray, np.ndarray]:
    tables = laplace_family(cut=0)
    rng = np.random.default_rng(0)
    rows = np.sort(rng.integers(0, 32, COLUMNS))
    return tables, rows, tables.slots[rows[:, None], rng.integers(0, 1024, (COLUMNS, TOKENS))]


@pytest.mark.parametrize("name", ["rans", "arithmetic"])
def test_same_bytes_and_values_as_numba(symbols: tuple[Any, np.ndarray, np.ndarray], name: str) -> None:
    tables, rows, wanted = symbols
    coder, device_coder, model = {
        "rans": (rans, rans_triton, tables),
        "arithmetic": (arithmetic, arithmetic_triton, arithmetic.from_tables(tables)),
    }[name]
    device_model = device_coder.to_device(model, rows, "cuda")
    data = coder.encode(wanted, rows, model, segment_tokens=SEGMENT)
    assert device_coder.encode(torch.from_numpy(wanted).cuda(), device_model, segment_tokens=SEGMENT) == data
    rng = np.random.default_rng(1)
    how = {
        "values": rng.normal(size=(32, 32)).astype(np.float32),
        "scale": rng.lognormal(size=COLUMNS).astype(np.float32),
        "offset": rng.normal(size=COLUMNS).astype(np.float32),
        "token_scale": rng.lognormal(size=(BLOCKS, TOKENS)).astype(np.float32),
    }
    shape = (BLOCKS, TOKENS, COLUMNS // BLOCKS)
    for dtype in ("float16", "bfloat16", "float32"):
        expected = torch.empty(shape, dtype=getattr(torch, dtype))
        array = expected.numpy() if dtype == "float32" else expected.view(torch.uint16).numpy()
        coder.decode_dequantised(data, rows, model, COLUMNS, TOKENS, array, dtype=dtype, **how)
        out = torch.full(shape, torch.nan, dtype=expected.dtype, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        device_coder.decode_dequantised(data, device_model, TOKENS, out, **how)
        used = torch.cuda.max_memory_allocated() - before
        assert torch.equal(out.cpu(), expected)
        assert used + out.nbytes < 1.15 * (out.nbytes + len(data)) + (1 << 20)


@pytest.mark.parametrize("name", ["rans", "arithmetic"])
def test_damage_never_faults(symbols: tuple[Any, np.ndarray, np.ndarray], name: str) -> None:
    """A kernel that reads out of bounds would end every later CUDA call of this process with an error."""
    tables, rows, wanted = symbols
    coder, device_coder, model = {
        "rans": (rans, rans_triton, tables),
        "arithmetic": (arithmetic, arithmetic_triton, arithmetic.from_tables(tables)),
    }[name]
    device_model = device_coder.to_device(model, rows, "cuda")
    data = coder.encode(wanted, rows, model, segment_tokens=SEGMENT)
    rng = np.random.default_rng(2)
    for _ in range(20):
        bad = bytearray(data)
        at = int(rng.integers(8, len(data) - 4096))
        bad[at : at + 4096] = rng.bytes(4096)
        with pytest.raises(CodecError):
            device_coder.decode(bytes(bad), device_model, TOKENS)
    assert np.array_equal(device_coder.decode(data, device_model, TOKENS).cpu().numpy(), wanted)
