"""The lossless level of codec kvstream: sizes against zstd -19, and rates.

    python benchmarks/codec_lossless.py [--models bundled benchmarks/models/second] [--out FILE]

Caches of 1,024 tokens of the models' check text. Beside zstd -19 of the whole cache as it lies in memory (package
zstandard; where it is missing, lzma's preset 9, which is smaller, and Deflate) stands the limit that this level keeps:
75 % of raw for bfloat16, 92 % for float16. Rates are bytes of the cache a second, on the CPU and, where there is one,
on a GPU: of `codec.decode` from host memory, and of the kernel alone. Where nvCOMP is installed beside a GPU, so is its
ANS, of bytes or of 16-bit floats, whichever is smaller.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvstream.codec import container
from kvstream.codec.container import Chunk, Header
from kvstream.codec.kvstream import lossless
from kvstream.codec.targets import StridedTarget

DTYPES = (torch.bfloat16, torch.float16)


def peers() -> dict[str, Callable[[bytes], bytes]]:
    """General compressors at hand."""
    try:
        import zstandard
    except ImportError:
        print("package zstandard is not installed: lzma and Deflate stand in for zstd -19")
        return {"lzma -9": lambda data: lzma.compress(data, preset=9), "zlib -9": lambda data: zlib.compress(data, 9)}
    return {"zstd -19": zstandard.ZstdCompressor(level=19).compress}


def fastest_s(work: Callable[[], Any], runs: int = 3) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def chunk_of(kv: Tensor) -> Chunk:
    layers, _, tokens, heads, dim = kv.shape
    header = Header("kvstream", 0, 0, layers, tokens, heads, dim, str(kv.dtype).removeprefix("torch."))
    return container.parse(container.pack(header, lossless.encode(kv)))


def nvcomp_ans(kv: Tensor) -> tuple[int, float] | None:
    """Bytes that nvCOMP's ANS makes of a cache, and seconds to decode them on the GPU; None where it is missing."""
    try:
        from nvidia import nvcomp
    except ImportError:
        return None
    import triton

    flat = kv.contiguous().view(-1).view(torch.uint8).cuda()
    found: tuple[int, float] | None = None
    for data_type in ("|u1", "<f2"):
        codec = nvcomp.Codec(algorithm="ANS", data_type=data_type)
        coded = codec.encode(nvcomp.as_array(flat if data_type == "|u1" else flat.view(torch.float16)))
        decoded = torch.as_tensor(codec.decode(coded), device="cuda")
        assert torch.equal(decoded.view(-1).view(torch.uint8), flat)
        if found is None or coded.buffer_size < found[0]:
            seconds = float(triton.testing.do_bench(lambda: codec.decode(coded), return_mode="median")) / 1e3  # noqa: B023
            found = (coded.buffer_size, seconds)
    return found


def row(name: str, kv: Tensor, others: dict[str, Callable[[bytes], bytes]]) -> dict[str, Any]:
    chunk = chunk_of(kv)
    out = torch.empty_like(kv)
    lossless.decode(chunk, StridedTarget(out))
    assert torch.equal(out.view(torch.int16), kv.view(torch.int16))
    raw = kv.view(torch.uint8).numpy().tobytes()
    sizes = {"lossless": chunk.total_bytes} | {peer: len(compress(raw)) for peer, compress in others.items()}
    if torch.cuda.is_available() and (ans := nvcomp_ans(kv)):
        sizes["nvCOMP ANS"] = ans[0]
    shown = ", ".join(f"{peer} {size / len(raw):.1%}" for peer, size in sizes.items())
    print(f"{name:<12} {kv.dtype!s:<15} {len(raw) / 1e6:6.1f} MB: {shown} of raw", flush=True)
    encode = len(raw) / 1e6 / fastest_s(lambda: lossless.encode(kv))
    decode = len(raw) / 1e6 / fastest_s(lambda: lossless.decode(chunk, StridedTarget(out)))
    print(f"{'':<12} CPU: encodes {encode:.0f} MB/s, decodes {decode:.0f} MB/s", flush=True)
    return {
        "name": name,
        "dtype": str(kv.dtype).removeprefix("torch."),
        "raw_bytes": len(raw),
        "of_raw": {peer: size / len(raw) for peer, size in sizes.items()},
        "cpu_encode_mb_per_s": encode,
        "cpu_decode_mb_per_s": decode,
    }


def gpu_rows() -> list[dict[str, Any]]:
    """A chunk of Mistral-7B's shape, of normal numbers: their sizes say nothing, their rates do."""
    import triton

    found = []

    from kvstream.codec.kvstream import lossless_triton

    for dtype in DTYPES:
        kv = torch.randn((32, 2, 1_536, 8, 128), dtype=torch.float32).to(dtype)
        chunk, out = chunk_of(kv), torch.empty_like(kv, device="cuda")
        target = StridedTarget(out)
        lossless_triton.decode(chunk, target)
        assert torch.equal(out.cpu().view(torch.int16), kv.view(torch.int16))
        wall = fastest_s(lambda: lossless_triton.decode(chunk, target), 10)  # noqa: B023
        job = lossless_triton.Job(chunk, target)
        kernel = float(triton.testing.do_bench(job.launch, return_mode="median")) / 1e3
        print(
            f"{torch.cuda.get_device_name()}, {dtype}, {chunk.total_bytes / kv.nbytes:.1%} of raw: kernel "
            f"{kv.nbytes / kernel / 1e9:.0f} GB/s, from host memory {kv.nbytes / wall / 1e9:.1f} GB/s"
        )
        facts = {"name": torch.cuda.get_device_name(), "dtype": str(dtype).removeprefix("torch.")}
        rates = {"kernel_gb_per_s": kv.nbytes / kernel / 1e9, "from_host_gb_per_s": kv.nbytes / wall / 1e9}
        of_raw = {"lossless": chunk.total_bytes / kv.nbytes}
        if ans := nvcomp_ans(kv):
            of_raw["nvCOMP ANS"] = ans[0] / kv.nbytes
            rates["nvcomp_gb_per_s"] = kv.nbytes / ans[1] / 1e9
            print(f"  nvCOMP's ANS: {of_raw['nvCOMP ANS']:.1%} of raw, {rates['nvcomp_gb_per_s']:.0f} GB/s")
        found.append(facts | {"of_raw": of_raw} | rates)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["bundled", "benchmarks/models/second"])
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    args = parser.parse_args()
    others = peers()
    found = []
    for source in args.models:
        from kvstream.testbed.encoding import calibrate
        from kvstream.testbed.engine.loading import load_model
        from kvstream.testbed.engine.model import calculate_kv

        model = load_model(source)
        kv = calculate_kv(model, next(iter(calibrate.samples(model, "check", 1, 1_024))).context_ids).cpu()
        for dtype in DTYPES:
            found.append(row(model.name, kv.to(dtype), others))
    if torch.cuda.is_available():
        found += gpu_rows()
    if args.out:
        command = "python " + " ".join(sys.argv)
        args.out.write_text(json.dumps({"command": command, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
