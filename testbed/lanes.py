"""The in-order queues of the device that computes, and its clock: one code path for a CPU and a CUDA device.

Work is put `on` a lane; `mark` notes a moment of a lane, `after` lets a lane wait for a mark of another, `reach` lets
the calling thread wait for one, and `when` says at what CLOCK_MONOTONIC it was. On a CPU all of it happens in the
calling thread, in order, so a mark is the time at which it is made. On a CUDA device lanes are streams and marks are
events: putting work on a lane waits for nothing, and times are the device's own.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

Lane: TypeAlias = Literal["copy", "decode", "model"]
LANES: Final[tuple[Lane, ...]] = ("copy", "decode", "model")
Mark: TypeAlias = Any
"""A moment of a lane: what `Lanes.mark` gives, to be handed back."""
_ZERO_TRIES: Final = 5


class Lanes:
    """A CPU: the calling thread is the only lane."""

    def on(self, lane: Lane) -> AbstractContextManager[Any]:
        """What is launched within goes to this lane."""
        return nullcontext()

    def mark(self, lane: Lane) -> Mark:
        return time.monotonic()

    def after(self, lane: Lane, mark: Mark) -> None:
        """What comes next on the lane begins after the mark."""

    def reach(self, mark: Mark) -> None:
        """Hold the calling thread until the mark; other threads go on."""

    def when(self, mark: Mark) -> float:
        """CLOCK_MONOTONIC of a mark that was reached."""
        return float(mark)

    def set_clock(self) -> None:
        """Tie the device's clock to CLOCK_MONOTONIC again; holds the calling thread until the device is idle."""

    def host_memory(self, nbytes: int) -> Tensor:
        """uint8 `[nbytes]`, touched, in memory that the device can copy from beside everything else."""
        return torch.from_numpy(np.ones(nbytes, dtype=np.uint8))

    def mirror(self, host: Tensor) -> Tensor | None:
        """Memory of the same size on the device; None where the device reads the host's."""
        return None


class CudaLanes(Lanes):
    """A CUDA device: each lane is a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = {lane: torch.cuda.Stream(device) for lane in LANES}
        self._zero = torch.cuda.Event(enable_timing=True)
        self._zero_s = 0.0
        self.set_clock()

    def on(self, lane: Lane) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._streams[lane])

    def mark(self, lane: Lane) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._streams[lane])
        return event

    def after(self, lane: Lane, mark: Mark) -> None:
        self._streams[lane].wait_event(mark)

    def reach(self, mark: Mark) -> None:
        mark.synchronize()

    def when(self, mark: Mark) -> float:
        return self._zero_s + float(self._zero.elapsed_time(mark)) / 1e3

    def set_clock(self) -> None:
        torch.cuda.synchronize(self._device)
        shortest_s = float("inf")
        for _ in range(_ZERO_TRIES):
            event = torch.cuda.Event(enable_timing=True)
            before_s = time.monotonic()
            event.record(self._streams["copy"])
            event.synchronize()
            after_s = time.monotonic()
            if after_s - before_s < shortest_s:
                shortest_s = after_s - before_s
                self._zero, self._zero_s = event, (before_s + after_s) / 2

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.ones(nbytes, dtype=torch.uint8).pin_memory()

    def mirror(self, host: Tensor) -> Tensor | None:
        return torch.empty_like(host, device=self._device)


def lanes_of(device: torch.device) -> Lanes:
    """The lanes of a device."""
    return CudaLanes(device) if device.type == "cuda" else Lanes()
