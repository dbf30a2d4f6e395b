"""Chunks on several senders arrive as from one: real senders over loopback, links of different speed."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest
import torch
from aiohttp.test_utils import TestServer

from kvstream.policies.api import KEEP, TEXT, Choice, Observation, Progress, Replace
from kvstream.testbed.engine.model import Model
from kvstream.testbed.engine.model_engine import ModelEngine
from kvstream.testbed.net.client import Client
from kvstream.testbed.net.sender import Sender
from kvstream.testbed.receiver.driver import Fetched, Limits, fetch_session
from kvstream.testbed.session.record import SessionFailed
from kvstream.testbed.session.settings import SessionSettings
from tests.testbed.conftest import Stored
from tests.testbed.link import Link
from tests.testbed.receiver.test_driver import Plan, cache_of, costs_of, engine, exact_token, network_of

__all__ = ["engine"]

CALM = Limits(stall_s=3.0, reconnects=1, session_s=50.0)


def fetched(
    stored: Stored, engine: ModelEngine, policy: Any, rates_bps: list[float | None]
) -> tuple[Fetched, list[int]]:
    """A session over as many senders as there are rates, and what each one's link carried."""

    async def scenario() -> tuple[Fetched, list[int]]:
        async with asyncio.timeout(60), AsyncExitStack() as stack:
            clients, links = [], []
            for rate_bps in rates_bps:
                server = await stack.enter_async_context(TestServer(Sender(stored.store).app()))
                links.append(await stack.enter_async_context(Link(server.port or 0, rate_bps)))
                clients.append(await stack.enter_async_context(Client(links[-1].url)))
            done = await fetch_session(
                clients[0],
                stored.context,
                policy,
                SessionSettings(10.0),
                engine=engine,
                costs=costs_of(stored),
                prompt_ids=stored.questions[0].prompt_ids,
                limits=CALM,
                others=clients[1:],
                network=network_of(engine),
            )
            return done, [link.carried_bytes for link in links]

    return asyncio.run(scenario())


def test_every_sender_sends_its_chunks_and_the_cache_is_exact(
    stored: Stored, tiny_model: Model, engine: ModelEngine
) -> None:
    done, carried = fetched(stored, engine, Plan(), [None, None])
    assert torch.equal(cache_of(engine, stored), stored.exact)
    assert done.token == exact_token(tiny_model, stored)
    sizes = [chunk.bytes for chunk in done.record.chunks]
    assert carried[1] == pytest.approx(sum(sizes[1::2]), rel=0.05)
    assert done.stream_bytes >= sum(sizes)


@pytest.mark.parametrize("rates_bps", [[4e6, None], [None, 4e6], [6e6, 3e6, None]])
def test_a_session_hears_of_its_chunks_in_order(
    stored: Stored, engine: ModelEngine, rates_bps: list[float | None]
) -> None:
    done, _ = fetched(stored, engine, Plan(), rates_bps)
    ends = [chunk.last_byte_s for chunk in done.record.chunks]
    begins = [chunk.first_byte_s for chunk in done.record.chunks]
    assert None not in ends
    assert ends == sorted(ends)  # type: ignore[type-var]
    assert all(begin >= end for begin, end in zip(begins[1:], ends, strict=False))  # type: ignore[operator]
    assert torch.equal(cache_of(engine, stored), stored.exact)


class Fickle:
    """Gives up on the first chunk that is under way, for text."""

    def __init__(self) -> None:
        self.replaced = False

    def choose(self, obs: Observation) -> Choice:
        return Choice(0)

    def progress(self, obs: Observation) -> Progress:
        if self.replaced or not obs.in_flight[0].received_bytes:
            return KEEP
        self.replaced = True
        return Replace(TEXT)


def test_a_chunk_that_was_given_up_does_not_hold_up_the_others(stored: Stored, engine: ModelEngine) -> None:
    done, _ = fetched(stored, engine, Fickle(), [4e6, 4e6])
    assert done.record.levels.count(TEXT) == 1
    assert done.record.wasted_bytes > 0


def test_a_lost_sender_ends_the_session(stored: Stored, engine: ModelEngine) -> None:
    with pytest.raises(SessionFailed, match=r"lost|connection"):
        fetched(stored, engine, Plan(), [None, 0.0])
