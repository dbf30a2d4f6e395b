"""What both coders' Triton kernels share: sections on a device, reconstruction and output, compaction after encoding.

Importing this module imports torch and Triton. Kernels run on a CUDA device, or on the CPU under Triton's interpreter
(TRITON_INTERPRET=1 in the environment before the first import), slowly but with the same results. Every index that
data could influence is clamped or masked, and kernels report damage in a flag.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# Triton gives kernels their types.

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.entropy import sections
from kvstream.codec.entropy.sections import Data, Layout
from kvstream.codec.errors import CodecError

MAX_UNITS = 1 << 31
_COPY_BLOCK = 128


@dataclass(frozen=True)
class DeviceStreams:
    """A section's streams on a device. The host has unpacked their lengths, which add up; kernels clamp offsets all the
    same."""

    payload: Tensor
    """int32: the units of all streams, then zeros."""
    offsets: Tensor
    """int32 `[N + 1]`: each stream's first unit, then the end of the last."""
    units: int
    columns: int
    tokens: int
    segment_tokens: int

    @property
    def segments(self) -> int:
        return -(-self.tokens // self.segment_tokens)


@dataclass(frozen=True)
class DeviceReconstruction:
    """`sections.Reconstruction` on a device, without its defaults."""

    values: Tensor
    """float32 `[K, S]` or `[1, S]`; only the first is read if `linear`."""
    linear: bool
    scale: Tensor
    offset: Tensor
    token_scale: Tensor | None
    """float32 `[G, T]`, None for 1."""


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device current: Triton launches kernels there, wherever their tensors are."""
    is_current = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if is_current else torch.cuda.device(device)


def upload(
    data: Data, columns: int, tokens: int, unit_bytes: int, device: torch.device | str,
    segment_tokens: int | None = None,
) -> DeviceStreams:  # fmt: skip
    """Copy a section to a device, with where its streams lie. Raises CodecError where its header does not fit it, or
    its lengths do not add up."""
    section = stage(data, device)
    layout = sections.layout(data, columns, tokens, unit_bytes, segment_tokens)
    return on_device(section, layout, stream_offsets(layout), columns, tokens)


def stage(data: Data, device: torch.device | str) -> Tensor:
    """Start copying a section to a device: uint8, whole words, then one of zeros, because kernels read ahead."""
    source = np.frombuffer(data, np.uint8)
    # Page-locked memory is copied five times as fast. Filling it on torch's threads takes half as long on a quiet
    # machine, and ten times as long on one whose processors are busy.
    host = torch.empty(4 * (-(-len(source) // 4) + 1), dtype=torch.uint8, pin_memory=on_cuda(device))
    found = host.numpy()
    found[len(source) :] = 0
    found[: len(source)] = source
    return host.to(device, non_blocking=True)


def on_cuda(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def copy(device: torch.device, *arrays: NDArray[Any]) -> list[Tensor]:
    """Arrays of one dimension, and four or eight bytes an element, on a device, in one transfer: a small one costs as
    much as a larger one. Each begins at a multiple of 16 bytes, or kernels would be compiled anew for every alignment.
    """
    parts = [array.view(np.int32) for array in arrays]
    begins, end = [], 0
    for part in parts:
        begins.append(end)
        end += -(-len(part) // 4) * 4
    host = torch.empty(end, dtype=torch.int32, pin_memory=on_cuda(device))
    words = host.numpy()
    for part, begin in zip(parts, begins, strict=True):
        words[begin : begin + len(part)] = part
    there = host.to(device, non_blocking=True)
    found = [there[begin : begin + len(part)] for part, begin in zip(parts, begins, strict=True)]
    return [
        part if array.dtype == np.int32 else part.view(getattr(torch, str(array.dtype)))
        for part, array in zip(found, arrays, strict=True)
    ]


def send(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor of the host on a device, copied without waiting for what is queued there."""
    return tensor.pin_memory().to(device, non_blocking=True) if on_cuda(device) else tensor


def on_device(
    section: Tensor, layout: Layout, offsets: NDArray[np.int32], columns: int, tokens: int
) -> DeviceStreams:  # fmt: skip
    """Streams, which `stream_offsets` has found, of a section whose bytes are, or will be, in `section`: uint8 on a
    device, whole words, then four zeros."""
    words = section.view(torch.int32)[layout.units_at // 4 :]
    (there,) = copy(section.device, offsets)
    return DeviceStreams(words, there, layout.units, columns, tokens, layout.segment_tokens)


def stream_offsets(layout: Layout) -> NDArray[np.int32]:
    """As `sections.stream_offsets`, for kernels. Raises CodecError."""
    if layout.units >= MAX_UNITS:
        raise CodecError(f"a section of {layout.units} units is too large for a device; cut the chunk")
    return sections.stream_offsets(layout).astype(np.int32)


def reconstruction(
    n_tables: int, n_symbols: int, columns: int, tokens: int, device: torch.device,
    values: NDArray[Any] | None, scale: NDArray[Any] | None, offset: NDArray[Any] | None,
    token_scale: NDArray[Any] | None,
) -> DeviceReconstruction:  # fmt: skip
    """Check as on the CPU, then copy to a device. Raises CodecError."""
    how = sections.reconstruction(n_tables, n_symbols, columns, tokens, values, scale, offset, token_scale)
    return DeviceReconstruction(
        values=torch.from_numpy(how.values).to(device),
        linear=how.linear,
        scale=torch.from_numpy(how.scale).to(device),
        offset=torch.from_numpy(how.offset).to(device),
        token_scale=None if token_scale is None else torch.from_numpy(how.token_scale).to(device),
    )


def target(out: Tensor, columns: int, tokens: int) -> Tensor:
    """`out` as `[B, T, W]`, checked. Raises CodecError."""
    if out.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.uint8):
        raise CodecError(f"cannot decode into a tensor of {out.dtype}")
    view = out[None] if out.dim() == 2 else out
    if view.dim() != 3 or view.shape[1] != tokens or view.shape[0] * view.shape[2] != columns:
        raise CodecError(f"out {tuple(out.shape)} does not hold {columns} columns of {tokens} tokens")
    return view


def output_arguments(view: Tensor, how: DeviceReconstruction, columns: int) -> dict[str, Any]:
    """What `reconstruct` and `places` need, by parameter name."""
    return {
        "values": how.values,
        "scale": how.scale,
        "offset": how.offset,
        "token_scale": how.values if how.token_scale is None else how.token_scale,
        "out": view,
        "width": view.shape[2],
        "block_stride": view.stride(0),
        "token_stride": view.stride(1),
        "lane_stride": view.stride(2),
        "columns_per_group": columns // (1 if how.token_scale is None else how.token_scale.shape[0]),
        "value_stride": how.values.shape[1] if how.values.shape[0] > 1 else 0,
        "KIND": 0 if view.dtype == torch.uint8 else 1 if how.linear else 2,
        "SCALED": how.token_scale is not None,
    }


def raise_if_damaged(damaged: Tensor, streams: DeviceStreams) -> None:
    """Wait for the kernel that writes `damaged` (int32 `[1]`: a stream's number + 1, or 0). Raises CodecError."""
    if number := int(damaged.item()):
        raise_damaged(number, streams.columns)


def raise_damaged(number: int, columns: int) -> None:
    """Raises CodecError for a damaged stream's number + 1, there being so many columns a segment."""
    segment, column = divmod(number - 1, columns)
    raise CodecError(
        f"coded stream of column {column}, segment {segment}, is damaged or belongs to other tables; "
        "fetch the chunk again"
    )


def fetch(*tensors: Tensor) -> Callable[[], list[NDArray[Any]]]:
    """Start copying tensors to the host. What is returned waits for that, not for what is queued behind it."""
    if not tensors[0].is_cuda:
        return lambda: [tensor.numpy() for tensor in tensors]
    hosts = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for host, tensor in zip(hosts, tensors, strict=True):
        host.copy_(tensor, non_blocking=True)
    wait = _until_here(tensors[0].device)

    def arrays() -> list[NDArray[Any]]:
        wait()
        return [host.numpy() for host in hosts]

    return arrays


def _until_here(device: torch.device) -> Callable[[], None]:
    """Waits for what is queued on the current stream now."""
    if not on_cuda(device):
        return lambda: None
    done = torch.cuda.Event()
    done.record()
    return done.synchronize


class Coded:
    """Streams of a section that a kernel is writing into `scratch` `[N, capacity]` (int16 or uint8): `lengths` int32
    `[N]` of each, ending at the row's end or, unless `from_end`, beginning at its beginning; `damaged` as for
    decoding, which `complaint` puts into words, given a column."""

    def __init__(
        self, scratch: Tensor, lengths: Tensor, damaged: Tensor, symbols: Tensor, segment_tokens: int,
        complaint: str, *, from_end: bool,
    ) -> None:  # fmt: skip
        self._scratch, self._lengths, self._from_end, self._complaint = scratch, lengths, from_end, complaint
        self._columns, self._tokens = symbols.shape
        self._segment_tokens = segment_tokens
        self._ends = torch.cumsum(lengths, 0)
        self._arrived = fetch(lengths, damaged)

    def units(self) -> tuple[Tensor, NDArray[np.int32]]:
        """All streams concatenated, on the device, and each one's length. Raises CodecError for a symbol that cannot
        be coded."""
        lengths, damaged = self._arrived()
        if damaged[0] > 0:
            raise CodecError(self._complaint.format((int(damaged[0]) - 1) % self._columns))
        units = torch.empty(int(lengths.sum(dtype=np.int64)), dtype=self._scratch.dtype, device=self._scratch.device)
        _compact[(len(lengths),)](
            self._scratch, self._lengths, self._ends - self._lengths, units, self._scratch.shape[1],
            FROM_END=self._from_end, BLOCK=_COPY_BLOCK, num_warps=1,
        )  # fmt: skip
        return units, lengths

    def section(self) -> Callable[[], memoryview]:
        """Starts copying the section to the host, page-locked memory where the device is a GPU; what is returned gives
        it, once it is there. The units are copied behind room for what precedes them, which is packed meanwhile. Raises
        as `units`."""
        units, lengths = self.units()
        content = units.view(torch.uint8)
        room = sections.most_before_units(len(lengths))
        host = torch.empty(room + len(content) + 2, dtype=torch.uint8, pin_memory=on_cuda(units.device))
        host[room : room + len(content)].copy_(content, non_blocking=True)
        wait = _until_here(units.device)

        def finish() -> memoryview:
            before = sections.before_units(lengths.astype(np.int64), self._tokens, self._segment_tokens)
            found = host.numpy()
            found[room - len(before) : room] = np.frombuffer(before, np.uint8)
            found[-2:] = 0
            wait()
            return memoryview(found[room - len(before) :])  # type: ignore[arg-type]  # an array is a buffer

        return finish


def symbols_on_device(symbols: Tensor, segment_tokens: int | None) -> int:
    """Check symbols `[C, T]` for encoding; returns the tokens of a segment. Raises CodecError."""
    if symbols.dim() != 2 or symbols.dtype != torch.uint8 or 0 in symbols.shape:
        raise CodecError(f"symbols are uint8 [columns, tokens], not {symbols.dtype} of shape {tuple(symbols.shape)}")
    return sections.segment_length(symbols.shape[1], segment_tokens)


@triton.jit
def _compact(scratch, lengths, offsets, units, capacity, FROM_END: tl.constexpr, BLOCK: tl.constexpr):
    stream = tl.program_id(0).to(tl.int64)
    n = tl.load(lengths + stream)
    source = scratch + stream * capacity
    if FROM_END:
        source += capacity - n
    to = units + tl.load(offsets + stream)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(to + i, tl.load(source + i, mask=i < n), mask=i < n)


@triton.jit
def places(column, segment, segment_tokens, out, width, block_stride, token_stride, lane_stride):
    """Where a segment's first token of each column goes."""
    first = (segment * segment_tokens).to(tl.int64)
    block = (column // width).to(tl.int64)
    return out + block * block_stride + first * token_stride + (column % width).to(tl.int64) * lane_stride


@triton.jit
def reconstruct(symbol, base, values, slope, shift, factor, KIND: tl.constexpr, SCALED: tl.constexpr):
    """The output for a symbol: itself (KIND 0), base + symbol (1) or its entry in `values` (2), both then scaled."""
    if KIND == 0:
        y = symbol
    elif KIND == 1:
        y = (symbol.to(tl.float32) + base) * slope + shift
    else:
        y = tl.load(values + symbol) * slope + shift
    if SCALED:
        y = y * factor
    return y
