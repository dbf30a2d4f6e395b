"""A background load like an engine that generates tokens: matrix-vector products, which read weights from memory.

It runs on a stream of its own during a session; how much longer a round takes then is what decoding
costs others. A round is captured as one graph, so that launching it takes the processor 20 us every few ms.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from dataclasses import dataclass
from typing import Any, Final

import torch

WIDTH: Final = 8192
PRODUCTS: Final = 32
"""Products of a round: 32 of 134 MB each take some 1 ms on an H200."""
MATRICES: Final = 8
"""Different ones, taken in turn: 1 GB, many times any cache."""


@dataclass(frozen=True, slots=True)
class Round:
    """CLOCK_MONOTONIC, seconds."""

    start_s: float
    end_s: float


class GemvLoop:
    """Begin with `start`; `stop` gives every round. On a CPU the products are small: that is for tests."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        width = WIDTH if self._cuda else WIDTH // 32
        dtype = torch.bfloat16 if self._cuda else torch.float32
        self._matrices = [torch.randn(width, width, device=device).to(dtype) for _ in range(MATRICES)]
        self._vector = torch.randn(width, device=device).to(dtype)
        self._out = torch.empty(width, device=device, dtype=dtype)
        self._device = device
        self._rounds: list[Round] = []
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._graph: Any = None
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            with torch.cuda.stream(self._stream):
                self._round()
            torch.cuda.synchronize(device)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._round()

    def start(self) -> None:
        self._rounds, self._ending = [], threading.Event()
        self._thread = threading.Thread(target=self._run_cuda if self._cuda else self._run, daemon=True)
        self._thread.start()

    def stop(self) -> list[Round]:
        assert self._thread is not None
        self._ending.set()
        self._thread.join()
        return self._rounds

    def _round(self) -> None:
        for index in range(PRODUCTS):
            torch.mv(self._matrices[index % MATRICES], self._vector, out=self._out)

    def _run(self) -> None:
        while not self._ending.is_set():
            start_s = time.monotonic()
            self._round()
            self._rounds.append(Round(start_s, time.monotonic()))

    def _run_cuda(self) -> None:
        """Keeps two rounds queued, so that the device never waits for the launch."""
        zero = torch.cuda.Event(enable_timing=True)
        zero.record(self._stream)
        zero.synchronize()
        zero_s = time.monotonic()
        marks = [zero]
        with torch.cuda.stream(self._stream):
            while not self._ending.is_set():
                self._graph.replay()
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record(self._stream)
                if len(marks) > 2:
                    marks[-3].synchronize()
        marks[-1].synchronize()
        ends = [zero_s + zero.elapsed_time(mark) / 1e3 for mark in marks]
        self._rounds = [Round(start_s, end_s) for start_s, end_s in itertools.pairwise(ends)]


def slowdown(rounds: list[Round], start_s: float, end_s: float) -> dict[str, float]:
    """Rounds within [start, end) against those outside: by how much longer they took, as a fraction."""
    within = [r.end_s - r.start_s for r in rounds if r.start_s >= start_s and r.end_s <= end_s]
    outside = [r.end_s - r.start_s for r in rounds if r.end_s < start_s or r.start_s > end_s]
    if not within or not outside:
        return {}
    alone_s, beside_s = statistics.median(outside), statistics.fmean(within)
    return {"rounds": len(within), "alone_s": alone_s, "beside_s": beside_s, "slowdown": beside_s / alone_s - 1.0}
