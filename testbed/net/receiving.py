"""The child of a `NetworkProcess`: receives for its parent's sessions, one after the other.

It takes messages, tuples, from the connection whose file descriptor it is given, and answers with others:

    "open", senders, context, limits        a session begins; senders as (address, token)
    "warm_up", padding_bytes, until_s       "warm", None or an exception
    "manifest", number
    "chunk", number, chunk, level, place, size, memory_bytes
                                            place: where in the shared memory, None for memory of this process
    "run"                                   "answer", number, at_s, sha256       a header has arrived
                                            "bytes", number, at_s, received      every NEWS_S at most, and the first
                                            "last", number, at_s, received, data data: of memory of this process
                                            "waste", nbytes
                                            "failed", exception
    "cancel", chunk
    "close"                                 "closed", (bytes, reconnects)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
from multiprocessing.connection import Connection
from typing import Any, Final

import aiohttp

from kvstream.policies.api import TEXT, LevelOrText
from kvstream.testbed.errors import SpecError
from kvstream.testbed.host.clock import Urgency, be_punctual
from kvstream.testbed.host.shared_memory import SharedMemory
from kvstream.testbed.net import messages
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.inbound import Arrival, Limits
from kvstream.testbed.net.multi_sender import AnyInbound, inbound_from
from kvstream.testbed.session.record import SessionFailed

NEWS_S: Final = 0.002
"""News cost the parent's threads some 0.1 ms, and what a session does next hangs on how a chunk begins and ends."""
FIRST_BYTES: Final = 1 << 19
"""So much of a chunk is news at once: with its first piece, decoding begins
(`kvstream.testbed.engine.buffers.FIRST_PIECE_BYTES`)."""


class Receiving:
    """One parent's sessions. Everything runs on the event loop's thread."""

    def __init__(self, connection: Connection, memory: SharedMemory) -> None:
        self._connection, self._memory = connection, memory
        self._inbound: AnyInbound | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closing: asyncio.Task[None] | None = None
        self._numbers: dict[Arrival, int] = {}
        self._told_s = 0.0
        self._begun: Arrival | None = None
        """The last one whose FIRST_BYTES are there."""
        self.ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(connection.fileno(), self._read)
        self._send("ready")

    def _send(self, *message: Any) -> None:
        with contextlib.suppress(OSError):  # the parent has ended, as `_read` will see
            self._connection.send(message)

    def _read(self) -> None:
        try:
            what, *rest = self._connection.recv()
        except (EOFError, OSError):
            self.ended.set()
            return
        try:
            self._obey(what, *rest)
        except Exception as error:  # what comes next would not fit either: the parent starts another process
            self._send("failed", _plain(error))
            self.ended.set()

    def _obey(self, what: str, *rest: Any) -> None:
        if what == "open":
            senders, context, limits = rest
            gc.disable()  # a session is timed
            clients = [Client(url, token=token or "") for url, token in senders]
            self._inbound = inbound_from(clients, context, self, Limits(**limits))
            return
        inbound = self._inbound
        assert inbound is not None
        match what, rest:
            case "warm_up", (padding_bytes, until_s):
                self._tasks.append(asyncio.create_task(self._warm_up(inbound, padding_bytes, until_s)))
            case "manifest", (number,):
                self._numbers[inbound.get_manifest()] = number
            case "chunk", (number, chunk, level, place, size, memory_bytes):
                target = self._target(place, size, memory_bytes)
                self._numbers[inbound.get_chunk(chunk, level, target)] = number
            case "cancel", (chunk,):
                self._tell_rest(chunk)
                inbound.cancel(chunk)
            case "run", ():
                self._tasks.append(asyncio.create_task(self._run(inbound)))
            case "close", ():
                self._closing = asyncio.create_task(self._close(inbound))
            case _:
                raise ValueError(f"unknown message {what!r}")

    def _target(self, place: int | None, size: int, memory_bytes: int) -> memoryview:
        if place is None:
            return memoryview(bytearray(size))
        return self._memory.view(memory_bytes)[place : place + size]

    def _tell_rest(self, chunk: int) -> None:
        """Say what has arrived of a chunk since the last news."""
        for arrival, number in self._numbers.items():
            if isinstance(arrival.get, messages.GetChunk) and arrival.get.chunk == chunk and not arrival.is_cancelled:
                self._send("bytes", number, arrival.at_s, arrival.received)

    async def _warm_up(self, inbound: AnyInbound, padding_bytes: int, until_s: float | None) -> None:
        try:
            await inbound.warm_up(padding_bytes, until_s)
            self._send("warm", None)
        except Exception as error:
            self._send("warm", _plain(error))

    async def _run(self, inbound: AnyInbound) -> None:
        try:
            await inbound.run()
        except Exception as error:
            self._send("failed", _plain(error))

    async def _close(self, inbound: AnyInbound) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await inbound.close()
        self._inbound = None
        self._tasks.clear()
        self._numbers.clear()
        self._begun = None
        self._send("closed", (inbound.bytes, inbound.reconnects))
        gc.enable()
        gc.collect()

    # --- a `Listener`

    def on_answer(self, arrival: Arrival) -> None:
        self._send("answer", self._numbers[arrival], arrival.at_s, arrival.sha256)

    def on_bytes(self, arrival: Arrival) -> None:
        now_s = arrival.at_s
        begins = arrival is not self._begun and arrival.received >= FIRST_BYTES
        if begins:
            self._begun = arrival
        if arrival.is_complete:
            level: LevelOrText = TEXT if isinstance(arrival.get, messages.GetManifest) else arrival.get.level
            data = bytes(arrival.target) if level == TEXT else None
            self._send("last", self._numbers.pop(arrival), arrival.at_s, arrival.received, data)
        elif begins or now_s >= self._told_s + NEWS_S:
            self._send("bytes", self._numbers[arrival], arrival.at_s, arrival.received)
        else:
            return
        self._told_s = now_s

    def on_waste(self, nbytes: int) -> None:
        self._send("waste", nbytes)


def _plain(error: Exception) -> Exception:
    """An exception as one of those that a parent expects, which can be sent."""
    if isinstance(error, SessionFailed | SpecError):
        return type(error)(str(error))
    if isinstance(error, OSError | aiohttp.ClientError):
        return ConnectionError(str(error) or type(error).__name__)
    return RuntimeError(f"{type(error).__name__}: {error}")


async def serve(connection: Connection, memory: SharedMemory) -> None:
    """Receive until the parent ends."""
    receiving = Receiving(connection, memory)
    await receiving.ended.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvstream.testbed.net.receiving", description=__doc__)
    parser.add_argument("connection", type=int)
    parser.add_argument("memory", type=int)
    options = parser.parse_args()
    be_punctual(Urgency.NETWORK)
    asyncio.run(serve(Connection(options.connection), SharedMemory(options.memory)))


if __name__ == "__main__":
    main()
