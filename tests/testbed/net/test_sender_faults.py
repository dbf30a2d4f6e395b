"""A sender among clients that attack it, over loopback: others are served, memory, places and the log stay bounded."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from kvstream.testbed.errors import SpecError
from kvstream.testbed.net import doorkeeper, uploads
from kvstream.testbed.net import sender as sender_module
from kvstream.testbed.net.sender import Sender
from kvstream.testbed.store.layout import encodings, level_of
from kvstream.testbed.store.store import Store
from tests.testbed.conftest import Stored

ROOT = Path(__file__).resolve().parents[3]
BOMB = zlib.compress(b"[" * (1 << 28), 9)
"""256 MiB in 256 kB."""


@contextmanager
def process(
    store: Path, *arguments: str, descriptors: int | None = None
) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A sender of its own: its port."""
    command = [sys.executable, "-m", "kvstream.testbed.net.sender", "--store", str(store), "--port", "0", *arguments]
    if descriptors is not None:
        command = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *command]
    log = store.parent / "sender.log"
    with log.open("w") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
        try:
            assert child.stdout is not None
            yield json.loads(child.stdout.readline())["port"], child
        finally:
            child.terminate()


def healthz(port: int) -> float:
    """Seconds that a good client waits."""
    begin_s = time.monotonic()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=20) as answer:
        assert json.load(answer)["ok"] is True
    return time.monotonic() - begin_s


def request(port: int, text: str, body: bytes = b"") -> bytes:
    """What a sender answers to a request, up to the end of the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(text.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        try:
            connection.sendall(body)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        answer = b""
        while data := connection.recv(1 << 16):
            answer += data
        return answer


@pytest.mark.parametrize("encoding", ["deflate", "gzip"])
def test_compressed_bodies_are_refused_unread(stored: Stored, encoding: str) -> None:
    with process(stored.store.path, "--writable") as (port, child):
        for head in (
            "PUT /v1/contexts/x HTTP/1.1",
            "GET /healthz HTTP/1.1",
            "PUT /v1/contexts/ctx/chunks/0/0 HTTP/1.1",
        ):
            answer = request(port, f"{head}\nHost: x\nContent-Encoding: {encoding}\nContent-Length: {len(BOMB)}", BOMB)
            assert b" 415 " in answer.splitlines()[0]
            assert b"Content-Encoding" in answer
        peak = Path(f"/proc/{child.pid}/status").read_text().split("VmHWM:")[1].split()[0]
        assert int(peak) < 200_000


def test_a_body_that_nobody_asked_for_ends_the_connection(stored: Stored) -> None:
    with process(stored.store.path) as (port, _):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
            sent, begin_s = 0, time.monotonic()
            with suppress(BrokenPipeError, ConnectionResetError):
                while sent < 100 << 20:
                    sent += connection.send(bytes(1 << 16))
            assert sent < 32 << 20
            assert time.monotonic() - begin_s < 5.0
        healthz(port)


async def put(client: TestClient[Any, Any], path: str, data: bytes) -> tuple[int, dict[str, Any]]:
    answer = await client.put(path, data=data)
    return answer.status, await answer.json()


@asynccontextmanager
async def writable(path: Path) -> AsyncIterator[tuple[TestClient[Any, Any], Store]]:
    store = Store(path)
    async with TestClient(TestServer(Sender(store, writable=True).app())) as client:
        yield client, store


def renamed(stored: Stored, context: str, **changes: Any) -> bytes:
    return json.dumps(stored.store.manifest(stored.context).to_json() | {"context": context} | changes).encode()


def test_abandoned_uploads_give_their_places_back(
    stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with writable(tmp_path) as (client, store):
            for i in range(uploads.MAX_UPLOADS):
                assert (await put(client, f"/v1/contexts/u{i}", renamed(stored, f"u{i}")))[0] == 201
            status, answer = await put(client, "/v1/contexts/late", renamed(stored, "late"))
            assert status == 429
            assert "30 s" in answer["error"]
            monkeypatch.setattr(uploads, "IDLE_S", 0.0)
            assert (await put(client, "/v1/contexts/late", renamed(stored, "late")))[0] == 201
            assert len(list((store.path / "contexts").glob(".u*"))) == 0
        assert list((store.path / "contexts").glob(".late*")) == []

    asyncio.run(scenario())


def test_what_can_never_be_stored_is_refused_at_once(stored: Stored, tmp_path: Path) -> None:
    long = "x" * 200
    nan = renamed(stored, "x").replace(b'"settings": {}', b'"settings": {"a": NaN}')
    assert b"NaN" in nan
    huge = renamed(stored, "x").replace(b'"distortion": 0.0', b'"distortion": ' + b"9" * 401)

    async def scenario() -> None:
        async with writable(tmp_path) as (client, store):
            for path, data in (
                (f"/v1/contexts/{long}", renamed(stored, long)),
                ("/v1/contexts/x", nan),
                ("/v1/contexts/x", huge),
                ("/v1/contexts/x", b"[" * 100_000),
                ("/v1/contexts/x", renamed(stored, "y")),
            ):
                status, answer = await put(client, path, data)
                assert status == 400
                assert len(answer["error"]) < 400
            assert list((store.path / "contexts").glob(".*.*")) == []
            vast = [[64 * i, 64 * i + 64, 1 << 32, [1 << 32]] for i in range(4000)]
            status, answer = await put(client, "/v1/contexts/x", renamed(stored, "x", chunks=vast))
            assert status == 507
            assert "disk" in answer["error"]

    asyncio.run(scenario())


def test_a_second_writer_cannot_mix_its_bytes_in(stored: Stored, tmp_path: Path) -> None:
    manifest = stored.store.manifest(stored.context)

    async def upload(client: TestClient[Any, Any], change: Callable[[bytes], bytes]) -> set[int]:
        statuses = {(await put(client, "/v1/contexts/ctx", renamed(stored, "ctx")))[0]}
        for key, _ in encodings(manifest):
            chunk, level = key.split("/")
            data = change(stored.store.get_kv(f"ctx/{chunk}", level_of(level)))
            statuses.add((await put(client, f"/v1/contexts/ctx/chunks/{key}", data))[0])
        return statuses

    async def scenario() -> None:
        async with writable(tmp_path) as (client, store):
            other = renamed(stored, "ctx", model="other")
            assert (await put(client, "/v1/contexts/ctx", renamed(stored, "ctx")))[0] == 201
            assert (await put(client, "/v1/contexts/ctx", other))[0] == 409
            flipped = lambda data: bytes([data[0] ^ 1]) + data[1:]  # noqa: E731
            first, second = await asyncio.gather(upload(client, bytes), upload(client, flipped))
            assert 409 in first | second
            for key, digest in store.hashes("ctx").items() if store.contexts() else ():
                chunk, level = key.split("/")
                assert hashlib.sha256(store.get_kv(f"ctx/{chunk}", level_of(level))).hexdigest() == digest

    asyncio.run(scenario())


@pytest.mark.parametrize("damage", ["truncated", "deep", "hashes", "stray", "flipped"])
def test_one_damaged_context_is_left_out_and_named(stored: Stored, tmp_path: Path, damage: str) -> None:
    store = tmp_path / "store"
    shutil.copytree(stored.store.path, store)
    bad = store / "contexts" / "bad"
    shutil.copytree(store / "contexts" / "ctx", bad)
    (bad / "manifest.json").write_bytes(renamed(stored, "bad"))
    chunk = bad / "chunks" / "2" / "0.bin"
    match damage:
        case "truncated":
            chunk.write_bytes(chunk.read_bytes()[:-1])
        case "flipped":
            chunk.write_bytes(b"x" + chunk.read_bytes()[1:])
        case "deep":
            (bad / "manifest.json").write_text("[" * 100_000)
        case "hashes":
            (bad / "hashes.json").write_text('["a"]')
        case "stray":
            shutil.rmtree(bad)
            (store / "contexts" / "bad").mkdir()
            (store / "contexts" / "bad" / "manifest.json").mkdir()
    with process(store) as (port, _), urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/contexts") as answer:
        assert json.load(answer) == {"contexts": ["ctx"]}
    log = (store.parent / "sender.log").read_text()
    assert "not served" in log
    assert "bad" in log


def test_headers_that_never_end(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorkeeper, "FIRST_REQUEST_S", 0.3)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        runner = web.AppRunner(Sender(stored.store).app(), access_log=None)
        await runner.setup()
        assert runner.server is not None
        server = await loop.create_server(doorkeeper.Doorkeeper(runner.server, 100), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        writer.write(b"GET /healthz HTTP/1.1\r\n")
        trickle = asyncio.create_task(_trickle(writer))
        async with asyncio.timeout(5):
            with suppress(ConnectionError):
                assert await reader.read() == b""
        trickle.cancel()
        writer.close()
        server.close()
        await runner.cleanup()

    asyncio.run(scenario())


async def _trickle(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"X")
        await asyncio.sleep(0.05)


def test_few_descriptors_and_many_connections(stored: Stored, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.symlink_to(stored.store.path)
    with process(store, descriptors=64) as (port, _):
        idle = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(200)]
        time.sleep(0.5)
        assert healthz(port) < 5.0
        for connection in idle:
            connection.close()
        assert healthz(port) < 2.0
    assert (tmp_path / "sender.log").stat().st_size < 20_000


def test_nobody_takes_all_streams(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "MAX_STREAMS", 4)
    monkeypatch.setattr(sender_module, "IDLE_S", 0.2)

    async def scenario() -> None:
        async with TestClient(TestServer(Sender(stored.store).app())) as client:
            path = "/v1/contexts/ctx/stream"
            taken = [await client.ws_connect(path) for _ in range(4)]
            assert (await client.get(path)).status == 503
            await asyncio.sleep(0.3)
            mine = await client.ws_connect(path)
            await mine.send_str('{"req": 1, "get": "manifest"}')
            assert "sha256" in (await mine.receive_str())
            closed = await taken[0].receive(timeout=5)
            assert closed.data is None or taken[0].closed
            monkeypatch.setattr(sender_module, "MAX_STREAMS_OF_ONE", 2)
            assert (await client.get(path)).status == 429

    asyncio.run(scenario())


def test_the_log_does_not_grow_with_an_attack() -> None:
    limit = doorkeeper.LineLimit()
    record = logging.LogRecord("x", logging.INFO, "", 0, "line", (), None)
    passed = sum(limit.filter(record) for _ in range(10_000))
    assert 1 <= passed <= 101


FETCH = """
import asyncio, sys
from kvstream.testbed.net.client import Client

async def fetched() -> bytes:
    async with Client(sys.argv[1]) as client:
        stream = await client.open_stream("ctx")
        await stream.drop()
        return await client.get_kv("ctx/0", 0)

sys.stdout.buffer.write(asyncio.run(fetched()))
"""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_https_by_certificate(stored: Stored, tmp_path: Path) -> None:
    for name in ("ours", "other"):
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x"
        where = f"-addext subjectAltName=IP:127.0.0.1 -keyout {tmp_path}/{name}.key -out {tmp_path}/{name}.pem"
        subprocess.run([*command.split(), *where.split()], check=True, capture_output=True)
    store = tmp_path / "store"
    store.symlink_to(stored.store.path)
    with process(store, "--certificate", f"{tmp_path}/ours.pem", "--key", f"{tmp_path}/ours.key") as (port, _):

        def fetch(trusted: str) -> subprocess.CompletedProcess[bytes]:
            environment = os.environ | {"SSL_CERT_FILE": f"{tmp_path}/{trusted}.pem", "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-c", FETCH, f"https://127.0.0.1:{port}"]
            return subprocess.run(command, capture_output=True, env=environment, check=False)

        assert fetch("ours").stdout == stored.store.get_kv("ctx/0", 0)
        assert b"CERTIFICATE_VERIFY_FAILED" in fetch("other").stderr


def test_certificates_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="both --certificate and --key"):
        sender_module.tls_of(tmp_path / "a", None)
    (tmp_path / "a").write_text("x")
    with pytest.raises(SpecError, match="not a certificate and its key"):
        sender_module.tls_of(tmp_path / "a", tmp_path / "a")


def test_the_api_describes_itself(stored: Stored) -> None:
    async def scenario() -> None:
        async with TestClient(TestServer(Sender(stored.store).app())) as client:
            answer = await client.get("/v1/openapi.json")
            paths = (await answer.json())["paths"]
            routes = {route.resource.canonical for route in client.server.app.router.routes() if route.resource}  # type: ignore[union-attr]
            assert set(paths) == routes - {"/v1/openapi.json"}
            assert "error" in await (await client.get("/nowhere")).json()
            assert (await client.post("/healthz")).status == 405

    asyncio.run(scenario())


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_the_api_keeps_its_description(stored: Stored, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(stored.store.path, store)
    with process(store, "--writable") as (port, _):
        url = f"http://127.0.0.1:{port}/v1/openapi.json"
        # a profile must have the hash that its URL names, which no schema can say
        settings = "--max-examples 20 --exclude-path-regex stream --exclude-checks positive_data_acceptance"
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", url, *settings.split()], capture_output=True, text=True,
            check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]
        healthz(port)
