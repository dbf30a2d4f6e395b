"""The receiver's compute: decoding, recomputing and the prompt's prefill, in order, on one thread beside the network.

Work for a session happens in one `KVCache`. Steps are submitted to a single worker thread, so their order is the
order of submission, and the event loop is never held: torch and numba release the interpreter lock in their kernels.
On a CUDA device the thread launches and, at a step's end, waits for the device's own mark; copies go there from the
event loop's thread, which waits for nothing. A codec that can then decodes pieces of a chunk as they arrive.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from codec import container, registry
from codec.errors import CodecError
from codec.profile import Profile
from policies.api import TEXT, LevelOrText
from testbed.captured import CapturedPrefill
from testbed.errors import SpecError
from testbed.landing import Inflow, Landing
from testbed.lanes import Mark, lanes_of
from testbed.llm import KVCache, Model, Question, Score, extend_kv, first_token, generate_with_kv, score
from testbed.manifest import Manifest
from testbed.paged import PagedCache
from testbed.session import Costs
from testbed.store import token_ids

if TYPE_CHECKING:
    from codec.api import Codec

SWITCH_INTERVAL_S = 0.0001
"""How long a thread in Python code may hold the interpreter lock while another waits. Each read of the network waits
for it twice, and at 25 Gbit/s 300 KB come in this time; the default of 5 ms would delay its events by as much."""
REPEATS = 5
MAX_BYTES_PER_ELEMENT = 8
MAX_OVERHEAD_BYTES = 1 << 20
PLACES = 4
"""Encodings that a CUDA device's receiver holds at most: two under way, one being decoded, one to spare. With all of
them taken, none is asked for: a decoder that is slower than the link holds the link back, and not ever more memory."""


@dataclass(frozen=True, slots=True)
class Step:
    """A finished step; times on CLOCK_MONOTONIC, seconds."""

    start_s: float
    end_s: float
    token: int | None = None
    """The first output token of a prefill."""
    pieces: tuple[tuple[float, float], ...] = ()
    """Of decoding piece by piece: when each began and ended. The last is what was left when all bytes were here."""
    copies: tuple[tuple[float, float], ...] = ()
    """The same of copying to the device; empty where none is needed."""


class Compute:
    """One model, its cache, and the codecs in use. Every method runs in the caller's thread unless submitted."""

    def __init__(self, model: Model, *, places: int | None = None, pages_on: Sequence[torch.device | str] = ()) -> None:
        """`places` bounds the encodings that are held at a time; by default PLACES on a CUDA device, all on a CPU.
        `pages_on` devices, the model's first, chunks are decoded into the blocks of a `PagedCache`, each its share of
        the layers, as for an engine; our model, which attends to one piece of memory, then gets each chunk by a copy.
        """
        self.model = model
        self.lanes = lanes_of(model.device)
        self.landing = Landing(self.lanes)
        self.places = 0
        """Encodings of the open context that may be held at a time."""
        self._places = PLACES if places is None and model.device.type == "cuda" else places
        self._profiles: dict[str, Profile] = {}
        self._codecs: dict[tuple[str, str | None], Codec] = {}
        self._cache: KVCache | None = None
        self._pages_on = _devices_of_pages(pages_on, model) if pages_on else []
        self._pages: PagedCache | None = None
        self._captured: dict[tuple[int, int], CapturedPrefill] = {}
        self._manifest: Manifest | None = None
        self._codec: Codec | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        # begun now, so that it does not inherit what the network's thread is later granted by the scheduler
        self._thread.submit(lambda: None).result()
        sys.setswitchinterval(SWITCH_INTERVAL_S)

    def submit(self, step: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run a step on the compute thread, after everything submitted before."""
        return self._thread.submit(step, *arguments)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    # --- before a session

    def add_profile(self, data: bytes) -> str:
        """Keep a profile; its hash is returned. Raises CodecError for bytes that are none."""
        profile = Profile.from_bytes(data)
        self._profiles[profile.sha256] = profile
        return profile.sha256

    def lacks_profile(self, manifest: Manifest) -> bool:
        return manifest.profile is not None and manifest.profile not in self._profiles

    def reserve(self, tokens: int) -> None:
        """Room for a context and its prompt, with its pages touched and every old value gone."""
        if self._cache is None or self._cache.capacity < tokens:
            self._captured.clear()
            self._cache = self.model.new_cache(tokens)
            self._pages = PagedCache(self.model.kv, tokens, self._pages_on) if self._pages_on else None
        self._poison()

    def capture(self, context_tokens: int, prompt_tokens: int) -> None:
        """Make the prefill of such prompts one graph, where the device and the model allow it; `reserve` before."""
        key = context_tokens, prompt_tokens
        if self._cache is None or self.model.device.type != "cuda" or key in self._captured:
            return
        # a model that does something no graph can hold is run as ever
        with suppress(RuntimeError):
            self._captured[key] = CapturedPrefill(self.model, self._cache, *key)
        self._cache.poison()

    def forget(self) -> None:
        """Make sure that nothing of an earlier session can be used."""
        self._manifest = None
        self._poison()

    def _poison(self) -> None:
        for memory in (self._cache, self._pages):
            if memory is not None:
                memory.poison()
        self.lanes.set_clock()

    def open(self, manifest: Manifest, extra_tokens: int, *, overlap: bool = True) -> None:
        """Get ready for the chunks of a context; without `overlap` all of it is held before any is decoded.

        Raises SpecError or CodecError if it is not this model's.
        """
        if manifest.model != self.model.fingerprint:
            raise SpecError(
                f"context {manifest.context} was computed with model {manifest.model[:12]}, "
                f"this receiver runs {self.model.name} ({self.model.fingerprint[:12]})"
            )
        if manifest.kv != self.model.kv:
            raise SpecError(f"context {manifest.context} has a cache of {manifest.kv}, this receiver {self.model.kv}")
        self._codec = self.codec(manifest)
        if len(self._codec.levels) != len(manifest.levels):
            raise SpecError(f"context {manifest.context}: its codec has {len(self._codec.levels)} levels, not its own")
        for index, chunk in enumerate(manifest.chunks):
            # memory is set aside for what a manifest claims, so the claim must be in proportion
            most = MAX_BYTES_PER_ELEMENT * chunk.tokens * manifest.kv.elements_per_token + MAX_OVERHEAD_BYTES
            if max(*chunk.sizes_bytes, chunk.text_bytes) > most:
                raise SpecError(f"context {manifest.context}: chunk {index} claims more than {most} bytes; store again")
        needed = manifest.tokens + extra_tokens
        if needed > self.model.positions:
            raise SpecError(f"{needed} tokens are more than the {self.model.positions} positions of {self.model.name}")
        if self._cache is None or self._cache.capacity < needed:
            self.reserve(needed)
        self._manifest = manifest
        n = len(manifest.chunks)
        self.places = min(self._places or n, n) if overlap else n
        self.landing.open(manifest, self.places, mirrored=self.decodes_pieces)

    @property
    def decodes_pieces(self) -> bool:
        """Whether the open context's chunks are decoded while they arrive."""
        return self._ready()[1].decodes_pieces(self.model.device)

    def codec(self, manifest: Manifest) -> Codec:
        """The codec that a manifest describes, built once."""
        key = (str(sorted(manifest.codec.items())), manifest.profile)
        if key not in self._codecs:
            profile = None if manifest.profile is None else self._profiles.get(manifest.profile)
            self._codecs[key] = registry.from_config(manifest.codec, profile)
        return self._codecs[key]

    # --- steps of a session

    def feed(self, inflow: Inflow) -> None:
        """Decode what of a chunk is here and was not decoded yet. What is wrong with it fails `decode`."""
        if inflow.is_dropped or inflow.error is not None:
            return
        try:
            self._feed(inflow)
        except Exception as error:
            inflow.error = error

    def _feed(self, inflow: Inflow) -> None:
        manifest, codec, cache = self._ready()
        start, (stop, _, copied) = inflow.fed, inflow.copies[-1]
        if start == stop and inflow.decoder is not None:
            return  # an earlier call took this piece along
        self.lanes.after("decode", copied)
        begin = self.lanes.mark("decode")
        with self.lanes.on("decode"):
            if inflow.decoder is None:
                info = manifest.chunks[inflow.chunk]
                check_chunk(inflow.view[:stop], info.start, inflow.level)
                view = cache.view(info.start, info.stop)
                target = view if self._pages is None else self._pages.target(info.start, info.stop)
                inflow.decoder = codec.decoder(target, device=self.model.device, total_bytes=len(inflow.view))
            if stop > start:
                mirror = None if inflow.mirror is None else inflow.mirror[start:stop]
                inflow.decoder.feed(inflow.view[start:stop], mirror)
        inflow.fed = stop
        inflow.runs.append((begin, self.lanes.mark("decode")))

    def decode(self, inflow: Inflow) -> Step:
        """Decode (the rest of) a complete chunk into the cache. Raises CodecError if its bytes are not this chunk at
        this level."""
        self.feed(inflow)
        if inflow.error is not None:
            raise inflow.error
        assert inflow.decoder is not None
        manifest, _, cache = self._ready()
        info = manifest.chunks[inflow.chunk]
        begin = self.lanes.mark("decode")
        with self.lanes.on("decode"):
            inflow.decoder.finish()
            if self._pages is not None:
                self._pages.copy_to(cache.view(info.start, info.stop), info.start)
        end = self.lanes.mark("decode")
        inflow.runs.append((begin, end))
        self.lanes.reach(end)
        when = self.lanes.when
        pieces = tuple((when(a), when(b)) for a, b in inflow.runs)
        copies = () if inflow.mirror is None else tuple((when(a), when(b)) for _, a, b in inflow.copies)
        return Step(pieces[0][0], pieces[-1][1], pieces=pieces if len(pieces) > 2 else (), copies=copies)

    def recompute(self, chunk: int, data: memoryview) -> Step:
        """Compute a chunk's KV from its token ids; everything before it is in the cache. Raises CodecError."""
        manifest, _, cache = self._ready()
        info = manifest.chunks[chunk]
        try:
            ids = token_ids(data, info.tokens)
            with self._modelling() as begin:
                cache.length = info.start
                extend_kv(self.model, cache, ids)
        except SpecError as error:
            raise CodecError(f"text of chunk {chunk}: {error}") from error
        return self._step(begin)

    def prefill(self, prompt_ids: Sequence[int]) -> Step:
        """Run the prompt over the whole context; the first output token."""
        manifest, _, cache = self._ready()
        with self._modelling() as begin:
            cache.length = manifest.tokens
            captured = self._captured.get((manifest.tokens, len(prompt_ids)))
            if captured is None:
                token = first_token(self.model, cache, prompt_ids)
            else:
                self.model.check_ids(prompt_ids)
                token = captured(prompt_ids)
        return self._step(begin, token)

    @contextmanager
    def _modelling(self) -> Iterator[Mark]:
        """The model runs within, after everything that was decoded; gives the mark of its beginning."""
        self.lanes.after("model", self.lanes.mark("decode"))
        begin = self.lanes.mark("model")
        with self.lanes.on("model"):
            yield begin

    def _step(self, begin: Mark, token: int | None = None) -> Step:
        end = self.lanes.mark("model")
        self.lanes.reach(end)
        return Step(self.lanes.when(begin), self.lanes.when(end), token)

    def ask(self, questions: Sequence[Question], passage: Sequence[int] = ()) -> Score:
        """A passage and answers under the cache that arrived; after a session, not part of TTFT, so with every core."""
        manifest, _, cache = self._ready()
        cache.length = manifest.tokens
        threads = torch.get_num_threads()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        try:
            return score(self.model, cache, questions, passage)
        finally:
            torch.set_num_threads(threads)

    def answer(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation of a prompt over the context that arrived; after a session."""
        manifest, _, cache = self._ready()
        cache.length = manifest.tokens
        return generate_with_kv(self.model, cache, prompt_ids, max_new_tokens)

    def _ready(self) -> tuple[Manifest, Codec, KVCache]:
        if self._manifest is None or self._codec is None or self._cache is None:
            raise SpecError("no context is open")
        return self._manifest, self._codec, self._cache


def _devices_of_pages(names: Sequence[torch.device | str], model: Model) -> list[torch.device]:
    """Raises SpecError for devices that are not there, or could not share out a model's layers."""
    try:
        devices = [torch.empty(0, device=name).device for name in names]
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        raise SpecError(f"pages on {', '.join(map(str, names))}: {str(error).splitlines()[0]}") from error
    if devices[0] != model.device:
        raise SpecError(f"the first device with pages must be the model's, {model.device}, not {devices[0]}")
    if len(devices) > model.kv.layers:
        raise SpecError(f"{len(devices)} devices cannot share out {model.kv.layers} layers")
    return devices


def check_chunk(data: memoryview, start: int, level: LevelOrText) -> None:
    """Raise CodecError unless encoded bytes begin like those of the chunk at this position and of this level.

    Otherwise a sender could answer with a well-formed chunk of another place, and the cache would be silently wrong.
    """
    header = container.parse_header(data)
    if (header.start, header.level) != (start, level):
        raise CodecError(
            f"asked for tokens from {start} at level {level}, got tokens from {header.start} at level {header.level}"
        )


def measure_costs(
    compute: Compute, manifest: Manifest, get: Callable[[int, LevelOrText], bytes], prompt_ids: Sequence[int]
) -> Costs:
    """Median seconds of each step on this machine, with everything warm afterwards. `get` gives a chunk's bytes."""
    compute.open(manifest, len(prompt_ids))
    recompute_s, prefill_s = measure_model(compute, manifest, get, prompt_ids)
    return Costs(measure_decoding(compute, manifest, get), recompute_s, prefill_s)


def measure_decoding(
    compute: Compute, manifest: Manifest, get: Callable[[int, LevelOrText], bytes]
) -> tuple[tuple[float, ...], ...]:
    """Seconds of decoding [chunk][level] of the open context, measured on the first chunk of every size."""
    levels = range(len(manifest.levels))
    decode_s: dict[int, tuple[float, ...]] = {}
    for index, chunk in enumerate(manifest.chunks):
        if chunk.tokens not in decode_s:
            decode_s[chunk.tokens] = tuple(_median_s(_decode, compute, index, x, get(index, x)) for x in levels)
    _, _, cache = compute._ready()
    cache.poison()
    return tuple(decode_s[chunk.tokens] for chunk in manifest.chunks)


def measure_model(
    compute: Compute, manifest: Manifest, get: Callable[[int, LevelOrText], bytes], prompt_ids: Sequence[int]
) -> tuple[tuple[float, ...], float]:
    """Seconds of recomputing [chunk] and of the prefill in the open context; the codec does not matter.

    Recomputing is measured on the first, middle and last chunk and interpolated by position, since attention grows
    with what lies before.
    """
    chunks = manifest.chunks
    # what lies before must be numbers, not NaN, whose arithmetic may take another time
    _, _, cache = compute._ready()
    cache.storage.normal_()
    points = []
    for index in sorted({0, len(chunks) // 2, len(chunks) - 1}):
        chunk_s = _median_s(compute.recompute, index, memoryview(get(index, TEXT)))
        points.append((chunks[index].start, chunk_s / chunks[index].tokens))
    prefill_s = _median_s(compute.prefill, prompt_ids)
    cache.poison()
    return tuple(_interpolate(points, chunk.start) * chunk.tokens for chunk in chunks), prefill_s


def _decode(compute: Compute, chunk: int, level: int, data: bytes) -> Step:
    """All of a chunk's bytes at once: from their copying on, where they are copied."""
    inflow = compute.landing.take(chunk, level, len(data))
    try:
        inflow.view[:] = data
        compute.landing.landed(inflow, len(data))
        step = compute.decode(inflow)
    finally:
        compute.landing.release(inflow)
    return replace(step, start_s=step.copies[0][0]) if step.copies else step


def _median_s(step: Callable[..., Step], *arguments: Any) -> float:
    times: list[float] = []
    for _ in range(REPEATS + 1):
        done = step(*arguments)
        times.append(done.end_s - done.start_s)
    return statistics.median(times[1:])


def _interpolate(points: Sequence[tuple[int, float]], x: int) -> float:
    """Piecewise linear through the points (ascending), flat outside."""
    return float(np.interp(x, [p[0] for p in points], [p[1] for p in points]))


def set_threads(threads: int | None) -> int:
    """Threads of torch's kernels: by default half the cores, at least one.

    The rest is for the network: with as many threads as cores, every frame that arrives takes a core from a kernel
    whose other threads then spin, and the time to the first token becomes erratic.
    """
    count = threads or max(1, len(os.sched_getaffinity(0)) // 2)
    torch.set_num_threads(count)
    return count
