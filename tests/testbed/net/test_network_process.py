"""The process that receives for another, when it ends and when it is misused; what it does otherwise is tested wherever
sessions are (tests/testbed/receiver/test_driver.py)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvstream.testbed.engine.model import Model
from kvstream.testbed.engine.model_engine import ModelEngine
from kvstream.testbed.errors import MachineError
from kvstream.testbed.net import network_process
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.inbound import Limits
from kvstream.testbed.net.network_process import NetworkProcess
from kvstream.testbed.receiver.driver import Fetched
from kvstream.testbed.session.record import SessionFailed
from tests.testbed.conftest import Stored
from tests.testbed.receiver.test_driver import Plan, Receiver, cache_of, linked, run, sender_process, session

PARENT = """
from kvstream.testbed.net.network_process import NetworkProcess
network = NetworkProcess()
print(network.pid, flush=True)
input()
"""


@pytest.fixture
def engine(tiny_model: Model) -> Iterator[Receiver]:
    with closing(NetworkProcess()) as network, closing(Receiver(tiny_model, shared=network.memory)) as engine:
        engine.network = network
        yield engine


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@asynccontextmanager
async def fetching(stored: Stored, engine: Receiver) -> AsyncIterator[asyncio.Future[Any]]:
    """A session over a slow link, in its middle."""
    async with linked(stored, 4e5) as (client, link):
        task = asyncio.ensure_future(session(client, stored, engine, Plan()))
        await link.carried(3000, task)
        yield task


def test_a_session_whose_process_is_killed_fails_and_the_next_has_a_new_one(stored: Stored, engine: Receiver) -> None:
    assert engine.network is not None
    first = engine.network.pid

    async def scenario() -> None:
        async with fetching(stored, engine) as task:
            os.kill(first, signal.SIGKILL)
            with pytest.raises(SessionFailed, match="the process that receives from the network has ended"):
                await task

    asyncio.run(scenario())
    run(stored, engine, Plan())
    assert torch.equal(cache_of(engine, stored), stored.exact)
    assert engine.network.pid != first


def test_a_session_that_is_given_up_leaves_the_process_to_the_next(stored: Stored, engine: Receiver) -> None:
    assert engine.network is not None
    pid = engine.network.pid

    async def scenario() -> None:
        async with fetching(stored, engine) as task:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(scenario())
    run(stored, engine, Plan())
    assert torch.equal(cache_of(engine, stored), stored.exact)
    assert engine.network.pid == pid


def test_a_message_that_cannot_be_obeyed_ends_the_process_and_nobody_waits(stored: Stored, engine: Receiver) -> None:
    network = engine.network
    assert network is not None
    first = network.pid

    async def scenario() -> None:
        async with linked(stored) as (client, _):
            inbound = network.inbound([client], stored.context, SimpleNamespace(), Limits())  # type: ignore[arg-type]
            inbound._send("no such message")
            with pytest.raises((RuntimeError, ConnectionError)):
                await inbound.warm_up(0, None)
            await inbound.close()

    asyncio.run(asyncio.wait_for(scenario(), 20))
    run(stored, engine, Plan())
    assert torch.equal(cache_of(engine, stored), stored.exact)
    assert network.pid != first


def test_news_say_when_bytes_came_however_late_they_are_heard(stored: Stored, engine: Receiver) -> None:
    held_up_s = 1.0

    def on_first_byte(chunk: int) -> None:
        if chunk == 0:
            time.sleep(held_up_s)  # the event loop hears nothing

    async def scenario(port: int) -> Fetched:
        async with Client(f"http://127.0.0.1:{port}") as client:
            return await session(client, stored, engine, Plan(), on_first_byte=on_first_byte)

    with sender_process(stored) as (_, port):
        first, second, *_ = asyncio.run(scenario(port)).record.chunks
    assert first.last_byte_s is not None
    assert first.last_byte_s < held_up_s
    assert second.request_s is not None
    assert second.request_s > held_up_s


def test_encodings_must_arrive_in_the_shared_memory(stored: Stored, tiny_model: Model) -> None:
    with closing(NetworkProcess()) as network, closing(ModelEngine(tiny_model)) as engine:

        async def scenario() -> None:
            async with linked(stored) as (client, _):
                with pytest.raises(ValueError, match="not in the shared memory"):
                    await session(client, stored, engine, Plan(), network=network)

        asyncio.run(scenario())


def test_the_process_ends_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.communicate()
    deadline_s = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not is_alive(pid)


def test_a_process_that_cannot_start_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_process, "CHILD", "kvstream.testbed.net.no_such_module")
    with pytest.raises(MachineError, match="has ended"):
        NetworkProcess()
