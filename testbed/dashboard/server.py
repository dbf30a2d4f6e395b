"""The dashboard's server: read-only, on loopback, behind a token in the URL.

It shares the processors with an emulation, so it runs at the lowest priority, leaves all counting to the browser, and
reads a file that the run writes anyway.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from aiohttp import web

from kvstream.testbed.dashboard.feed import Feed, cell_of
from kvstream.testbed.report.page import ASSETS as REPORT_ASSETS
from kvstream.testbed.report.sessions import n_levels, session, trace_specs
from kvstream.testbed.report.style import TEXT_COLOUR, level_colours
from kvstream.testbed.results.folder import Run

ASSETS: Final = Path(__file__).with_name("assets")
LOOPBACK: Final = "127.0.0.1"
MAX_LADDER: Final = 16
HEADERS: Final = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; script-src 'self'; img-src data:; "
    "style-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
STATIC: Final = {
    "uPlot.js": (REPORT_ASSETS / "uPlot.iife.min.js", "text/javascript"),
    "uPlot.css": (REPORT_ASSETS / "uPlot.min.css", "text/css"),
    "viewer.js": (REPORT_ASSETS / "viewer.js", "text/javascript"),
    "viewer.css": (REPORT_ASSETS / "viewer.css", "text/css"),
    "page.css": (REPORT_ASSETS / "page.css", "text/css"),
    "dashboard.js": (ASSETS / "dashboard.js", "text/javascript"),
    "dashboard.css": (ASSETS / "dashboard.css", "text/css"),
}
RUN: Final = web.AppKey("run", Run)
TOKEN: Final = web.AppKey("token", str)
CLOSING: Final = web.AppKey("closing", asyncio.Event)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(run: Run, token: str) -> web.Application:
    """The application; every path begins with the token."""
    app = web.Application(middlewares=[_guard])
    app[RUN], app[TOKEN], app[CLOSING] = run, token, asyncio.Event()
    app.on_shutdown.append(_close)
    app.router.add_get("/{token}/", _page)
    app.router.add_get("/{token}/events", _events)
    app.router.add_get("/{token}/session", _session)
    app.router.add_get("/{token}/static/{name}", _static)
    return app


@web.middleware
async def _guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Without the token every path is 404, so guessing reveals nothing."""
    given = request.match_info.get("token", "")
    if not hmac.compare_digest(given.encode(), request.app[TOKEN].encode()):
        return web.Response(status=404, text="not found\n", headers=HEADERS)
    return await handler(request)


async def _page(request: web.Request) -> web.Response:
    look = {"ladders": {n: level_colours(n) for n in range(1, MAX_LADDER + 1)}, "text": TEXT_COLOUR}
    html = (ASSETS / "dashboard.html").read_text(encoding="utf-8")
    html = html.replace("LOOK_JSON", json.dumps(look).replace("</", "<\\/"))
    return web.Response(text=html, content_type="text/html", headers=HEADERS)


async def _static(request: web.Request) -> web.Response:
    if request.match_info["name"] not in STATIC:
        return web.Response(status=404, text="not found\n", headers=HEADERS)
    file, kind = STATIC[request.match_info["name"]]
    return web.Response(text=file.read_text(encoding="utf-8"), content_type=kind, headers=HEADERS)


async def _session(request: web.Request) -> web.Response:
    """One finished session in the viewer's format."""
    run = request.app[RUN]
    cell = cell_of(run, request.query.get("unit", ""), request.query.get("scheme", ""))
    if cell is None:
        return web.Response(status=404, text="no such session\n", headers=HEADERS)
    manifest = run.manifest
    found = session(cell, n_levels(cell["row"], manifest.get("levels", {})), trace_specs(manifest))
    return web.json_response(found, headers=HEADERS)


async def _events(request: web.Request) -> web.StreamResponse:
    """Server-sent events: the state, then every new event, until the server closes: the response then ends properly,
    which a browser does not report as an error."""
    response = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream"})
    await response.prepare(request)
    telling = asyncio.create_task(_tell(response, Feed(request.app[RUN])))
    closing = asyncio.create_task(request.app[CLOSING].wait())
    try:
        await asyncio.wait((telling, closing), return_when=asyncio.FIRST_COMPLETED)
    finally:
        closing.cancel()
        telling.cancel()
        with suppress(asyncio.CancelledError, ConnectionResetError):  # the browser has gone
            await telling
    return response


async def _tell(response: web.StreamResponse, feed: Feed) -> None:
    state, offset = feed.state()
    await response.write(_sse(state))
    async for event in feed.follow(offset):
        await response.write(_sse(event))


async def _close(app: web.Application) -> None:
    app[CLOSING].set()


def _sse(event: object) -> bytes:
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


async def serve(run: Run, port: int = 0, say: Callable[[str], None] = print) -> None:
    """Serve until cancelled; `say` gets the URL, token included, once the port is open."""
    os.nice(19)
    token = secrets.token_urlsafe(16)
    runner = web.AppRunner(make_app(run, token), access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        site = web.TCPSite(runner, LOOPBACK, port)
        await site.start()
        say(f"http://{LOOPBACK}:{runner.addresses[0][1]}/{token}/")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
