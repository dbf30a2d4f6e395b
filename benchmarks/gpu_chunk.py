"""The whole `kvstream` codec on a GPU, for `codec_gpu.py`: a chunk of Mistral-7B's shape, decoded and encoded.

Decoding is timed as a graph of its launches, replayed, and beside that launched from Python, which takes longer than
the device does.

The profile is made, not calibrated: random orthonormal bases, and tables and reconstruction values of the bundled
model's profile, given to columns so that a level has the bits per element that it names, most bits first within each
head, as a KLT orders them. Symbols are drawn from the tables. So the work is that of a real chunk; the values mean
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec import container, kvstream_arriving, kvstream_triton
from codec.container import Header
from codec.entropy import device as shared
from codec.entropy import rans_triton, sections
from codec.kvstream import SEGMENT_TOKENS, KVStream
from codec.profile import Profile
from codec.targets import LayeredTarget, PagedTarget, StridedTarget

SHIPPED = Path(__file__).parents[1] / "testbed/calibration/shipped/profiles"
BITS = (1.2, 2.4, 3.6)
START = 4096


def made_codec(layers: int, heads: int, dim: int) -> KVStream:
    """A codec of this shape with three levels of about `BITS`; in the highest every 50th column is wide."""
    shipped = Profile.load(next(SHIPPED.glob("*-kvstream-*.safetensors")))
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    columns = layers * 2 * heads * dim
    model = KVStream(profile=shipped).classes
    tables = model.tables
    entropy = (tables.frequencies / 1024 * np.where(tables.frequencies > 0, tables.cost_bits, 0)).sum(axis=1)
    classes, shifts = np.zeros((len(BITS), columns), np.uint8), np.zeros((len(BITS), columns), np.uint8)
    for level, bits in enumerate(BITS):
        wanted = np.sort(rng.gamma(2.0, bits / 2.0, (columns // dim, dim)), axis=1)[:, ::-1].ravel()
        classes[level] = np.abs(entropy[None] - wanted[:, None]).argmin(axis=1)
    whole = np.flatnonzero(model.whole)
    wide = np.arange(0, columns, 50)
    shifts[-1, wide], classes[-1, wide] = 3, whole[entropy[whole].argmax()]
    basis = torch.linalg.qr(torch.randn(layers * 2 * heads, dim, dim))[0].view(layers, 2, heads, dim, dim)
    inv_freq = 1 / 10_000 ** (torch.arange(0, dim, 2) / dim)
    tensors = {
        "mean": torch.randn(layers, 2, heads, dim).numpy(),
        "basis": basis.half().numpy(),
        "scale": np.ones((layers, 2, heads), np.float32),
        "tables": tables.frequencies,
        "values": model.values,
        "steps": np.array([0.5, 0.2, 0.1], np.float32),
        "classes": classes,
        "shifts": shifts,
        "inv_freq": inv_freq.float().expand(layers, -1).contiguous().numpy(),
    }
    facts = {"codec": "kvstream", "layers": layers, "heads": heads, "head_dim": dim, "rope_interleaved": False,
             "levels": [f"{bits:g} bit" for bits in BITS]}  # fmt: skip
    return KVStream(profile=Profile(tensors, facts))


def made_chunk(codec: KVStream, model: kvstream_triton.DeviceModel, level: int, tokens: int) -> bytes:
    """A chunk with symbols drawn from its columns' tables."""
    layers, heads, dim = codec.shape
    found = model.level(level)
    rows = found.tables.rows.long()
    symbols = torch.empty((tokens, len(rows)), dtype=torch.uint8, device=model.device)
    for t in range(tokens):
        symbols[t] = found.tables.slots[rows, torch.randint(0, 1024, (len(rows),), device=model.device)]
    fine = b""
    if found.fine is not None:
        shift = found.fine.rows + 1
        drawn = torch.rand((tokens, len(shift)), device=model.device) * (1 << shift)
        fine = rans_triton.encode(drawn.to(torch.uint8).T, found.fine, segment_tokens=SEGMENT_TOKENS)
    header = Header("kvstream", level, START, layers, tokens, heads, dim, "float16", codec.profile_sha256)
    coefficients = rans_triton.encode(symbols.T, found.tables, segment_tokens=SEGMENT_TOKENS)
    return container.pack(header, {"escs": b"", "fine": fine, "coef": coefficients})


def packed_lengths(
    data: bytes, columns: int, tokens: int, unit_bytes: int, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """What `device.stream_offsets` takes, from a section."""
    layout = sections.layout(data, columns, tokens, unit_bytes)
    first = np.cumsum(layout.widths, dtype=np.int32) - layout.widths
    groups = torch.from_numpy(np.stack([layout.shortest.astype(np.int32), layout.widths, first])).to(device)
    deltas = np.zeros((layout.units_at - layout.deltas_at) // 4 + 1, np.int32)
    deltas[:-1] = layout.data[layout.deltas_at : layout.units_at].view("<i4")
    return groups, torch.from_numpy(deltas).to(device), layout.streams


def rows(table: Any, layers: int, heads: int, dim: int, tokens: int, device: torch.device) -> None:
    """Measure and print; every output is compared with the CPU's."""
    codec = made_codec(layers, heads, dim)
    model = kvstream_triton.DeviceModel(codec, device)
    for level, name in enumerate(codec.levels):
        data = made_chunk(codec, model, level, tokens)
        wanted = codec.decode(data, torch.empty((layers, 2, tokens, heads, dim)))
        chunk = codec.check(container.parse(data))
        found = model.level(level)
        streams = rans_triton.upload(chunk.section("coef"), found.tables, tokens)
        fine = rans_triton.upload(chunk.section("fine"), found.fine, tokens) if found.fine else None
        groups = packed_lengths(chunk.section("coef"), len(found.tables.rows), tokens, 2, device)
        facts = {"bits": 8 * len(data) / wanted.numel(), "level": name.name, "segment_tokens": SEGMENT_TOKENS}

        def work(target: Any, level: int = level, streams: Any = streams, fine: Any = fine,
                 groups: Any = groups) -> Callable[[], Any]:  # fmt: skip
            def once() -> kvstream_triton.Job:
                shared.stream_offsets(groups[0], groups[1], groups[2])
                job = kvstream_triton.Job(model, level, range(START, START + tokens), target)
                if fine is not None:
                    job.further_bits(fine)
                job.coefficients(streams)
                job.values(0, tokens)
                return job

            return once

        for dtype in (torch.float16, torch.bfloat16):
            out = torch.full((layers, 2, tokens, heads, dim), torch.nan, dtype=dtype, device=device)
            decode = work(StridedTarget(out))
            shared.raise_if_damaged(decode().damaged, streams)
            check(out, wanted)
            kind = str(dtype).removeprefix("torch.")
            table.add(f"kvstream decode to {kind}", decode, graph=True, **facts)
            if dtype is torch.float16:
                job = decode()
                table.add("  launched from Python each time", decode, **facts)
                table.add("  of it rANS + dequantisation", lambda j=job, s=streams: j.coefficients(s), **facts)
                table.add("  of it the transform", lambda j=job: j.values(0, tokens), **facts)
        paged = [torch.zeros((2, -(-tokens // 16) + 3, 16, heads, dim), dtype=torch.float16, device=device)
                 for _ in range(layers)]  # fmt: skip
        order = torch.randperm(-(-tokens // 16) + 3, generator=torch.Generator().manual_seed(1))[: -(-tokens // 16)]
        decode = work(PagedTarget(paged, order, 0, tokens))
        decode()
        taken = torch.stack(paged)[:, :, order.to(device)].flatten(2, 3)[:, :, :tokens]
        check(taken, wanted)
        table.add("kvstream decode to paged float16", decode, graph=True, **facts)
        del taken, paged

        if torch.cuda.device_count() > 1:
            shared_out(table, codec, data, wanted, facts)

        kv = codec.decode(data, torch.empty(wanted.shape, dtype=torch.float16, device=device), device=device)
        assert isinstance(kv, Tensor)
        end_to_end(table, codec, data, kv, facts)
        table.add("kvstream encode, all stages, to coded words in device memory",
                  lambda k=kv, n=level: coded(model, k, n, tokens), **facts)  # fmt: skip


def shared_out(table: Any, codec: KVStream, data: bytes, wanted: Tensor, facts: dict[str, Any]) -> None:
    """The layers shared out to one GPU, then to two: wall clock of graphs that are started together."""
    chunk = codec.check(container.parse(data))
    tokens, level = chunk.header.tokens, chunk.header.level
    for gpus in (1, 2):
        out = [
            torch.full((len(wanted) // gpus, *wanted.shape[1:]), torch.nan, dtype=torch.float16, device=f"cuda:{index}")
            for index in range(gpus)
        ]
        target = LayeredTarget([StridedTarget(part) for part in out])
        codec.decode(data, target, device=target.device)
        check(torch.cat([part.cpu() for part in out]), wanted)
        graphs = []
        for share in kvstream_arriving.shares(codec, target):
            device, found = share.model.device, share.model.level(level)
            with torch.cuda.device(device):
                streams = rans_triton.upload(chunk.section("coef"), found.tables, tokens)
                fine = rans_triton.upload(chunk.section("fine"), found.fine, tokens) if found.fine else None
                groups = packed_lengths(chunk.section("coef"), len(found.tables.rows), tokens, 2, device)
                graph = torch.cuda.CUDAGraph()
                torch.cuda.synchronize()
                with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
                    shared.stream_offsets(*groups)
                    job = share.begin(chunk.header)
                    if fine is not None:
                        job.further_bits(fine)
                    job.coefficients(streams)
                    job.values(0, tokens)
                graphs.append((device, graph, streams, job))
        times = []
        for _ in range(50):
            start = time.perf_counter()
            for device, graph, *_ in graphs:
                with torch.cuda.device(device):
                    graph.replay()
            for device, *_ in graphs:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        check(torch.cat([part.cpu() for part in out]), wanted)
        name = "one GPU" if gpus == 1 else f"{gpus} GPUs"
        table.wall(f"kvstream decode, layers on {name}, wall clock", sorted(times)[len(times) // 2], **facts)


def coded(model: kvstream_triton.DeviceModel, kv: Tensor, level: int, tokens: int) -> Any:
    symbols, _, _ = kvstream_triton.launch_quantise(model, kv, level, range(START, START + tokens))
    return rans_triton.launch_encode(symbols.T, model.level(level).tables, SEGMENT_TOKENS)


def end_to_end(table: Any, codec: KVStream, data: bytes, kv: Tensor, facts: dict[str, Any]) -> None:
    """Wall clock from bytes in host memory to values on the device and back, checksums and copies included."""
    for name, call in (
        ("decode", lambda: codec.decode(data, kv, device=kv.device)),
        ("encode", lambda: codec.encode(kv, list(codec.levels).index(level_of(codec, data)),
                                        positions=range(START, START + kv.shape[2]))),
    ):  # fmt: skip
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            if kv.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        table.wall(f"  codec.{name}(), host bytes, wall clock", sorted(times)[len(times) // 2], **facts)


def level_of(codec: KVStream, data: bytes) -> Any:
    return codec.levels[container.parse_header(data).level]


def check(out: Tensor, wanted: Tensor) -> None:
    """Within the larger of one unit in the last place and 2^-14 of the column's root mean square."""
    wanted = wanted.to(out.device)
    rms = wanted.pow(2).mean(dim=2, keepdim=True).sqrt()
    spacing = torch.finfo(out.dtype).eps * wanted.abs()
    wrong = ~((out.float() - wanted).abs() <= torch.maximum(spacing, rms * 2**-14))
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {wrong.numel()} values are off"
