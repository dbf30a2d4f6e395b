"""What a prompt begins with, of what a sender offers: told without waiting for the sender."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch, from the extra [run]")

from aiohttp.test_utils import TestServer

from kvstream.testbed.connectors import contexts as module
from kvstream.testbed.connectors.contexts import Contexts, Lookup
from kvstream.testbed.errors import SpecError
from kvstream.testbed.net.sender import Sender
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.store.store import Store
from tests.testbed.conftest import Stored, store_context


@contextmanager
def served(store: Store) -> Iterator[str]:
    """A sender on a thread of its own, since `Contexts` has one too."""
    urls: list[str] = []
    ready, stop = threading.Event(), threading.Event()

    async def live() -> None:
        async with TestServer(Sender(store).app()) as server:
            urls.append(str(server.make_url("")).rstrip("/"))
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=lambda: asyncio.run(live()))
    thread.start()
    ready.wait(10)
    try:
        yield urls[0]
    finally:
        stop.set()
        thread.join()


@contextmanager
def offered(url: str, refusal: Callable[[Manifest], str] = lambda manifest: "") -> Iterator[Contexts]:
    found = Contexts(url, refusal)
    try:
        yield found
    finally:
        found.close()


def look(found: Contexts, ids: list[int], name: str | None = None) -> Lookup:
    """The answer once it is there, as a scheduler gets it by asking again."""
    arrived_s, end_s = time.time(), time.monotonic() + 20
    while (one := found.look(ids, name, arrived_s)).is_pending:
        assert time.monotonic() < end_s
        time.sleep(0.005)
    return one


def test_the_longest_context_that_a_prompt_begins_with(tmp_path: Any, tiny_model: Any, stored: Stored) -> None:
    long = store_context(tmp_path, tiny_model, context="long")
    short = Store(tmp_path)
    from kvstream.codec import registry
    from kvstream.testbed.encoding.encode import store_kv

    store_kv(short, "short", long.tokens[:100], tiny_model, registry.make("raw"), chunk_tokens=64, distortions=[0.0])
    with served(short) as url, offered(url) as found:
        for prompt, name in (([*long.tokens, 5], "long"), (long.tokens, "long"), (long.tokens[:200], "short")):
            one = look(found, prompt)
            assert one.context is not None
            assert one.context.manifest.context == name
        assert look(found, [*long.tokens, 5], "short").context is not None
        assert look(found, long.tokens[:99]) == Lookup()
        assert look(found, [long.tokens[0] ^ 1, *long.tokens[1:]]) == Lookup()
        assert look(found, []) == Lookup()
        assert "does not begin with" in look(found, long.tokens[:200], "long").reason
        assert "no context 'nothing'" in look(found, long.tokens, "nothing").reason


def test_a_context_stored_later_is_found_by_its_name_at_once(tmp_path: Any, tiny_model: Any) -> None:
    store = Store(tmp_path)
    with served(store) as url, offered(url) as found:
        assert look(found, [1, 2, 3]) == Lookup()
        later = store_context(tmp_path, tiny_model, context="later")
        assert look(found, later.tokens, "later").context is not None
        assert look(found, later.tokens).context is not None
        found.forget("later")
        assert look(found, later.tokens, "later").context is not None


def test_prompts_that_name_nothing_find_new_contexts_soon(
    tmp_path: Any, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REFRESH_S", 0.0)
    with served(Store(tmp_path)) as url, offered(url) as found:
        assert look(found, [1, 2, 3]) == Lookup()
        later = store_context(tmp_path, tiny_model, context="later")
        end_s = time.monotonic() + 20
        while look(found, later.tokens).context is None:
            assert time.monotonic() < end_s
            time.sleep(0.01)


def test_contexts_of_other_models_are_refused_with_the_reason(stored: Stored) -> None:
    with served(stored.store) as url, offered(url, lambda manifest: f"{manifest.context} is not for me") as found:
        assert look(found, stored.tokens) == Lookup()
        assert look(found, stored.tokens, stored.context).reason == "ctx is not for me"


def test_without_a_sender_prompts_are_computed() -> None:
    with offered("http://127.0.0.1:9") as found:
        assert look(found, [1, 2, 3]) == Lookup()
        assert "no sender at http://127.0.0.1:9" in look(found, [1, 2, 3], "docs").reason
    with pytest.raises(SpecError, match="address"):
        Contexts("127.0.0.1:9", lambda manifest: "")
