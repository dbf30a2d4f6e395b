"""The lossless level decoded on a GPU: a lane makes the numbers of one channel from their two bytes, straight into the
target."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# Triton gives kernels their types.

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kvstream.codec.container import Chunk
from kvstream.codec.entropy import device as shared
from kvstream.codec.entropy import rans_triton
from kvstream.codec.entropy.device import DeviceStreams
from kvstream.codec.entropy.rans_triton import advance, begin
from kvstream.codec.kvstream.lossless import SYMBOLS, Bytes, Content
from kvstream.codec.kvstream.triton_kernels import token_offset
from kvstream.codec.targets import DTYPES, CacheTarget, StridedTarget

_LANES = 64


def decode(chunk: Chunk, target: CacheTarget) -> None:
    """Write a chunk's values into a target of its shape, and wait for the device. Raises CodecError."""
    with shared.current(target.device):
        dtype = DTYPES[chunk.header.dtype]
        if target.dtype == dtype and target.placement is not None:
            _decode(chunk, target)
            return
        # A target that only takes finished values, or others than the chunk's: they are made beside it.
        values = torch.empty(target.shape, dtype=dtype, device=target.device)
        _decode(chunk, StridedTarget(values))
        for layer in range(len(values)):
            for side in (0, 1):
                target.write(layer, side, values[layer, side])


class Job:
    """One chunk on a device, ready to be decoded into a target in whose placement kernels may write."""

    def __init__(self, chunk: Chunk, target: CacheTarget) -> None:
        header, content, device = chunk.header, Content.of(chunk), target.device
        placement = target.placement
        assert placement is not None
        self.header, self.content, self.placement = header, content, placement
        self._how = Bytes.of(header.dtype)
        self._number, self._rows = shared.copy(device, _numbers(content), content.rows.astype(np.int32))
        self._kept_at = torch.from_numpy(content.kept_ends).to(device)
        self._kept = _upload(content.kept, device)
        self._damaged = torch.zeros(1, dtype=torch.int32, device=device)
        self._streams: DeviceStreams | None = None
        if content.tables is None:
            self._slots = self._entries = torch.zeros(1, dtype=torch.int64, device=device)
        else:
            tables = rans_triton.to_device(content.tables, content.rows, device)
            self._slots, self._entries = tables.slots, tables.entries
            self._streams = rans_triton.upload(content.coded, tables, header.tokens, content.segment_tokens)

    def launch(self) -> None:
        """Start decoding on the current stream."""
        header, content, placement, streams = self.header, self.content, self.placement, self._streams
        nothing = self._damaged
        channels, blocks, halves = header.heads * header.head_dim, len(content.own), self._how.count // 2
        segments, tiles = triton.cdiv(header.tokens, content.segment_tokens), triton.cdiv(channels, _LANES)
        _assemble[(segments * blocks * tiles * halves,)](
            nothing if streams is None else streams.payload, nothing if streams is None else streams.offsets,
            self._rows, self._slots, self._entries, self._number, self._kept, self._kept_at, self._damaged,
            placement.bases, placement.bases if placement.token_at is None else placement.token_at,
            0 if streams is None else streams.units, len(content.rows), header.tokens, content.segment_tokens, blocks,
            channels, header.head_dim, placement.token_stride, placement.head_stride, placement.dim_stride,
            TABLE=placement.token_at is not None, ROTATED=self._how.rotated, HALVES=halves, N_SYMBOLS=SYMBOLS,
            BLOCK=_LANES, num_warps=1,
        )  # fmt: skip

    def finish(self) -> None:
        """Wait for the device. Raises CodecError for a stream that does not end as it must."""
        if self._streams is not None:
            shared.raise_if_damaged(self._damaged, self._streams)


def _decode(chunk: Chunk, target: CacheTarget) -> None:
    job = Job(chunk, target)
    job.launch()
    job.finish()


def _numbers(content: Content) -> NDArray[np.int32]:
    """Of each column, which of the coded ones it is, or -1 - its place among its block's kept ones."""
    coded = content.own > 0
    kept = np.cumsum(content.own == 0, axis=1)
    return np.where(coded, (np.cumsum(coded) - 1).reshape(coded.shape), -kept).astype(np.int32).ravel()


def _upload(data: NDArray[np.uint8], device: torch.device) -> Tensor:
    host = torch.empty(max(len(data), 1), dtype=torch.uint8, pin_memory=shared.on_cuda(device))
    host.numpy()[: len(data)] = data
    return host.to(device, non_blocking=True)


@triton.jit
def _open(number, offsets, rows, slots, entries, payload, segment, coded_columns, units, N_SYMBOLS: tl.constexpr):
    """Streams of the coded columns among `number`; empty ones for the others."""
    coded = number >= 0
    stream = segment * coded_columns + number
    end = tl.load(offsets + stream + 1, mask=coded, other=0)
    end = tl.minimum(tl.maximum(end, 0), units)
    at = tl.minimum(tl.maximum(tl.load(offsets + stream, mask=coded, other=0), 0), end)
    row = tl.load(rows + number, mask=coded, other=0)
    state = tl.zeros_like(at).to(tl.uint32)
    ahead = state
    if tl.max(number) >= 0:
        state, ahead, at = begin(payload, at, end)
    return state, ahead, at, end, slots + row * 1024, entries + row * N_SYMBOLS


@triton.jit(
    do_not_specialize=[
        "units", "coded_columns", "tokens", "segment_tokens", "blocks", "channels", "head_dim", "token_stride",
        "head_stride", "dim_stride",
    ]
)  # fmt: skip
def _assemble(
    payload, offsets, rows, slots, entries, numbers, kept, kept_at, damaged, bases, token_at,
    units, coded_columns, tokens, segment_tokens, blocks, channels, head_dim, token_stride, head_stride, dim_stride,
    TABLE: tl.constexpr, ROTATED: tl.constexpr, HALVES: tl.constexpr, N_SYMBOLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One half (16 bits) of the numbers of some channels of a block in one segment."""
    tiles = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    half = program % HALVES
    program = program // HALVES
    # Lanes beyond the last channel repeat it and store the same values: no mask in the loop.
    channel = tl.minimum((program % tiles) * BLOCK + tl.arange(0, BLOCK), channels - 1)
    block = (program // tiles) % blocks
    segment = program // (tiles * blocks)
    column = (block * HALVES + half) * 2 * channels + channel
    high = tl.load(numbers + column)
    low = tl.load(numbers + column + channels)
    state_h, ahead_h, at_h, end_h, slots_h, entries_h = _open(
        high, offsets, rows, slots, entries, payload, segment, coded_columns, units, N_SYMBOLS
    )
    state_l, ahead_l, at_l, end_l, slots_l, entries_l = _open(
        low, offsets, rows, slots, entries, payload, segment, coded_columns, units, N_SYMBOLS
    )
    any_h = tl.max(high) >= 0
    any_l = tl.max(low) >= 0
    # bytes `[T, columns]` of the block's kept columns
    begins = tl.load(kept_at + block)
    stride = (tl.load(kept_at + block + 1) - begins) // tokens
    first = segment * segment_tokens
    last = tl.minimum(first + segment_tokens, tokens)
    source = kept + begins + first * stride
    to = tl.load(bases + block).to(tl.pointer_type(tl.int16)) + (HALVES - 1 - half)
    to += HALVES * ((channel // head_dim).to(tl.int64) * head_stride + (channel % head_dim).to(tl.int64) * dim_stride)
    t = first
    for _index in range(first, last):
        byte_h = tl.load(source - 1 - high, mask=high < 0, other=0).to(tl.int32)
        byte_l = tl.load(source - 1 - low, mask=low < 0, other=0).to(tl.int32)
        if any_h:
            symbol, _x, state_h, ahead_h, at_h = advance(state_h, ahead_h, at_h, end_h, payload, slots_h, entries_h)
            byte_h = tl.where(high >= 0, symbol, byte_h)
        if any_l:
            symbol, _x, state_l, ahead_l, at_l = advance(state_l, ahead_l, at_l, end_l, payload, slots_l, entries_l)
            byte_l = tl.where(low >= 0, symbol, byte_l)
        value = (byte_h << 8) | byte_l
        rotated = (value >> 1) | ((value & 1) << 15)
        value = tl.where((half == 0) & ROTATED, rotated, value)
        tl.store(to + HALVES * token_offset(token_at, t, True, token_stride, TABLE), value.to(tl.int16))
        source += stride
        t += 1
    wrong_h = (high >= 0) & ((state_h != 0) | (at_h != end_h))
    wrong_l = (low >= 0) & ((state_l != 0) | (at_l != end_l))
    number = tl.maximum(tl.where(wrong_h, high, -1), tl.where(wrong_l, low, -1))
    if tl.max(number) >= 0:
        tl.atomic_max(damaged, segment * coded_columns + tl.max(number) + 1)
