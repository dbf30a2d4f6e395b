"""One of many requests in time, as the receiver of a synthetic workload serves it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from aiohttp.test_utils import TestServer

from kvstream.testbed.net.sender import Sender
from kvstream.testbed.receiver.timed_worker import TimedWorker
from kvstream.testbed.requests import prefixes
from kvstream.testbed.store.store import Store
from kvstream.testbed.workloads import synthetic

WORKLOAD = "mistral-7b,compute=h200"
MODEL = synthetic.parse(WORKLOAD)


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, Mapping[tuple[str, int], str]]:
    monkeypatch.setattr(prefixes, "cache_dir", lambda: tmp_path)
    return prefixes.prepare(MODEL, ["kvstream"], 1536, 4)


def asked(store: Store, **command: Any) -> tuple[dict[str, Any], float]:
    """The answer, over loopback with a real sender, and when the request began."""

    async def inside() -> tuple[dict[str, Any], float]:
        worker = TimedWorker(WORKLOAD, store)
        try:
            async with TestServer(Sender(Store(store.path, create=False)).app()) as server:
                begun_s = time.monotonic()
                usual = {"cmd": "request", "url": str(server.make_url("/")), "policy": "lowest", "deadline_s": 5.0}
                return await worker.obey(usual | command), begun_s
        finally:
            worker.close()

    return asyncio.run(inside())


def test_what_no_store_holds_is_computed(prepared) -> None:
    store, _ = prepared
    answer, begun_s = asked(store, context=None, tokens=3000)
    cost_s = MODEL.forward_s(0, 3000)
    assert (answer["status"], answer["record"]) == ("ok", None)
    assert answer["busy_s"] >= cost_s
    assert answer["end_s"] - begun_s >= cost_s


def test_what_the_store_holds_is_fetched_and_the_rest_computed(prepared) -> None:
    store, ids = prepared
    answer, begun_s = asked(store, context=ids["kvstream", 4], tokens=1500)
    assert answer["record"]["levels"] == (0, 0)
    assert answer["record"]["bytes"] == sum(c.sizes_bytes[0] for c in store.manifest(ids["kvstream", 4]).chunks)
    assert answer["busy_s"] >= MODEL.forward_s(2048, 3548)
    assert answer["end_s"] - begun_s >= MODEL.forward_s(2048, 3548)


def test_a_request_that_fails_says_why(prepared) -> None:
    store, ids = prepared
    asked_for = ids["kvstream", 4]
    for chunk in (store.path / "contexts" / asked_for / "chunks").rglob("0.bin"):
        chunk.unlink()
    answer, _ = asked(store, context=asked_for, tokens=10)
    assert answer["status"] == "failed"
    assert answer["error"]
