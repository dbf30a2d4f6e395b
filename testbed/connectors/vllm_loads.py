"""Loading contexts into vLLM's blocks on one rank: sessions on a thread beside the engine's. Needs no vLLM.

A chunk counts once all of it is decoded, checked and in its blocks. A session that fails leaves the chunks before the
first missing one; every other block is reported, and the engine computes those tokens itself.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
import torch
from torch import Tensor

from kvstream.codec.errors import CodecError
from kvstream.codec.targets import CacheTarget, KVTarget
from kvstream.testbed.config.build import make_policy
from kvstream.testbed.connectors.vllm_blocks import Blocks, Share, kernel_table
from kvstream.testbed.errors import SpecError
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.inbound import Limits
from kvstream.testbed.receiver.cache_engine import CacheEngine, shape_of
from kvstream.testbed.receiver.driver import fetch_session
from kvstream.testbed.receiver.fetch import add_profile
from kvstream.testbed.receiver.kept_times import decode_times, learn_decoding
from kvstream.testbed.session.ask import ask_in_session
from kvstream.testbed.session.costs import IN_SESSIONS, Costs
from kvstream.testbed.session.record import SessionFailed, SessionRecord
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.store.manifest import Manifest

log = logging.getLogger("kvstream.connectors")

LIMITS: Final = Limits(stall_s=3.0, reconnects=1)
"""Shorter than where nothing else can be done: here the engine computes what does not come."""
LEAST_DEADLINE_S: Final = 0.001
"""What a policy is told is left of a deadline that is over."""


@dataclass(frozen=True)
class Load:
    """Tokens `[skip, stop)` of a context, for a request's blocks."""

    request_id: str
    manifest: Manifest
    blocks: tuple[int, ...]
    """All blocks of the request so far, in order, as the scheduler counts them."""
    block_tokens: int
    skip: int
    stop: int
    policy: str
    deadline_s: float
    """Until the cache is complete, from the request's arrival."""
    arrived_s: float
    """Wall clock."""


@dataclass(frozen=True)
class Loaded:
    """What became of a load."""

    request_id: str
    report: dict[str, Any]
    failed_blocks: frozenset[int] = frozenset()


@dataclass
class _Task:
    load: Load
    ready: Callable[[], None]
    running: asyncio.Task[None] | None = None
    is_cancelled: bool = False
    settled: set[int] = field(default_factory=set)
    """Starts of the chunks that are in their blocks."""

    def failed_blocks(self) -> frozenset[int]:
        """Every block with a token that is not there."""
        load, stop = self.load, self.load.skip
        for chunk in load.manifest.chunks:
            if chunk.start in self.settled:
                stop = max(stop, min(chunk.stop, load.stop))
            elif chunk.stop > load.skip:
                break
        first, last = stop // load.block_tokens, -(-load.stop // load.block_tokens)
        return frozenset(load.blocks[first:last] if stop < load.stop else ())


class BlocksEngine(CacheEngine):
    """An `Engine` whose cache is a rank's share of a request's blocks."""

    _settles = True

    def __init__(self, task: _Task, blocks: Blocks, share: Share) -> None:
        load = task.load
        super().__init__(load.manifest, _Place(load.manifest, blocks))
        self._task, self._blocks, self._share = task, blocks, share
        self._table = kernel_table(load.blocks, load.block_tokens, blocks.block_tokens)
        kv = load.manifest.kv
        self._is_whole = share.is_all(kv.layers, kv.heads)
        self._aside: dict[int, Tensor] = {}
        """[start of a chunk]: where it is decoded when not in the blocks themselves."""
        self._waited = False

    @property
    def target_kind(self) -> str:
        return type(self._blocks).__name__

    def forget(self) -> None:
        self._task.settled.clear()
        super().forget()

    def _target(self, start: int, stop: int) -> KVTarget:
        if not self._waited:
            self._task.ready()
            self._waited = True
        load = self._task.load
        if self._is_whole and load.skip <= start and stop <= load.stop:
            target = self._blocks.target(self._table, start, stop - start)
            if target is not None:
                return target
        layers, sides, _, heads, head_dim = shape_of(load.manifest)
        shape = (layers, sides, stop - start, heads, head_dim)
        self._aside[start] = torch.empty(shape, dtype=self._blocks.dtype, device=self._blocks.device)
        return self._aside[start]

    def _settle(self, start: int, stop: int) -> None:
        load, aside = self._task.load, self._aside.pop(start, None)
        first, last = max(start, load.skip), min(stop, load.stop)
        if aside is None:
            is_finite = self._blocks.is_finite(self._table, start, stop - start)
        else:
            is_finite = bool(aside.isfinite().all())
        if not is_finite:  # one such number in a block makes every sequence that attends to it worthless
            raise CodecError(f"tokens {start} to {stop} hold values that are not finite")
        if aside is not None and first < last:
            self._blocks.write(self._table, first, self._share.of(aside[:, :, first - start : last - start]))
        self._task.settled.add(start)


class Loader:
    """Carries out loads, on a thread of its own."""

    def __init__(self, url: str, blocks: Blocks, share: Share) -> None:
        self._url, self._blocks, self._share = url, blocks, share
        self._tasks: dict[str, _Task] = {}
        self._finished: list[Loaded] = []
        self._changed = threading.Condition()
        self._prior_bps: float | None = None
        begun: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._live, args=(begun,), name="kvstream-loads", daemon=True)
        self._thread.start()
        self._loop = begun.result()

    def begin(self, load: Load, ready: Callable[[], None]) -> None:
        """`ready` returns, on another thread, when the engine no longer uses what was in the blocks before."""
        task = self._tasks[load.request_id] = _Task(load, ready)
        asyncio.run_coroutine_threadsafe(self._run(task), self._loop)

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Nobody waits for these any more; those that are loading end soon, and are then reported."""
        for request_id in request_ids:
            if request_id in self._tasks:
                self._loop.call_soon_threadsafe(_cancel, self._tasks[request_id])

    def take_finished(self, wait_s: float = 0.0) -> list[Loaded]:
        """Loads that have ended since the last call: nothing writes into their blocks any more. While some are under
        way and none has ended, waits for at most `wait_s`."""
        with self._changed:
            if wait_s and self._tasks and not self._finished:
                self._changed.wait(wait_s)
            finished, self._finished = self._finished, []
        for one in finished:
            self._tasks.pop(one.request_id, None)
        return finished

    def close(self) -> None:
        """End what is loading; nothing writes into blocks afterwards."""
        with suppress(RuntimeError):  # closed before
            self._loop.call_soon_threadsafe(self._is_closed.set)
        self._thread.join()

    def _live(self, begun: Future[asyncio.AbstractEventLoop]) -> None:
        async def until_closed() -> None:
            self._is_closed = asyncio.Event()
            warming_up = asyncio.create_task(self._warm_up())
            begun.set_result(asyncio.get_running_loop())
            await self._is_closed.wait()
            warming_up.cancel()

        asyncio.run(until_closed())  # cancels every other task, and waits for them

    async def _warm_up(self) -> None:
        """Compile what decoding takes, and measure it, before the first request."""
        try:
            async with Client(self._url) as client:
                for name in await client.contexts():
                    manifest = await client.manifest(name)
                    if self._share.fits(manifest.kv.layers, manifest.kv.heads):
                        nothing = Load("", manifest, (), self._blocks.block_tokens, 0, 0, "lowest", 1.0, time.time())
                        async with self._engine(client, _Task(nothing, lambda: None)) as engine:
                            await decode_times(client, manifest, engine)
                        return
        except Exception as error:  # the first request then does it, or fails for the same reason
            log.info("no warm-up: %s", error)

    async def _run(self, task: _Task) -> None:
        load = task.load
        report: dict[str, Any] = {"context": load.manifest.context, "tokens": load.stop - load.skip}
        begun_s = time.monotonic()
        task.running = asyncio.current_task()
        try:
            if task.is_cancelled:
                raise asyncio.CancelledError
            report |= _told(await self._session(task))
        except asyncio.CancelledError:
            report["error"] = "the request ended before its context was here"
        except (SessionFailed, SpecError, CodecError, OSError, aiohttp.ClientError) as error:
            report["error"] = str(error)
        except Exception as error:
            log.exception("loading %s", load.manifest.context)
            report["error"] = f"{type(error).__name__}: {error}"
        report["load_s"] = time.monotonic() - begun_s
        failed = task.failed_blocks()
        if "error" in report:
            log.warning(
                "context %s: %s; %d blocks are computed here", load.manifest.context, report["error"], len(failed)
            )
        with self._changed:
            self._finished.append(Loaded(load.request_id, report, failed))
            self._changed.notify()

    async def _session(self, task: _Task) -> SessionRecord:
        load = task.load
        policy = make_policy(load.policy)
        async with Client(self._url) as client, self._engine(client, task) as engine:
            decode_s = await decode_times(client, load.manifest, engine)
            left_s = load.deadline_s - (time.time() - load.arrived_s)
            settings = SessionSettings(
                max(left_s, LEAST_DEADLINE_S), prior_bps=self._prior_bps, concurrent=max(1, len(self._tasks))
            )
            fetched = await fetch_session(
                client,
                load.manifest.context,
                policy,
                settings,
                engine=engine,
                costs=Costs(decode_s, None, 0.0, IN_SESSIONS),
                prompt_ids=(),
                ask=ask_in_session(policy),
                limits=LIMITS,
            )
            learn_decoding(load.manifest, engine, decode_s, fetched.record)
        self._prior_bps = fetched.record.goodput_bps or self._prior_bps
        return fetched.record

    @asynccontextmanager
    async def _engine(self, client: Client, task: _Task) -> AsyncIterator[BlocksEngine]:
        """An engine for a load's chunks; afterwards nothing writes into its blocks any more."""
        engine = BlocksEngine(task, self._blocks, self._share)
        try:
            if engine.lacks_profile(task.load.manifest):
                await add_profile(client, engine, task.load.manifest)
            engine.open(task.load.manifest, 0)
            yield engine
        finally:
            closing = asyncio.get_running_loop().run_in_executor(None, engine.close)
            while not closing.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.shield(closing)


def _cancel(task: _Task) -> None:
    """A task that has not begun ends as it begins: every load is reported."""
    if task.running is not None and not task.is_cancelled:
        task.running.cancel()
    task.is_cancelled = True


class _Place(CacheTarget):
    """Stands for a request's blocks where only shape, dtype and device are asked for."""

    def __init__(self, manifest: Manifest, blocks: Blocks) -> None:
        self.shape = shape_of(manifest)
        self.dtype, self.device = blocks.dtype, blocks.device

    def write(self, layer: int, kv: int, values: Tensor, first: int = 0) -> None:
        raise CodecError("chunks are decoded to where their engine says")


def _told(record: SessionRecord) -> dict[str, Any]:
    """What a response says about a session."""
    return {
        "levels": list(record.levels),
        "bytes": record.bytes,
        "distortion": record.distortion,
        "deadline_met": record.met,
    }
