"""Speed of the entropy coders and of codec `kvstream` on a GPU: chunks in the shape of Mistral-7B's cache.

    python benchmarks/codec_gpu.py [--out benchmarks/results/h200-codec.json]

64 (layer, K or V) x 1,024 channels x 1,536 tokens; the whole codec with 1,024 tokens too. A rate is bytes of float16
that the symbols stand for, over the time from coded bytes in device memory to float16 in device memory: for decoding,
bounds checks and dequantisation included; where the streams lie is unpacked on the host, which the rows of wall clock
include. Beside it: what only dequantises (uint8 to float16), what only fills, and, where it
is installed, nvCOMP's ANS, which does not dequantise (nvidia-nvcomp-cu13 and nvidia-libnvcomp-cu13 of one version).
Symbols are drawn from the tables; every output is checked. `--kvstream` leaves out the coders on their own, `--small`
shrinks everything: for trying the script, not for measuring; with TRITON_INTERPRET=1 it runs without a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_chunk
from kvstream.codec.entropy import arithmetic, arithmetic_triton, rans, rans_triton
from kvstream.codec.entropy import device as shared
from kvstream.codec.entropy.tables import laplace_family

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEGMENTS = (256, 512, 1536)
REFERENCE_SEGMENT = 512
LANES = (32, 64)
API_TOKENS = 1_024
"""What a connector hands to the API at a time."""


@triton.jit
def _dequantise(symbols, out, slope, shift, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(symbols + i, mask=i < n).to(tl.float32) * slope + shift
    tl.store(out + i, y.to(tl.float16), mask=i < n)


class Table:
    """Rows of (name, seconds, GB/s of float16), printed as they come."""

    def __init__(self, elements: int) -> None:
        self.elements = elements
        """That the next rows are about."""
        self.rows: list[dict[str, Any]] = []
        self.multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count if DEVICE.type == "cuda" else 1

    def add(self, name: str, work: Callable[[], Any], *, graph: bool = False, **facts: Any) -> None:
        """A row of device time."""
        self.wall(name, median_s(work, graph), **facts)

    def wall(self, name: str, seconds: float, **facts: Any) -> None:
        gigabytes = 2 * self.elements / 1e9
        row = {
            "name": name,
            **facts,
            "seconds": seconds,
            "fp16_gb_per_s": gigabytes / seconds,
            "multiprocessor_seconds_per_gb": seconds * self.multiprocessors / gigabytes,
        }
        self.rows.append(row)
        extra = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items())
        print(f"{name:<44} {1e6 * seconds:>10.0f} us {row['fp16_gb_per_s']:>9.1f} GB/s  {extra}", flush=True)


def median_s(work: Callable[[], Any], graph: bool = False) -> float:
    """Seconds of one run: the median over many, in device time; with `graph`, its launches replayed as one graph."""
    if DEVICE.type == "cuda" and graph:
        return float(triton.testing.do_bench_cudagraph(work, rep=100, return_mode="median")) / 1e3
    if DEVICE.type == "cuda":
        return float(triton.testing.do_bench(work, warmup=20, rep=100, return_mode="median")) / 1e3
    times = []
    for _ in range(2):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def draw(slots: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """Symbols uint8 `[T, C]` distributed as each column's table (uint8 `[K, 1024]`) says."""
    symbols = torch.empty((tokens, len(rows)), dtype=torch.uint8, device=DEVICE)
    for t in range(tokens):
        symbols[t] = slots[rows, torch.randint(0, 1024, (len(rows),), device=DEVICE)]
    return symbols


def rows_for(bits: float, columns: int, per_block: int, rng: np.random.Generator) -> np.ndarray:
    """Tables of the shared family for columns of about `bits` a symbol, those of a block sorted as a codec would."""
    tables = laplace_family()
    entropy = (tables.frequencies / 1024 * np.where(tables.frequencies > 0, tables.cost_bits, 0)).sum(axis=1)
    wanted = rng.gamma(4.0, bits / 4.0, columns)
    rows = np.abs(entropy[None] - wanted[:, None]).argmin(axis=1)
    return np.sort(rows.reshape(-1, per_block), axis=1).ravel().astype(np.uint16)


def decode_row(table: Table, name: str, coder: Any, model: Any, data: bytes, expected: Tensor, **facts: Any) -> None:
    """Decode, dequantise into `[blocks, T, W]`; checked first, on a poisoned output."""
    tokens, columns = expected.shape
    streams = coder.upload(data, model, tokens)
    scale = torch.rand(columns).numpy() + 0.5
    how = coder.reconstruction(model, tokens, values=np.arange(32, dtype=np.float32)[None] - 16, scale=scale)
    width = facts.pop("per_block")
    out = torch.full((columns // width, tokens, width), torch.nan, dtype=torch.float16, device=DEVICE)
    lanes = facts.get("lanes", 32)
    shared.raise_if_damaged(coder.launch_decode(streams, model, how, out, lanes), streams)
    for block in range(0, len(out), max(1, len(out) // 8)):
        part = slice(block * width, (block + 1) * width)
        wanted = (expected[:, part].float() - 16) * torch.from_numpy(scale[part]).to(DEVICE)
        assert torch.equal(out[block], wanted.half()), f"{name}: wrong output"

    work = lambda: coder.launch_decode(streams, model, how, out, lanes)  # noqa: E731
    table.add(name, work, bits=8 * len(data) / expected.numel(), **facts)


def nvcomp_row(table: Table, symbols: Tensor) -> str | None:
    """nvCOMP's ANS on the same symbols, channel by channel; returns why there is none."""
    try:
        from nvidia import nvcomp

        codec = nvcomp.Codec(algorithm="ANS")
        flat = symbols.T.contiguous().view(-1)
        coded = codec.encode(nvcomp.as_array(flat))
        decoded = torch.as_tensor(codec.decode(coded), device=DEVICE)
        assert torch.equal(decoded.view(torch.uint8).view(-1), flat)
        size = coded.buffer_size
        table.add("nvCOMP ANS decode, no dequantisation", lambda: codec.decode(coded), bits=8 * size / flat.numel())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def coders(table: Table, small: bool, shape: tuple[int, int, int]) -> str | None:
    """Both coders, and nvCOMP's, on their own; returns why there is none of nvCOMP's."""
    blocks, per_block, tokens = shape
    columns = blocks * per_block
    segments = (4, 8) if small else SEGMENTS
    reference_segment = 4 if small else REFERENCE_SEGMENT
    rng = np.random.default_rng(0)
    tables = laplace_family(cut=0)
    slots = torch.from_numpy(tables.slots).to(DEVICE)
    out = torch.empty((tokens, columns), dtype=torch.float16, device=DEVICE)
    table.add("float16 fill", lambda: out.fill_(1.0))
    symbols = draw(slots, torch.from_numpy(rows_for(2.4, columns, per_block, rng).astype(np.int64)).to(DEVICE), tokens)
    grid = (triton.cdiv(symbols.numel(), 4096),)
    table.add("uint8 to float16 dequantisation",
              lambda: _dequantise[grid](symbols, out, 0.5, -8.0, symbols.numel(), BLOCK=4096))  # fmt: skip

    for bits in (2.4,) if small else (2.4, 1.7, 1.2):
        rows = rows_for(bits, columns, per_block, rng)
        symbols = draw(slots, torch.from_numpy(rows.astype(np.int64)).to(DEVICE), tokens)
        model = rans_triton.to_device(tables, rows, DEVICE)
        for segment in segments:
            data = rans_triton.encode(symbols.T, model, segment_tokens=segment)
            few = slice(0, min(256, columns))
            part = rans.encode(symbols[:, few].T.cpu().numpy(), rows[few], tables, segment_tokens=segment)
            assert part == rans_triton.encode(
                symbols[:, few].T, rans_triton.to_device(tables, rows[few], DEVICE), segment_tokens=segment
            )
            for lanes in LANES:
                decode_row(table, "rANS decode + dequantisation", rans_triton, model, data, symbols,
                           per_block=per_block, segment_tokens=segment, lanes=lanes)  # fmt: skip
        table.add("rANS encode, from symbols", lambda m=model, s=symbols: rans_triton.launch_encode(
            s.T, m, reference_segment).units(), bits=bits, segment_tokens=reference_segment)  # fmt: skip
        shuffled = np.random.default_rng(1).permutation(columns)
        mixed = rans_triton.to_device(tables, rows[shuffled], DEVICE)
        symbols = symbols[:, torch.from_numpy(shuffled).to(DEVICE)].contiguous()
        decode_row(table, "rANS decode, columns in no order", rans_triton, mixed,
                   rans_triton.encode(symbols.T, mixed, segment_tokens=reference_segment), symbols,
                   per_block=per_block, segment_tokens=reference_segment)  # fmt: skip

    counts = np.stack([np.bincount(c, minlength=32) for c in symbols[:, : min(columns, 1024)].T.cpu().numpy()])
    own = np.tile(counts, (columns // len(counts), 1))
    for title, cdfs, cdf_rows in (
        ("a CDF a column", arithmetic.from_counts(own), np.arange(columns)),
        ("32 shared CDFs", arithmetic.from_tables(tables), rows[shuffled]),
    ):
        model_ac = arithmetic_triton.to_device(cdfs, cdf_rows, DEVICE)
        for segment in (256, reference_segment) if not small else (reference_segment,):
            data = arithmetic_triton.encode(symbols.T, model_ac, segment_tokens=segment)
            decode_row(table, f"arithmetic decode + dequantisation, {title}", arithmetic_triton, model_ac, data,
                       symbols, per_block=per_block, segment_tokens=segment)  # fmt: skip
        table.add(f"arithmetic encode, {title}", lambda m=model_ac: arithmetic_triton.launch_encode(
            symbols.T, m, reference_segment).units(), segment_tokens=reference_segment)  # fmt: skip
    return nvcomp_row(table, symbols)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes: does the script run?")
    parser.add_argument("--kvstream", action="store_true", help="only the whole codec, not the coders")
    parser.add_argument("--tune", action="store_true", help="measure the codec's kernels in other block shapes too")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    arguments = parser.parse_args()
    blocks, per_block, tokens = (1, 64, 8) if arguments.small else (64, 1024, 1536)
    columns = blocks * per_block
    torch.manual_seed(0)
    table = Table(columns * tokens)
    name = torch.cuda.get_device_name(0) if DEVICE.type == "cuda" else "no GPU: Triton's interpreter, not a measurement"
    print(f"{name}; {blocks} x {per_block} channels x {tokens} tokens, {2 * table.elements / 1e6:.0f} MB of float16")

    missing = None if arguments.kvstream else coders(table, arguments.small, (blocks, per_block, tokens))
    heads, dim = (2, 32) if arguments.small else (8, 128)
    layers = blocks // 2 or 1
    codec = gpu_chunk.made_codec(layers, heads, dim, DEVICE)
    for count in dict.fromkeys((min(tokens, API_TOKENS), tokens)):
        table.elements = columns * count
        kv = gpu_chunk.rows(table, codec, count, DEVICE)
    if missing:
        print(f"nvCOMP left out: {missing}")

    def write() -> None:
        if not arguments.out:
            return
        found = {
            "command": "python " + " ".join(sys.argv), "device": name, "measurement": DEVICE.type == "cuda",
            "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
            "shape": [blocks, per_block, tokens], "rows": table.rows, "nvcomp_missing": missing,
        }  # fmt: skip
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")

    write()
    if arguments.tune:
        for level in gpu_chunk.TUNED_LEVELS:
            gpu_chunk.tuned(table, codec, kv, level)
            write()


if __name__ == "__main__":
    main()
