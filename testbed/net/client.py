"""The HTTP client of a sender: `store_kv` and `get_kv` over the network, and streams."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from contextlib import suppress
from types import TracebackType
from typing import Self

import aiohttp

from kvstream.codec.profile import MAX_PROFILE_BYTES
from kvstream.policies.api import LevelOrText
from kvstream.testbed.errors import SpecError
from kvstream.testbed.net import messages
from kvstream.testbed.net.frames import Frames
from kvstream.testbed.net.pace import LEAST_BYTES_PER_S, Pace
from kvstream.testbed.store.api import ContextStore, chunk_id, split_chunk_id
from kvstream.testbed.store.layout import checked_id, checked_sha256, encodings, level_of
from kvstream.testbed.store.manifest import Manifest
from kvstream.testbed.store.names import find_id
from kvstream.testbed.store.store import token_ids

CONNECT_S = 5.0
READ_S = 60.0
CLOSE_S = 0.2
PACE_S = 20.0
MAX_LIST_BYTES = 16 << 20


class Client:
    """Calls to one sender. Use it as an async context manager.

    `url` is like `http://10.0.0.1:8700`; `token` defaults to the environment variable KVSTREAM_TOKEN. A refusal by
    the sender raises SpecError with its reason; a sender that cannot be reached raises OSError.
    """

    def __init__(self, url: str, *, token: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise SpecError(f"sender {url!r}: give an address like http://10.0.0.1:8700")
        self.url = url.rstrip("/")
        self.token = os.environ.get("KVSTREAM_TOKEN") if token is None else token
        self._headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
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
        data = await self._get("/v1/contexts", MAX_LIST_BYTES)
        try:
            body = json.loads(data)
            return [checked_id(str(context)) for context in body["contexts"]]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise SpecError("the sender's list of contexts cannot be read") from error

    async def manifest(self, context: str) -> Manifest:
        data = await self._get(f"/v1/contexts/{checked_id(context)}", messages.MAX_MANIFEST_BYTES)
        manifest = Manifest.from_bytes(data)
        if manifest.context != context:
            raise SpecError(f"requested context {context!r}, got {manifest.context[:140]!r}")
        return manifest

    async def find(self, name: str) -> Manifest:
        """The manifest of the context with this id, or of the only one that people call so. Raises SpecError."""
        try:
            return await self.manifest(name)
        except SpecError:  # not an id; if it is the sender that refuses, it does so again
            identifier = find_id(name, await self.contexts())
        return await self.manifest(identifier)

    async def token_ids(self, manifest: Manifest) -> list[int]:
        """The token ids of a whole context, in one request. Raises SpecError for ids that do not fit the manifest."""
        sizes = [chunk.text_bytes for chunk in manifest.chunks]
        if sum(sizes) > messages.MAX_TOKENS_BYTES:
            raise SpecError(f"context {manifest.context}: {sum(sizes)} bytes of token ids exceed the limit")
        data, etag = await self._get_tagged(f"/v1/contexts/{manifest.context}/tokens", sum(sizes))
        if len(data) != sum(sizes) or etag != hashlib.sha256(data).hexdigest():
            raise SpecError(f"token ids of context {manifest.context} are damaged or not the manifest's; fetch again")
        ids: list[int] = []
        at = 0
        for chunk in manifest.chunks:
            ids += token_ids(memoryview(data)[at : at + chunk.text_bytes], chunk.tokens)
            at += chunk.text_bytes
        return ids

    async def profile(self, digest: str) -> bytes:
        return await self._get(f"/v1/profiles/{checked_sha256(digest)}", MAX_PROFILE_BYTES)

    async def get_kv(self, identifier: str, level: LevelOrText, size: int | None = None) -> bytes:
        """One chunk's bytes at a level, or its token ids for 'text' (the paper's API). With the manifest's `size`, more
        or fewer bytes raise SpecError."""
        context, chunk = split_chunk_id(identifier)
        limit = messages.MAX_CHUNK_BYTES if size is None else size
        data = await self._get(f"/v1/contexts/{context}/chunks/{chunk}/{level}", limit)
        if size is not None and len(data) != size:
            raise SpecError(f"chunk {identifier} at level {level} has {len(data)} bytes, not {size}; fetch it again")
        return data

    async def store_kv(self, store: ContextStore, context: str) -> dict[int, str]:
        """Upload a context of a store of this process, its profile included: `{chunk: id}` (the paper's API)."""
        manifest = await asyncio.to_thread(store.manifest, context)
        if manifest.profile is not None:
            profile = await asyncio.to_thread(store.profile, manifest.profile)
            await self._put(f"/v1/profiles/{manifest.profile}", profile)
        await self._put(f"/v1/contexts/{context}", json.dumps(manifest.to_json()).encode())
        for key, _ in encodings(manifest):
            chunk, _, level = key.partition("/")
            data = await asyncio.to_thread(store.get_kv, chunk_id(context, int(chunk)), level_of(level))
            await self._put(f"/v1/contexts/{context}/chunks/{key}", data)
        return {index: chunk_id(context, index) for index in range(len(manifest.chunks))}

    async def open_stream(self, context: str) -> StreamConnection:
        """A WebSocket on a new connection of its own."""
        session = self._new_session()
        try:
            socket = await session.ws_connect(
                f"{self.url}/v1/contexts/{checked_id(context)}/stream",
                compress=0,
                max_msg_size=2 * messages.LARGE_FRAME_BYTES,
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_S),
            )
        except aiohttp.WSServerHandshakeError as error:
            await session.close()
            raise SpecError(f"the sender refused the stream of {context!r}: status {error.status}") from error
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

    async def _get(self, path: str, limit: int) -> bytes:
        data, _ = await self._get_tagged(path, limit)
        return data

    async def _get_tagged(self, path: str, limit: int) -> tuple[bytes, str]:
        """The body, and the hash that the sender states for it."""
        assert self._session is not None
        async with self._session.get(self.url + path) as response:
            if response.status != 200:
                raise SpecError(await _reason(response))
            if response.content_length is not None and response.content_length > limit:
                raise SpecError(f"{path}: {response.content_length} bytes exceed the limit of {limit}")
            data = bytearray()
            loop, pace = asyncio.get_running_loop(), Pace(PACE_S)
            pace.restart(loop.time(), 0)
            async for piece in response.content.iter_chunked(messages.FRAME_BYTES):
                data += piece
                if len(data) > limit:
                    raise SpecError(f"{path}: more than {limit} bytes")
                if pace.is_too_slow(loop.time(), len(data)):
                    raise TimeoutError(f"{path}: less than {LEAST_BYTES_PER_S:g} bytes a second")
            tag = response.headers.get("ETag", "").strip('"')
            if tag and tag != hashlib.sha256(data).hexdigest():
                raise SpecError(f"{path}: what arrived is not what the sender announced (hash); fetch it again")
            return bytes(data), tag

    async def _put(self, path: str, data: bytes) -> None:
        assert self._session is not None
        async with self._session.put(self.url + path, data=data) as response:
            if response.status not in (200, 201):
                raise SpecError(await _reason(response))


class StreamConnection:
    """A WebSocket and its connection. What arrives comes through `frames`."""

    def __init__(self, session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._session = session
        self._socket = socket
        self.frames = Frames(socket)

    async def request(self, request: messages.Request) -> None:
        await self._socket.send_str(messages.pack_request(request))

    async def drop(self) -> None:
        """Close, waiting at most CLOSE_S for the sender to answer; in the middle of a frame, abort at once."""
        if self.frames.hand_back():
            with suppress(OSError, aiohttp.ClientError):
                await self._socket.close()
        else:
            self.frames.abort()
        await self._session.close()


async def _reason(response: aiohttp.ClientResponse) -> str:
    """The reason in the sender's own words, if it gave one."""
    try:
        body = json.loads(await response.content.read(4096))
        return f"sender: {str(body['error'])[:500]}"
    except (ValueError, RecursionError, KeyError, TypeError):
        return f"the sender answered {response.status} to {response.method} {response.url.path}"
