"""A mark on what is worth a wake-up: set while bytes come fast, gone when they do not; no stream ever hangs on it."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstream.testbed.errors import SpecError
from kvstream.testbed.net import rcvlowat
from kvstream.testbed.net.frames import Frames
from kvstream.testbed.net.rcvlowat import MOST_BYTES, PATIENCE_S, WORTH_BYTES, LowWater
from tests.testbed.net.test_frames import Answer, frame


class Marked:
    """A socket that only keeps its marks."""

    def __init__(self) -> None:
        self.marks: list[int] = []

    def setsockopt(self, level: int, option: int, mark: int) -> None:
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_RCVLOWAT)
        self.marks.append(mark)


def test_a_mark_is_what_comes_within_a_millisecond() -> None:
    async def scenario() -> None:
        marked = Marked()
        mark = LowWater(marked)  # type: ignore[arg-type]
        await asyncio.sleep(PATIENCE_S)
        mark.after_read(WORTH_BYTES - 1, 1000)
        assert marked.marks == [], "below 2 Gbit/s nothing is waited for"
        await asyncio.sleep(PATIENCE_S)
        mark.after_read(2 * WORTH_BYTES, 200_000)
        assert marked.marks == [200_000]
        mark.after_read(100, 0)
        assert marked.marks == [200_000, 1], "what is awaited is near"
        mark.after_read(100, 300_000)
        await asyncio.sleep(20 * PATIENCE_S)
        assert marked.marks == [200_000, 1, WORTH_BYTES, 1], "nothing came"
        mark.after_read(100, 300_000)
        assert len(marked.marks) == 4, "the rate is not known again"
        await asyncio.sleep(PATIENCE_S)
        mark.after_read(1 << 40, 1 << 30)
        assert marked.marks[4:] == [MOST_BYTES], "the faster, the more a wake-up is worth"
        mark.close()

    asyncio.run(scenario())


Piece = tuple[int, bool]
"""Bytes of a frame, and whether the sender pauses in its middle."""
LONG_S = 0.01
"""A patience with which a slow machine's loopback sets marks too."""


@asynccontextmanager
async def streamed(handler: Answer) -> AsyncIterator[tuple[Callable[[bytes], Awaitable[None]], socket.socket]]:
    """A real connection whose bytes `handler` gets: what sends over it, and the receiver's socket."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as theirs:
        theirs.setblocking(False)
        mine, _ = server.accept()
        transport: Any
        transport, _ = await loop.create_connection(asyncio.BaseProtocol, sock=mine)
        transport.set_protocol(SimpleNamespace(connection_lost=lambda error: None))
        response = SimpleNamespace(connection=SimpleNamespace(transport=transport), close=lambda: None)
        frames = Frames(SimpleNamespace(_response=response))  # type: ignore[arg-type]
        serving = asyncio.ensure_future(frames.serve(handler))
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(20):
                yield lambda data: loop.sock_sendall(theirs, data), mine
            assert not serving.done()
        finally:
            serving.cancel()
            transport.abort()
            await asyncio.gather(serving, return_exceptions=True)


@settings(max_examples=25, deadline=None)
@given(
    pieces=st.lists(
        st.tuples(st.one_of(st.integers(1, 70_000), st.integers(65_537, 600_000)), st.booleans()),
        min_size=1,
        max_size=24,
    ),
    seed=st.integers(0, 1000),
    given_up=st.one_of(st.none(), st.integers(0, 24)),
)
def test_what_was_sent_is_seen(pieces: list[Piece], seed: int, given_up: int | None) -> None:
    """Whenever the sender pauses, all that it sent arrives; also when the answer is not wanted any more, and ends."""
    draw = random.Random(seed)
    handler = Answer(sum(size for size, _ in pieces) + 5_000_000)

    async def scenario() -> None:
        async with streamed(handler) as (send, _):
            sent = 0
            for index, (size, pauses) in enumerate(pieces):
                handler.wanted = given_up is None or index < given_up
                data, cut = frame(2, draw.randbytes(size)), draw.randint(0, size)
                head = len(data) - size
                await send(data[: head + cut])
                while pauses and handler.received < sent + cut:
                    await asyncio.sleep(PATIENCE_S)
                await send(data[head + cut :])
                sent += size
            await send(frame(1, b'{"req": 1, "cancelled": true}'))
            while not handler.texts:
                await asyncio.sleep(PATIENCE_S)
        assert handler.received == sent

    with patch.object(rcvlowat, "PATIENCE_S", LONG_S):
        asyncio.run(scenario())


def test_large_frames_are_waited_for_while_they_come_fast() -> None:
    size, frames = 400_000, 200
    marks = set()

    async def scenario() -> None:
        class Watched(Answer):
            def on_received(self, nbytes: int) -> None:
                super().on_received(nbytes)
                marks.add(mine.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT))

        handler = Watched(size * frames)
        async with streamed(handler) as (send, mine):
            body = random.Random(1).randbytes(size)
            for _ in range(frames):
                await send(frame(2, body))
            while handler.received < size * frames:
                await asyncio.sleep(PATIENCE_S)
            assert mine.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
        assert handler.memory == body * frames

    with patch.object(rcvlowat, "PATIENCE_S", LONG_S):
        asyncio.run(scenario())
    assert WORTH_BYTES <= max(marks) <= MOST_BYTES


def test_a_frame_that_was_not_asked_for_leaves_no_mark() -> None:
    async def scenario() -> None:
        marked = Marked()
        transport = SimpleNamespace(
            get_protocol=lambda: None, set_protocol=lambda protocol: None, get_extra_info=lambda name: marked
        )
        response = SimpleNamespace(connection=SimpleNamespace(transport=transport))
        frames = Frames(SimpleNamespace(_response=response))  # type: ignore[arg-type]
        serving = asyncio.ensure_future(frames.serve(Answer(100_000)))
        await asyncio.sleep(2 * PATIENCE_S)
        data = frame(2, bytes(100_001))
        frames.get_buffer(-1)[:10] = data[:10]
        frames.buffer_updated(10)
        await asyncio.wait([serving])
        assert isinstance(serving.exception(), SpecError)
        assert marked.marks == []

    asyncio.run(scenario())
