"""What both coders' Triton kernels share: sections on a device, reconstruction and output, compaction after encoding.

Importing this module imports torch and Triton. Kernels run on a CUDA device, or on the CPU under Triton's interpreter
(TRITON_INTERPRET=1 in the environment before the first import), slowly but with the same results. Every index that
data could influence is clamped or masked, and what a kernel finds damaged it reports in a flag.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# Triton gives kernels their types.

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from codec.entropy import sections
from codec.entropy.sections import Data, Layout
from codec.errors import CodecError

MAX_UNITS = 1 << 31
_COPY_BLOCK = 128


@dataclass(frozen=True)
class DeviceStreams:
    """A section's streams on a device. The host has checked that their lengths add up; kernels clamp offsets still."""

    payload: Tensor
    """int32: the units of all streams, zeros behind them."""
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
    """`sections.Reconstruction` on a device, its defaults left out."""

    values: Tensor
    """float32 `[K, S]` or `[1, S]`; only the first is read if `linear`."""
    linear: bool
    scale: Tensor
    offset: Tensor
    token_scale: Tensor | None
    """float32 `[G, T]`, None for 1."""


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the one that kernels are launched on, which need not be where their tensors lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def upload(
    data: Data, columns: int, tokens: int, unit_bytes: int, device: torch.device | str,
    segment_tokens: int | None = None,
) -> DeviceStreams:  # fmt: skip
    """Copy a section to a device and unpack its lengths there. Raises CodecError where its header does not fit it."""
    layout = sections.layout(data, columns, tokens, unit_bytes, segment_tokens)
    sections.stream_offsets(layout)  # lengths that do not add up are refused; that costs less than finding out there
    # One spare word of zeros: kernels read ahead.
    host = np.zeros(-(-len(layout.data) // 4) + 1, np.uint32)
    host.view(np.uint8)[: len(layout.data)] = layout.data
    return on_device(torch.from_numpy(host.view(np.uint8)).to(device), layout, columns, tokens)


def on_device(section: Tensor, layout: Layout, columns: int, tokens: int) -> DeviceStreams:
    """Streams of a section whose bytes lie, or will lie, in `section`: uint8 on a device, whole words, four zeros
    behind them. Its lengths must be there, and add up. Raises CodecError."""
    if layout.units >= MAX_UNITS:
        raise CodecError(f"a section of {layout.units} units is too large for a device; cut the chunk")
    words = section.view(torch.int32)
    first_delta = np.cumsum(layout.widths, dtype=np.int32) - layout.widths
    host = np.stack([layout.shortest.astype(np.int32), layout.widths, first_delta])
    groups = torch.from_numpy(host).to(section.device)
    offsets = stream_offsets(groups, words[layout.deltas_at // 4 :], layout.streams)
    return DeviceStreams(words[layout.units_at // 4 :], offsets, layout.units, columns, tokens, layout.segment_tokens)


def stream_offsets(groups: Tensor, deltas: Tensor, streams: int) -> Tensor:
    """int32 `[N + 1]` from packed lengths: `groups` int32 `[3, G]` (shortest, width, first word in `deltas`)."""
    lengths = torch.empty(streams + 1, dtype=torch.int32, device=groups.device)
    _unpack_lengths[(groups.shape[1],)](groups, deltas, lengths, streams, groups.shape[1], num_warps=1)
    return torch.cumsum(lengths, 0, dtype=torch.int32)


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
        "columns_a_group": columns // (1 if how.token_scale is None else how.token_scale.shape[0]),
        "value_stride": how.values.shape[1] if how.values.shape[0] > 1 else 0,
        "KIND": 0 if view.dtype == torch.uint8 else 1 if how.linear else 2,
        "SCALED": how.token_scale is not None,
    }


def raise_if_damaged(damaged: Tensor, streams: DeviceStreams) -> None:
    """Wait for the kernel that writes `damaged` (int32 `[1]`: a stream's number + 1, or 0). Raises CodecError."""
    stream = int(damaged.item()) - 1
    if stream >= 0:
        segment, column = divmod(stream, streams.columns)
        raise CodecError(
            f"coded stream of column {column}, segment {segment}, is damaged or belongs to other tables; "
            "fetch the chunk again"
        )


def compact(scratch: Tensor, lengths: Tensor, *, from_end: bool) -> Tensor:
    """The streams in `scratch` `[N, capacity]` (int16 or uint8), `lengths` int32 `[N]` of each, one after another."""
    ends = torch.cumsum(lengths, 0)
    units = torch.empty(int(ends[-1].item()), dtype=scratch.dtype, device=scratch.device)
    _compact[(len(scratch),)](
        scratch, lengths, ends - lengths, units, scratch.shape[1], FROM_END=from_end, BLOCK=_COPY_BLOCK, num_warps=1
    )
    return units


def symbols_on_device(symbols: Tensor, segment_tokens: int | None) -> int:
    """Check symbols `[C, T]` for encoding; returns the tokens of a segment. Raises CodecError."""
    if symbols.dim() != 2 or symbols.dtype != torch.uint8 or 0 in symbols.shape:
        raise CodecError(f"symbols are uint8 [columns, tokens], not {symbols.dtype} of shape {tuple(symbols.shape)}")
    return sections.segment_length(symbols.shape[1], segment_tokens)


@triton.jit(do_not_specialize=["deltas", "n", "n_groups"])
def _unpack_lengths(groups, deltas, lengths, n, n_groups):
    """`lengths` int32 `[N + 1]`, a zero first. One group of 32 streams a program; `groups` int32 `[3, G]`: shortest,
    width, first word of its deltas."""
    group = tl.program_id(0)
    lane = tl.arange(0, 32)
    shortest = tl.load(groups + group)
    width = tl.load(groups + n_groups + group)
    bit = lane * width
    words = deltas + tl.load(groups + 2 * n_groups + group) + (bit >> 5)
    low = tl.load(words).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(words + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    both = (low | (high << 32)) >> (bit & 31).to(tl.uint64)
    delta = both.to(tl.int32) & ((1 << width) - 1)
    stream = group * 32 + lane
    tl.store(lengths + 1 + stream, shortest + delta, mask=stream < n)
    tl.store(lengths, 0, mask=group == 0)


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
