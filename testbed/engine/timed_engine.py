"""The engine of a synthetic workload: decoding, recomputing and prefill take the times of its compute profile.

For workloads whose model this machine cannot run (`kvstream.testbed.workloads.synthetic`): bytes come over the link
for real, and a step of compute is a wait, in line with the others on one thread, for as long as the profile says.
Nothing is decoded and no model runs, so there is no answer, and results measured this way are called synthetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

from kvstream.codec.errors import CodecError
from kvstream.policies.api import LevelOrText
from kvstream.testbed.engine.api import Step
from kvstream.testbed.engine.buffers import ChunkBuffers, IncomingChunk
from kvstream.testbed.engine.checks import check_chunk
from kvstream.testbed.engine.streams import Streams
from kvstream.testbed.engine.threads import ComputeThread
from kvstream.testbed.errors import SpecError
from kvstream.testbed.session.costs import Costs
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.store.store import token_ids
from kvstream.testbed.workloads import synthetic

SPIN_S: Final = 0.001
"""A sleep may be late by less than this; the rest of a step is spun away."""


@dataclass(frozen=True, slots=True)
class _OpenContext:
    manifest: Manifest
    costs: Costs


class TimedEngine:
    """An `Engine` whose steps are waits. With the `thread` of another it shares that one's decoder."""

    def __init__(self, workload: synthetic.Workload, thread: ComputeThread | None = None) -> None:
        self.slots = 0
        self.thread = thread or ComputeThread()
        self._workload = workload
        self._buffers = ChunkBuffers(Streams())
        self._context: _OpenContext | None = None

    def submit(self, step: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self.thread.submit(step, *arguments)

    def close(self) -> None:
        self.thread.close()

    def add_profile(self, data: bytes) -> str:
        raise SpecError("a timed engine decodes nothing; it has no use for a profile")

    def lacks_profile(self, manifest: Manifest) -> bool:
        return False

    def reserve(self, manifest: Manifest) -> None:
        """Take memory for a context's chunks now, not in a session."""
        self.slots = len(manifest.chunks)
        self._buffers.open(manifest, self.slots)

    def forget(self) -> None:
        self._context = None

    def open(self, manifest: Manifest, extra_tokens: int, *, overlap: bool = True) -> None:
        wanted = f"synthetic {self._workload.model}"
        if manifest.model != wanted or manifest.kv != self._workload.kv:
            raise SpecError(f"context {manifest.context} is for {manifest.model}, this receiver simulates {wanted}")
        self._context = _OpenContext(manifest, self._workload.costs(manifest))
        self.reserve(manifest)

    def take(self, chunk: int, level: LevelOrText, size: int) -> IncomingChunk:
        return self._buffers.take(chunk, level, size)

    def on_bytes(self, incoming: IncomingChunk, received: int) -> None:
        incoming.received = received

    def decode(self, incoming: IncomingChunk) -> Step:
        context = self._opened()
        start_s = time.monotonic()
        assert isinstance(incoming.level, int)
        # only the header: checking every byte would take longer than the decoder that this replaces
        check_chunk(incoming.view, context.manifest.chunks[incoming.chunk].start, incoming.level)
        return _step(start_s, context.costs.decode_s[incoming.chunk][incoming.level])

    def recompute(self, chunk: int, data: memoryview) -> Step:
        context = self._opened()
        assert context.costs.recompute_s is not None
        start_s = time.monotonic()
        try:
            token_ids(data, context.manifest.chunks[chunk].tokens)
        except SpecError as error:
            raise CodecError(f"text of chunk {chunk}: {error}") from error
        return _step(start_s, context.costs.recompute_s[chunk])

    def prefill(self, prompt_ids: Sequence[int]) -> Step:
        start_s, begin = time.monotonic(), self._opened().manifest.tokens
        cost_s = self._workload.forward_s(begin, begin + len(prompt_ids)) if prompt_ids else 0.0
        return _step(start_s, cost_s, token=0)

    def _opened(self) -> _OpenContext:
        if self._context is None:
            raise SpecError("no context is open")
        return self._context


def wait_until(end_s: float) -> None:
    """Return at a moment of CLOCK_MONOTONIC."""
    rest_s = end_s - time.monotonic() - SPIN_S
    if rest_s > 0.0:
        time.sleep(rest_s)
    while time.monotonic() < end_s:
        pass


def _step(start_s: float, cost_s: float, token: int | None = None) -> Step:
    wait_until(start_s + cost_s)
    return Step(start_s, time.monotonic(), token)
