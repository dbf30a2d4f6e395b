"""The Triton kernels against numba, to the bit: on a CUDA device where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from kvstream.codec.entropy import arithmetic, arithmetic_triton, rans, rans_triton  # noqa: E402
from kvstream.codec.entropy.device import raise_if_damaged  # noqa: E402
from kvstream.codec.entropy.tables import Tables, from_counts  # noqa: E402
from kvstream.codec.errors import CodecError  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    # symbols, tables, skew, columns, tokens, tokens per segment
    (32, 8, 0.3, 40, 20, 8),
    (1, 1, 1.0, 3, 5, 5),
    (2, 3, 0.05, 33, 1, 1),
    (256, 2, 10.0, 5, 20, 20),
    (20, 300, 0.3, 33, 9, 4),
]


def case(n_symbols: int, count: int, skew: float, columns: int, tokens: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """Histograms, a table per column, and symbols; in a third of the columns they are the table's rarest."""
    rng = np.random.default_rng(n_symbols * 31 + columns)
    counts = rng.multinomial(1000, rng.dirichlet(np.full(n_symbols, skew), count))
    rows = rng.integers(0, count, columns)
    tables = from_counts(counts)
    symbols = tables.slots[rows[:, None], rng.integers(0, 1024, (columns, tokens))]
    rarest = tables.frequencies.argmin(axis=1).astype(np.uint8)
    symbols[::3] = rarest[rows[::3], None]
    return counts, rows, symbols


def coders(counts: np.ndarray, rows: np.ndarray) -> list[tuple[Any, Any, Any, Any]]:
    """(numba coder, its model, Triton coder, the model on the device) for rANS and arithmetic coding."""
    tables, cdfs = from_counts(counts), arithmetic.from_counts(counts)
    return [
        (rans, tables, rans_triton, rans_triton.to_device(tables, rows, DEVICE)),
        (arithmetic, cdfs, arithmetic_triton, arithmetic_triton.to_device(cdfs, rows, DEVICE)),
    ]


@pytest.mark.parametrize(("n_symbols", "count", "skew", "columns", "tokens", "segment"), CASES)
def test_same_bytes_and_symbols_as_numba(
    n_symbols: int, count: int, skew: float, columns: int, tokens: int, segment: int
) -> None:
    counts, rows, symbols = case(n_symbols, count, skew, columns, tokens)
    on_device = torch.from_numpy(symbols.T.copy()).to(DEVICE).T
    for coder, model, device_coder, device_model in coders(counts, rows):
        data = coder.encode(symbols, rows, model, segment_tokens=segment)
        assert device_coder.encode(on_device, device_model, segment_tokens=segment) == data
        assert np.array_equal(device_coder.decode(data, device_model, tokens).cpu().numpy(), symbols)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_same_reconstruction_as_numba(dtype: str, lookup: bool, scaled: bool) -> None:
    columns, tokens = 36, 7
    counts, rows, symbols = case(20, 4, 0.5, columns, tokens)
    rng = np.random.default_rng(7)
    how = {
        "values": rng.normal(size=(4, 20)).astype(np.float32) if lookup else np.arange(20, dtype=np.float32)[None] - 10,
        "scale": rng.lognormal(size=columns).astype(np.float32),
        "offset": rng.normal(size=columns).astype(np.float32),
        "token_scale": rng.lognormal(size=(2, tokens)).astype(np.float32) if scaled else None,
    }
    for coder, model, device_coder, device_model in coders(counts, rows):
        data = coder.encode(symbols, rows, model, segment_tokens=4)
        expected = torch.empty(3, tokens, 12, dtype=getattr(torch, dtype))
        array = expected.numpy() if dtype == "float32" else expected.view(torch.uint16).numpy()
        coder.decode_dequantised(data, rows, model, columns, tokens, array, dtype=dtype, **how)
        out = torch.full((3, 12, tokens), torch.nan, dtype=expected.dtype, device=DEVICE).transpose(1, 2)
        device_coder.decode_dequantised(data, device_model, tokens, out, **how)
        if dtype == "bfloat16" and DEVICE == "cpu":
            # Triton's interpreter truncates bfloat16 where the GPU rounds: up to one unit in the last place.
            difference = out.contiguous().view(torch.int16).int() - expected.view(torch.int16).int()
            assert difference.abs().max() <= 1
        else:
            assert torch.equal(out.cpu(), expected)


def test_damage_is_an_error_or_harmless() -> None:
    counts, rows, symbols = case(32, 8, 0.3, 40, 12)
    rng = np.random.default_rng(0)
    for coder, model, device_coder, device_model in coders(counts, rows):
        data = coder.encode(symbols, rows, model)
        noticed = 0
        for _ in range(8):
            bad = bytearray(data)
            bad[int(rng.integers(8, len(data)))] ^= 1 << int(rng.integers(0, 8))
            try:
                out = device_coder.decode(bytes(bad), device_model, 12)
            except CodecError:
                noticed += 1
                continue
            assert int(out.max()) < 32
        assert noticed > 2
        for bad in (data[:-3], data[:9], data + b"\0\0", rng.bytes(len(data))):
            with pytest.raises(CodecError):
                device_coder.decode(bad, device_model, 12)
        for tokens in (11, 13, 1 << 45):
            with pytest.raises(CodecError):
                device_coder.decode(data, device_model, tokens)


def test_lengths_that_do_not_add_up_are_refused() -> None:
    """On the host: the device would only clamp them."""
    counts, rows, symbols = case(32, 8, 0.3, 40, 20)
    for coder, model, device_coder, device_model in coders(counts, rows):
        data = coder.encode(symbols, rows, model)
        for change in (1, -1, 0x7FFF):
            bad = bytearray(data)
            shortest = int.from_bytes(bad[12:14], "little")
            bad[12:14] = (shortest + change & 0xFFFF).to_bytes(2, "little")
            with pytest.raises(CodecError, match="do not add up"):
                device_coder.decode(bytes(bad), device_model, 20)


def test_offsets_out_of_bounds_are_clamped() -> None:
    """Kernels stay in bounds without the host's checks."""
    counts, rows, symbols = case(32, 8, 0.3, 40, 20)
    for coder, model, device_coder, device_model in coders(counts, rows):
        streams = device_coder.upload(coder.encode(symbols, rows, model), device_model, 20)
        wild = replace(streams, offsets=streams.offsets * 1_000_003 - 7)
        out = torch.zeros((20, 40), dtype=torch.uint8, device=DEVICE)
        flag = device_coder.launch_decode(wild, device_model, device_coder.reconstruction(device_model, 20), out)
        with pytest.raises(CodecError, match="damaged"):
            raise_if_damaged(flag, wild)
        assert int(out.max()) < 32


def test_bad_arguments_are_refused() -> None:
    tables = Tables(np.array([[1024, 0], [512, 512]]))
    model = rans_triton.to_device(tables, np.zeros(4, int), DEVICE)
    ones = torch.ones(4, 3, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(CodecError, match="no slot"):
        rans_triton.encode(ones, model)
    with pytest.raises(CodecError, match="uint8"):
        rans_triton.encode(ones.float(), model)
    with pytest.raises(CodecError, match="columns"):
        rans_triton.encode(ones[:2], model)
    data = rans_triton.encode(ones * 0, model)
    for out in (torch.zeros(3, 5, device=DEVICE), torch.zeros(3, 4, dtype=torch.int32, device=DEVICE), ones.T):
        with pytest.raises(CodecError):
            rans_triton.decode_dequantised(data, model, 3, out)
    cdfs = arithmetic_triton.to_device(arithmetic.from_counts(np.ones((1, 2))), np.zeros(4, int), DEVICE)
    with pytest.raises(CodecError, match="alphabet"):
        arithmetic_triton.encode(ones * 2, cdfs)


def test_every_kernel_compiles_without_a_gpu() -> None:
    """Down to machine code for compute capability 9.0, and without spilling registers."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_kernels.py"
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) >= 8
    assert all(line.endswith("spilled 0") for line in lines), run.stdout
