"""`kvstream.fetch`: the cache of a stored context, into memory of the caller's, under a policy and before a deadline.

The receiver needs no model. A session runs on a thread and an event loop of its own, so that it neither waits for what
the caller does nor holds it up, and nothing of the caller's process is changed: no interpreter-wide setting, no signal
handler.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeAlias, TypeVar

import aiohttp

from kvstream.codec.errors import CodecError
from kvstream.codec.targets import KVTarget
from kvstream.policies.api import Policy
from kvstream.testbed.config.build import make_policy
from kvstream.testbed.files import write_whole
from kvstream.testbed.host.machine import cache_dir
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.inbound import Limits
from kvstream.testbed.receiver.cache_engine import CacheEngine, Recompute, target_of
from kvstream.testbed.receiver.driver import fetch_session
from kvstream.testbed.receiver.kept_times import decode_times, learn_decoding, recompute_times
from kvstream.testbed.session.ask import ask_in_session
from kvstream.testbed.session.costs import IN_SESSIONS, Costs
from kvstream.testbed.session.record import SessionFailed, SessionRecord
from kvstream.testbed.session.settings import SessionSettings
from kvstream.testbed.store.manifest import Manifest

if TYPE_CHECKING:
    import torch

Into: TypeAlias = KVTarget | Callable[[Manifest], KVTarget] | None
"""Where a cache goes: a tensor `[L, 2, T, H, D]` of any strides, a target of `kvstream.codec.targets`, a Hugging Face
cache with room for exactly its tokens, a function that makes one of these for a manifest, or None for a new tensor."""
Answer = TypeVar("Answer")
PATIENCE: Final = 10.0
"""A session that takes as many times its deadline is given up; but not before `Limits.session_s`."""


@dataclass(frozen=True)
class FetchedContext:
    """A context's cache, as it arrived."""

    cache: KVTarget
    """What `into` was, or the new tensor `[L, 2, T, H, D]`."""
    token_ids: list[int]
    """Of the T tokens in the cache."""
    record: SessionRecord
    """Levels, bytes and times of the session; `ttft_s` is when the cache was complete."""
    manifest: Manifest
    """`manifest.model` is the fingerprint of the model that the cache is for."""


def fetch(
    url: str,
    context: str,
    policy: str | Policy = "kvstream",
    deadline_s: float = 1.0,
    into: Into = None,
    device: torch.device | str = "cpu",
    *,
    recompute: Recompute | None = None,
    prior_bps: float | None = None,
) -> FetchedContext:
    """Fetch a context from a sender such as `http://127.0.0.1:8700`; blocks until its cache is complete.

    `context` is its id or its name; `policy` decides each chunk's level so that the cache is complete `deadline_s`
    after the request: leave room for what your prompt takes. `into` is where the cache goes (`Into`), by default a new
    tensor on `device`. A chunk is fetched as text only where `recompute(token_ids, start)` can put its keys and values
    into the cache. `prior_bps` is what the path is known to carry, such as `record.goodput_bps` of the last fetch over
    it; without, policies begin in the dark. A token for the sender is taken from the environment variable
    KVSTREAM_TOKEN.

    Raises SessionFailed where the sender cannot be reached, is lost or sends what is no part of the context: the cache
    then holds nothing that may be used. Raises SpecError for an unknown context and a target of the wrong shape,
    PolicyError for a policy that there is not.
    """
    call = _Call(lambda: _fetch(url, context, policy, deadline_s, into, device, recompute, prior_bps))
    try:
        return call.result.result()
    except BaseException:
        call.cancel()
        raise


async def afetch(
    url: str,
    context: str,
    policy: str | Policy = "kvstream",
    deadline_s: float = 1.0,
    into: Into = None,
    device: torch.device | str = "cpu",
    *,
    recompute: Recompute | None = None,
    prior_bps: float | None = None,
) -> FetchedContext:
    """As `fetch`, awaited. Cancelled, it returns when nothing writes into the cache any more."""
    call = _Call(lambda: _fetch(url, context, policy, deadline_s, into, device, recompute, prior_bps))
    result = asyncio.wrap_future(call.result)
    try:
        return await asyncio.shield(result)
    except asyncio.CancelledError:
        await asyncio.get_running_loop().run_in_executor(None, call.cancel)
        result.cancel()
        raise


class _Call(Generic[Answer]):
    """A coroutine on a thread of its own."""

    def __init__(self, work: Callable[[], Awaitable[Answer]]) -> None:
        self.result: Future[Answer] = Future()
        self._work = work
        self._begun = threading.Event()
        self._task: asyncio.Task[Answer] | None = None
        self._thread = threading.Thread(target=self._run, name="kvstream-fetch", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """End the work, if it has not ended, and wait for that."""
        self._begun.wait()
        if self._task is not None:
            with suppress(RuntimeError):  # its loop is closed: it has ended
                self._task.get_loop().call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _run(self) -> None:
        try:
            # the plain loop, whatever the caller has made of the default
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                answer = runner.run(self._main())
        except BaseException as error:
            self._begun.set()
            self.result.set_exception(error)
        else:
            self.result.set_result(answer)

    async def _main(self) -> Answer:
        self._task = asyncio.current_task()
        self._begun.set()
        return await self._work()


async def _fetch(
    url: str,
    context: str,
    policy: str | Policy,
    deadline_s: float,
    into: Into,
    device: torch.device | str,
    recompute: Recompute | None,
    prior_bps: float | None,
) -> FetchedContext:
    chosen = make_policy(policy) if isinstance(policy, str) else policy
    settings = SessionSettings(deadline_s, prior_bps=prior_bps)
    limits = Limits(session_s=max(Limits().session_s, PATIENCE * deadline_s))
    try:
        async with Client(url) as client:
            manifest = await client.find(context)
            token_ids = await client.token_ids(manifest)
            cache, target = target_of(into, manifest, device)
            engine = CacheEngine(manifest, target, recompute)
            try:
                if engine.lacks_profile(manifest):
                    await add_profile(client, engine, manifest)
                engine.open(manifest, 0)
                decode_s = await decode_times(client, manifest, engine)
                recompute_s = await recompute_times(manifest, token_ids, engine) if recompute is not None else None
                fetched = await fetch_session(
                    client,
                    manifest.context,
                    chosen,
                    settings,
                    engine=engine,
                    costs=Costs(decode_s, recompute_s, 0.0, IN_SESSIONS),
                    prompt_ids=(),
                    ask=ask_in_session(chosen),
                    limits=limits,
                )
                learn_decoding(manifest, engine, decode_s, fetched.record)
            finally:
                engine.close()
    except (OSError, aiohttp.ClientError) as error:
        raise SessionFailed(f"no sender at {url} ({error}); start one: kvstream serve") from error
    except CodecError as error:
        raise SessionFailed(f"context {context}: {error}") from error
    return FetchedContext(cache, token_ids, fetched.record, manifest)


async def add_profile(client: Client, engine: CacheEngine, manifest: Manifest) -> None:
    """Have the context's profile: kept from an earlier fetch, or the sender's. Raises CodecError."""
    digest = manifest.profile
    assert digest is not None
    kept = cache_dir() / "profiles" / "fetched" / digest
    data = kept.read_bytes() if kept.is_file() else b""
    if hashlib.sha256(data).hexdigest() != digest:
        data = await client.profile(digest)
        if hashlib.sha256(data).hexdigest() != digest:
            raise CodecError(f"the sender's profile does not have the hash {digest}")
        with suppress(OSError):
            write_whole(kept, data)
    engine.add_profile(data)
