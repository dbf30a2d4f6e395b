"""The in-order queues of the device that computes, and its clock: one code path for a CPU and a CUDA device.

Work is put `on` a stream; `mark` notes a moment of a stream, `after` makes a stream wait for a mark of another, `reach`
makes the calling thread wait for one, and `when` gives its CLOCK_MONOTONIC. On a CPU everything happens in the calling
thread, in order, so a mark is the time at which it is made. On a CUDA device these are CUDA streams and marks are
events: putting work on a stream waits for nothing, and times are the device's own.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kvstream.testbed.host.shared_memory import SharedMemory

StreamName: TypeAlias = Literal["decode", "model"]
STREAM_NAMES: Final[tuple[StreamName, ...]] = ("decode", "model")
Mark: TypeAlias = Any
"""A moment of a stream: what `Streams.mark` gives, to be handed back."""
_ZERO_TRIES: Final = 5
_PORTABLE: Final = 1
"""cudaHostRegisterPortable: page-locked for all devices, of which several may decode a chunk's layers."""


class Streams:
    """A CPU: the calling thread is the only stream."""

    def on(self, stream: StreamName) -> AbstractContextManager[Any]:
        """What is launched within goes to this stream."""
        return nullcontext()

    def mark(self, stream: StreamName) -> Mark:
        return time.monotonic()

    def after(self, stream: StreamName, mark: Mark) -> None:
        """What comes next on the stream begins after the mark."""

    def reach(self, mark: Mark) -> None:
        """Hold the calling thread until the mark; other threads go on."""

    def when(self, mark: Mark) -> float:
        """CLOCK_MONOTONIC of a mark that was reached."""
        return float(mark)

    def set_clock(self) -> None:
        """Tie the device's clock to CLOCK_MONOTONIC again; holds the calling thread until the device is idle."""

    def host_memory(self, nbytes: int, shared: SharedMemory | None = None) -> Tensor:
        """uint8 `[nbytes]`, touched, in memory from which the device copies while it does other work."""
        if shared is None:
            return torch.from_numpy(np.ones(nbytes, dtype=np.uint8))
        return torch.from_numpy(np.frombuffer(shared.view(nbytes), dtype=np.uint8))


class CudaStreams(Streams):
    """A CUDA device, with a CUDA stream for each name."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = {name: torch.cuda.Stream(device) for name in STREAM_NAMES}
        self._zero = torch.cuda.Event(enable_timing=True)
        self._zero_s = 0.0
        self._locked: Tensor | None = None
        """Shared memory that is page-locked."""
        self.set_clock()

    def on(self, stream: StreamName) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._streams[stream])

    def mark(self, stream: StreamName) -> Mark:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._streams[stream])
        return event

    def after(self, stream: StreamName, mark: Mark) -> None:
        self._streams[stream].wait_event(mark)

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
            event.record(self._streams["decode"])
            event.synchronize()
            after_s = time.monotonic()
            if after_s - before_s < shortest_s:
                shortest_s = after_s - before_s
                self._zero, self._zero_s = event, (before_s + after_s) / 2

    def host_memory(self, nbytes: int, shared: SharedMemory | None = None) -> Tensor:
        if shared is None:
            return torch.ones(nbytes, dtype=torch.uint8).pin_memory()
        runtime = torch.cuda.cudart()
        if self._locked is not None:
            torch.cuda.check_error(runtime.cudaHostUnregister(self._locked.data_ptr()))
        self._locked = super().host_memory(nbytes, shared)
        torch.cuda.check_error(runtime.cudaHostRegister(self._locked.data_ptr(), len(self._locked), _PORTABLE))
        return self._locked


def streams_of(device: torch.device) -> Streams:
    """The streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else Streams()
