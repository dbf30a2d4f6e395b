"""Speed and size of the entropy coders and of the whole kvstream codec on the CPU, beside torchac in the same run.

    python benchmarks/coders_cpu.py [--out benchmarks/results/coders-cpu.json]

Symbols are drawn from the tables themselves, so every rate is against the entropy of the coder's own model. The codec
codes a synthetic cache, of eight layers of a 7B model's, which gives timing only. Rows of one
thread are in that thread's CPU time, so that other work on the machine does not count; rows of several threads are in
elapsed time, where it does. Each is the best of several repetitions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvstream.codec import registry
from kvstream.codec.entropy import arithmetic, rans, sections, torchac_reference
from kvstream.codec.entropy.tables import Tables, column_counts, cross_entropy_bits, from_counts, laplace_family
from kvstream.codec.errors import CodecError
from kvstream.codec.kvstream import fit
from kvstream.codec.transform import Rope

COLUMNS, TOKENS = 8192, 1024
TORCHAC_COLUMNS = 64
REPEATS = 7


def best_s(work: Callable[[], Any], clock: Callable[[], float], repeats: int = REPEATS) -> float:
    """Seconds of the fastest of several runs, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)


def draw(tables: Tables, rows: np.ndarray, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Symbols uint8 `[C, T]` distributed as each column's table says."""
    symbols = np.empty((len(rows), tokens), np.uint8)
    for c, k in enumerate(rows):
        symbols[c] = tables.slots[k][rng.integers(0, 1024, tokens)]
    return symbols


def rows_for(tables: Tables, bits: float, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Tables for columns whose entropies spread around a mean of `bits` a symbol, as those of a KV cache do."""
    cost = np.where(tables.frequencies > 0, tables.cost_bits, 0)
    entropy = (tables.frequencies / 1024 * cost).sum(axis=1)
    wanted = rng.gamma(4.0, bits / 4.0, columns)
    return np.abs(entropy[None] - wanted[:, None]).argmin(axis=1).astype(np.uint16)


def sizes(tables: Tables, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Bytes over the entropy of the model, section header, lengths and final states included."""
    found = []
    for tokens in (1024, 256):
        rows = rows_for(tables, 1.2, COLUMNS, rng)
        symbols = draw(tables, rows, tokens, rng)
        ideal = cross_entropy_bits(column_counts(symbols, tables.symbols), rows, tables)
        coded = len(rans.encode(symbols, rows, tables))
        found.append({
            "tokens": tokens,
            "bits_per_symbol": ideal / symbols.size,
            "overhead": 8 * coded / ideal - 1,
            "overhead_bytes_per_column": (coded - ideal / 8) / COLUMNS,
        })  # fmt: skip
    return found


def speeds(tables: Tables, bits: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Megasymbols per second of every coder on the same symbols."""
    rows = rows_for(tables, bits, COLUMNS, rng)
    symbols = draw(tables, rows, TOKENS, rng)
    megasymbols = symbols.size / 1e6
    found: list[dict[str, Any]] = []

    def row(
        name: str, threads: int, work: Callable[[], Any], count: float = megasymbols, repeats: int = REPEATS
    ) -> None:
        speed = count / best_s(work, time.thread_time if threads == 1 else time.perf_counter, repeats)
        found.append({"name": name, "bits_per_symbol": bits, "threads": threads, "msymbols_per_s": speed})
        print(f"{name:<46} {threads:>2} thread{'s' * (threads > 1):<1} {speed:9.1f} Msym/s", flush=True)

    def decode_rows(name: str, coder: Any, model: Any, own: np.ndarray, data: bytes, threads: tuple[int, ...]) -> None:
        for dtype, array in (("float32", np.float32), ("bfloat16", np.uint16)):
            out = np.empty((TOKENS, COLUMNS), array)
            for n in threads:
                row(f"{name} decode to {dtype}", n, lambda n=n, out=out, dtype=dtype: coder.decode_dequantised(
                    data, own, model, COLUMNS, TOKENS, out, dtype=dtype, threads=n))  # fmt: skip
            if dtype == "float32":
                assert np.array_equal(out.T, symbols)

    cores = len(os.sched_getaffinity(0))
    threads = (1,) if cores == 1 else (1, 2)
    data = rans.encode(symbols, rows, tables)
    decode_rows("rANS, 32 shared tables,", rans, tables, rows, data, threads)
    row("rANS, 32 shared tables, encode", 1, lambda: rans.encode(symbols, rows, tables, threads=1))

    own = from_counts(column_counts(symbols, tables.symbols))
    identity = np.arange(COLUMNS)
    decode_rows("rANS, a table a column,", rans, own, identity, rans.encode(symbols, identity, own), threads)

    cdfs = arithmetic.from_counts(column_counts(symbols, tables.symbols))
    coded = arithmetic.encode(symbols, identity, cdfs)
    decode_rows("arithmetic, a CDF a column,", arithmetic, cdfs, identity, coded, threads)
    row("arithmetic, a CDF a column, encode", 1, lambda: arithmetic.encode(symbols, identity, cdfs, threads=1))

    few = symbols[:TORCHAC_COLUMNS]
    try:
        streams = torchac_reference.encode_streams(few, identity[:TORCHAC_COLUMNS], cdfs)
    except CodecError as error:
        print(f"torchac left out: {error}", file=sys.stderr)
        return found
    count = few.size / 1e6
    row("torchac decode", 1, lambda: torchac_reference.decode_streams(
        streams, identity[:TORCHAC_COLUMNS], cdfs, TOKENS), count, 3)  # fmt: skip
    row("torchac encode", 1, lambda: torchac_reference.encode_streams(few, identity[:TORCHAC_COLUMNS], cdfs), count, 3)
    torchac = next(r["msymbols_per_s"] for r in found if r["name"] == "torchac decode")
    for r in found:
        r["times_torchac_decode"] = r["msymbols_per_s"] / torchac
    return found


def codec_speeds() -> list[dict[str, Any]]:
    """Megasymbols per second of the whole kvstream codec: RoPE, transform, quantisation, coding."""
    import torch

    layers, tokens, heads, dim = 8, 1024, 8, 128
    draw = torch.Generator().manual_seed(0)
    rope = Rope(10_000.0 ** -(torch.arange(dim // 2) / (dim // 2)).repeat(layers, 1))
    spread = torch.exp(torch.randn((layers, 2, 1, heads, dim), generator=draw))

    def cache(n: int) -> torch.Tensor:
        kv = spread * torch.randn((layers, 2, n, heads, dim), generator=draw)
        for layer in range(layers):
            kv[layer, 0] = rope.rotate(kv[layer, 0].transpose(0, 1).contiguous(), layer, range(n)).transpose(0, 1)
        return kv.to(torch.bfloat16)

    codec = registry.make("kvstream", {}, fit([cache(1_024)], rope=rope, target_bits=(1.2, 2.3)))
    kv = cache(tokens)
    out = torch.empty_like(kv)
    found = []
    for level in range(2):
        data = codec.encode(kv, level, positions=range(tokens))
        bits = 8 * len(data) / kv.numel()
        for threads in (1, 2)[: len(os.sched_getaffinity(0))]:
            torch.set_num_threads(threads)
            for name, work in (
                ("decode", lambda data=data: codec.decode(data, out)),
                ("encode", lambda level=level: codec.encode(kv, level, positions=range(tokens))),
            ):
                with one_core() if threads == 1 else nullcontext():
                    clock = time.thread_time if threads == 1 else time.perf_counter
                    speed = kv.numel() / 1e6 / best_s(work, clock, 3)
                found.append({
                    "name": f"kvstream {name} to bfloat16" if name == "decode" else f"kvstream {name}",
                    "bits_per_symbol": bits, "threads": threads, "msymbols_per_s": speed,
                })  # fmt: skip
                print(f"kvstream {name}, {bits:.2f} bit a symbol {'':<15} {threads:>2} threads {speed:9.1f} Msym/s")
    return found


@contextmanager
def one_core() -> Iterator[None]:
    """The process on one core: the coders take as many threads as it may use."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    sections._cores.cache_clear()
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        sections._cores.cache_clear()


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    arguments = parser.parse_args()
    tables = laplace_family()
    rng = np.random.default_rng(0)
    rans.warm_up()
    arithmetic.warm_up()
    print(f"{processor()}, {os.cpu_count()} cores; {COLUMNS} columns of {TOKENS} tokens")
    found = {"sizes": sizes(tables, rng), "speeds": []}
    for size in found["sizes"]:
        print(
            f"rANS size at {size['tokens']} tokens, {size['bits_per_symbol']:.2f} bit a symbol: entropy of its model "
            f"+ {100 * size['overhead']:.2f} % ({size['overhead_bytes_per_column']:.2f} bytes a column)"
        )
    for bits in (2.3, 1.2):
        print(f"at {bits} bit a symbol")
        found["speeds"] += speeds(tables, bits, rng)
    print("the whole codec")
    found["speeds"] += codec_speeds()
    first = next(r for r in found["speeds"] if "times_torchac_decode" in r)
    print(f"rANS to float32 on one core decodes {first['times_torchac_decode']:.0f} times as fast as torchac")
    if arguments.out:
        versions = {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": __import__("numba").__version__,
        }
        found |= {
            "command": "python " + " ".join(sys.argv),
            "processor": processor(),
            "load": os.getloadavg(),
            "versions": versions,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
