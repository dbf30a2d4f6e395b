"""What a sender offers for one model, and which of it a prompt begins with: kept up to date beside an engine.

An engine's scheduler must not wait for a network: a thread of its own asks the sender, and whoever looks something up
is told at once what is known, or that an answer is on its way.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import aiohttp

from kvstream.testbed.errors import SpecError
from kvstream.testbed.net.client import Client
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.store.names import find_id

log = logging.getLogger("kvstream.connectors")

REFRESH_S: Final = 10.0
"""Prompts that name no context are compared with what the sender had at most this long ago."""


@dataclass(frozen=True)
class Known:
    """A context that can be loaded."""

    manifest: Manifest
    ids: bytes
    """Its token ids as `packed`."""


@dataclass(frozen=True)
class Lookup:
    """Neither a context nor a reason: none was wanted, and none fits."""

    context: Known | None = None
    reason: str = ""
    """Why a context that was asked for cannot be loaded."""
    is_pending: bool = False
    """Ask again: the sender has been asked."""


class Contexts:
    """The contexts of the sender at `url`. `refusal` says why a manifest is not for this engine, or is empty."""

    def __init__(self, url: str, refusal: Callable[[Manifest], str]) -> None:
        Client(url)  # raises SpecError for what is no address
        self._url, self._refusal = url, refusal
        self._known: dict[str, Known] = {}
        self._refused: dict[str, str] = {}
        self._error = ""
        self._asked_s = 0.0
        """When the sender was last asked with an answer that is here: wall clock, like requests' arrivals."""
        self._wanted = threading.Event()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="kvstream-contexts", daemon=True)
        self._wanted.set()
        self._thread.start()

    def look(self, prompt_ids: Sequence[int], name: str | None, arrived_s: float) -> Lookup:
        """The longest context that a prompt begins with; with a `name`, that one or the reason why not."""
        if self._asked_s == 0.0:
            return Lookup(is_pending=True)
        known = self._known  # replaced as a whole by the thread
        prompt = packed(prompt_ids)
        if name is None:
            if time.time() > self._asked_s + REFRESH_S:
                self._wanted.set()
            fitting = [one for one in known.values() if prompt.startswith(one.ids)]
            return Lookup(max(fitting, key=lambda one: len(one.ids), default=None))
        try:
            found = known.get(find_id(name, [*known, *self._refused]))
        except SpecError as error:
            if self._asked_s <= arrived_s:
                self._wanted.set()
                return Lookup(is_pending=True)
            return Lookup(reason=self._error or str(error))
        if found is None:
            return Lookup(reason=self._refused.get(find_id(name, [*known, *self._refused]), ""))
        if not prompt.startswith(found.ids):
            return Lookup(reason=f"the prompt does not begin with the {found.manifest.tokens} tokens of {name}")
        return Lookup(found)

    def forget(self, context: str) -> None:
        """Ask for a context anew: it could not be loaded as it was known."""
        self._known = {name: one for name, one in self._known.items() if name != context}
        self._wanted.set()

    def close(self) -> None:
        self._is_closed = True
        self._wanted.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            if self._is_closed:
                return
            self._wanted.clear()
            began_s = time.time()
            try:
                asyncio.run(self._ask())
                self._error = ""
            except (OSError, aiohttp.ClientError) as error:
                self._error = f"no sender at {self._url} ({error})"
            except Exception as error:
                self._error = f"the sender at {self._url}: {error}"
            if self._error:
                log.warning("%s: prompts are prefilled", self._error)
            self._asked_s = began_s

    async def _ask(self) -> None:
        async with Client(self._url) as client:
            names = await client.contexts()
            known = {name: one for name, one in self._known.items() if name in names}
            refused: dict[str, str] = {}
            for name in names:
                if name in known:
                    continue
                try:
                    manifest = await client.manifest(name)
                    if reason := self._refusal(manifest):
                        refused[name] = reason
                    else:
                        known[name] = Known(manifest, packed(await client.token_ids(manifest)))
                except SpecError as error:
                    refused[name] = str(error)
        self._known, self._refused = known, refused


def packed(token_ids: Sequence[int]) -> bytes:
    """Token ids as bytes, four each: one prompt begins with another where these do."""
    return array("I", token_ids).tobytes()
