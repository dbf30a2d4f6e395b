"""Contexts of the bundled model in a store, questions about them, and a link to their sender that may do harm."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvstream.testbed.encoding import calibrate
from kvstream.testbed.encoding.encode import store_cache
from kvstream.testbed.engine.loading import load_model
from kvstream.testbed.engine.model import Model, calculate_kv
from kvstream.testbed.store.store import Store
from kvstream.testbed.workloads.contexts import find_contexts
from tests.testbed.link import Link

TOKENS = 1600
CHUNK_TOKENS = 256
ANSWER_TOKENS = 5


@dataclass(frozen=True)
class Asked:
    """A context, and questions whose answers it contains."""

    name: str
    ids: list[int]
    prompts: list[list[int]]
    answers: list[list[int]]


@dataclass(frozen=True)
class Kitchen:
    store: Path
    model: Model
    asked: list[Asked]


def make(folder: Path, names: tuple[str, ...] = ("docs", "code")) -> Kitchen:
    """The first tokens of shipped contexts under kvstream, and `swapped`: the first one's token ids with the second's
    cache."""
    model = load_model()
    codec = calibrate.make_codec("kvstream", model)
    store = Store(folder)
    asked, caches = [], []

    def put(name: str, ids: list[int], kv: Any) -> None:
        store_cache(
            store, name, ids, kv, codec, model=model.fingerprint, vocabulary=model.vocabulary,
            chunk_tokens=CHUNK_TOKENS, distortions=[0.01 / 2**level for level in range(len(codec.levels))],
        )  # fmt: skip

    for context in find_contexts(names):
        text = context.text[:TOKENS]
        questions = [q for q in context.questions if q.prompt.lstrip() + q.answer in text][:4]
        ids = model.encode(text.decode())
        caches.append(calculate_kv(model, ids))
        put(context.name, ids, caches[-1])
        asked.append(
            Asked(
                context.name,
                ids,
                [ids + model.encode(q.prompt.decode()) for q in questions],
                [model.encode(q.answer.decode())[:ANSWER_TOKENS] for q in questions],
            )
        )
    put("swapped", asked[0].ids, caches[1])
    return Kitchen(folder, model, asked)


class LinkThread:
    """A `Link` on a thread of its own."""

    def __init__(self, link: Link, loop: asyncio.AbstractEventLoop) -> None:
        self._link, self._loop = link, loop

    @property
    def url(self) -> str:
        return self._link.url

    @property
    def carried_bytes(self) -> int:
        return self._link.carried_bytes

    def lead_to(self, port: int) -> None:
        """Where connections from now on go; those that exist are cut."""
        self._link.target = port
        self._loop.call_soon_threadsafe(self._link.cut)

    def set(self, *, rate_bps: float | None = None, change: Callable[[bytes], bytes] = lambda data: data) -> None:
        self._loop.call_soon_threadsafe(partial(self._set, rate_bps, change))

    def _set(self, rate_bps: float | None, change: Callable[[bytes], bytes]) -> None:
        self._link.rate_bps, self._link.change = rate_bps, change


@contextmanager
def linked(port: int) -> Iterator[LinkThread]:
    begun: list[LinkThread] = []
    ready = threading.Event()

    async def live() -> None:
        async with Link(port) as link:
            begun.append(LinkThread(link, asyncio.get_running_loop()))
            stop.append(asyncio.Event())
            ready.set()
            await stop[0].wait()

    stop: list[asyncio.Event] = []
    thread = threading.Thread(target=lambda: asyncio.run(live()))
    thread.start()
    ready.wait()
    try:
        yield begun[0]
    finally:
        begun[0]._loop.call_soon_threadsafe(stop[0].set)
        thread.join()
