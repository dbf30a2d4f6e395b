"""The messages of the stream that sessions use: `GET /v1/contexts/{id}/stream`, a WebSocket.

The receiver sends JSON texts, the sender answers strictly in their order:

    {"req": 1, "get": "manifest"}                                   manifest as JSON
    {"req": 2, "get": "chunk", "chunk": 3, "level": 1, "offset": 0} bytes from `offset` on; level may be "text"
    {"req": 3, "get": "padding", "bytes": 65536}                    that many zeros, to open the congestion window
    {"cancel": 2}                                                   stop answering request 2, or do not begin

`req` increases on a connection. An answer is a JSON header and then binary frames with `bytes - offset` bytes in all:

    {"req": 2, "bytes": 48211, "offset": 0, "sha256": "..."}
    {"req": 2, "cancelled": true}           where the answer stops

A request that was answered in full before its cancellation arrived gets no second answer. An invalid request closes
the connection with status 1008 and a reason, a context that turns out to be damaged with 1011. Both sides validate
everything they read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeAlias

from kvstream.policies.api import TEXT, LevelOrText
from kvstream.testbed.errors import SpecError
from kvstream.testbed.store.manifest import MAX_CHUNK_BYTES, MAX_CHUNKS, MAX_LEVELS
from kvstream.testbed.store.manifest import MAX_MANIFEST_BYTES as MAX_MANIFEST_BYTES
from kvstream.traces.fluid import FRAME_BYTES as FRAME_BYTES  # re-exported: frames are part of the protocol
from kvstream.traces.fluid import LARGE_FRAME_BYTES as LARGE_FRAME_BYTES
from kvstream.traces.fluid import MIN_FRAME_BYTES as MIN_FRAME_BYTES
from kvstream.traces.fluid import frame_bytes as frame_bytes

MAX_REQUEST_BYTES = 4096
MAX_QUEUED = 16
"""Requests that may wait on one connection."""
MAX_TOKENS_BYTES = 1 << 28
"""The token ids of a context."""
MAX_PADDING_BYTES = 64 << 20
MAX_REQ = 1 << 40
REFUSED = 1008
"""WebSocket close code for a request that is not one (RFC 6455, section 7.4.1: a violation of policy)."""
FAILED = 1011
"""For a context that the sender cannot serve any more (an unexpected condition)."""


@dataclass(frozen=True, slots=True)
class GetManifest:
    req: int


@dataclass(frozen=True, slots=True)
class GetChunk:
    req: int
    chunk: int
    level: LevelOrText
    offset: int


@dataclass(frozen=True, slots=True)
class GetPadding:
    req: int
    bytes: int


@dataclass(frozen=True, slots=True)
class CancelRequest:
    req: int


Get: TypeAlias = GetManifest | GetChunk | GetPadding
Request: TypeAlias = Get | CancelRequest


@dataclass(frozen=True, slots=True)
class Answer:
    """Header of an answer: `bytes - offset` bytes follow."""

    req: int
    bytes: int
    offset: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The answer to `req` ends here."""

    req: int


def pack_request(request: Request) -> str:
    match request:
        case GetManifest(req):
            body: dict[str, Any] = {"req": req, "get": "manifest"}
        case GetChunk(req, chunk, level, offset):
            body = {"req": req, "get": "chunk", "chunk": chunk, "level": level, "offset": offset}
        case GetPadding(req, size):
            body = {"req": req, "get": "padding", "bytes": size}
        case CancelRequest(req):
            body = {"cancel": req}
    return json.dumps(body)


def parse_request(text: str) -> Request:
    """Raises SpecError for anything that is not a request."""
    body = _object(text, "a request")
    if "cancel" in body:
        return CancelRequest(_integer(body, "cancel", MAX_REQ))
    req = _integer(body, "req", MAX_REQ)
    match body.get("get"):
        case "manifest":
            return GetManifest(req)
        case "chunk":
            level = body.get("level")
            return GetChunk(
                req,
                chunk=_integer(body, "chunk", MAX_CHUNKS),
                level=TEXT if level == TEXT else _integer(body, "level", MAX_LEVELS),
                offset=_integer(body, "offset", MAX_CHUNK_BYTES),
            )
        case "padding":
            return GetPadding(req, _integer(body, "bytes", MAX_PADDING_BYTES))
    raise SpecError("a request must have 'get' (manifest, chunk or padding) or 'cancel'")


def pack_answer(answer: Answer | Cancelled) -> str:
    if isinstance(answer, Cancelled):
        return json.dumps({"req": answer.req, "cancelled": True})
    return json.dumps({"req": answer.req, "bytes": answer.bytes, "offset": answer.offset, "sha256": answer.sha256})


def parse_answer(text: str) -> Answer | Cancelled:
    """Raises SpecError for anything that is not the header of an answer."""
    body = _object(text, "an answer")
    req = _integer(body, "req", MAX_REQ)
    if body.get("cancelled") is True:
        return Cancelled(req)
    sha256 = body.get("sha256")
    if not isinstance(sha256, str) or len(sha256) > 64:
        raise SpecError("an answer must have 'sha256': a hash in hexadecimal, or empty")
    size = _integer(body, "bytes", MAX_CHUNK_BYTES)
    return Answer(req, bytes=size, offset=_integer(body, "offset", size), sha256=sha256)


def _object(text: str, what: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise SpecError(f"{what} is not JSON") from None
    if not isinstance(body, dict):
        raise SpecError(f"{what} is not a JSON object")
    return body


def _integer(body: dict[str, Any], key: str, limit: int) -> int:
    value = body.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise SpecError(f"'{key}' must be a whole number from 0 to {limit}")
    return value
