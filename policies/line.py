"""What is left of a transfer as a flow line of two machines, and the link of such a line for many states at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstream.policies.errors import PolicyError
from kvstream.traces.fluid import (
    FRAME_BYTES,
    FRAMES_PER_ANSWER,
    FRAMES_PER_LARGE_ANSWER,
    LARGE_FRAME_BYTES,
    MIN_FRAME_BYTES,
)
from kvstream.traces.trace import Trace

Floats = NDArray[np.float64]


def first_frame_bits(bits: Floats | float) -> Floats:
    """Bits of an answer's first frame (`traces.fluid.frame_bytes`): with depth 2 the next chunk is requested when it is
    here, at the earliest."""
    size = np.asarray(bits) / 8.0
    small = np.clip(np.floor(size / FRAMES_PER_ANSWER), MIN_FRAME_BYTES, FRAME_BYTES)
    large = np.minimum(np.floor(size / FRAMES_PER_LARGE_ANSWER), LARGE_FRAME_BYTES)
    found: Floats = np.minimum(bits, 8.0 * np.maximum(small, large))
    return found


@dataclass(frozen=True)
class Line:
    """What is left of a transfer. The tables run over [chunk][option]; every chunk has the same number of options.

    `distortion` is weighted already: a plan's distortion is the sum over its chunks. `start_s` is the earliest moment
    at which the first chunk's answer can begin, `compute_free_s` when the receiver can begin to compute.
    `first_chunk` is the index of the first chunk, for traces with one rate per chunk.
    """

    goodput: Trace
    rtt_s: float
    depth: int
    start_s: float
    compute_free_s: float
    prefill_s: float
    sizes_bytes: tuple[tuple[float, ...], ...]
    compute_s: tuple[tuple[float, ...], ...]
    distortion: tuple[tuple[float, ...], ...]
    first_chunk: int = 0

    def __post_init__(self) -> None:
        shapes = {len(row) for table in (self.sizes_bytes, self.compute_s, self.distortion) for row in table}
        if len({len(self.sizes_bytes), len(self.compute_s), len(self.distortion)}) != 1 or len(shapes) != 1:
            raise PolicyError("sizes, compute times and distortions of a plan must have one shape")

    @cached_property
    def bits(self) -> Floats:
        return np.array(self.sizes_bytes, dtype=np.float64) * 8.0

    @cached_property
    def frames(self) -> Floats:
        """Bits of each answer's first frame."""
        return first_frame_bits(self.bits)

    @cached_property
    def compute(self) -> Floats:
        return np.array(self.compute_s, dtype=np.float64)

    @cached_property
    def loss(self) -> Floats:
        return np.array(self.distortion, dtype=np.float64)

    @cached_property
    def tables(self) -> tuple[Any, ...]:
        """As the compiled loops take it."""
        return self.bits, self.frames, self.compute, self.loss, self.start_s, self.compute_free_s

    def ttft_s(self, options: tuple[int, ...]) -> float:
        """When the first token comes under a plan; inf if it never does. The plain recurrence, one chunk at a time."""
        start_s, free_s = self.start_s, self.compute_free_s
        for k, option in enumerate(options):
            if start_s == math.inf:
                return math.inf
            bits = float(self.bits[k, option])
            end_s = start_s + self._serve_s(bits, start_s, k)
            free_s = max(end_s, free_s) + float(self.compute[k, option])
            if self.depth == 1:
                start_s = end_s + self.rtt_s
            else:
                start_s = max(end_s, start_s + self._serve_s(float(self.frames[k, option]), start_s, k) + self.rtt_s)
        return free_s + self.prefill_s

    def _serve_s(self, bits: float, start_s: float, k: int) -> float:
        if self.goodput.per == "time":
            return self.goodput.time_for(bits, start_s)
        rate = self.goodput.chunk_rate(self.first_chunk + k)
        return bits / rate if rate > 0.0 else math.inf


class TrueLink:
    """The link of a Line for many states at once: positions in bits since time 0, times in seconds, up to a horizon."""

    def __init__(self, line: Line, horizon_s: float) -> None:
        self.depth, self.rtt_s = line.depth, line.rtt_s
        self.per_chunk = line.goodput.per == "chunk"
        self._line = line
        if self.per_chunk:
            self._edges = self._rates = self._bits = np.zeros(1)
            self._flows = False
        else:
            steps = line.goodput.changes(0.0, max(horizon_s, 1e-9))
            self._edges = np.array([at_s for at_s, _ in steps] + [max(horizon_s, 1e-9)])
            self._rates = np.array([rate for _, rate in steps])
            self._bits = np.concatenate(([0.0], np.cumsum(np.diff(self._edges) * self._rates)))
            self._flows = bool((self._rates > 0.0).all())
        self.origin = line.start_s if self.per_chunk else float(self.at(np.array([line.start_s]))[0])
        """Where the first answer can begin: in bits, or in seconds with one rate per chunk."""

    @cached_property
    def tables(self) -> tuple[Any, ...]:
        """As the compiled loops take it."""
        slowness = [self.seconds_per_bit(k) if self.per_chunk else 0.0 for k in range(len(self._line.bits))]
        steps = self._edges, self._bits, self._rates, np.array(slowness)
        return self.per_chunk, self._flows, *steps, self.depth, self.rtt_s, self.origin

    def at(self, t_s: Floats) -> Floats:
        """Bits carried by `t_s`."""
        if self.per_chunk:
            return np.zeros_like(t_s)
        return np.interp(t_s, self._edges, self._bits)

    def least_in(self, span_s: float, low_s: Floats, high_s: Floats) -> Floats:
        """For each [low, high]: fewest bits that a stretch of `span_s` carries that begins therein."""
        horizon_s = float(self._edges[-1])
        low_s = np.minimum(low_s, horizon_s)
        high_s = np.clip(high_s, low_s, horizon_s)
        starts = np.concatenate((self._edges, np.maximum(self._edges - span_s, 0.0), low_s, high_s))
        carried = self.at(starts + span_s) - self.at(starts)
        inside = (starts >= low_s[:, None]) & (starts <= high_s[:, None])
        return np.where(inside, carried, np.inf).min(1)

    def above(self, low_s: Floats, high_s: Floats, at_s: Floats, end_s: float) -> tuple[Floats, Floats]:
        """For each span [low, high] a line above the link's bits, close to them at `at_s`.

        It is bits <= limit - slope * (end - t).
        """
        top = float(self._rates.max())
        slopes = top * np.exp2(-np.arange(0.0, 10.0, 0.25))
        low_s = np.minimum(low_s, self._edges[-1])
        high_s = np.maximum(high_s, low_s)  # equal but for rounding, or else no plan meets the deadline
        times = np.concatenate((self._edges, low_s, high_s))
        bits = self.at(times)
        inside = (times >= low_s[:, None]) & (times <= high_s[:, None])
        excess = bits - slopes[:, None] * times  # [slope, time]
        beta = np.where(inside[:, None, :], excess, -np.inf).max(2)  # [span, slope]
        best = (beta + slopes * np.clip(at_s, low_s, high_s)[:, None]).argmin(1)
        slope = slopes[best]
        return slope, beta[np.arange(len(best)), best] + slope * end_s

    def when(self, bits: Floats) -> Floats:
        """The first moment by which `bits` have been carried; inf beyond the horizon."""
        if self._flows:
            return np.interp(bits, self._bits, self._edges, right=np.inf)
        row = np.searchsorted(self._bits, bits, side="left") - 1
        late = row >= len(self._rates)
        row = np.clip(row, 0, len(self._rates) - 1)
        rate = self._rates[row]
        t_s = self._edges[row] + (bits - self._bits[row]) / np.where(rate > 0.0, rate, 1.0)
        return np.where(late, np.inf, t_s)

    def send(self, start: Floats, pos: Floats, bits: Floats, k: int) -> tuple[Floats, Floats]:
        """End of the transfer and the position then."""
        if self.per_chunk:
            return start + bits * self.seconds_per_bit(k), pos
        end_pos = pos + bits
        return self.when(end_pos), end_pos

    def next_start(
        self, start: Floats, pos: Floats, frame: Floats, end: Floats, end_pos: Floats, k: int
    ) -> tuple[Floats, Floats]:
        """When the next answer can begin (see `kvstream.testbed.session.session` for depth), and the position then;
        `frame` holds the bits of first frames."""
        if self.rtt_s == 0.0:
            return end, end_pos
        if self.depth == 1:
            begin = end + self.rtt_s
            return begin, self.at(begin)
        framed, _ = self.send(start, pos, frame, k)
        begin = np.maximum(end, framed + self.rtt_s)
        return begin, np.where(begin > end, self.at(begin), end_pos)

    def seconds_per_bit(self, k: int) -> float:
        rate = self._line.goodput.chunk_rate(self._line.first_chunk + k)
        return 1.0 / rate if rate > 0.0 else math.inf
