"""A context whose chunks are spread over several senders: chunk i comes from sender i mod N.

Every request is sent at once, so the senders' answers follow each other without a gap. What a sender delivers ahead of
its turn is held back: a session sees its chunks one after the other, in the order of its requests, as from a single
sender.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import TypeAlias

from kvstream.policies.api import LevelOrText
from kvstream.testbed.net import messages
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.inbound import Arrival, Inbound, Limits, Listener


class MultiInbound:
    """`Inbound` for several senders; the first one has the manifest and the profile."""

    def __init__(self, clients: Sequence[Client], context: str, listener: Listener, limits: Limits) -> None:
        self._listener = listener
        self._parts = [Inbound(client, context, self, limits) for client in clients]
        self._turns: deque[int] = deque()
        """Incomplete chunks, in the order of their requests."""
        self._early: dict[int, Arrival] = {}
        """Arrivals ahead of their turn."""

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self._parts)

    @property
    def reconnects(self) -> int:
        return sum(part.reconnects for part in self._parts)

    def get_manifest(self) -> Arrival:
        return self._parts[0].get_manifest()

    def get_chunk(self, chunk: int, level: LevelOrText, target: memoryview) -> Arrival:
        self._turns.append(chunk)
        return self._of(chunk).get_chunk(chunk, level, target)

    def cancel(self, chunk: int) -> None:
        self._of(chunk).cancel(chunk)
        self._early.pop(chunk, None)
        if chunk in self._turns:
            self._turns.remove(chunk)
        # not at once: the session is in the middle of deciding
        asyncio.get_running_loop().call_soon(self._catch_up)

    async def warm_up(self, padding_bytes: int, until_s: float | None) -> None:
        await asyncio.gather(*(part.warm_up(padding_bytes, until_s) for part in self._parts))

    async def run(self) -> None:
        tasks = [asyncio.create_task(part.run()) for part in self._parts]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        await asyncio.gather(*(part.close() for part in self._parts))

    # --- Listener of the senders' ends

    def on_answer(self, arrival: Arrival) -> None:
        if isinstance(arrival.get, messages.GetManifest) or self._is_next(arrival.get.chunk):
            self._listener.on_answer(arrival)
        else:
            self._early[arrival.get.chunk] = arrival

    def on_waste(self, nbytes: int) -> None:
        self._listener.on_waste(nbytes)

    def on_bytes(self, arrival: Arrival) -> None:
        if isinstance(arrival.get, messages.GetManifest):
            self._listener.on_bytes(arrival)
        elif self._is_next(arrival.get.chunk):
            if arrival.is_complete:
                self._turns.popleft()
            self._listener.on_bytes(arrival)
            self._catch_up()

    def _catch_up(self) -> None:
        """Pass on the early arrivals whose turn has come."""
        while self._turns and (arrival := self._early.pop(self._turns[0], None)) is not None:
            arrival.at_s = time.monotonic()  # for a session it has begun with its turn
            if arrival.is_open:
                self._listener.on_answer(arrival)
            if arrival.is_complete:
                self._turns.popleft()
            if arrival.received:
                self._listener.on_bytes(arrival)

    def _is_next(self, chunk: int) -> bool:
        return bool(self._turns) and self._turns[0] == chunk

    def _of(self, chunk: int) -> Inbound:
        return self._parts[chunk % len(self._parts)]


AnyInbound: TypeAlias = Inbound | MultiInbound


def inbound_from(clients: Sequence[Client], context: str, listener: Listener, limits: Limits) -> AnyInbound:
    """The receiving end for a context on these senders."""
    if len(clients) == 1:
        return Inbound(clients[0], context, listener, limits)
    return MultiInbound(clients, context, listener, limits)
