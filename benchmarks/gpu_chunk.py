"""The whole `kvstream` codec on a GPU, for `codec_gpu.py`: a chunk of Mistral-7B's shape, decoded and encoded.

The caches are synthetic: the vectors of a layer, keys and values together, have a spectrum that falls as a power of the
rank, as those of real models do (FALL is chosen so that as many columns are live at a rate as for SmolLM2), in a random
orthonormal basis, keys rotated. The profile is calibrated on two layers of them and repeated for all. So the work is
that of a real chunk; the values mean nothing.

Decoding is timed as a graph of its launches, and beside that as a caller of the API sees it: `codec.decode(bytes, out)`
from host memory, wall clock; `codec.encode(kv)` likewise, to bytes in host memory. The wall clock is then taken apart:
what the host does one after another, a stage that ends with waiting for the device named so; and what the device takes
for each of its steps. `tuned` measures the kernels of several block shapes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec import api, container
from kvstream.codec.entropy import device as shared
from kvstream.codec.entropy import sections
from kvstream.codec.kvstream import KVStream, apart, escapes, fit, kinds, streaming, triton_encode, triton_job
from kvstream.codec.kvstream.parameters import Parameters
from kvstream.codec.kvstream.rest import Rest
from kvstream.codec.profile import Profile
from kvstream.codec.targets import PagedTarget, StridedTarget
from kvstream.codec.transform import Rope

BITS = (0.2, 0.35, 0.7, 1.4)
FALL = 0.9
THETA = 1e4
START = 4096
PAGE_TOKENS = 16
FITTED_LAYERS, FITTED_TOKENS = 2, 3_000
TUNED_LEVELS = (1, 2)
STREAM_SHAPES = ((True, 128, 4), (False, 128, 4), (True, 64, 2), (True, 32, 1), (True, 64, 1))
"""Words read far ahead, streams and warps of a program."""
VALUE_SHAPES = ((256, 8, 4, None), (256, 8, 3, None), (128, 8, 4, 128), (128, 4, 4, None), (64, 4, 4, None))
"""Tokens, warps, stages and registers of a program."""
PRODUCT_SHAPES = tuple(
    triton_encode.Shape(*shape) for shape in ((128, 64, 4, 3), (128, 64, 8, 4), (256, 64, 8, 3), (256, 64, 8, 4))
)
EXACT_SHAPES = tuple(triton_encode.Shape(*shape) for shape in ((128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3)))


def made_caches(layers: int, tokens: int, heads: int, dim: int, device: torch.device, seed: int, start: int) -> Tensor:
    """A cache float32 `[L, 2, T, H, D]`; every layer has the same basis."""
    width = 2 * heads * dim
    model = torch.Generator(device).manual_seed(7)
    basis = torch.linalg.qr(torch.randn((width, width), generator=model, device=device))[0]
    spectrum = (torch.arange(width, device=device) + 1.0) ** -FALL
    spectrum /= spectrum.square().mean().sqrt()
    draw = torch.Generator(device).manual_seed(seed)
    out = torch.empty((layers, 2, tokens, heads, dim), device=device)
    for layer in range(layers):
        rows = torch.randn((tokens, width), generator=draw, device=device) * spectrum @ basis
        out[layer] = rows.view(tokens, 2, heads, dim).transpose(0, 1)
    rope_of(layers, dim, device).rotate_layers(out[:, 0], range(layers), range(start, start + tokens))
    return out


def rope_of(layers: int, dim: int, device: torch.device | None = None) -> Rope:
    return Rope((THETA ** (-torch.arange(dim // 2, device=device) / (dim // 2))).repeat(layers, 1))


def made_codec(layers: int, heads: int, dim: int, device: torch.device) -> KVStream:
    """A codec of this shape, calibrated on a few layers that stand for all."""
    few = min(FITTED_LAYERS, layers)
    samples = [made_caches(few, FITTED_TOKENS, heads, dim, device, seed, 0).cpu() for seed in (1, 2)]
    small = fit(samples, rope=rope_of(few, dim), group=1, target_bits=BITS)
    times = layers // few
    tensors: dict[str, NDArray[Any]] = {}
    for name, array in small.tensors.items():
        if name.startswith("basis."):
            for copy in range(times):
                tensors[f"basis.{int(name.removeprefix('basis.')) + few * copy}"] = array
        elif name == "expected":
            tensors[name] = np.concatenate([array] * times, axis=1)
        elif len(array) == few and name not in ("steps", "tables", "values", "kind_class", "kind_shift"):
            tensors[name] = np.concatenate([array] * times)
        else:
            tensors[name] = array
    facts = {key: value for key, value in small.metadata.items() if key != "format"} | {"layers": layers}
    return KVStream(profile=Profile(tensors, facts))


def rows(table: Any, codec: KVStream, tokens: int, device: torch.device) -> Tensor:
    """Measure and print; returns the cache. Every decoded cache is compared with what was encoded."""
    layers, heads, dim = codec.parameters.shape
    kv = made_caches(layers, tokens, heads, dim, device, 5, START).half()
    positions = range(START, START + tokens)
    for level, name in enumerate(codec.levels):
        data = codec.encode(kv, level, positions=positions)
        out = torch.empty_like(kv)
        codec.decode(data, out)
        error = float((out.float() - kv.float()).square().mean().sqrt() / kv.float().std())
        assert error < 0.5, f"{name.name}: decoded values are off by {error:.2f} of their deviation"
        found = codec.describe(data)
        facts = {
            "tokens": tokens,
            "level": name.name,
            "bits": 8 * len(data) / kv.numel(),
            "live": found["live_columns"] / found["columns"],
        }
        for what, target in (("float16", StridedTarget(out)), ("paged float16", paged(kv))):
            once = kernels(codec, data, target)
            table.add(f"kvstream decode to {what}, all kernels", once, graph=True, **facts)
        if device.type == "cuda":
            table.wall(
                "codec.decode(bytes, out), wall clock", wall_s(lambda d=data, o=out: codec.decode(d, o)), **facts
            )
            encoded = wall_s(lambda n=level: codec.encode(kv, n, positions=positions))
            table.wall("codec.encode(kv) to bytes, wall clock", encoded, **facts)
        if device.type == "cuda" or level == 0:
            stages(table, codec, kv, data, level, {"tokens": tokens, "level": name.name})
    return kv


def kernels(codec: KVStream, data: bytes, target: Any) -> Callable[[], None]:
    """The launches that decode a chunk whose bytes are on the device already."""
    steps = launches(codec, data, target)

    def once() -> None:
        for step in steps.values():
            step()

    return once


def launches(codec: KVStream, data: bytes, target: Any) -> dict[str, Callable[[], Any]]:
    """The steps of `kernels`."""
    chunk = codec.check(container.parse(data))
    (share,) = streaming.shares(codec.on_device, target, target.device)
    rest = Rest.of(codec.parameters, chunk.header, chunk.section)
    job = share.begin(chunk.header)
    job.begin(rest)
    job.add_extras()
    coef, tokens = chunk.section("coef"), chunk.header.tokens
    streams = shared.upload(coef, len(rest.alive), tokens, 2, target.device, Parameters.segment_tokens)
    job.coefficients(streams)  # with the low bits, once
    return {"coefficients": lambda: job.coefficients(streams), "values": lambda: job.values(0, tokens)}


class Clock:
    """Seconds of the host between one mark and the next, by what was done; medians over several rounds."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {}
        self._last = 0.0

    def start(self) -> None:
        self._last = time.perf_counter()

    def mark(self, what: str) -> None:
        now = time.perf_counter()
        self._found.setdefault(what, []).append(now - self._last)
        self._last = now

    def medians(self) -> dict[str, float]:
        return {what: statistics.median(times) for what, times in self._found.items()}


def stages(
    table: Any, codec: KVStream, kv: Tensor, data: bytes, level: int, facts: dict[str, Any]
) -> None:  # fmt: skip
    """What `decode` and `encode` spend their wall clock on, and what the device's steps take."""
    out = torch.empty_like(kv)
    start = container.parse_header(data).start
    positions = range(start, start + kv.shape[2])
    for title, once in (
        ("decode", lambda clock: decode_by_stages(codec, data, out, clock)),
        ("encode", lambda clock: encode_by_stages(codec, kv, level, positions, clock)),
    ):
        with torch.inference_mode():
            once(Clock())
            clock = Clock()
            for _ in range(25 if kv.is_cuda else 1):
                if kv.is_cuda:
                    torch.cuda.synchronize()
                once(clock)
        for what, seconds in clock.medians().items():
            table.wall(f"  {title}, host: {what}", seconds, **facts)
    with torch.inference_mode():
        for what, step in launches(codec, data, StridedTarget(out)).items():
            table.add(f"  decode, device: {what}", step, graph=True, **facts)
        for what, step in encoding_steps(codec, kv, level, positions).items():
            table.add(f"  encode, device: {what}", step, **facts)


def decode_by_stages(codec: KVStream, data: bytes, out: Tensor, clock: Clock) -> None:
    """`codec.decode`, step by step."""
    clock.start()
    chunk = codec.check(container.split(data))
    header, coef = chunk.header, chunk.section("coef")
    clock.mark("header parsed")
    (share,) = streaming.shares(codec.on_device, StridedTarget(out), out.device)
    section = shared.stage(coef, out.device)
    clock.mark("copying streams to the device")
    chunk.verify(*(tag for tag in chunk.sections if tag != "coef"))
    rest = Rest.of(codec.parameters, header, chunk.section)
    clock.mark("the rest parsed")
    layout = sections.layout(coef, len(rest.alive), header.tokens, 2, Parameters.segment_tokens)
    offsets = shared.stream_offsets(layout)
    clock.mark("lengths unpacked")
    job = share.begin(header)
    clock.mark("where the target lies")
    job.begin(rest, offsets)
    clock.mark("columns laid out, to the device")
    job.coefficients(job.streams(section, layout, offsets))
    clock.mark("launch of the coefficients")
    job.add_extras()
    clock.mark("escapes, basis")
    job.values(0, header.tokens)
    clock.mark("launch of the values")
    job.end()
    clock.mark("what was damaged, asked for")
    chunk.verify("coef")
    clock.mark("checksum of the coefficients")
    job.finish()
    clock.mark("waiting")


def encode_by_stages(codec: KVStream, kv: Tensor, level: int, positions: range, clock: Clock) -> None:
    """`codec.encode`, step by step, for a chunk without tokens beyond what a level can hold."""
    model, parameters = codec.on_device(kv.device), codec.parameters
    clock.start()
    api.check_finite(kv, "the cache")
    clock.mark("is it finite? (waits)")
    skipped = torch.zeros(len(positions), dtype=torch.uint8, device=kv.device)
    rows = triton_encode.rows(model, kv, positions, skipped)
    skipped |= apart.inexpressible(triton_encode.left_out(model, rows, level).masked_fill(skipped > 0, 0.0))
    values = triton_encode.product(model, rows, level)
    clock.mark("launch of the product")
    chosen, tokens = triton_encode.survey(model, values, level, skipped)
    clock.mark("survey of the columns (waits)")
    streams = triton_encode.Streams(model, rows, level, chosen, skipped)
    clock.mark("launch of the streams")
    kind = kinds.pack(chosen, parameters.expected[level])
    clock.mark("kinds compressed")
    escaped = streams.escapes(kv.numel())
    clock.mark("escapes (waits)")
    sections = {
        "kind": kind,
        "apar": apart.pack(kv, tokens),
        "escs": escapes.pack(escaped),
    }
    coef, fine = (coded.section() if coded else bytes for coded in (streams.coef, streams.fine))
    clock.mark("streams on their way to the host (waits)")
    sections |= {"fine": fine(), "coef": coef()}
    clock.mark("lengths packed (waits)")
    layers, _, count, heads, dim = kv.shape
    dtype = str(kv.dtype).removeprefix("torch.")
    header = container.Header(
        codec.codec_id, level, positions.start, layers, count, heads, dim, dtype, codec.profile_sha256
    )
    container.pack(header, sections)
    clock.mark("checksums, one piece of bytes")


def encoding_steps(codec: KVStream, kv: Tensor, level: int, positions: range) -> dict[str, Callable[[], Any]]:
    """What the device does to encode, a step at a time; each includes its launches."""
    model = codec.on_device(kv.device)
    skipped = torch.zeros(len(positions), dtype=torch.uint8, device=kv.device)
    rows = triton_encode.rows(model, kv, positions, skipped)
    values = triton_encode.product(model, rows, level)
    chosen, _ = triton_encode.survey(model, values, level, skipped)
    return {
        "is it finite?": lambda: torch.aminmax(kv),
        "rows": lambda: triton_encode.rows(model, kv, positions, skipped),
        "what no column expresses": lambda: triton_encode.left_out(model, rows, level),
        "product": lambda: triton_encode.product(model, rows, level),
        "survey": lambda: triton_encode.survey(model, values, level, skipped),
        "product of live columns, streams": lambda: triton_encode.Streams(model, rows, level, chosen, skipped),
    }


def tuned(table: Any, codec: KVStream, kv: Tensor, level: int) -> None:
    """Other block shapes of the kernels, each checked against what the usual ones give."""
    name, tokens = codec.levels[level].name, kv.shape[2]
    positions = range(START, START + tokens)
    data, model = codec.encode(kv, level, positions=positions), codec.on_device(kv.device)
    out = torch.empty_like(kv)
    wanted = codec.decode(data, torch.empty_like(kv))
    for far, lanes, warps in STREAM_SHAPES:
        with changed(triton_job, FAR=far, DECODE_LANES=lanes, DECODE_WARPS=warps):
            step = launches(codec, data, StridedTarget(out))["coefficients"]
            table.add("  tune: coefficients", step, graph=True, level=name, far=far, lanes=lanes, warps=warps)
            check(codec, data, out, wanted)
    for block, warps, depth, registers in VALUE_SHAPES:
        with changed(triton_job, BLOCK=block, WARPS=warps, STAGES=depth, REGISTERS=registers):
            facts = {"block": block, "warps": warps, "stages": depth, "registers": registers}
            step = launches(codec, data, StridedTarget(out))["values"]
            table.add("  tune: values", step, graph=True, level=name, **facts)
            check(codec, data, out, wanted)
    if level != TUNED_LEVELS[0]:
        return
    with torch.inference_mode():
        skipped = torch.zeros(tokens, dtype=torch.uint8, device=kv.device)
        rows = triton_encode.rows(model, kv, positions, skipped)
        usual = triton_encode.product(model, rows, level)
        for shape in PRODUCT_SHAPES:
            with changed(triton_encode, ROUNDED=shape):
                found = triton_encode.product(model, rows, level)
                assert float((found - usual).norm() / usual.norm()) < 1e-4
                step = lambda: triton_encode.product(model, rows, level)  # noqa: E731
                table.add("  tune: product of all columns", step, **vars(shape))
        chosen, _ = triton_encode.survey(model, usual, level, skipped)
        for shape in EXACT_SHAPES:
            with changed(triton_encode, EXACT=shape):
                step = lambda: triton_encode.Streams(model, rows, level, chosen, skipped)  # noqa: E731
                table.add("  tune: product of live columns, streams", step, **vars(shape))
        if kv.is_cuda:
            table.add("  tune: the same by cuBLAS", lambda: by_cublas(model, rows))


def by_cublas(model: Any, rows: Tensor) -> None:
    """The product a group at a time."""
    for group in model.parameters.groups:
        width = 2 * model.heads * model.dim
        part = rows[0, :, group.layers.start * width : group.layers.stop * width]
        torch.mm(
            triton_encode.analysis_of(model).matrix[0, group.columns, : part.shape[1]], part.T, out_dtype=torch.float32
        )


def check(codec: KVStream, data: bytes, out: Tensor, wanted: Tensor) -> None:
    out.fill_(torch.nan)
    codec.decode(data, out)
    assert float((out.float() - wanted.float()).norm() / wanted.float().norm()) < 1e-3, "wrong output"


@contextmanager
def changed(module: Any, **names: Any) -> Iterator[None]:
    """A module with other constants for a while."""
    usual = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(usual)


def paged(kv: Tensor) -> PagedTarget:
    """Blocks as vLLM's, in no order."""
    layers, _, tokens, heads, dim = kv.shape
    blocks = -(-tokens // PAGE_TOKENS)
    pages = [torch.empty((2, blocks, PAGE_TOKENS, heads, dim), dtype=kv.dtype, device=kv.device) for _ in range(layers)]
    return PagedTarget(pages, torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).tolist(), 0, tokens)


def wall_s(work: Callable[[], Any], times: int = 49) -> float:
    """Seconds of one call: the median over some."""
    work()
    found = []
    for _ in range(times):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found)
