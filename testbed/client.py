"""The HTTP client of a sender: `store_kv` and `get_kv` over the network, and the door to its streams."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import aiohttp

from codec.profile import MAX_PROFILE_BYTES
from policies.api import LevelOrText
from testbed import wire
from testbed.errors import SpecError
from testbed.frames import Frames
from testbed.manifest import Manifest
from testbed.store import Store, checked_id, checked_sha256, chunk_id, encodings, level_of, split_chunk_id

CONNECT_S = 5.0
READ_S = 60.0
CLOSE_S = 0.2


class Client:
    """Calls to one sender. Use it as an async context manager.

    `url` is like `http://10.0.0.1:8700`; `token` defaults to the environment variable KVSTREAM_TOKEN. Everything that
    the sender refuses raises SpecError with its reason; a sender that cannot be reached raises OSError.
    """

    def __init__(self, url: str, *, token: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise SpecError(f"sender {url!r}: give an address like http://10.0.0.1:8700")
        self.url = url.rstrip("/")
        token = os.environ.get("KVSTREAM_TOKEN") if token is None else token
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = self._new_session()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def contexts(self) -> list[str]:
        body = json.loads(await self._get("/v1/contexts", wire.MAX_MANIFEST_BYTES))
        return [checked_id(str(context)) for context in body["contexts"]]

    async def manifest(self, context: str) -> Manifest:
        data = await self._get(f"/v1/contexts/{checked_id(context)}", wire.MAX_MANIFEST_BYTES)
        return parse_manifest(data)

    async def profile(self, digest: str) -> bytes:
        return await self._get(f"/v1/profiles/{checked_sha256(digest)}", MAX_PROFILE_BYTES)

    async def get_kv(self, identifier: str, level: LevelOrText) -> bytes:
        """One chunk's bytes at a level, or its token ids for 'text' (the paper's API)."""
        context, chunk = split_chunk_id(identifier)
        return await self._get(f"/v1/contexts/{context}/chunks/{chunk}/{level}", wire.MAX_CHUNK_BYTES)

    async def store_kv(self, store: Store, context: str) -> dict[int, str]:
        """Upload a context of a local store, its profile included: `{chunk: id}` (the paper's API)."""
        manifest = store.manifest(context)
        if manifest.profile is not None:
            await self._put(f"/v1/profiles/{manifest.profile}", store.profile(manifest.profile))
        await self._put(f"/v1/contexts/{context}", json.dumps(manifest.to_json()).encode())
        for key, _ in encodings(manifest):
            chunk, _, level = key.partition("/")
            data = store.get_kv(chunk_id(context, int(chunk)), level_of(level))
            await self._put(f"/v1/contexts/{context}/chunks/{key}", data)
        return {index: chunk_id(context, index) for index in range(len(manifest.chunks))}

    async def open_stream(self, context: str) -> StreamConnection:
        """A new connection with its WebSocket; nothing of it is shared with other calls."""
        session = self._new_session()
        try:
            socket = await session.ws_connect(
                f"{self.url}/v1/contexts/{checked_id(context)}/stream",
                compress=0,
                max_msg_size=2 * wire.LARGE_FRAME_BYTES,
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_S),
            )
        except aiohttp.WSServerHandshakeError as error:
            await session.close()
            raise SpecError(f"sender refuses the stream of {context!r}: status {error.status}") from error
        except BaseException:
            await session.close()
            raise
        return StreamConnection(session, socket)

    def _new_session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=4, ttl_dns_cache=None),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=READ_S),
            trust_env=False,
        )

    async def _get(self, path: str, most: int) -> bytes:
        assert self._session is not None
        async with self._session.get(self.url + path) as response:
            if response.status != 200:
                raise SpecError(await _reason(response))
            if response.content_length is not None and response.content_length > most:
                raise SpecError(f"{path}: {response.content_length} bytes are more than {most}")
            data = bytearray()
            async for piece in response.content.iter_chunked(wire.FRAME_BYTES):
                data += piece
                if len(data) > most:
                    raise SpecError(f"{path}: more than {most} bytes")
            return bytes(data)

    async def _put(self, path: str, data: bytes) -> None:
        assert self._session is not None
        async with self._session.put(self.url + path, data=data) as response:
            if response.status not in (200, 201):
                raise SpecError(await _reason(response))


class StreamConnection:
    """A WebSocket and the connection that it alone uses. What arrives comes through `frames`."""

    def __init__(self, session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._session = session
        self._socket = socket
        self.frames = Frames(socket)

    async def request(self, request: wire.Request) -> None:
        await self._socket.send_str(wire.pack_request(request))

    async def drop(self) -> None:
        """Close; a sender that does not answer is waited for at most CLOSE_S, one in the middle of a frame is not."""
        if self.frames.hand_back():
            with suppress(OSError, aiohttp.ClientError):
                await self._socket.close()
        else:
            self.frames.abort()
        await self._session.close()


def parse_manifest(data: bytes | bytearray | memoryview) -> Manifest:
    """A manifest as it travels. Raises SpecError."""
    try:
        body: Any = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise SpecError(f"the manifest is not JSON: {error}") from error
    return Manifest.from_json(body)


async def _reason(response: aiohttp.ClientResponse) -> str:
    """The sender's own words, if it has some."""
    try:
        body = json.loads(await response.content.read(4096))
        return f"sender: {str(body['error'])[:500]}"
    except (ValueError, KeyError, TypeError):
        return f"sender answers {response.status} to {response.method} {response.url.path}"
