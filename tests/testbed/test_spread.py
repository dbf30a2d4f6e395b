"""Chunks on several senders arrive as from one: real senders over loopback, links of different speed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import torch
from aiohttp.test_utils import TestServer

from policies.api import KEEP, TEXT, Choice, Observation, Progress, Replace
from testbed.client import Client
from testbed.compute import Compute
from testbed.llm import Model
from testbed.receiver import Fetched, Limits, fetch_session
from testbed.sender import Sender
from testbed.session import SessionFailed
from tests.testbed.conftest import Stored
from tests.testbed.link import Link
from tests.testbed.test_receiver import Plan, cache_of, costs_of, exact_token

QUICK = Limits(stall_s=0.4, reconnects=1, session_s=20.0)


@pytest.fixture(scope="module")
def compute(tiny_model: Model) -> Iterator[Compute]:
    compute = Compute(tiny_model)
    yield compute
    compute.close()


def fetched(stored: Stored, compute: Compute, policy: Any, rates_bps: list[float | None]) -> tuple[Fetched, list[int]]:
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
                10.0,
                compute=compute,
                costs=costs_of(stored),
                prompt_ids=stored.questions[0].prompt_ids,
                limits=QUICK,
                others=clients[1:],
            )
            return done, [link.carried_bytes for link in links]

    return asyncio.run(scenario())


def test_every_sender_sends_its_chunks_and_the_cache_is_exact(
    stored: Stored, tiny_model: Model, compute: Compute
) -> None:
    done, carried = fetched(stored, compute, Plan(), [None, None])
    assert torch.equal(cache_of(compute, stored), stored.exact)
    assert done.token == exact_token(tiny_model, stored)
    sizes = [chunk.bytes for chunk in done.record.chunks]
    assert carried[1] == pytest.approx(sum(sizes[1::2]), rel=0.05)
    assert done.stream_bytes >= sum(sizes)


@pytest.mark.parametrize("rates_bps", [[4e6, None], [None, 4e6], [6e6, 3e6, None]])
def test_a_session_hears_of_its_chunks_in_order(
    stored: Stored, compute: Compute, rates_bps: list[float | None]
) -> None:
    done, _ = fetched(stored, compute, Plan(), rates_bps)
    ends = [chunk.last_byte_s for chunk in done.record.chunks]
    begins = [chunk.first_byte_s for chunk in done.record.chunks]
    assert None not in ends
    assert ends == sorted(ends)  # type: ignore[type-var]
    assert all(begin >= end for begin, end in zip(begins[1:], ends, strict=False))  # type: ignore[operator]
    assert torch.equal(cache_of(compute, stored), stored.exact)


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


def test_a_chunk_that_was_given_up_does_not_hold_up_the_others(stored: Stored, compute: Compute) -> None:
    done, _ = fetched(stored, compute, Fickle(), [4e6, 4e6])
    assert done.record.levels.count(TEXT) == 1
    assert done.record.wasted_bytes > 0


def test_a_lost_sender_ends_the_session(stored: Stored, compute: Compute) -> None:
    with pytest.raises(SessionFailed, match=r"lost|connection"):
        fetched(stored, compute, Plan(), [None, 0.0])
