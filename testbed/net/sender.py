"""The sender: an HTTP server for the contexts of a store. Sessions use its stream (`kvstream.testbed.net.stream`).

Start it with `python -m kvstream.testbed.net.sender --store DIR --host 127.0.0.1 --port 8700`. When it listens, it
prints one JSON line on stdout: `{"ready": true, "host": "127.0.0.1", "port": 8700, "contexts": 3}`; port 0 takes a
free one. SIGTERM and SIGINT stop it. It needs a bearer token, in the environment variable KVSTREAM_TOKEN, as soon as
it binds beyond loopback; `--sandbox` (the network is private to the run) lifts this. `--writable` allows PUT.

    GET      /healthz
    GET      /v1/openapi.json                        a description of all this
    GET      /v1/contexts                            {"contexts": [...]}
    GET|PUT  /v1/contexts/{id}                       manifest; PUT starts an upload, see below
    GET      /v1/contexts/{id}/tokens                the token ids of all chunks
    GET|PUT  /v1/contexts/{id}/chunks/{i}/{level}    ETag (SHA-256), If-None-Match, Range, If-Range; level or 'text'
    GET|PUT  /v1/profiles/{sha256}
    GET      /v1/contexts/{id}/stream                WebSocket, protocol in kvstream.testbed.net.messages

An upload is the manifest, then every chunk at every level and as text in any order; the context is served once it is
complete.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import gc
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import signal
import ssl
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
from aiohttp import web

import kvstream
from kvstream.codec.profile import MAX_PROFILE_BYTES
from kvstream.testbed.errors import MachineError, SpecError
from kvstream.testbed.host.clock import Urgency, be_punctual
from kvstream.testbed.net import messages, openapi, stream
from kvstream.testbed.net.doorkeeper import Connection, Doorkeeper, LineLimit, most_connections
from kvstream.testbed.net.pace import LEAST_BYTES_PER_S, Pace
from kvstream.testbed.net.uploads import Refused, Uploads
from kvstream.testbed.store.api import ContextStore
from kvstream.testbed.store.cache import Content, ContentCache
from kvstream.testbed.store.layout import checked_sha256, level_of
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.store.opening import open_store

log = logging.getLogger("kvstream.sender")

MAX_STREAMS = 512
MAX_STREAMS_OF_ONE = 384
"""Streams of one address, so that no client takes all places."""
IDLE_S = 5.0
"""When all places are taken, a stream that has asked nothing for this long gives its place to a new one."""
UNREAD_BYTES = 1 << 20
"""Of a body that nobody asked for, this much is read so that its sender can read the answer."""
UNREAD_S = 1.0
HANDLER: Mapping[str, Any] = {"auto_decompress": False, "lingering_time": 0.0}
"""Of every connection: a request's body is never decompressed, nor drained for as long as it comes."""


class Sender:
    """The server's state; `app()` is the aiohttp application."""

    def __init__(self, store: ContextStore, *, token: str | None = None, writable: bool = False) -> None:
        self.cache = ContentCache(store)
        self.store = store
        self._token = token
        self._writable = writable
        self._streams: set[stream.Stream] = set()
        self._uploads = Uploads(store)
        self._parsing = asyncio.Lock()

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], handler_args=HANDLER)
        app.on_cleanup.append(self._close)
        context = "/v1/contexts/{context}"
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/v1/openapi.json", self._openapi)
        app.router.add_get("/v1/contexts", self._contexts)
        app.router.add_get(context, self._manifest)
        app.router.add_put(context, self._begin_upload)
        app.router.add_get(context + "/stream", self._stream)
        app.router.add_get(context + "/tokens", self._tokens)
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
        connection = request.protocol
        if isinstance(connection, Connection):
            connection.begin()
        try:
            response = self._refusal(request)
            if response is None:
                try:
                    response = await handler(request)
                except web.HTTPException as error:
                    allowed = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
                    response = _refuse(error.status, error.reason.lower(), allowed)
                except Refused as error:
                    response = _refuse(error.status, str(error))
                except SpecError as error:
                    response = _refuse(404 if request.method == "GET" else 400, str(error))
                except MachineError as error:  # an object store that does not answer
                    log.warning("%s %s: %s", request.method, request.path, error)
                    response = _refuse(503, stream.NO_ANSWER)
                except OSError as error:
                    if isinstance(error, ConnectionError):
                        raise
                    log.warning("%s %s: %s", request.method, request.path, error)
                    response = _refuse(507 if error.errno == errno.ENOSPC else 500, os.strerror(error.errno or 0))
            await _discard_body(request, response)
            return response
        finally:
            if isinstance(connection, Connection):
                connection.end()

    def _refusal(self, request: web.Request) -> web.StreamResponse | None:
        """Why a request is refused whatever it asks for; None if it is not."""
        if self._token is not None and request.path != "/healthz":
            given = request.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(errors="surrogateescape"), f"Bearer {self._token}".encode()):
                return _refuse(401, "a bearer token is required", {"WWW-Authenticate": "Bearer"})
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            return _refuse(415, "send the body as it is: this sender takes no Content-Encoding")
        if request.method == "PUT" and not self._writable:
            return _refuse(403, "this sender is read-only; start it with --writable")
        return None

    async def _close(self, app: web.Application) -> None:
        await self._uploads.close()
        await self.cache.close()

    # --- HTTP

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"ok": True, "streams": len(self._streams)})

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.json_response(openapi.describe(kvstream.__version__))

    async def _contexts(self, request: web.Request) -> web.Response:
        return web.json_response({"contexts": await self.cache.contexts()})

    async def _manifest(self, request: web.Request) -> web.StreamResponse:
        cached = await self.cache.context(request.match_info["context"])
        return await _serve(request, cached.content, "application/json")

    async def _chunk(self, request: web.Request) -> web.StreamResponse:
        key = f"{int(request.match_info['chunk'])}/{level_of(request.match_info['level'])}"
        cached = await self.cache.context(request.match_info["context"], look=not self.store.is_remote)
        return await _serve(request, await self.cache.chunk(cached, key))

    async def _tokens(self, request: web.Request) -> web.StreamResponse:
        cached = await self.cache.context(request.match_info["context"])
        return await _serve(request, await self.cache.tokens(cached))

    async def _profile(self, request: web.Request) -> web.StreamResponse:
        digest = checked_sha256(request.match_info["sha256"])
        return await _serve(request, Content(await asyncio.to_thread(self.store.profile, digest), digest))

    async def _begin_upload(self, request: web.Request) -> web.Response:
        context = request.match_info["context"]
        data = await _body(request, messages.MAX_MANIFEST_BYTES)
        async with self._parsing:  # one at a time: a parsed manifest takes far more memory than its text
            manifest = await asyncio.to_thread(Manifest.from_bytes, data)
        if manifest.context != context:
            raise SpecError(f"the manifest is for context {manifest.context!r}, the URL for {context!r}")
        return web.json_response({"missing": await self._uploads.begin(manifest)}, status=201)

    async def _upload_chunk(self, request: web.Request) -> web.Response:
        context, chunk = request.match_info["context"], int(request.match_info["chunk"])
        level = level_of(request.match_info["level"])
        pieces = _pieces(request)
        digest, missing = await self._uploads.put_chunk(context, chunk, level, request.content_length, pieces)
        return web.json_response({"missing": missing}, status=201, headers={"ETag": f'"{digest}"'})

    async def _upload_profile(self, request: web.Request) -> web.Response:
        digest = checked_sha256(request.match_info["sha256"])
        data = await _body(request, MAX_PROFILE_BYTES)
        if hashlib.sha256(data).hexdigest() != digest:
            raise SpecError(f"the profile does not have the hash {digest}")
        await asyncio.to_thread(self.store.put_profile, data)
        return web.json_response({}, status=201)

    # --- the stream

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        context = request.match_info["context"]
        cached = await self.cache.context(context)
        address = request.remote or ""
        await self._make_room(address)
        socket_ = web.WebSocketResponse(
            compress=False, max_msg_size=messages.MAX_REQUEST_BYTES, writer_limit=0, timeout=stream.CLOSE_S
        )
        await socket_.prepare(request)
        one = stream.Stream(self.cache, cached, socket_, request)
        self._streams.add(one)
        try:
            await one.run()
        finally:
            self._streams.discard(one)
        return socket_

    async def _make_room(self, address: str) -> None:
        """Raises Refused if there is no place for one more stream of an address."""
        if sum(one.address == address for one in self._streams) >= MAX_STREAMS_OF_ONE:
            raise Refused(429, f"{address} has {MAX_STREAMS_OF_ONE} open streams; close one")
        if len(self._streams) < MAX_STREAMS:
            return
        idle = [one for one in self._streams if one.idle_s > IDLE_S]
        if not idle:
            raise Refused(503, f"too many open streams ({MAX_STREAMS})")
        held = Counter(one.address for one in self._streams)
        oldest = max(idle, key=lambda one: (held[one.address], one.idle_s))
        self._streams.discard(oldest)
        oldest.abort()


async def _serve(
    request: web.Request, content: Content, content_type: str = "application/octet-stream"
) -> web.StreamResponse:
    """The content or a range of it, with its hash as a strong ETag."""
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
            return _refuse(416, "range not satisfiable", {"Content-Range": f"bytes */{total}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{total}"
        status = 206
    response = web.StreamResponse(status=status, headers=headers)
    response.content_type = content_type
    response.content_length = stop - start
    await response.prepare(request)
    view = memoryview(content.data)
    for at in range(start, stop, messages.FRAME_BYTES):
        async with asyncio.timeout(stream.STALL_S):
            await response.write(view[at : min(at + messages.FRAME_BYTES, stop)])
    return response


async def _body(request: web.Request, limit: int) -> bytes:
    """The request's body, which must have a Content-Length of at most `limit` bytes. Raises SpecError."""
    length = request.content_length
    if length is None or length > limit:
        raise SpecError(f"a body of at most {limit} bytes with Content-Length is required, got {length}")
    data = bytearray()
    async for piece in _pieces(request):
        data += piece
    if len(data) != length:
        raise SpecError(f"the body ended before its {length} bytes")
    return bytes(data)


async def _pieces(request: web.Request) -> AsyncIterator[bytes]:
    """A body as it comes. Raises SpecError if it stops coming, or trickles."""
    pace, loop, received = Pace(stream.STALL_S), asyncio.get_running_loop(), 0
    pace.restart(loop.time(), 0)
    while True:
        try:
            async with asyncio.timeout(stream.STALL_S):
                piece = await request.content.readany()
        except (TimeoutError, web.RequestPayloadError, aiohttp.ClientPayloadError) as error:
            raise SpecError("the body stopped before its end") from error
        if not piece:
            return
        received += len(piece)
        if pace.is_too_slow(loop.time(), received):
            raise SpecError(f"the body comes at less than {LEAST_BYTES_PER_S:g} bytes a second")
        yield piece


async def _discard_body(request: web.Request, response: web.StreamResponse) -> None:
    """Answer before the connection ends because of a body that nobody read, and read a little of it: a client that
    is still sending it would otherwise hear of a reset instead of the answer."""
    if request.content.is_eof() or isinstance(response, web.WebSocketResponse):
        return
    response.force_close()
    await response.prepare(request)
    await response.write_eof()
    with suppress(TimeoutError, web.RequestPayloadError, ConnectionError):
        async with asyncio.timeout(UNREAD_S):
            read = 0
            while read < UNREAD_BYTES and (piece := await request.content.readany()):
                read += len(piece)


def _refuse(status: int, why: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": why}, status=status, headers=headers)


def tls_of(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """Settings of HTTPS; None without a certificate. Raises SpecError for files that do not go together."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise SpecError("HTTPS needs both --certificate and --key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        raise SpecError(f"{certificate} and {key} are not a certificate and its key: {error}") from error
    return context


def needs_token(host: str) -> bool:
    """Whether an address can be reached from other machines."""
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


Announce: TypeAlias = Callable[[Sender, Sequence[str], str, int], None]
"""Called with the contexts, host and port once the sender listens."""


def announce_json(sender: Sender, contexts: Sequence[str], host: str, port: int) -> None:
    """One JSON line on stdout."""
    ready = {"ready": True, "host": host, "port": port, "contexts": len(contexts)}
    print(json.dumps(ready), flush=True)


async def serve(
    sender: Sender, host: str, port: int, announce: Announce = announce_json, tls: ssl.SSLContext | None = None
) -> None:
    """Listen until SIGTERM or SIGINT."""
    if not sender.store.is_remote:
        await sender.cache.preload()
    gc.collect()
    gc.freeze()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.set_exception_handler(lambda loop, context: log.warning("%s", context.get("exception", context["message"])))
    settings: dict[str, Any] = {"access_log": None, "keepalive_timeout": 75.0}
    runner = web.AppRunner(sender.app(), shutdown_timeout=stream.CLOSE_S, **settings)
    await runner.setup()
    assert runner.server is not None
    most, at_once = most_connections()
    try:
        keeper = Doorkeeper(runner.server, most, **settings, **HANDLER)
        server = await loop.create_server(keeper, host, port, backlog=at_once, ssl=tls)
        announce(sender, await sender.cache.contexts(), host, server.sockets[0].getsockname()[1])
        try:
            await stop.wait()
        finally:
            server.close()
    finally:
        await runner.cleanup()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvstream.testbed.net.sender", description="Serve stored contexts.")
    parser.add_argument("--store", required=True, help="folder or URL of contexts")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8700, help="0 picks a free one")
    parser.add_argument("--writable", action="store_true", help="allow PUT")
    parser.add_argument("--certificate", type=Path, help="serve HTTPS with this certificate (PEM, with its chain)")
    parser.add_argument("--key", type=Path, help="the certificate's private key (PEM)")
    parser.add_argument("--sandbox", action="store_true", help="the network is private to the run: no token needed")
    options = parser.parse_args(arguments)
    try:
        tls = tls_of(options.certificate, options.key)
        run(options.store, options.host, options.port, writable=options.writable, sandbox=options.sandbox, tls=tls)
    except MachineError as error:
        print(f"sender: {error}", file=sys.stderr)
        return 4
    except (SpecError, OSError) as error:
        print(f"sender: {error}", file=sys.stderr)
        return 2
    return 0


def run(
    store: Path | str,
    host: str,
    port: int,
    *,
    writable: bool = False,
    quota_bytes: int | None = None,
    sandbox: bool = False,
    announce: Announce = announce_json,
    tls: ssl.SSLContext | None = None,
) -> None:
    """Serve a store, given by its path or URL, until SIGTERM or SIGINT, in a process that does nothing else. Raises
    SpecError, MachineError, OSError."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="sender: %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(LineLimit())
    token = os.environ.get("KVSTREAM_TOKEN") or None
    if needs_token(host) and token is None and not sandbox:
        raise SpecError(f"{host} is beyond loopback: set KVSTREAM_TOKEN to a secret, or bind 127.0.0.1")
    opened = open_store(store, create=writable, quota_bytes=quota_bytes)
    if sandbox:
        be_punctual(Urgency.NETWORK)
    asyncio.run(serve(Sender(opened, token=token, writable=writable), host, port, announce, tls))


if __name__ == "__main__":
    sys.exit(main())
