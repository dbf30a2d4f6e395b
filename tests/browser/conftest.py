"""The distribution's Chromium, headless, driven by Playwright. Nothing may leave the machine, no error be logged."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SHOTS = os.environ.get("KVSTREAM_SCREENSHOTS")
"""A folder for pictures of what the tests see."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser a module: while it is there, Playwright's event loop stands in the way of `asyncio.run`."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here; install it with: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=list(FLAGS))
        yield browser
        browser.close()


class Watched:
    """A page, and everything it asked for or complained about."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)

    def shoot(self, name: str) -> None:
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


Open = Callable[..., Watched]


@pytest.fixture
def serve() -> Iterator[Callable[[Any], str]]:
    """Serve what makes an aiohttp application until the pages are closed; gives the URL."""
    with ExitStack() as stack:
        yield lambda make: f"http://127.0.0.1:{stack.enter_context(Served(make)).port}"


@pytest.fixture
def open_page(chromium: Any, serve: object) -> Iterator[Open]:
    """Open a URL in a fresh context; at the end, no request may have left the machine and nothing been logged."""
    opened: list[tuple[Any, Watched]] = []

    def open_it(url: str, width: int = 1280, scheme: str = "light") -> Watched:
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        watched = Watched(context.new_page())
        opened.append((context, watched))
        watched.page.goto(url, timeout=120_000)
        return watched

    yield open_it
    for context, watched in opened:
        context.close()
        assert watched.complaints == []
        away = [url for url in watched.requests if not url.startswith(("file:", "data:", "http://127.0.0.1:"))]
        assert away == []


class Served:
    """An aiohttp application on loopback in a thread of its own."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._ready = threading.Event()
        self._make = make
        self.port = 0

    def __enter__(self) -> Served:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        from aiohttp import web

        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        runner = web.AppRunner(self._make(), access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._over.wait()
        await runner.cleanup()
