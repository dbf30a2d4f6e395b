"""What the sender serves, as OpenAPI 3.1 (`GET /v1/openapi.json`). The stream is described in docs/http-api.md."""

from __future__ import annotations

from typing import Any, Final

from kvstream.testbed.store.manifest import MAX_MANIFEST_BYTES

Json = dict[str, Any]

_ID: Final[Json] = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"}
_SHA256: Final[Json] = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_CHUNK: Final[Json] = {"type": "integer", "minimum": 0, "maximum": 999_999}
_LEVEL: Final[Json] = {"type": "string", "pattern": "^([0-9]{1,2}|text)$"}
_BYTES: Final[Json] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


def _in_path(name: str, schema: Json) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _answer(about: str, schema: Json | None = None, **content: Any) -> Json:
    body = {"application/json": {"schema": schema}} if schema else content.get("content", {})
    return {"description": about, "content": body} if body else {"description": about}


_ERROR: Final[Json] = {
    "description": "one line that says what is wrong",
    "content": {
        "application/json": {
            "schema": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
        }
    },
}
_MISSING: Final = _answer(
    "how many encodings are missing still",
    {"type": "object", "required": ["missing"], "properties": {"missing": {"type": "integer", "minimum": 0}}},
)


def _refusals(*statuses: int) -> Json:
    """Those that any request may get, and others."""
    return {str(status): _ERROR for status in sorted({400, 401, 404, 415, *statuses})}


def _get(about: str, ok: Json, *, ranged: bool = False) -> Json:
    answers = {"200": ok} | _refusals()
    if ranged:
        answers |= {"206": ok, "304": {"description": "not modified"}} | _refusals(416)
    return {"summary": about, "responses": answers}


def _put(about: str, answer: Json, body: Json) -> Json:
    return {
        "summary": about,
        "requestBody": {"required": True, "content": body},
        "responses": {"201": answer} | _refusals(403, 409, 413, 429, 507),
    }


def describe(version: str) -> Json:
    """The description, for one version of kvstream."""
    manifest: Json = {"type": "object", "description": f"docs/manifest.schema.json; {MAX_MANIFEST_BYTES} bytes at most"}
    context, json_manifest = [_in_path("context", _ID)], {"application/json": {"schema": manifest}}
    names = {"type": "object", "required": ["contexts"], "properties": {"contexts": {"type": "array", "items": _ID}}}
    health = {"type": "object", "required": ["ok", "streams"], "properties": {"ok": {"const": True}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvstream sender", "version": version, "license": {"name": "Apache-2.0"}},
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{"token": []}, {}],
        "paths": {
            "/healthz": {"get": _get("whether the sender serves", _answer("it does", health)) | {"security": []}},
            "/v1/contexts": {"get": _get("ids of the contexts that are served", _answer("ids", names))},
            "/v1/contexts/{context}": {
                "parameters": context,
                "get": _get("a context's manifest", _answer("the manifest", manifest), ranged=True),
                "put": _put("begin an upload", _MISSING, json_manifest),
            },
            "/v1/contexts/{context}/tokens": {
                "parameters": context,
                "get": _get("the token ids of all chunks", _answer("their bytes", content=_BYTES), ranged=True),
            },
            "/v1/contexts/{context}/chunks/{chunk}/{level}": {
                "parameters": [*context, _in_path("chunk", _CHUNK), _in_path("level", _LEVEL)],
                "get": _get("one encoding of a chunk", _answer("its bytes", content=_BYTES), ranged=True),
                "put": _put("upload one encoding", _MISSING, _BYTES),
            },
            "/v1/profiles/{sha256}": {
                "parameters": [_in_path("sha256", _SHA256)],
                "get": _get("a codec's profile", _answer("its bytes", content=_BYTES), ranged=True),
                "put": _put("upload a profile", _answer("stored", {"type": "object"}), _BYTES),
            },
            "/v1/contexts/{context}/stream": {
                "parameters": context,
                "get": {
                    "summary": "the stream that sessions use, a WebSocket",
                    "responses": {"101": {"description": "upgraded"}} | _refusals(429, 503),
                },
            },
        },
    }
