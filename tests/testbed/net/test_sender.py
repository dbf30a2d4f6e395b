"""The sender over loopback: contents, ranges, tokens, and clients that violate the protocol."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstream.testbed.errors import SpecError
from kvstream.testbed.net import messages
from kvstream.testbed.net import stream as stream_module
from kvstream.testbed.net.frame_size import LARGEST_BYTES
from kvstream.testbed.net.sender import Sender, needs_token
from tests.testbed.conftest import Stored

CHUNK = "/v1/contexts/ctx/chunks/1/0"


@asynccontextmanager
async def serving(stored: Stored, **settings: Any) -> AsyncIterator[TestClient[Any, Any]]:
    async with TestClient(TestServer(Sender(stored.store, **settings).app())) as client:
        yield client


def with_sender(stored: Stored, scenario: Callable[[TestClient[Any, Any]], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        async with asyncio.timeout(30), serving(stored, **settings) as client:
            await scenario(client)
            # whatever was done to it, it still serves
            assert (await client.get("/healthz")).status == 200

    asyncio.run(run())


def test_http_contents_and_headers(stored: Stored) -> None:
    async def scenario(client: TestClient[Any, Any]) -> None:
        assert await (await client.get("/v1/contexts")).json() == {"contexts": ["ctx"]}
        manifest = stored.store.manifest("ctx")
        answer = await client.get("/v1/contexts/ctx")
        assert await answer.json() == json.loads(json.dumps(manifest.to_json()))
        assert answer.content_type == "application/json"
        answer = await client.get(CHUNK)
        data = await answer.read()
        assert data == stored.store.get_kv("ctx/1", 0)
        etag = answer.headers["ETag"]
        assert etag == f'"{stored.store.hashes("ctx")["1/0"]}"'
        assert (await client.get(CHUNK, headers={"If-None-Match": etag})).status == 304
        assert (await client.get(CHUNK, headers={"If-None-Match": '"x"'})).status == 200
        assert await (await client.get("/v1/contexts/ctx/chunks/0/text")).read() == bytes(stored.tokens[:64])

    with_sender(stored, scenario)


def test_ranges(stored: Stored) -> None:
    async def scenario(client: TestClient[Any, Any]) -> None:
        data = stored.store.get_kv("ctx/1", 0)
        total = len(data)
        for ask, start, stop in (
            ("bytes=0-0", 0, 1),
            ("bytes=100-299", 100, 300),
            ("bytes=5-", 5, total),
            ("bytes=-7", total - 7, total),
            (f"bytes=10-{total + 50}", 10, total),
        ):
            answer = await client.get(CHUNK, headers={"Range": ask})
            assert answer.status == 206
            assert await answer.read() == data[start:stop]
            assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{total}"
        for bad in (f"bytes={total}-", "bytes=9-3", "bytes=x", "lines=1-2"):
            assert (await client.get(CHUNK, headers={"Range": bad})).status == 416
        whole = await client.get(CHUNK, headers={"Range": "bytes=5-", "If-Range": '"older"'})
        assert whole.status == 200
        assert await whole.read() == data

    with_sender(stored, scenario)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/contexts/none",
        "/v1/contexts/..%2f..%2fetc",
        "/v1/contexts/%00",
        "/v1/contexts/ctx/chunks/99/0",
        "/v1/contexts/ctx/chunks/0/7",
        "/v1/contexts/ctx/chunks/0/abc",
        "/v1/contexts/ctx/chunks/-1/0",
        "/v1/contexts/ctx/chunks/0/..",
        "/v1/contexts/ctx/evaluation/questions.json",
        "/v1/contexts/none/stream",
        f"/v1/profiles/{'0' * 64}",
        "/v1/profiles/..%2fpasswd",
        "/etc/passwd",
    ],
)
def test_unknown_and_hostile_paths_are_not_found(stored: Stored, path: str) -> None:
    async def scenario(client: TestClient[Any, Any]) -> None:
        from yarl import URL

        answer = await client.get(URL(path, encoded=True))
        assert answer.status == 404
        assert len(await answer.read()) < 500

    with_sender(stored, scenario)


def test_writing_needs_permission_and_checks_sizes(stored: Stored, tmp_path: Path) -> None:
    async def read_only(client: TestClient[Any, Any]) -> None:
        assert (await client.put(CHUNK, data=b"x")).status == 403
        assert (await client.put("/v1/contexts/new", data=b"{}")).status == 403

    async def writable(client: TestClient[Any, Any]) -> None:
        assert (await client.put("/v1/contexts/ctx2/chunks/0/0", data=b"x")).status == 409
        for body in (b"", b"nonsense", b"[]", b"{}"):
            assert (await client.put("/v1/contexts/ctx2", data=body)).status == 400
        manifest = stored.store.manifest("ctx").to_json()
        assert (await client.put("/v1/contexts/ctx2", data=json.dumps(manifest).encode())).status == 400
        renamed = json.dumps(manifest | {"context": "ctx2"}).encode()
        assert (await client.put("/v1/contexts/ctx2", data=renamed)).status == 201
        for size in (0, 1, len(stored.store.get_kv("ctx/0", 0)) + 1):
            assert (await client.put("/v1/contexts/ctx2/chunks/0/0", data=bytes(size))).status == 400

        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield bytes(1 << 16)

        assert (await client.put("/v1/contexts/ctx2/chunks/0/0", data=endless())).status == 400
        assert await (await client.get("/v1/contexts")).json() == {"contexts": ["ctx"]}

    with_sender(stored, read_only)
    with_sender(stored, writable, writable=True)


def test_a_token_guards_everything_but_health(stored: Stored) -> None:
    async def scenario(client: TestClient[Any, Any]) -> None:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer "},
        ):
            for path in ("/v1/contexts", CHUNK, "/v1/contexts/ctx/stream"):
                assert (await client.get(path, headers=headers)).status == 401
        assert (await client.get(CHUNK, headers={"Authorization": "Bearer secret"})).status == 200

    with_sender(stored, scenario, token="secret")


@pytest.mark.parametrize(
    ("host", "needed"),
    [
        ("127.0.0.1", False),
        ("localhost", False),
        ("::1", False),
        ("0.0.0.0", True),
        ("10.0.0.1", True),
        ("x.org", True),
    ],
)
def test_a_token_is_needed_beyond_loopback(host: str, needed: bool) -> None:
    assert needs_token(host) is needed


# --- the stream


async def read_answer(stream: Any) -> tuple[messages.Answer | messages.Cancelled, bytes]:
    message = await stream.receive()
    assert message.type is WSMsgType.TEXT, message
    answer = messages.parse_answer(message.data)
    data = b""
    while isinstance(answer, messages.Answer) and len(data) < answer.bytes - answer.offset:
        message = await stream.receive()
        if message.type is WSMsgType.TEXT:
            return messages.parse_answer(message.data), data
        assert len(message.data) <= LARGEST_BYTES
        data += message.data
    return answer, data


def test_stream_answers_in_order(stored: Stored) -> None:
    async def scenario(client: TestClient[Any, Any]) -> None:
        async with client.ws_connect("/v1/contexts/ctx/stream") as stream:
            requests = [
                messages.GetManifest(0),
                messages.GetChunk(1, 2, 0, 0),
                messages.GetChunk(2, 1, 0, 1000),
                messages.GetChunk(5, 3, "text", 0),
                messages.GetPadding(6, 100_000),
                messages.GetChunk(7, 0, "text", 64),
            ]
            for request in requests:
                await stream.send_str(messages.pack_request(request))
            expected = [
                None,
                stored.store.get_kv("ctx/2", 0),
                stored.store.get_kv("ctx/1", 0)[1000:],
                bytes(stored.tokens[192:256]),
                bytes(100_000),
                b"",
            ]
            for request, data in zip(requests, expected, strict=True):
                answer, received = await read_answer(stream)
                assert answer.req == request.req
                if data is None:
                    assert json.loads(received) == json.loads(json.dumps(stored.store.manifest("ctx").to_json()))
                else:
                    assert received == data
                if isinstance(request, messages.GetChunk):
                    assert isinstance(answer, messages.Answer)
                    assert answer.sha256 == stored.store.hashes("ctx")[f"{request.chunk}/{request.level}"]

    with_sender(stored, scenario)


def test_cancelling_stops_answers_and_waiting_requests(stored: Stored) -> None:
    async def scenario(client: TestClient[Any, Any]) -> None:
        async with client.ws_connect("/v1/contexts/ctx/stream") as stream:
            size = 32 << 20  # more than sockets buffer, so that it cannot have been sent at once
            await stream.send_str(messages.pack_request(messages.GetPadding(0, size)))
            await stream.send_str(messages.pack_request(messages.GetChunk(1, 0, 0, 0)))
            await stream.send_str(messages.pack_request(messages.GetChunk(2, 0, "text", 0)))
            await stream.receive()
            await stream.send_str(messages.pack_request(messages.CancelRequest(0)))
            await stream.send_str(messages.pack_request(messages.CancelRequest(1)))
            await stream.send_str(messages.pack_request(messages.CancelRequest(77)))
            received = 0
            while (message := await stream.receive()).type is WSMsgType.BINARY:
                received += len(message.data)
            assert messages.parse_answer(message.data) == messages.Cancelled(0)
            assert received < size
            assert (await read_answer(stream))[0] == messages.Cancelled(1)
            answer, text = await read_answer(stream)
            assert answer.req == 2
            assert text == bytes(stored.tokens[:64])
            # cancelled too late: it was answered in full, and there is no second answer
            await stream.send_str(messages.pack_request(messages.CancelRequest(2)))
            await stream.send_str(messages.pack_request(messages.GetManifest(3)))
            assert (await read_answer(stream))[0].req == 3

    with_sender(stored, scenario)


def get(**fields: Any) -> str:
    return json.dumps({"req": 1, "get": "chunk", "chunk": 0, "level": 0, "offset": 0} | fields)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("not json", "not JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 4000, "not JSON"),
        ("{}", "'req'"),
        ('{"req": 1}', "'get'"),
        ('{"req": 1, "get": "secrets"}', "'get'"),
        ('{"cancel": "all"}', "'cancel'"),
        (get(req=-1), "'req'"),
        (get(req=1.5), "'req'"),
        (get(chunk=99), "chunks 0 to 4, not 99"),
        (get(chunk=-1), "'chunk'"),
        (get(chunk=True), "'chunk'"),
        (get(level=1), "levels 0 to 0, not 1"),
        (get(level="../0"), "'level'"),
        (get(level=None), "'level'"),
        (get(offset=1 << 20), "beyond"),
        (get(offset=1 << 60), "'offset'"),
        ('{"req": 1, "get": "padding", "bytes": 99999999999}', "'bytes'"),
    ],
)
def test_bad_requests_close_the_stream_with_a_reason(stored: Stored, message: str, reason: str) -> None:
    async def scenario(client: TestClient[Any, Any]) -> None:
        async with client.ws_connect("/v1/contexts/ctx/stream") as stream:
            await stream.send_str(message)
            answer = await stream.receive()
            assert answer.type is WSMsgType.CLOSE
            assert answer.data == 1008
            assert reason in answer.extra

    with_sender(stored, scenario)


def test_binary_oversize_and_repeated_requests_close_the_stream(stored: Stored) -> None:
    async def scenario(client: TestClient[Any, Any]) -> None:
        async with client.ws_connect("/v1/contexts/ctx/stream") as stream:
            await stream.send_bytes(b"x")
            assert (await stream.receive()).data == 1008
        async with client.ws_connect("/v1/contexts/ctx/stream") as stream:
            await stream.send_str("x" * (messages.MAX_REQUEST_BYTES + 1))
            assert (await stream.receive()).data == 1009
        async with client.ws_connect("/v1/contexts/ctx/stream") as stream:
            await stream.send_str(messages.pack_request(messages.GetManifest(4)))
            await stream.send_str(messages.pack_request(messages.GetManifest(4)))
            while (answer := await stream.receive()).type in (WSMsgType.TEXT, WSMsgType.BINARY):
                pass
            assert (answer.data, answer.extra) == (1008, "request 4 is not greater than the last one, 4")

    with_sender(stored, scenario)


def test_too_many_waiting_requests_close_the_stream(stored: Stored) -> None:
    async def scenario(client: TestClient[Any, Any]) -> None:
        async with client.ws_connect("/v1/contexts/ctx/stream") as stream:
            await stream.send_str(messages.pack_request(messages.GetPadding(0, messages.MAX_PADDING_BYTES)))
            for req in range(1, messages.MAX_QUEUED + 3):
                await stream.send_str(messages.pack_request(messages.GetManifest(req)))
            while (answer := await stream.receive()).type in (WSMsgType.TEXT, WSMsgType.BINARY):
                pass
            assert answer.type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.ERROR)
            health = await (await client.get("/healthz")).json()
            assert health == {"ok": True, "streams": 0}

    with_sender(stored, scenario)


def test_a_client_that_does_not_read_is_disconnected(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "STALL_S", 0.3)

    async def streams(client: TestClient[Any, Any]) -> int:
        return int((await (await client.get("/healthz")).json())["streams"])

    async def scenario(client: TestClient[Any, Any]) -> None:
        reader, writer = await asyncio.open_connection(client.server.host, client.server.port)
        writer.write(
            b"GET /v1/contexts/ctx/stream HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        request = messages.pack_request(messages.GetPadding(0, messages.MAX_PADDING_BYTES)).encode()
        writer.write(bytes([0x81, 0x80 | len(request), 0, 0, 0, 0]) + request)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        assert await streams(client) == 1
        while await streams(client):
            await asyncio.sleep(0.05)
        writer.transport.abort()

    with_sender(stored, scenario)


def test_a_context_that_was_stored_again_is_read_again(tmp_path: Path, tiny_model: Any) -> None:
    from tests.testbed.conftest import store_context

    stored = store_context(tmp_path, tiny_model)

    async def scenario(client: TestClient[Any, Any]) -> None:
        assert len(await (await client.get(CHUNK)).read()) == len(stored.store.get_kv("ctx/1", 0))
        before = (await client.get("/v1/contexts/ctx")).headers["ETag"]
        store_context(tmp_path, tiny_model, "uniform")
        after = await client.get("/v1/contexts/ctx")
        assert after.headers["ETag"] != before
        assert await (await client.get(CHUNK)).read() == stored.store.get_kv("ctx/1", 0)

    with_sender(stored, scenario)


@given(
    st.text(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x)).map(json.dumps)
)
def test_parsers_refuse_what_is_not_an_object(text: str) -> None:
    for parse in (messages.parse_request, messages.parse_answer):
        with pytest.raises(SpecError):
            parse(text)


reqs = st.integers(0, messages.MAX_REQ)
sizes = st.integers(0, messages.MAX_CHUNK_BYTES)
requests = (
    st.builds(messages.GetManifest, reqs)
    | st.builds(messages.GetPadding, reqs, st.integers(0, messages.MAX_PADDING_BYTES))
    | st.builds(messages.CancelRequest, reqs)
    | st.builds(
        messages.GetChunk,
        reqs,
        st.integers(0, messages.MAX_CHUNKS),
        st.just("text") | st.integers(0, messages.MAX_LEVELS),
        sizes,
    )
)
answers = st.builds(messages.Cancelled, reqs) | sizes.flatmap(
    lambda size: st.builds(messages.Answer, reqs, st.just(size), st.integers(0, size), st.sampled_from(["", "ab" * 32]))
)
WRONG = [-1, 0, 1, 2.0, True, False, None, "", "text", "manifest", "padding", "ab" * 33, [1], {}]
LIMITS = {
    "req": [messages.MAX_REQ],
    "cancel": [messages.MAX_REQ],
    "chunk": [messages.MAX_CHUNKS],
    "level": [messages.MAX_LEVELS],
    "offset": [messages.MAX_CHUNK_BYTES],
    "bytes": [messages.MAX_CHUNK_BYTES, messages.MAX_PADDING_BYTES],
}


@st.composite
def perturbed(draw: st.DrawFn, packed: st.SearchStrategy[str]) -> dict[str, Any]:
    """A valid message with up to two fields replaced, removed or added."""
    body: dict[str, Any] = json.loads(draw(packed))
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from([*body, "get", "cancel", "cancelled"]))
        limits = LIMITS.get(key, []) + ([body["bytes"]] if key == "offset" and "bytes" in body else [])
        values = [edge for limit in limits if isinstance(limit, int) for edge in (limit, limit + 1)]
        match draw(st.sampled_from(["edge", "wrong", "none"])):
            case "edge" if values:
                body[key] = draw(st.sampled_from(values))
            case "wrong":
                body[key] = draw(st.sampled_from(WRONG))
            case _:
                body.pop(key, None)
    return body


def is_count(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value <= limit


@settings(max_examples=500)
@given(perturbed(requests.map(messages.pack_request)))
def test_a_request_is_understood_exactly_if_its_fields_are_valid(body: dict[str, Any]) -> None:
    """The protocol's rules written a second time; extra fields are ignored."""
    valid = is_count(body.get("req"), messages.MAX_REQ)
    match body.get("get"):
        case "chunk":
            valid &= is_count(body.get("chunk"), messages.MAX_CHUNKS)
            valid &= body.get("level") == "text" or is_count(body.get("level"), messages.MAX_LEVELS)
            valid &= is_count(body.get("offset"), messages.MAX_CHUNK_BYTES)
        case "padding":
            valid &= is_count(body.get("bytes"), messages.MAX_PADDING_BYTES)
        case other:
            valid &= other == "manifest"
    if "cancel" in body:
        valid = is_count(body["cancel"], messages.MAX_REQ)
    text = json.dumps(body)
    if not valid:
        with pytest.raises(SpecError):
            messages.parse_request(text)
        return
    understood = json.loads(messages.pack_request(messages.parse_request(text)))
    assert understood == {key: body[key] for key in understood}
    assert understood.keys() & {"get", "cancel"}


@pytest.mark.parametrize(
    ("field", "limit", "request_"),
    [
        ("req", messages.MAX_REQ, messages.GetManifest(0)),
        ("cancel", messages.MAX_REQ, messages.CancelRequest(0)),
        ("bytes", messages.MAX_PADDING_BYTES, messages.GetPadding(0, 0)),
        ("chunk", messages.MAX_CHUNKS, messages.GetChunk(0, 0, 0, 0)),
        ("level", messages.MAX_LEVELS, messages.GetChunk(0, 0, 0, 0)),
        ("offset", messages.MAX_CHUNK_BYTES, messages.GetChunk(0, 0, 0, 0)),
    ],
)
def test_fields_of_requests_have_limits(field: str, limit: int, request_: messages.Request) -> None:
    body = json.loads(messages.pack_request(request_))
    messages.parse_request(json.dumps(body | {field: limit}))
    with pytest.raises(SpecError, match=f"'{field}'"):
        messages.parse_request(json.dumps(body | {field: limit + 1}))


@settings(max_examples=500)
@given(perturbed(answers.map(messages.pack_answer)))
def test_an_answer_is_understood_exactly_if_its_fields_are_valid(body: dict[str, Any]) -> None:
    valid = is_count(body.get("req"), messages.MAX_REQ)
    if body.get("cancelled") is not True:
        size, sha256 = body.get("bytes"), body.get("sha256")
        valid &= is_count(size, messages.MAX_CHUNK_BYTES) and is_count(body.get("offset"), size)
        valid &= isinstance(sha256, str) and len(sha256) <= 64
    text = json.dumps(body)
    if not valid:
        with pytest.raises(SpecError):
            messages.parse_answer(text)
        return
    understood = json.loads(messages.pack_answer(messages.parse_answer(text)))
    assert understood == {key: body[key] for key in understood}


@given(requests)
def test_requests_round_trip(request: messages.Request) -> None:
    packed = messages.pack_request(request)
    assert messages.parse_request(packed) == request
    assert len(packed) <= messages.MAX_REQUEST_BYTES


@given(answers)
def test_answers_round_trip(answer: messages.Answer | messages.Cancelled) -> None:
    assert messages.parse_answer(messages.pack_answer(answer)) == answer


@given(st.integers(0, messages.MAX_CHUNK_BYTES))
def test_frames_are_a_small_part_of_an_answer_within_bounds(total: int) -> None:
    step = messages.frame_bytes(total)
    assert messages.MIN_FRAME_BYTES <= step <= messages.LARGE_FRAME_BYTES
    assert step <= max(messages.MIN_FRAME_BYTES, total // 8)
    assert step <= max(messages.FRAME_BYTES, total // 32)
    if total <= 1 << 21:
        assert step == min(messages.FRAME_BYTES, max(messages.MIN_FRAME_BYTES, total // 8))


# --- the process


def start(stored: Stored, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvstream.testbed.net.sender", "--store", str(stored.store.path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def test_the_process_announces_itself_and_ends_on_sigterm(stored: Stored) -> None:
    process = start(stored, "--port", "0")
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert (ready["ready"], ready["contexts"]) == (True, 1)
        with socket.create_connection(("127.0.0.1", ready["port"]), timeout=5):
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert process.wait(10) == 0
            assert time.monotonic() - began < 5
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--host", "0.0.0.0", "--port", "0"], "KVSTREAM_TOKEN"), (["--store", "/nonexistent"], "is not a store")],
)
def test_the_process_refuses_unsafe_arguments(stored: Stored, arguments: list[str], message: str) -> None:
    process = start(stored, *arguments)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message in errors
    assert len(errors.splitlines()) == 1


def test_the_client_reports_the_reason_that_the_sender_gives(stored: Stored) -> None:
    from kvstream.testbed.net.client import Client

    async def scenario() -> None:
        async with TestServer(Sender(stored.store, token="secret").app()) as server:
            url = str(server.make_url("/"))
            async with Client(url, token="wrong") as client:
                with pytest.raises(SpecError, match="a bearer token is required"):
                    await client.contexts()
                with pytest.raises(SpecError, match="status 401"):
                    await client.open_stream("ctx")
            async with Client(url, token="secret") as client:
                assert await client.contexts() == ["ctx"]
                with pytest.raises(SpecError, match="no context 'nope'"):
                    await client.manifest("nope")
        async with Client(url) as client:
            with pytest.raises((OSError, aiohttp.ClientError)):
                await client.contexts()
        with pytest.raises(SpecError, match="give an address"):
            Client("10.0.0.1:8700")

    asyncio.run(scenario())
