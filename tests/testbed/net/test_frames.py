"""Frames of a WebSocket, split in any way, reach their buffers; protocol errors end the stream."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstream.testbed.errors import SpecError
from kvstream.testbed.net.frames import HEADER_BYTES, Closed, Frames


class Transport:
    def __init__(self) -> None:
        self.protocol: Any = SimpleNamespace(connection_lost=lambda error: None)
        self.socket = SimpleNamespace(setsockopt=lambda *option: None)

    def get_extra_info(self, name: str) -> Any:
        return self.socket

    def get_protocol(self) -> Any:
        return self.protocol

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol


class Answer:
    """Collects texts, and binary frames in one buffer, as a chunk does."""

    def __init__(self, size: int, wanted: bool = True) -> None:
        self.texts: list[str] = []
        self.memory = bytearray(size)
        self.received = 0
        self.wanted = wanted

    def on_text(self, text: str) -> None:
        self.texts.append(text)

    def on_frame(self, nbytes: int) -> None:
        if nbytes > len(self.memory) - self.received:
            raise SpecError("unsolicited data")

    def next_buffer(self) -> memoryview | None:
        return memoryview(self.memory)[self.received :] if self.wanted else None

    def on_received(self, nbytes: int) -> None:
        self.received += nbytes


def frame(opcode: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return bytes([0x80 | opcode, size]) + payload
    if size < 1 << 16:
        return bytes([0x80 | opcode, 126]) + size.to_bytes(2, "big") + payload
    return bytes([0x80 | opcode, 127]) + size.to_bytes(8, "big") + payload


def deliver(data: bytes, handler: Answer | None, most: int | None = None, seed: int = 0) -> Frames:
    """What a socket would bring: at most `most` bytes a read, never more than the buffer that is offered."""
    pongs: list[bytes] = []

    async def run() -> Frames:
        async def pong(payload: bytes) -> None:
            pongs.append(payload)

        transport = Transport()
        response = SimpleNamespace(connection=SimpleNamespace(transport=transport), close=lambda: None)
        frames = Frames(SimpleNamespace(_response=response, pong=pong))  # type: ignore[arg-type]
        serving = None if handler is None else asyncio.ensure_future(frames.serve(handler))
        await asyncio.sleep(0)
        draw, at = random.Random(seed), 0
        while at < len(data) and frames._error is None:
            buffer = frames.get_buffer(-1)
            assert len(buffer) > 0
            size = min(len(buffer), len(data) - at, draw.randint(1, most) if most else 1 << 30)
            buffer[:size] = data[at : at + size]
            at += size
            frames.buffer_updated(size)
        await asyncio.sleep(0)
        frames.finish()
        if serving is not None:
            await asyncio.wait([serving])
            frames._raised = serving.exception()  # type: ignore[attr-defined]
        frames._pongs = pongs  # type: ignore[attr-defined]
        return frames

    return asyncio.run(run())


def error_of(frames: Frames) -> BaseException | None:
    return frames._error


@settings(max_examples=60)
@given(
    sizes=st.lists(
        st.one_of(st.integers(1, 40), st.integers(100, 140), st.integers(65_500, 65_600), st.just(300_000)), max_size=6
    ),
    most=st.sampled_from([1, 2, 7, HEADER_BYTES, 1000, 70_000, None]),
    seed=st.integers(0, 1000),
    wanted=st.booleans(),
)
def test_any_cut_of_the_stream_gives_the_same(sizes: list[int], most: int | None, seed: int, wanted: bool) -> None:
    if most is not None and most < 100:
        sizes = [min(size, 300) for size in sizes]
    draw = random.Random(seed)
    payloads = [draw.randbytes(size) for size in sizes]
    data = frame(1, b"begin")
    for index, payload in enumerate(payloads):
        data += frame(2, payload)
        if index % 2:
            data += frame(9, b"hi")
    # what follows an answer does not belong in its buffer
    data += frame(1, b"end")
    handler = Answer(sum(sizes), wanted)
    frames = deliver(data, handler, most, seed)
    assert error_of(frames) is None
    assert handler.texts == ["begin", "end"]
    assert handler.received == sum(sizes)
    assert handler.memory == (b"".join(payloads) if wanted else bytes(sum(sizes)))
    assert frames._pongs == [b"hi"] * (len(sizes) // 2)  # type: ignore[attr-defined]
    assert frames.hand_back()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x02\x05hello", "invalid frame header"),  # a fragment
        (b"\x80\x05hello", "invalid frame header"),  # a continuation
        (b"\xc2\x05hello", "invalid frame header"),  # compressed
        (b"\x82\x85\0\0\0\0hello", "invalid frame header"),  # masked
        (b"\x83\x00", "invalid frame header"),  # reserved
        (frame(1, bytes(5000)), "longer than"),
        (frame(1, b"\xff\xfe"), "not UTF-8"),
        (frame(2, bytes(9)), "unsolicited data"),
        (b"\x82\x7f" + b"\xff" * 8, "unsolicited data"),
    ],
)
def test_protocol_errors_end_the_stream(data: bytes, reason: str) -> None:
    for most in (1, None):
        frames = deliver(data, Answer(8), most)
        assert isinstance(error_of(frames), SpecError)
        assert reason in str(error_of(frames))
        assert not frames.hand_back()


def test_closing_says_why() -> None:
    error = error_of(deliver(frame(8, (1008).to_bytes(2, "big") + b"go away"), Answer(0)))
    assert isinstance(error, Closed)
    assert (error.code, error.reason) == (1008, "go away")
    assert isinstance(error_of(deliver(frame(8, b""), Answer(0))), Closed)


def test_nothing_is_taken_before_somebody_listens() -> None:
    for data in (frame(1, b"early"), frame(2, b"early")):
        assert isinstance(error_of(deliver(data, None)), SpecError)
