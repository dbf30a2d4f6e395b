"""The receiving end of streams in a process of its own, whose bytes arrive in memory that both processes have.

A thread that launches kernels and one that reads the network share an interpreter lock, and on links of 10 Gbit/s and
more each holds up the other. `NetworkProcess` keeps a child that only receives (`kvstream.testbed.net.receiving`); what
a session would ask of an `Inbound` goes to the child in messages, and news of what arrived comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any, Final

from kvstream.policies.api import TEXT, LevelOrText
from kvstream.testbed.errors import MachineError, SpecError
from kvstream.testbed.host.process import IMPORT_ROOT
from kvstream.testbed.host.shared_memory import SharedMemory
from kvstream.testbed.net import messages
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.inbound import Arrival, Limits, Listener
from kvstream.testbed.session.record import SessionFailed

_ENDED: Final = "the process that receives from the network has ended"
CHILD: Final = "kvstream.testbed.net.receiving"


class NetworkProcess:
    """A child that receives for one session at a time, into `memory`. It ends with this process at the latest, and is
    started anew if it ended."""

    def __init__(self) -> None:
        """Raises MachineError where no child can be started."""
        self.memory = SharedMemory()
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(filter(None, [str(IMPORT_ROOT), os.environ.get("PYTHONPATH")]))
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-m", CHILD, str(theirs.fileno()), str(self.memory.fd)],
                pass_fds=(theirs.fileno(), self.memory.fd),
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
            )
        self.connection = Connection(ours.detach())
        try:
            self.connection.recv()
        except (EOFError, OSError):
            self.close()
            raise MachineError(f"{_ENDED}; what it said is above") from None

    @property
    def pid(self) -> int:
        return self._child.pid

    def inbound(self, clients: Sequence[Client], context: str, listener: Listener, limits: Limits) -> RemoteInbound:
        """The receiving end for a session. The one before must be closed."""
        if self.connection.poll():  # between sessions it says nothing: it has ended
            self.close()
            self._start()
        return RemoteInbound(self, clients, context, listener, limits)

    def close(self) -> None:
        self.connection.close()
        self._child.wait()


class RemoteInbound:
    """An `Inbound` whose work is done by a `NetworkProcess`. Everything here runs on the event loop's thread."""

    def __init__(
        self, process: NetworkProcess, clients: Sequence[Client], context: str, listener: Listener, limits: Limits
    ) -> None:
        self._connection, self._memory, self._listener = process.connection, process.memory, listener
        self._loop = asyncio.get_running_loop()
        self._arrivals: dict[int, Arrival] = {}
        """By the number that both processes know them by."""
        self._count = 0
        self._warm, self._failed, self._closed = (self._loop.create_future() for _ in range(3))
        self.bytes = self.reconnects = 0
        """Payload that has arrived in total, and how often the connection was replaced; known after `close`."""
        self._loop.add_reader(self._connection.fileno(), self._read)
        self._send("open", [(client.url, client.token) for client in clients], context, asdict(limits))

    # --- requests

    def get_manifest(self) -> Arrival:
        return self._ask(messages.GetManifest(self._count), memoryview(b""), "manifest")

    def get_chunk(self, chunk: int, level: LevelOrText, target: memoryview) -> Arrival:
        """Request exactly as many bytes as `target` has. Raises ValueError for an encoding whose target is not in
        the shared memory."""
        place = None if level == TEXT else self._memory.place_of(target)
        get = messages.GetChunk(self._count, chunk, level, 0)
        return self._ask(get, target, "chunk", chunk, level, place, len(target), len(self._memory))

    def _ask(self, get: messages.GetManifest | messages.GetChunk, target: memoryview, *request: Any) -> Arrival:
        arrival = self._arrivals[get.req] = Arrival(get, target)
        self._count += 1
        self._send(request[0], get.req, *request[1:])
        return arrival

    def cancel(self, chunk: int) -> None:
        """Cancel all outstanding requests for a chunk."""
        for arrival in self._arrivals.values():
            if isinstance(arrival.get, messages.GetChunk) and arrival.get.chunk == chunk:
                arrival.is_cancelled = True
        self._send("cancel", chunk)

    async def warm_up(self, padding_bytes: int, until_s: float | None) -> None:
        """As that of `Inbound`."""
        self._send("warm_up", padding_bytes, until_s)
        await self._warm

    async def run(self) -> None:
        """Receive until cancelled. Raises SessionFailed, or ConnectionError if the process has ended."""
        self._send("run")
        await self._failed

    async def close(self) -> None:
        """Returns when nothing is written into the memory any more."""
        self._send("close")
        with contextlib.suppress(ConnectionError):
            self.bytes, self.reconnects = await self._closed
        self._loop.remove_reader(self._connection.fileno())

    # --- to and from the process

    def _send(self, *message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError:
            self._fail(ConnectionError(_ENDED), self._warm, self._failed, self._closed)

    def _read(self) -> None:
        try:
            what, *rest = self._connection.recv()
        except (EOFError, OSError):
            self._loop.remove_reader(self._connection.fileno())
            self._fail(ConnectionError(_ENDED), self._warm, self._failed, self._closed)
            return
        try:
            self._on_message(what, *rest)
        except SpecError as error:  # as in `Inbound`: what it means, not how it came
            self._fail(SessionFailed(f"protocol error of the sender: {error}"), self._failed)
        except Exception as error:
            self._fail(error, self._failed)

    @staticmethod
    def _fail(error: Exception, *futures: asyncio.Future[Any]) -> None:
        for future in futures:
            if not future.done():
                future.set_exception(error)
                future.exception()  # perhaps nobody waits for it

    def _on_message(self, what: str, *rest: Any) -> None:
        match what, rest:
            case "answer", (number, at_s, sha256):
                arrival = self._arrivals[number]
                arrival.is_open, arrival.at_s, arrival.sha256 = True, at_s, sha256
                if not arrival.is_cancelled:
                    self._listener.on_answer(arrival)
            case "bytes", (number, at_s, received):
                self._on_bytes(self._arrivals[number], at_s, received)
            case "last", (number, at_s, received, data):
                self._on_last(self._arrivals.pop(number), at_s, received, data)
            case "waste", (nbytes,):
                self._listener.on_waste(nbytes)
            case "warm", (None,):
                self._warm.set_result(None)
            case "warm", (error,):
                self._fail(error, self._warm)
            case "failed", (error,):
                self._fail(error, self._warm, self._failed)
            case "closed", (totals,):
                self._closed.set_result(totals)

    def _on_last(self, arrival: Arrival, at_s: float, received: int, data: bytes | None) -> None:
        """All is there; `data`, where it did not arrive in the shared memory."""
        if data is not None and not arrival.is_cancelled:
            if isinstance(arrival.get, messages.GetManifest):
                arrival.target = memoryview(data)
            else:
                arrival.target[:] = data
        self._on_bytes(arrival, at_s, received)

    def _on_bytes(self, arrival: Arrival, at_s: float, received: int) -> None:
        fresh, arrival.received, arrival.at_s = received - arrival.received, received, at_s
        if arrival.is_cancelled:  # they came before the process knew
            self._listener.on_waste(fresh)
        else:
            self._listener.on_bytes(arrival)
