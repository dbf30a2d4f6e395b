"""The sender: an HTTP server over a store, and the stream that sessions use.

Start it with `python -m testbed.sender --store DIR --host 127.0.0.1 --port 8700`. When it listens, it prints one JSON
line on stdout: `{"ready": true, "host": "127.0.0.1", "port": 8700, "contexts": 3}`; port 0 takes a free one. SIGTERM
and SIGINT stop it. It needs a bearer token, in the environment variable KVSTREAM_TOKEN, as soon as it binds beyond
loopback; `--sandbox` says that the network is the run's own and lifts this. `--writable` allows PUT.

    GET      /healthz
    GET      /v1/contexts                            {"contexts": [...]}
    GET|PUT  /v1/contexts/{id}                       manifest; PUT begins an upload, see below
    GET|PUT  /v1/contexts/{id}/chunks/{i}/{level}    ETag (SHA-256), If-None-Match, Range, If-Range; level or 'text'
    GET|PUT  /v1/profiles/{sha256}
    GET      /v1/contexts/{id}/stream                WebSocket, see testbed.wire

An upload is the manifest, then every chunk at every level and as text in any order; the context is served once all
are here.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

from codec.profile import MAX_PROFILE_BYTES
from testbed import wire
from testbed.emulator.clock import be_punctual
from testbed.errors import SpecError
from testbed.manifest import Manifest
from testbed.shelf import Content, Shelf, size_of
from testbed.store import Store, checked_sha256, encodings, level_of

log = logging.getLogger("kvstream.sender")

MAX_STREAMS = 256
MAX_UPLOADS = 8
IDLE_S = 600.0
STALL_S = 60.0
"""A client that does not take a frame within so long is let go."""
CLOSE_S = 1.0
_ZEROS = memoryview(bytes(wire.LARGE_FRAME_BYTES))


@dataclass
class Upload:
    """A context that is being written."""

    manifest: Manifest
    missing: set[str]
    hashes: dict[str, str] = field(default_factory=dict)


class Sender:
    """The server's state; `app()` is the aiohttp application."""

    def __init__(self, store: Store, *, token: str | None = None, writable: bool = False) -> None:
        self.shelf = Shelf(store)
        self.store = store
        self._token = token
        self._writable = writable
        self._streams = 0
        self._uploads: dict[str, Upload] = {}

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        context = "/v1/contexts/{context}"
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/v1/contexts", self._contexts)
        app.router.add_get(context, self._manifest)
        app.router.add_put(context, self._begin_upload)
        app.router.add_get(context + "/stream", self._stream)
        app.router.add_get(context + r"/chunks/{chunk:\d{1,6}}/{level:[a-z0-9]{1,4}}", self._chunk)
        app.router.add_put(context + r"/chunks/{chunk:\d{1,6}}/{level:[a-z0-9]{1,4}}", self._upload_chunk)
        app.router.add_get("/v1/profiles/{sha256}", self._profile)
        app.router.add_put("/v1/profiles/{sha256}", self._upload_profile)
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Token, write permission, and errors as one line of JSON."""
        if self._token is not None and request.path != "/healthz":
            given = request.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
                return _refuse(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
        if request.method == "PUT" and not self._writable:
            return _refuse(403, "this sender is read-only; start it with --writable")
        try:
            return await handler(request)
        except SpecError as error:
            return _refuse(404 if request.method == "GET" else 400, str(error))

    # --- HTTP

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"ok": True, "streams": self._streams})

    async def _contexts(self, request: web.Request) -> web.Response:
        return web.json_response({"contexts": self.store.contexts()})

    async def _manifest(self, request: web.Request) -> web.StreamResponse:
        _, content = self.shelf.manifest(request.match_info["context"])
        return await _serve(request, content, "application/json")

    async def _chunk(self, request: web.Request) -> web.StreamResponse:
        key = f"{int(request.match_info['chunk'])}/{level_of(request.match_info['level'])}"
        return await _serve(request, self.shelf.chunk(request.match_info["context"], key))

    async def _profile(self, request: web.Request) -> web.StreamResponse:
        digest = checked_sha256(request.match_info["sha256"])
        return await _serve(request, Content(self.store.profile(digest), digest))

    async def _begin_upload(self, request: web.Request) -> web.Response:
        context = request.match_info["context"]
        data = await _body(request, wire.MAX_MANIFEST_BYTES)
        try:
            manifest = Manifest.from_json(json.loads(data))
        except ValueError as error:
            raise SpecError(f"the manifest cannot be read: {error}") from error
        if manifest.context != context:
            raise SpecError(f"the manifest is of context {manifest.context!r}, the address of {context!r}")
        if context in self.store.contexts():
            return _refuse(409, f"context {context!r} is here already")
        if context not in self._uploads and len(self._uploads) >= MAX_UPLOADS:
            return _refuse(429, f"{MAX_UPLOADS} uploads are under way; finish one")
        self._uploads[context] = Upload(manifest, missing={key for key, _ in encodings(manifest)})
        return web.json_response({"missing": len(self._uploads[context].missing)}, status=201)

    async def _upload_chunk(self, request: web.Request) -> web.Response:
        context, chunk = request.match_info["context"], int(request.match_info["chunk"])
        level = level_of(request.match_info["level"])
        upload = self._uploads.get(context)
        if upload is None:
            return _refuse(409, f"no upload of context {context!r} is under way; PUT its manifest first")
        size = size_of(upload.manifest, chunk, str(level))
        data = await _body(request, size)
        if len(data) != size:
            raise SpecError(f"chunk {chunk} at level {level} has {size} bytes in the manifest, {len(data)} came")
        digest = await asyncio.to_thread(self.store.put_chunk, context, chunk, level, data)
        upload.hashes[f"{chunk}/{level}"] = digest
        upload.missing.discard(f"{chunk}/{level}")
        if not upload.missing and self._uploads.get(context) is upload:
            self.store.announce(upload.manifest, upload.hashes)
            del self._uploads[context]
        return web.json_response({"missing": len(upload.missing)}, status=201, headers={"ETag": f'"{digest}"'})

    async def _upload_profile(self, request: web.Request) -> web.Response:
        digest = checked_sha256(request.match_info["sha256"])
        data = await _body(request, MAX_PROFILE_BYTES)
        if hashlib.sha256(data).hexdigest() != digest:
            raise SpecError(f"the profile's bytes do not have the hash {digest}")
        await asyncio.to_thread(self.store.put_profile, data)
        return web.json_response({}, status=201)

    # --- the stream

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        context = request.match_info["context"]
        self.shelf.manifest(context)
        if self._streams >= MAX_STREAMS:
            return _refuse(503, f"{MAX_STREAMS} streams are open")
        socket_ = web.WebSocketResponse(
            compress=False, max_msg_size=wire.MAX_REQUEST_BYTES, writer_limit=0, timeout=CLOSE_S
        )
        await socket_.prepare(request)
        self._streams += 1
        try:
            await Stream(self.shelf, context, socket_, request).run()
        finally:
            self._streams -= 1
        return socket_


class Stream:
    """One WebSocket: requests come in, answers go out in their order."""

    def __init__(self, shelf: Shelf, context: str, socket_: web.WebSocketResponse, request: web.Request) -> None:
        self._shelf = shelf
        self._context = context
        self._ws = socket_
        assert request.transport is not None
        self._transport = request.transport
        self._socket = request.transport.get_extra_info("socket")
        # Nothing waits in user space: a frame is made when the kernel has taken the one before.
        self._transport.set_write_buffer_limits(high=0)
        self._queue: deque[wire.Get] = deque()
        self._cancelled: set[int] = set()
        self._last_req = -1
        self._wake = asyncio.Event()

    async def run(self) -> None:
        answering = asyncio.create_task(self._answer_all())
        try:
            refusal = await self._read_all()
            if refusal is not None:
                log.info("stream of %s refused: %s", self._context, refusal)
                with suppress(TimeoutError, ConnectionError):
                    async with asyncio.timeout(CLOSE_S):
                        await self._ws.close(code=1008, message=refusal.encode()[:120])
        finally:
            answering.cancel()
            with suppress(asyncio.CancelledError):
                await answering
            self._transport.abort()

    async def _read_all(self) -> str | None:
        """Take requests until the client is gone (None) or does what it must not (the reason)."""
        while True:
            try:
                message = await self._ws.receive(timeout=IDLE_S)
            except TimeoutError:
                return f"no request for {IDLE_S:g} s"
            if message.type is WSMsgType.TEXT:
                try:
                    self._take(wire.parse_request(message.data))
                except SpecError as error:
                    return str(error)
            elif message.type is WSMsgType.BINARY:
                return "requests are text messages"
            else:
                return None

    def _take(self, request: wire.Request) -> None:
        if isinstance(request, wire.CancelRequest):
            if any(waiting.req == request.req for waiting in self._queue):
                self._cancelled.add(request.req)
            return
        if request.req <= self._last_req:
            raise SpecError(f"request {request.req} does not count up from {self._last_req}")
        if len(self._queue) >= wire.MAX_QUEUED:
            raise SpecError(f"more than {wire.MAX_QUEUED} requests wait")
        if isinstance(request, wire.GetChunk):
            manifest, _ = self._shelf.manifest(self._context)
            size = size_of(manifest, request.chunk, str(request.level))
            if request.offset > size:
                raise SpecError(f"offset {request.offset} is beyond the {size} bytes of chunk {request.chunk}")
        self._last_req = request.req
        self._queue.append(request)
        self._wake.set()

    async def _answer_all(self) -> None:
        try:
            while True:
                while not self._queue:
                    self._wake.clear()
                    await self._wake.wait()
                request = self._queue[0]
                await self._answer(request)
                self._queue.popleft()
                self._cancelled.discard(request.req)
        except (ConnectionError, TimeoutError) as error:
            log.info("stream of %s ends: %s", self._context, error or type(error).__name__)
            self._transport.abort()
        except (SpecError, OSError) as error:  # the store changed under the stream
            log.warning("stream of %s ends: %s", self._context, error)
            self._transport.abort()

    async def _answer(self, request: wire.Get) -> None:
        if isinstance(request, wire.GetPadding):
            await self._send_content(request.req, request.bytes, 0, "", None)
            return
        if isinstance(request, wire.GetManifest):
            _, content = self._shelf.manifest(self._context)
            offset = 0
        else:
            content = self._shelf.chunk(self._context, f"{request.chunk}/{request.level}")
            offset = request.offset
        await self._send_content(request.req, len(content.data), offset, content.sha256, memoryview(content.data))

    async def _send_content(self, req: int, total: int, offset: int, sha256: str, data: memoryview | None) -> None:
        """Header and frames; no data means zeros."""
        if req not in self._cancelled:
            await self._send(wire.pack_answer(wire.Answer(req, total, offset, sha256)))
        step = wire.frame_bytes(total)
        # two frames, so that the link has one while the next is made; of a large one half lasts as long
        _commit_little(self._socket, max(step, min(2 * step, 2 * wire.FRAME_BYTES)))
        while offset < total and req not in self._cancelled:
            stop = min(offset + step, total)
            await self._send(_ZEROS[: stop - offset] if data is None else data[offset:stop])
            offset = stop
        if offset < total:
            await self._send(wire.pack_answer(wire.Cancelled(req)))

    async def _send(self, message: str | memoryview) -> None:
        async with asyncio.timeout(STALL_S):
            if isinstance(message, str):
                await self._ws.send_str(message)
            else:
                await self._ws.send_bytes(message)  # type: ignore[arg-type]  # aiohttp takes any buffer
        if self._transport.is_closing():
            raise ConnectionResetError("the client is gone")


def _commit_little(socket_: socket.socket | None, unsent_bytes: int) -> None:
    """Let the kernel hold at most so many bytes that it has not sent.

    What is in the kernel cannot be cancelled, and on a slow link it is time. TCP_NOTSENT_LOWAT bounds exactly that and
    leaves the bytes in flight to congestion control; a bound on SO_SNDBUF would count both and cap the rate at
    SO_SNDBUF / RTT.
    """
    if socket_ is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
        socket_.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, unsent_bytes)


async def _serve(
    request: web.Request, content: Content, content_type: str = "application/octet-stream"
) -> web.StreamResponse:
    """A whole content or one range of it, with its hash as strong ETag."""
    headers = {"ETag": f'"{content.sha256}"', "Accept-Ranges": "bytes", "Cache-Control": "no-cache"}
    if any(tag.value in (content.sha256, "*") for tag in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    total = len(content.data)
    start, stop, status = 0, total, 200
    if_range = request.headers.get("If-Range")
    if "Range" in request.headers and if_range in (None, f'"{content.sha256}"'):
        try:
            start, stop, _ = request.http_range.indices(total)
            if start >= stop:
                raise ValueError("empty")
        except ValueError:
            return _refuse(416, "this range is not in the content", {"Content-Range": f"bytes */{total}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
        status = 206
    response = web.StreamResponse(status=status, headers=headers)
    response.content_type = content_type
    response.content_length = stop - start
    await response.prepare(request)
    view = memoryview(content.data)
    for at in range(start, stop, wire.FRAME_BYTES):
        async with asyncio.timeout(STALL_S):
            await response.write(view[at : min(at + wire.FRAME_BYTES, stop)])
    return response


async def _body(request: web.Request, most: int) -> bytes:
    """The request's body, which must say its length. Raises SpecError if it is larger than `most`."""
    length = request.content_length
    if length is None or length > most:
        raise SpecError(f"a body of at most {most} bytes with Content-Length is needed, this has {length}")
    try:
        async with asyncio.timeout(max(STALL_S, length / 1e5)):
            return await request.content.readexactly(length)
    except (asyncio.IncompleteReadError, TimeoutError) as error:
        raise SpecError(f"the body ended before its {length} bytes") from error


def _refuse(status: int, why: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": why}, status=status, headers=headers)


def needs_token(host: str) -> bool:
    """Whether an address reaches beyond this machine."""
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


async def serve(sender: Sender, host: str, port: int) -> None:
    """Listen until SIGTERM or SIGINT; announces itself on stdout."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(sender.app(), access_log=None, shutdown_timeout=CLOSE_S, keepalive_timeout=75.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=128)
        await site.start()
        bound = runner.addresses[0][1]
        ready: dict[str, Any] = {"ready": True, "host": host, "port": bound, "contexts": len(sender.store.contexts())}
        print(json.dumps(ready), flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m testbed.sender", description="Serve stored contexts.")
    parser.add_argument("--store", type=Path, required=True, help="folder of contexts")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8700, help="0 takes a free one")
    parser.add_argument("--writable", action="store_true", help="allow PUT")
    parser.add_argument("--sandbox", action="store_true", help="the network is the run's own: no token is needed")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="sender: %(message)s")
    token = os.environ.get("KVSTREAM_TOKEN") or None
    try:
        if needs_token(options.host) and token is None and not options.sandbox:
            raise SpecError(f"{options.host} is beyond loopback: set KVSTREAM_TOKEN to a secret, or bind 127.0.0.1")
        sender = Sender(Store(options.store, create=options.writable), token=token, writable=options.writable)
        sender.shelf.preload()
        if options.sandbox:
            be_punctual()
        gc.collect()
        gc.freeze()
        asyncio.run(serve(sender, options.host, options.port))
    except (SpecError, OSError) as error:
        print(f"sender: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
